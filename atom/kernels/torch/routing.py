"""Which experts a token goes to."""

import torch


def route_experts(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of each token by softmax, the most probable first.

    router_logits [T, E] -> (weights float32 [T, top_k], ids int32 [T, top_k]). Weights are the chosen experts'
    probabilities among all E, divided by their sum if renormalize.
    """
    weights, ids = torch.softmax(router_logits, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids.to(torch.int32)
