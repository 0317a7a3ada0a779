"""Steps recorded on a CPU: a replay computes what the calls would, on any inputs, or is refused."""

import pytest
import torch

from atom.kernels.cpu.ops import fast
from atom.kernels.cpu.recording import Recorded, Recorder, StepTensors

T, HEADS, DIM, BLOCK, BLOCKS, VOCAB = 9, 2, 32, 16, 12, 50
HIDDEN = HEADS * DIM


@pytest.fixture(autouse=True)
def as_in_a_runner():
    with torch.inference_mode():
        yield


class Model:
    """A layer of a model, called as a model's layers call the kernels."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.table = random(VOCAB, HIDDEN)
        self.qkv = fast.pack_weight(random(3 * HIDDEN, HIDDEN) / 8, False)
        self.head_weight = random(DIM).abs()
        self.weight = random(HIDDEN).abs()
        self.up = fast.pack_weight(random(4 * HIDDEN, HIDDEN) / 8, True)
        self.gate_up = fast.pack_weight(random(2 * HIDDEN, 2 * HIDDEN) / 8, False)
        self.cos_sin = random(BLOCKS * BLOCK, DIM).float()
        self.k_cache, self.v_cache = (random(BLOCKS * T, BLOCK, HEADS, DIM) for _ in range(2))

    def __call__(self, s: StepTensors) -> torch.Tensor:
        residual = fast.embedding(s.input_ids, self.table)
        qkv = fast.norm_linear(residual, None, self.weight, 1e-5, self.qkv, None, 3 * HIDDEN, False)
        qkv = qkv.view(-1, 3 * HEADS, DIM)
        q, k, v = qkv.split_with_sizes([HEADS] * 3, 1)
        q = fast.rms_norm(q, self.head_weight, 1e-5)
        fast.rotary(s.positions, q, k, self.cos_sin, False)
        out = q.new_empty(q.shape)
        fast.store_kv(k, v, self.k_cache, self.v_cache, s.slots, None, None)
        caches = (self.k_cache, self.v_cache)
        fast.paged_attention(q, *caches, s.query_start, s.seq_lens, s.block_table, out, 0.2, 0, None, None)
        x = out.view(-1, HIDDEN)
        x = fast.norm_linear(x, residual, self.weight, 1e-5, self.up, None, 2 * HIDDEN, True)
        x = fast.silu_and_mul(fast.linear(x, self.gate_up, None, 2 * HIDDEN, False))
        return fast.add_rms_norm(x, residual, self.weight, 1e-5)[0]


def step(seed: int, count: int = T) -> StepTensors:
    """A decode of requests with 1 to BLOCKS * BLOCK tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, BLOCKS * BLOCK + 1, (count,), generator=generator, dtype=torch.int32)
    blocks = torch.arange(BLOCKS * count, dtype=torch.int32).view(count, BLOCKS)
    slots = blocks[:, 0].long() * BLOCK + lengths.long() - 1  # a request's blocks follow each other
    return StepTensors(
        torch.randint(0, VOCAB, (count,), generator=generator),
        (lengths - 1).long(),
        slots,
        torch.arange(count + 1, dtype=torch.int32),
        lengths,
        blocks,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_is_the_calls_on_other_inputs(dtype):
    recorder, recorded, plain = Recorder(), Model(dtype), Model(dtype)
    replays = {}
    for count in (T, 2, 3):  # they share memory
        first = step(count, count)
        hidden, replays[count] = recorder.record(lambda s=first: recorded(s), first)
        assert torch.equal(hidden, plain(first))
    for seed in range(12):
        inputs = step(seed, (2, T, 3)[seed % 3])
        assert torch.equal(replays[len(inputs.input_ids)].replay(inputs), plain(inputs))
    assert torch.equal(recorded.k_cache, plain.k_cache)
    assert torch.equal(recorded.v_cache, plain.v_cache)


def test_a_replayed_decode_reads_only_what_its_request_has():
    """Whoever attends to a request fills its cache as well: what other slots of a group hold stays out of it."""
    dtype = torch.bfloat16
    recorded, plain = Model(dtype), Model(dtype)
    first = step(0)
    _, replay = Recorder().record(lambda: recorded(first), first)
    for seed in range(1, 20):
        inputs = step(seed)
        for model in (recorded, plain):
            model.k_cache.fill_(float("nan"))
            model.v_cache.fill_(float("nan"))
            for slot, length in zip(inputs.slots.tolist(), inputs.seq_lens.tolist(), strict=True):
                context = torch.arange(slot - length + 1, slot)
                kv = torch.randn(2, len(context), HEADS, DIM, generator=torch.Generator().manual_seed(slot)).to(dtype)
                fast.store_kv(*kv, model.k_cache, model.v_cache, context, None, None)
        out = replay.replay(inputs)
        assert out.isfinite().all()
        assert torch.equal(out, plain(inputs))


def test_a_token_may_be_stored_elsewhere():
    recorded, plain = Model(torch.bfloat16), Model(torch.bfloat16)
    first = step(0)
    _, replay = Recorder().record(lambda: recorded(first), first)
    plain(first)
    inputs = step(1)
    inputs.slots[3] = -1
    inputs.slots[5] = inputs.slots[5] // BLOCK * BLOCK + 5
    assert torch.equal(replay.replay(inputs), plain(inputs))
    assert torch.equal(recorded.k_cache, plain.k_cache)


def test_a_block_table_may_have_become_wider():
    recorded, plain = Model(), Model()
    first = step(1)
    table, lengths = first.block_table[:, :1].contiguous(), first.seq_lens.clamp(max=BLOCK)
    narrow = first._replace(block_table=table, seq_lens=lengths, slots=first.block_table[:, 0].long() * BLOCK)
    _, replay = Recorder().record(lambda: recorded(narrow), narrow)
    plain(narrow)
    assert torch.equal(replay.replay(first), plain(first))


@pytest.mark.parametrize(
    ("spoil", "name"),
    [(lambda x: x + 1, "aten.add"), (lambda x: x.t().contiguous().t(), "contiguous"), (lambda x: x.mul_(2), "mul_")],
)
def test_what_the_kernels_did_not_compute_is_named(spoil, name):
    model, inputs = Model(), step(0)
    hidden, reason = Recorder().record(lambda: spoil(model(inputs)), inputs)
    assert torch.equal(hidden, spoil(Model()(inputs)))
    assert isinstance(reason, str)
    assert name in reason


def test_inputs_read_elsewhere_are_noticed():
    model, inputs = Model(), step(0)
    others = inputs._replace(slots=inputs.slots.clone())
    _, reason = Recorder().record(lambda: model(others), inputs)
    assert reason == "it reads a step's inputs elsewhere"


def test_a_wrong_id_runs_nothing():
    model, inputs = Model(), step(0)
    _, replay = Recorder().record(lambda: model(inputs), inputs)
    assert isinstance(replay, Recorded)
    before = model.k_cache.clone()
    wrong = step(3)
    wrong.input_ids[2] = VOCAB
    with pytest.raises(RuntimeError, match="id 50 is not within the table"):
        replay.replay(wrong)
    assert torch.equal(model.k_cache, before)


def test_an_error_ends_the_recording():
    def fail() -> torch.Tensor:
        raise ValueError("in the model")

    recorder, model, inputs = Recorder(), Model(), step(0)
    with pytest.raises(ValueError, match="in the model"):
        recorder.record(fail, inputs)
    assert isinstance(recorder.record(lambda: model(inputs), inputs)[1], Recorded)
