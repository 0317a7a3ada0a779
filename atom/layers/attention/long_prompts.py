"""Long prompts through cuDNN's attention (torch's, on NVIDIA GPUs from Hopper on) instead of our paged Triton kernel.

Why: cuDNN's kernel is clearly faster for long prompts (for 1024 tokens it isn't, and its calls and copies cost the host
0.1 ms a layer more), but it wants contiguous keys, and the first call of each new shape costs the host 50 to 75 ms
(0.84 s the very first), as cuDNN builds a plan for it. So only a part of a prompt goes there, cut to one of few
lengths; the rest of its tokens goes to the paged kernel together with the step's other requests, as chunks that find
all their keys in the cache. `LongPrompts.cut` decides on the host, once a step, `attend` runs in each layer.

A part that sees cached keys as well takes several calls, its own keys causally and the earlier ones whole, a piece
of fixed length at a time. Each gives a softmax over some of the keys; they are merged by their log-sum-exps, as in
FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691) and Flash-Decoding
(https://pytorch.org/blog/flash-decoding). So that pieces come out even, the part begins at a multiple of their
length: its context then takes in the tokens of the same chunk before it.

Measured on an H100 (torch 2.11, a layer, all of the context in one call): 16384 new tokens after 16384 cached ones
take 11.0 ms instead of 16.5 with an 8B model's heads, 5.8 instead of 8.2 with a 0.6B one's; 8192 of 16384 gain a fifth,
2048 of 8192 nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from atom.layers.attention.base import KVCache, LongPart


@dataclass(frozen=True, slots=True)
class Cut:
    """A step's long parts, and the step without them as arrays of `AttentionMetadata`: int32, S segments.

    A segment is one request's tokens between cuts. Long parts among the segments have seq_lens 0; the segments end
    with the last one that isn't long. requests: [S], the request of each.
    """

    parts: tuple[LongPart, ...]
    query_start_loc: np.ndarray
    seq_lens: np.ndarray
    requests: np.ndarray


@dataclass(frozen=True, slots=True)
class LongPrompts:
    """Which tokens make a long part.

    Prompts without cached keys: from `shortest` tokens on, a multiple of `step`, or of `long_step` from `long_from`
    tokens on. After cached keys: such a multiple from the position that `piece` divides on, if as many tokens follow.
    """

    shortest: int = 2048
    step: int = 512
    long_from: int = 4096
    long_step: int = 1024
    piece: int = 8192

    def find(self, length: int, context: int) -> tuple[int, int]:
        """(tokens before it, its length) of the long part of a chunk after `context` cached tokens; length 0: none."""
        skipped = -context % self.piece
        length -= skipped
        if length < (self.piece if context else self.shortest):
            return 0, 0
        step = self.step if length < self.long_from else self.long_step
        return skipped, length // step * step

    def cut(self, starts: np.ndarray, computed: np.ndarray) -> Cut | None:
        """None if the step has no long part. starts: [R + 1], as query_start_loc; computed: [R], cached tokens."""
        parts: list[LongPart] = []
        segments: list[tuple[int, int, int]] = []  # request, first token after it, seq_len
        spans = zip(starts[:-1].tolist(), starts[1:].tolist(), computed.tolist(), strict=True)
        for request, (start, end, context) in enumerate(spans):
            skipped, length = self.find(end - start, context)
            if length:
                begin = start + skipped
                if skipped:
                    segments.append((request, begin, context + skipped))
                parts.append(LongPart(request, begin, length, context + skipped))
                segments.append((request, begin + length, 0))
            if skipped + length < end - start:
                segments.append((request, end, context + end - start))
        if not parts:
            return None
        while segments and segments[-1][2] == 0:
            segments.pop()
        requests, ends, seq_lens = np.array(segments, dtype=np.int32).reshape(-1, 3).T.copy()
        return Cut(tuple(parts), np.concatenate([np.zeros(1, np.int32), ends]), seq_lens, requests)

    def attend(
        self,
        part: LongPart,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: KVCache,
        block_table: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """[n, Hq, D]: the part's attention. query [n, Hq, D]; key, value [n, Hk, D]: the part's own."""
        q, k, v = _heads_first(query), _heads_first(key), _heads_first(value)
        if not part.context:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return out[0].transpose(0, 1)
        out, lse = attend_with_lse(q, k, v, True, scale)
        block_size = cache.k.shape[1]
        for start in range(0, part.context, self.piece):
            end = start + self.piece
            blocks = block_table[part.request, start // block_size : -(-end // block_size)]
            k, v = (
                _heads_first(x.index_select(0, blocks).flatten(0, 1)[start % block_size :][: self.piece])
                for x in (cache.k, cache.v)
            )
            other, other_lse = attend_with_lse(q, k, v, False, scale)
            out.lerp_(other, torch.sigmoid(other_lse - lse).to(out.dtype))
            lse = torch.logaddexp(lse, other_lse)
        return out[0].transpose(0, 1)


def attend_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's attention of q [1, Hq, n, D] to k, v [1, Hk, m, D], and its log-sum-exps, float32 [1, Hq, n, 1]."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
    return out, lse.view(*q.shape[:3], 1)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[n, H, D] -> [1, H, n, D], a view."""
    return x.transpose(0, 1).unsqueeze(0)
