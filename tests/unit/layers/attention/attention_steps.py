"""Steps with requests of given lengths, through one attention backend and another."""

import torch

from atom.layers.attention.base import KVCache, PackedRotation
from atom.model_engine.input_batch import InputBatch, StepInput
from atom.model_engine.protocol import NewRequest, ScheduledBatch
from atom.sampling_params import SamplingParams

HEADS, KV_HEADS, DIM, MAX_LEN, PADDING = 4, 2, 32, 192, 3


def prepare_step(
    lengths, block_size, num_blocks, max_len=MAX_LEN, device="cpu", long_prompts=None, static=None
) -> StepInput:
    """lengths: (cached tokens, new ones) of each request; their blocks are any of num_blocks. static: StaticInputs."""
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    batch = InputBatch(len(lengths), max_len, block_size, 100, torch.device(device), long_prompts, static)
    for i, (computed, new) in enumerate(lengths):
        batch.add(
            NewRequest(
                request_id=str(i),
                token_ids=[1] * (computed + new),
                num_prompt_tokens=computed + new,
                sampling_params=SamplingParams(),
                block_ids=[free.pop() for _ in range(-(-(computed + new) // block_size))],
                num_computed_tokens=computed,
            )
        )
    scheduled = {str(i): new for i, (_, new) in enumerate(lengths)}
    return batch.prepare(
        ScheduledBatch(
            new_requests=[],
            new_block_ids={},
            num_scheduled_tokens=scheduled,
            removed_request_ids=[],
            total_tokens=sum(scheduled.values()),
        )
    )


def make_cache(num_blocks, block_size, seed=2) -> KVCache:
    generator = torch.Generator().manual_seed(seed)
    return KVCache(*(torch.randn(num_blocks, block_size, KV_HEADS, DIM, generator=generator) for _ in "kv"))


def compare_step(backend, reference, step, num_blocks, packed) -> None:
    """Tokens that are none follow the step's, as with CUDA graphs for pieces of the model."""
    metadata, num_tokens = step.metadata, len(step.positions)
    metadata.slot_mapping = torch.cat([metadata.slot_mapping, torch.full((PADDING,), -1)])
    positions = torch.cat([step.positions, torch.zeros(PADDING, dtype=torch.int64)])
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(num_tokens + PADDING, HEADS + 2 * KV_HEADS, DIM, generator=generator)
    outputs = []
    for one in (reference, backend):
        cache = make_cache(num_blocks, backend.spec.block_size)
        output = torch.full((num_tokens + PADDING, HEADS, DIM), 7.0)
        if packed:
            angle = torch.arange(MAX_LEN)[:, None] * 0.7 ** torch.arange(DIM // 2)
            rotation = PackedRotation(
                cos_sin_cache=torch.cat([angle.cos(), angle.sin()], 1),
                interleaved=False,
                q_weight=None,
                k_weight=None,
                eps=0.0,
            )
            one.forward_packed(qkv, positions, rotation, cache, metadata, output)
        else:
            one.forward(*qkv.split([HEADS, KV_HEADS, KV_HEADS], 1), cache, metadata, output)
        outputs.append(output[:num_tokens])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def attend_on_cpu(q, k, v, is_causal, scale):
    """`long_prompts.attend_with_lse` without cuDNN."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    return out, lse.unsqueeze(-1)
