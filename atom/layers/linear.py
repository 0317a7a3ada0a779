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
from atom.layers.build import BuildContext
from atom.layers.quant.base import get_linear_method

Loader = Callable[[torch.Tensor, torch.Tensor, int | None, int | None], None]


def set_loader(param: torch.Tensor, loader: Loader, num_shards: int = 1) -> None:
    param.weight_loader = loader  # type: ignore[attr-defined]
    param.num_shards = num_shards  # type: ignore[attr-defined]


def copy_checked(target: torch.Tensor, loaded: torch.Tensor) -> None:
    """Copy into a parameter or a part of one; ValueError when the shapes differ."""
    if target.shape != loaded.shape:
        raise ValueError(f"expected shape {tuple(target.shape)}, found {tuple(loaded.shape)}")
    target.copy_(loaded)


def rank_slice(loaded: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    """This rank's equal part of a whole tensor along `dim`."""
    if loaded.shape[dim] % size:
        raise ValueError(f"dimension {dim} of shape {tuple(loaded.shape)} does not divide by {size} ranks")
    part = loaded.shape[dim] // size
    return loaded.narrow(dim, rank * part, part)


def divide(total: int, parts: int) -> int:
    assert total % parts == 0, f"{total} does not divide by {parts}"
    return total // parts


class LinearBase(nn.Module):
    """A weight, an optional bias, and the method that stores and applies them.

    in_features, out_features: of this rank.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, context: BuildContext, prefix: str) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.tp = context.tp
        self.prefix = prefix
        spec = context.quant_config.get_layer_quant_config(prefix) if context.quant_config is not None else None
        self.method = get_linear_method(spec)
        self.method.create_weights(self, out_features, in_features, context.dtype)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=context.dtype), requires_grad=False) if bias else None
        self._apply_method = self.method.apply

    def process_weights_after_loading(self) -> None:
        self.method.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._apply_method(self, x, self.bias)

    def _set_loaders(self, loader: Loader, num_shards: int = 1) -> None:
        set_loader(self.weight, loader, num_shards)
        if self.bias is not None:
            set_loader(self.bias, loader, num_shards)


class ReplicatedLinear(LinearBase):
    """The same whole weight on every rank."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, context: BuildContext, prefix: str = ""
    ) -> None:
        super().__init__(in_features, out_features, bias, context, prefix)


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
        self.parts = [divide(n, context.tp.size) for n in out_features]
        super().__init__(in_features, sum(self.parts), bias, context, prefix)
        self._set_loaders(self._load, len(self.parts))

    def _load(self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None) -> None:
        if shard_id is None:  # all parts in one tensor
            sizes = [part * self.tp.size for part in self.parts]
            for i, one in enumerate(loaded.split(sizes, dim=0)):
                self._load(param, one, i, expert_id)
            return
        start = sum(self.parts[:shard_id])
        mine = rank_slice(loaded, 0, self.tp.rank, self.tp.size)
        copy_checked(param.data.narrow(0, start, self.parts[shard_id]), mine)


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
        self.num_heads = divide(num_heads, size)
        if num_kv_heads >= size:
            self.num_kv_heads, self.kv_replicas = divide(num_kv_heads, size), 1
        else:
            self.num_kv_heads, self.kv_replicas = 1, divide(size, num_kv_heads)
        self.q_size = self.num_heads * head_dim
        self.kv_size = self.num_kv_heads * head_dim
        super().__init__(hidden_size, self.q_size + 2 * self.kv_size, bias, context, prefix)
        self._set_loaders(self._load, 3)

    def _load(self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None) -> None:
        assert shard_id in (0, 1, 2)
        if shard_id == 0:
            start, length = 0, self.q_size
            mine = rank_slice(loaded, 0, self.tp.rank, self.tp.size)
        else:
            start, length = self.q_size + (shard_id - 1) * self.kv_size, self.kv_size
            mine = rank_slice(loaded, 0, self.tp.rank // self.kv_replicas, self.tp.size // self.kv_replicas)
        copy_checked(param.data.narrow(0, start, length), mine)


class RowParallelLinear(LinearBase):
    """Input features split over the ranks; the ranks' results are summed. The bias is added once."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, context: BuildContext, prefix: str = ""
    ) -> None:
        super().__init__(divide(in_features, context.tp.size), out_features, bias, context, prefix)
        set_loader(self.weight, self._load)
        self._adds_bias = context.tp.rank == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self._apply_method(self, x, self.bias if self._adds_bias else None)
        return out if self.tp.size == 1 else all_reduce(out, self.tp)

    def _load(self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None) -> None:
        copy_checked(param.data, rank_slice(loaded, 1, self.tp.rank, self.tp.size))
