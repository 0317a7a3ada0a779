"""Sampling metadata (contract) and the Sampler layer."""

from dataclasses import dataclass

import torch


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
    num_logprobs: int = -1  # the most any row asks for; -1 = none asks, 0 = chosen token only


@dataclass(slots=True, kw_only=True)
class SamplerOutput:
    token_ids: torch.Tensor  # int64 [R]
    # Of the raw logits, before temperature, penalties and bias:
    logprob_token_ids: torch.Tensor | None = None  # int64 [R, 1 + num_logprobs], chosen token first
    logprobs: torch.Tensor | None = None  # float32, same shape
    ranks: torch.Tensor | None = None  # int64 [R], 1 = most likely
