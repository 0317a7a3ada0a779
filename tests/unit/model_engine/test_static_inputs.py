"""Steps that graphs replay equal those that run plainly, whatever came before them on the device."""

import random

import numpy as np
import pytest
import torch

from atom.compilation.cuda_graph import GraphDispatcher
from atom.config import CUDAGraphMode
from atom.model_engine.input_batch import InputBatch
from atom.model_engine.protocol import NewRequest, ScheduledBatch
from atom.model_engine.static_inputs import StaticInputs
from atom.platforms.base import Fence
from atom.platforms.cpu import CpuPlatform
from atom.sampling_params import SamplingParams

ROWS, MAX_LEN, BLOCK_SIZE = 7, 64, 4


class LateFence(Fence):
    """Of a device that is behind: work is done when `reach` says so."""

    done = 0
    recorded = 0

    def __init__(self):
        self.at = 0

    def record(self):
        LateFence.recorded += 1
        self.at = LateFence.recorded

    def is_passed(self):
        return self.at <= LateFence.done


class LateDevice(CpuPlatform):
    def make_fence(self):
        return LateFence()


@pytest.fixture
def late_device():
    LateFence.done = LateFence.recorded = 0
    return LateDevice()


def make_static(platform, sizes=(1, 2, 4, 16), mode=CUDAGraphMode.FULL, prompt_sizes=()):
    return StaticInputs(platform, GraphDispatcher(mode, sizes, prompt_sizes), ROWS, MAX_LEN, BLOCK_SIZE)


def test_a_buffer_is_written_again_once_the_device_has_read_it(late_device):
    static = make_static(late_device)
    written = []
    for _ in range(3):
        host = static.begin(4)
        written.append(host.known.ctypes.data)
        static.send(4)
    assert len(set(written)) == 3
    LateFence.done = 1
    assert static.begin(4).known.ctypes.data == written[0]
    static.send(4)
    assert static.begin(4).known.ctypes.data not in written


def test_fields_are_apart_and_aligned():
    static = make_static(CpuPlatform(), sizes=(1, 3, 16))
    for size in (1, 3, 16):
        host, device = static.begin(size), static.on_device(size)
        for i, field in enumerate(host):
            field.fill(i + 1)
        static.send(size)
        for i, (there, field) in enumerate(zip(device, host, strict=True)):
            assert i == 0 or there.tolist() == field.tolist()
            assert there.data_ptr() % 16 == 0
            assert set(field.tolist()) == {i + 1}
        assert static.last_token.tolist() == [0] * len(static.last_token)


