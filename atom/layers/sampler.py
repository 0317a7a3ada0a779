"""Sampling metadata (contract) and the Sampler layer."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from atom.kernels import get_op
from atom.kernels.torch.sampling import top_logits

_RANKS_FROM_TOP = 20  # sampled tokens are seldom further down


@dataclass(slots=True, kw_only=True)
class SamplingMetadata:
    """One row a request that samples now. A None field means no row needs it, so no work is done."""

    all_greedy: bool
    temperature: torch.Tensor | None = None  # float32 [R]; 0 = greedy
    top_k: torch.Tensor | None = None  # int32 [R]; vocab size = off
    top_p: torch.Tensor | None = None  # float32 [R]
    min_p: torch.Tensor | None = None  # float32 [R]
    uniform: torch.Tensor | None = None  # float32 [R] in [0, 1): hash of (seed, position)
    # Penalties apply to rows `penalty_rows` (int64 [P]) only.
    penalty_rows: torch.Tensor | None = None
    prompt_mask: torch.Tensor | None = None  # bool [P, V]: token occurs in the prompt
    output_counts: torch.Tensor | None = None  # int32 [P, V]: occurrences in the output
    presence_penalty: torch.Tensor | None = None  # float32 [P]
    frequency_penalty: torch.Tensor | None = None  # float32 [P]
    repetition_penalty: torch.Tensor | None = None  # float32 [P]
    # Sparse additions to logits (logit_bias, and -inf for stop tokens before min_tokens).
    bias_rows: torch.Tensor | None = None  # int64 [B]
    bias_tokens: torch.Tensor | None = None  # int64 [B]
    bias_values: torch.Tensor | None = None  # float32 [B]
    # Rows whose next token must be one of a set.
    mask_rows: torch.Tensor | None = None  # int64 [M]
    token_masks: torch.Tensor | None = None  # uint8 [M, >= V/8]: bit t % 8 of byte t // 8 tells whether t may come
    num_logprobs: int = -1  # the most any row asks for; -1 = none asks, 0 = chosen token only
    logprob_rows: torch.Tensor | None = None  # int64 [L], those that ask; None = all rows

    @property
    def changes_logits(self) -> bool:
        return not (self.penalty_rows is self.bias_rows is self.mask_rows is None)

    @property
    def only_likeliest(self) -> bool:
        """Whether no row asks for more than the likeliest token of its raw logits."""
        return self.all_greedy and not self.changes_logits and self.num_logprobs < 0


@dataclass(slots=True, kw_only=True)
class SamplerOutput:
    token_ids: torch.Tensor  # int64 [R]
    # Of the raw logits, before temperature, penalties and bias; undefined in rows that didn't ask:
    logprob_token_ids: torch.Tensor | None = None  # int64 [R, 1 + num_logprobs], chosen token first
    logprobs: torch.Tensor | None = None  # float32, same shape
    ranks: torch.Tensor | None = None  # int64 [R], 1 = most likely


class Sampler(nn.Module):
    """Logits to tokens. Order: penalties, bias, masks, then greedy or the `sample` op (temperature, filters)."""

    def __init__(self) -> None:
        super().__init__()
        self._greedy, self._sample = get_op("greedy"), get_op("sample")

    def forward(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """logits: float32 [R, V]; may be overwritten, unless log probabilities are asked for."""
        adjusted = logits
        if metadata.changes_logits:
            if metadata.num_logprobs >= 0:
                adjusted = logits.clone()
            if metadata.penalty_rows is not None:
                apply_penalties_(adjusted, metadata)
            if metadata.bias_rows is not None:
                assert metadata.bias_tokens is not None
                assert metadata.bias_values is not None
                where = (metadata.bias_rows, metadata.bias_tokens)
                adjusted.index_put_(where, metadata.bias_values, accumulate=True)
            if metadata.mask_rows is not None:
                assert metadata.token_masks is not None
                apply_masks_(adjusted, metadata.mask_rows, metadata.token_masks)
        if metadata.all_greedy:
            token_ids = self._greedy(adjusted)
        else:
            token_ids = self._sample(
                adjusted, metadata.temperature, metadata.top_k, metadata.top_p, metadata.min_p, metadata.uniform
            )
        if metadata.num_logprobs < 0:
            return SamplerOutput(token_ids=token_ids)
        ids, logprobs, ranks = _logprobs_of_rows(logits, token_ids, metadata.num_logprobs, metadata.logprob_rows)
        return SamplerOutput(token_ids=token_ids, logprob_token_ids=ids, logprobs=logprobs, ranks=ranks)


def apply_penalties_(logits: torch.Tensor, metadata: SamplingMetadata) -> None:
    """Penalties on rows `metadata.penalty_rows` of float32 [R, V], in place.

    Repetition (Keskar et al. 2019, https://arxiv.org/abs/1909.05858), for tokens of prompt or output:
    a positive logit is divided by it, any other multiplied. Then, as OpenAI's API defines them,
    frequency * occurrences in the output and presence, if there are any, are subtracted.
    """
    rows, counts, mask = metadata.penalty_rows, metadata.output_counts, metadata.prompt_mask
    presence, frequency = metadata.presence_penalty, metadata.frequency_penalty
    repetition = metadata.repetition_penalty
    assert rows is not None
    assert counts is not None
    assert mask is not None
    assert presence is not None
    assert frequency is not None
    assert repetition is not None
    if logits.device.type == "cpu":
        # Few tokens have been seen: touch only those. (On a GPU, finding them would wait for it.)
        flat = np.flatnonzero(mask.numpy() | (counts.numpy() != 0))
        p, token = (torch.from_numpy(i) for i in np.divmod(flat, logits.shape[1]))
        row = rows[p]
        logits[row, token] = _penalize(logits[row, token], counts[p, token], presence[p], frequency[p], repetition[p])
    else:
        before = logits[rows]
        after = _penalize(before, counts, presence.unsqueeze(1), frequency.unsqueeze(1), repetition.unsqueeze(1))
        logits[rows] = torch.where(mask | (counts > 0), after, before)


def apply_masks_(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """-inf for tokens whose bit is 0, in `rows` (int64 [M]) of float32 [R, V], in place. masks: uint8 [M, bytes]."""
    vocab_size = logits.shape[1]
    if logits.device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(masks.numpy(), axis=1, count=vocab_size, bitorder="little")).bool()
    else:
        place = torch.arange(8, dtype=torch.uint8, device=masks.device)
        bits = ((masks.unsqueeze(2) >> place) & 1).flatten(1)[:, :vocab_size].bool()
    logits[rows] = logits[rows].masked_fill_(~bits, -torch.inf)


def _penalize(
    logits: torch.Tensor,
    counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> torch.Tensor:
    """Penalized logits of tokens that have been seen, elementwise."""
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    return logits - frequency * counts - presence * (counts > 0)


def gather_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What log_softmax of float32 [R, V] says about int64 [R] tokens and the `num` likeliest.

    Returns ids int64 and log probabilities float32 [R, 1 + num], the given token first and then the
    likeliest in falling order, and the given tokens' ranks int64 [R] (1 + how many are likelier).
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = token_ids.unsqueeze(1)
    values, likeliest = top_logits(logits, min(max(num, _RANKS_FROM_TOP), logits.shape[1]))
    ids = torch.cat([chosen, likeliest[:, :num]], dim=1)
    own = logits.gather(1, chosen)
    if logits.device.type != "cpu":
        ranks = (logits > own).sum(-1) + 1
    else:
        # Comparing the whole vocabulary costs more than all else here, and few need it.
        ranks = (values > own).sum(-1) + 1
        beyond = (own < values[:, -1:]).nonzero()[:, 0]
        if len(beyond):
            ranks[beyond] = (logits[beyond] > own[beyond]).sum(-1) + 1
    return ids, logprobs.gather(1, ids), ranks


def _logprobs_of_rows(
    logits: torch.Tensor, token_ids: torch.Tensor, num: int, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gather_logprobs` for some rows, spread over [R, ...]; None = all rows."""
    if rows is None:
        return gather_logprobs(logits, token_ids, num)
    found = gather_logprobs(logits[rows], token_ids[rows], num)
    spread = [part.new_zeros((len(logits), *part.shape[1:])).index_copy_(0, rows, part) for part in found]
    return spread[0], spread[1], spread[2]
