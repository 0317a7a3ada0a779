"""Linear layers that know their tensor-parallel shard and how to load it.

Column-parallel layers split the output features over the ranks, row-parallel ones the input features
(Megatron-LM, Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). With one rank they are plain layers.
A parameter's `weight_loader(param, loaded, shard_id, expert_id)` takes a whole checkpoint tensor and keeps
this rank's part of it; `num_shards` says how many such tensors fill the parameter.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from atom.distributed.communication import all_reduce
from atom.distributed.parallel_state import TPGroup
from atom.layers.build import BuildContext
from atom.layers.module import Layer
from atom.layers.quant.base import Rows
from atom.layers.quant.registry import get_linear_method
from atom.layers.quant.scaled import scales_by_row
from atom.utils.errors import ModelLoadError

Loader = Callable[[torch.Tensor, torch.Tensor, int | None, int | None], None]


def set_loader(param: torch.Tensor, loader: Loader, num_shards: int = 1) -> None:
    param.weight_loader = loader  # type: ignore[attr-defined]
    param.num_shards = num_shards  # type: ignore[attr-defined]


def check_shape(loaded: torch.Tensor, expected: Sequence[int]) -> None:
    """ModelLoadError unless a checkpoint tensor has the shape that the model's config says."""
    if loaded.shape != torch.Size(expected):
        raise ModelLoadError(f"expected shape {list(expected)}, found {list(loaded.shape)}")


def load_shard(target: torch.Tensor, loaded: torch.Tensor, dim: int, rank: int, size: int) -> None:
    """Fill `target`, a parameter or a part of one, with the rank-th of `size` equal parts of `loaded` along `dim`."""
    part = target.shape[dim]
    check_shape(loaded, [n * size if d == dim else n for d, n in enumerate(target.shape)])
    target.copy_(loaded.narrow(dim, rank * part, part))


def load_parts(loader: Loader, param: torch.Tensor, loaded: torch.Tensor, sizes: Sequence[int]) -> None:
    """Load all parts of a merged parameter from one checkpoint tensor that holds them on top of each other."""
    check_shape(loaded, [sum(sizes), *param.shape[1:]])
    for shard_id, part in enumerate(loaded.split(list(sizes))):
        loader(param, part, shard_id, None)


def divide(total: int, tp: TPGroup, what: str) -> int:
    """Each rank's equal part; ModelLoadError naming `what` when there is none."""
    if total % tp.size:
        raise ModelLoadError(f"tensor_parallel_size={tp.size} does not divide {what}={total}; use a divisor of it")
    return total // tp.size


class LinearBase(Layer):
    """A weight, an optional bias, and the method that stores and applies them.

    in_features, out_features: of this rank. whole_parts: rows of the checkpoint's weights, by shard id.
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        context: BuildContext,
        prefix: str,
        whole_parts: Sequence[int],
    ) -> None:
        super().__init__()
        self.whole_parts = list(whole_parts)
        self.in_features = in_features
        self.out_features = out_features
        self.tp = context.tp
        self.prefix = prefix
        spec = context.quant_config.get_layer_quant_config(prefix) if context.quant_config is not None else None
        self.method = get_linear_method(spec, context)
        self.method.create_weights(self, out_features, in_features, context.dtype)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=context.dtype), requires_grad=False) if bias else None
        self._apply_method = self.method.apply

    def process_weights_after_loading(self) -> None:
        self.method.process_weights_after_loading(self)
        super().process_weights_after_loading()

    def forward(self, x: Rows) -> torch.Tensor:
        return self._apply_method(self, x, self.bias)

    def _set_loaders(self, loader: Loader, num_shards: int = 1) -> None:
        set_loader(self.weight, loader, num_shards)
        if "weight_scale" in self._parameters:

            def load_scale(
                param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None
            ) -> None:
                rows = sum(self.whole_parts) if shard_id is None else self.whole_parts[shard_id]
                loader(param, scales_by_row(loaded, rows), shard_id, expert_id)

            set_loader(self.get_parameter("weight_scale"), load_scale, num_shards)
        if self.bias is not None:
            set_loader(self.bias, loader, num_shards)


class ReplicatedLinear(LinearBase):
    """The same whole weight on every rank."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, context: BuildContext, prefix: str = ""
    ) -> None:
        super().__init__(in_features, out_features, bias, context, prefix, [out_features])
        self._set_loaders(self._load)

    def _load(self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None) -> None:
        load_shard(param.data, loaded, dim=0, rank=0, size=1)


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel layers of one input as one: shard_id names which is loaded."""

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool = False,
        context: BuildContext,
        prefix: str = "",
    ) -> None:
        self.parts = [divide(n, context.tp, f"{prefix}.out_features") for n in out_features]
        super().__init__(in_features, sum(self.parts), bias, context, prefix, out_features)
        self._set_loaders(self._load, len(self.parts))

    def _load(self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None) -> None:
        if shard_id is None:  # all parts in one tensor
            load_parts(self._load, param, loaded, self.whole_parts)
            return
        part = param.data.split(self.parts)[shard_id]
        load_shard(part, loaded, dim=0, rank=self.tp.rank, size=self.tp.size)


class ColumnParallelLinear(MergedColumnParallelLinear):
    """Output features split over the ranks."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, context: BuildContext, prefix: str = ""
    ) -> None:
        super().__init__(in_features, [out_features], bias=bias, context=context, prefix=prefix)