class World:
    """Requests that come, grow and go, the same in two batches: one for graphs, one without."""

    def __init__(self, static, seed):
        self.rng = random.Random(seed)
        self.static = static
        device = torch.device("cpu")
        self.batches = [InputBatch(ROWS, MAX_LEN, BLOCK_SIZE, 100, device, None, s) for s in (static, None)]
        self.blocks = list(range(1000))
        self.left: dict[str, int] = {}  # tokens that are not computed
        self.length: dict[str, int] = {}
        self.num_blocks: dict[str, int] = {}
        self.count = 0

    def add(self):
        name, length = f"r{self.count}", self.rng.randint(1, 20)
        self.count += 1
        self.left[name], self.length[name], self.num_blocks[name] = length, length, 0
        tokens = [self.rng.randrange(100) for _ in range(length)]
        for batch in self.batches:
            batch.add(
                NewRequest(
                    request_id=name, token_ids=tokens, num_prompt_tokens=length, sampling_params=SamplingParams(),
                    block_ids=[], num_computed_tokens=0,
                )
            )  # fmt: skip

    def remove(self, name):
        for table in (self.left, self.length, self.num_blocks):
            del table[name]
        for batch in self.batches:
            batch.remove(name)

    def step(self):
        if len(self.left) < ROWS and (not self.left or self.rng.random() < 0.15):
            self.add()
        for name in [n for n, length in self.length.items() if length > MAX_LEN - 2 or self.rng.random() < 0.02]:
            self.remove(name)
        if not self.left:
            return
        scheduled = {}
        for name, left in self.left.items():
            scheduled[name] = min(left, self.rng.choice([1, 3, 50]))
            end = self.length[name] - left + scheduled[name]
            if (more := -(-end // BLOCK_SIZE) - self.num_blocks[name]) > 0:
                ids = [self.blocks[self.rng.randrange(1000)] for _ in range(more)]
                self.num_blocks[name] += more
                for batch in self.batches:
                    batch.append_blocks(batch.row_of[name], ids)
        total = sum(scheduled.values())
        plan = ScheduledBatch(
            new_requests=[], new_block_ids={}, num_scheduled_tokens=scheduled, removed_request_ids=[],
            total_tokens=total,
        )  # fmt: skip
        steps = [batch.prepare(plan) for batch in self.batches]
        self.compare(*steps)
        sampling = [n for n in scheduled if self.left[n] == scheduled[n]]
        for name, count in scheduled.items():
            self.left[name] -= count
        for name in sampling:
            self.left[name], self.length[name] = 1, self.length[name] + 1
        tokens = torch.tensor([self.rng.randrange(100) for _ in sampling], dtype=torch.int64)
        for batch, step in zip(self.batches, steps, strict=True):
            batch.advance(step, tokens if len(tokens) else None)

    def compare(self, step, plain):
        num_tokens, num_requests, num_sampled = len(plain.positions), len(plain.rows), len(plain.sampled_rows)
        sizes = self.static.dispatcher.mixed_sizes if num_tokens > num_requests else self.static.dispatcher.sizes
        assert (step.graph is not None) == (num_tokens <= sizes[-1])
        assert step.request_ids == plain.request_ids
        np.testing.assert_array_equal(step.sampled_rows, plain.sampled_rows)
        got, want = step.metadata, plain.metadata
        if step.graph is not None:
            size = step.graph.size
            self.static.resolve(size)
            there = self.static.on_device(size)
            assert there.slots[num_tokens:].tolist() == [-1] * (size - num_tokens)
            assert there.seq_lens[num_requests:].tolist() == [0] * (size - num_requests)
            assert there.positions.min() >= 0
            assert there.positions.max() < MAX_LEN
            if num_tokens > num_requests:
                assert there.starts[num_requests:].tolist() == [num_tokens] * (size + 1 - num_requests)
        for a, b in (
            (step.input_ids, plain.input_ids), (step.positions, plain.positions),
            (got.slot_mapping, want.slot_mapping), (got.seq_lens, want.seq_lens),
            (got.query_start_loc, want.query_start_loc), (step.sampling_rows, plain.sampling_rows),
        ):  # fmt: skip
            assert a.tolist() == b.tolist()
        if num_sampled < num_tokens:
            assert step.logits_indices.tolist() == plain.logits_indices.tolist()
        for i, length in enumerate(want.seq_lens.tolist()):
            used = -(-length // BLOCK_SIZE)
            assert got.block_table[i, :used].tolist() == want.block_table[i, :used].tolist()


@pytest.mark.parametrize("prompt_sizes", [(), (24, 40)])
@pytest.mark.parametrize("seed", range(4))
def test_static_steps_equal_plain_ones(seed, prompt_sizes):
    world = World(make_static(CpuPlatform(), prompt_sizes=prompt_sizes), seed)
    for _ in range(400):
        world.step()
    assert world.count > 20


def test_few_new_blocks_come_without_the_table(monkeypatch):
    """Decode steps of the same requests send what their tables got, not the tables."""
    static = make_static(CpuPlatform())
    tables = []
    send = static.send_table
    monkeypatch.setattr(static, "send_table", lambda *args: (tables.append(args), send(*args)))
    world = World(static, 0)
    world.rng.random = lambda: 0.5  # type: ignore[method-assign]  # nobody comes or goes
    for _ in range(3):
        world.add()
    for _ in range(40):
        world.step()
        if all(left == 1 for left in world.left.values()):
            tables.clear()
            break
    for _ in range(20):
        world.step()
    assert len(tables) == 1
