"""Small steps of every kind before the first request, so that none waits for a GPU kernel to be compiled."""

from typing import TYPE_CHECKING, Any

from atom.model_engine.protocol import NewRequest, ScheduledBatch
from atom.sampling_params import SamplingParams

if TYPE_CHECKING:
    from atom.model_engine.model_runner import ModelRunner

_LONG = 4096 + 300  # tokens of a prompt with a part for long prompts' own kernel, which is slow once, and a rest
# Prompts that are no long parts and together fill a GPU, one that doesn't, and a tail of one: each is attended to, or
# sent to experts, in tiles of another size.
_SHORT: tuple[tuple[int, ...], ...] = ((1500, 1500), (600,), (2,))
_FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.9},
    {"top_k": 20},
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.1},
)


def warm_up(runner: "ModelRunner", num_tokens: int) -> None:
    """A long prompt alone, shorter ones, then short chunks beside decodes, with each way of sampling.

    num_tokens: that the cache holds. Writes to its first blocks: call it before they hold anything.
    """
    config = runner.config
    assert config.max_model_len is not None
    room = min(num_tokens, config.max_model_len, config.max_num_batched_tokens)
    if long := min(_LONG, room - 1):
        _run(runner, {"long": (long, 0)}, {"temperature": 0})
    for lengths in _SHORT:
        if config.max_num_seqs >= len(lengths) and sum(lengths) <= room:
            _run(runner, {str(i): (n, 0) for i, n in enumerate(lengths)}, {"temperature": 0})
    chunk = min(40, room // 4)
    if config.max_num_seqs > 1 and chunk:
        for filters in _FILTERS:
            _run(runner, {"decode": (1, chunk), "chunk": (chunk, chunk)}, {"temperature": 0.7, **filters})


def _run(runner: "ModelRunner", lengths: dict[str, tuple[int, int]], params: dict[str, Any]) -> None:
    """One step; lengths: of each request, (tokens computed now, tokens that count as computed before)."""
    block_size = runner.config.kv_cache_block_size
    requests = [
        NewRequest(
            request_id=name,
            token_ids=[0] * (now + before),
            num_prompt_tokens=now + before,
            sampling_params=SamplingParams(seed=0, **params),
            block_ids=list(range(-(-(now + before) // block_size))),
            num_computed_tokens=before,
        )
        for name, (now, before) in lengths.items()
    ]
    batch = ScheduledBatch(
        new_requests=requests,
        new_block_ids={},
        num_scheduled_tokens={name: now for name, (now, _) in lengths.items()},
        removed_request_ids=[],
        total_tokens=sum(now for now, _ in lengths.values()),
    )
    runner.submit(batch)()
    runner.forget_requests()
