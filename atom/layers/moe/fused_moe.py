"""Mixture of experts: a router and the experts' weights, stacked."""

import torch
from torch import nn

from atom.distributed.communication import all_reduce
from atom.kernels import get_op
from atom.layers.build import BuildContext
from atom.layers.linear import divide, load_shard, set_loader
from atom.layers.module import Layer
from atom.utils.errors import ModelLoadError


def _run_experts(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    return get_op("fused_experts")(x, w13, w2, topk_weights, topk_ids)


def _route(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return get_op("route_experts")(router_logits, top_k, renormalize)


def _route_like(router_logits: torch.Tensor, top_k: int, _: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = router_logits.shape[0], top_k
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


# Which experts run depends on the data: compilers see opaque ops.
_library = torch.library.Library("atom", "FRAGMENT")
_library.define("fused_experts(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids) -> Tensor")
_library.impl("fused_experts", _run_experts, "CompositeExplicitAutograd")
_library.impl("fused_experts", lambda x, *_: torch.empty_like(x), "Meta")
_library.define("route_experts(Tensor router_logits, int top_k, bool renormalize) -> (Tensor, Tensor)")
_library.impl("route_experts", _route, "CompositeExplicitAutograd")
_library.impl("route_experts", _route_like, "Meta")


class FusedMoE(Layer):
    """Gated experts: w13_weight [E, 2 * I, H] (gate above up), w2_weight [E, H, I]; I split over the ranks."""

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        renormalize: bool,
        context: BuildContext,
    ) -> None:
        super().__init__()
        if context.quant_config is not None:
            raise ModelLoadError("a quantized checkpoint with experts is not supported yet")
        self.top_k = top_k
        self.renormalize = renormalize
        self.tp = context.tp
        self.intermediate_size = divide(intermediate_size, self.tp, "the experts' intermediate size")
        shape13 = (num_experts, 2 * self.intermediate_size, hidden_size)
        shape2 = (num_experts, hidden_size, self.intermediate_size)
        self.w13_weight = nn.Parameter(torch.empty(shape13, dtype=context.dtype), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.empty(shape2, dtype=context.dtype), requires_grad=False)
        set_loader(self.w13_weight, self._load_w13, 2 * num_experts)
        set_loader(self.w2_weight, self._load_w2, num_experts)
        self._route_experts = get_op("route_experts")
        self._fused_experts = get_op("fused_experts")

    def forward(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """x [T, H], router_logits [T, E] -> [T, H]"""
        compiling = torch.compiler.is_compiling()
        route = torch.ops.atom.route_experts if compiling else self._route_experts
        run = torch.ops.atom.fused_experts if compiling else self._fused_experts
        weights, ids = route(router_logits, self.top_k, self.renormalize)
        return all_reduce(run(x, self.w13_weight, self.w2_weight, weights, ids), self.tp)

    def _load_w13(self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None) -> None:
        assert shard_id in (0, 1)
        assert expert_id is not None
        part = param.data[expert_id].chunk(2)[shard_id]
        load_shard(part, loaded, dim=0, rank=self.tp.rank, size=self.tp.size)

    def _load_w2(self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None) -> None:
        assert expert_id is not None
        load_shard(param.data[expert_id], loaded, dim=1, rank=self.tp.rank, size=self.tp.size)
