"""Mixture of experts: every token through its chosen experts."""

import torch

from atom.kernels.torch.activation import silu_and_mul


def fused_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """sum over k of weight[t, k] * expert(id[t, k])(x[t]).

    x [T, H]; w13 [E, 2 * I, H] (gate above up); w2 [E, H, I]; topk_weights float32 [T, K];
    topk_ids int32 or int64 [T, K]. Accumulated in float32, returned in x's dtype.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(topk_ids).tolist():
        token, choice = torch.where(topk_ids == expert)
        hidden = silu_and_mul(x[token] @ w13[expert].t())
        out.index_add_(0, token, (hidden @ w2[expert].t()).float() * topk_weights[token, choice].unsqueeze(-1))
    return out.to(x.dtype)