class QKVParallelLinear(LinearBase):
    """Query, key and value projections as one; shard ids 0, 1, 2.

    Heads are split over the ranks; with fewer KV heads than ranks each KV head is kept by several.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        bias: bool = False,
        context: BuildContext,
        prefix: str = "",
    ) -> None:
        size = context.tp.size
        self.head_dim = head_dim
        self.num_heads = divide(num_heads, context.tp, "num_attention_heads")
        if num_heads % num_kv_heads:
            raise ModelLoadError(f"num_key_value_heads={num_kv_heads} does not divide num_attention_heads={num_heads}")
        if num_kv_heads < size and size % num_kv_heads == 0:
            self.num_kv_heads, self.kv_replicas = 1, size // num_kv_heads
        else:
            self.num_kv_heads, self.kv_replicas = divide(num_kv_heads, context.tp, "num_key_value_heads"), 1
        self.q_size = self.num_heads * head_dim
        self.kv_size = self.num_kv_heads * head_dim
        whole_parts = [num_heads * head_dim, *[num_kv_heads * head_dim] * 2]
        super().__init__(hidden_size, self.q_size + 2 * self.kv_size, bias, context, prefix, whole_parts)
        self._set_loaders(self._load, 3)

    def _load(self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None) -> None:
        kv_ranks = self.tp.size // self.kv_replicas
        if shard_id is None:
            load_parts(self._load, param, loaded, self.whole_parts)
            return
        part = param.data.split([self.q_size, self.kv_size, self.kv_size])[shard_id]
        if shard_id == 0:
            load_shard(part, loaded, dim=0, rank=self.tp.rank, size=self.tp.size)
        else:
            load_shard(part, loaded, dim=0, rank=self.tp.rank // self.kv_replicas, size=kv_ranks)


class RowParallelLinear(LinearBase):
    """Input features split over the ranks; the ranks' results are summed. The bias is added once."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, context: BuildContext, prefix: str = ""
    ) -> None:
        part = divide(in_features, context.tp, f"{prefix}.in_features")
        super().__init__(part, out_features, bias, context, prefix, [out_features])
        rows = self.method.row_format
        if rows is not None and rows.group_size and context.tp.size > 1 and part % rows.group_size:
            raise ModelLoadError(
                f"tensor_parallel_size={context.tp.size} cuts {prefix}.in_features={in_features} inside of a group of "
                f"{rows.group_size} columns that share a scale; use a smaller one"
            )
        self._set_loaders(self._load)
        self._adds_bias = context.tp.rank == 0

    def forward(self, x: Rows) -> torch.Tensor:
        out = self._apply_method(self, x, self.bias if self._adds_bias else None)
        return out if self.tp.size == 1 else all_reduce(out, self.tp)

    def _load(self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None) -> None:
        if param is self.bias or loaded.shape[1:] == (1,):  # the scales of whole rows
            load_shard(param.data, loaded, dim=0, rank=0, size=1)
        else:
            load_shard(param.data, loaded, dim=1, rank=self.tp.rank, size=self.tp.size)
