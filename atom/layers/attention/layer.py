"""The attention layer that models use: finds its cache and this step's metadata, calls its backend."""

from collections.abc import Callable

import torch
from torch.compiler import is_compiling

from atom.forward_context import get_forward_context
from atom.layers.attention.base import AttentionSpec, KVCache, PackedRotation
from atom.layers.attention.registry import select_backend
from atom.layers.build import BuildContext
from atom.layers.module import Layer


class Attention(Layer):
    """Causal attention over the paged cache, for this rank's heads."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layer_name: str,
        context: BuildContext,
        scale: float | None = None,
        sliding_window: int = 0,
    ) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.spec = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5 if scale is None else scale,
            dtype=context.dtype,
            block_size=context.block_size,
            kv_cache_dtype=context.kv_cache_dtype,
            sliding_window=sliding_window,
        )
        device_type = torch.get_default_device().type
        self.backend = select_backend(context.attention_backend, self.spec, device_type)(self.spec)
        self.kv_cache: KVCache | None = None
        self._rotation: Callable[[], PackedRotation] | None = None
        self._heads = (num_heads, head_dim)
        self._kv_heads = (num_kv_heads, head_dim)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[T, H * D] or [T, H, D] each -> [T, num_heads * D]."""
        num_tokens = query.shape[0]
        if query.dim() == 2:
            query = query.view(num_tokens, *self._heads)
            key = key.view(num_tokens, *self._kv_heads)
            value = value.view(num_tokens, *self._kv_heads)
        output = query.new_empty((num_tokens, *self._heads))
        if is_compiling():
            torch.ops.aiter.unified_attention_with_output(query, key, value, output, self.layer_name)
        else:
            self.attend(query, key, value, output)
        return output.view(num_tokens, -1)

    def rotate_with(self, rotation: Callable[[], PackedRotation]) -> None:
        """Let `forward_packed` normalize and rotate; `rotation` is asked at each call, as loading replaces weights."""
        self._rotation = rotation

    def forward_packed(self, positions: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """Raw projections [T, Hq + 2 * Hk, D] -> [T, num_heads * D]; see `rotate_with`."""
        num_tokens = qkv.shape[0]
        output = qkv.new_empty((num_tokens, *self._heads))
        if is_compiling():
            torch.ops.aiter.unified_attention_with_output(qkv, None, None, output, self.layer_name, positions)
        else:
            self.attend_packed(positions, qkv, output)
        return output.view(num_tokens, -1)

    def attend_packed(self, positions: torch.Tensor, qkv: torch.Tensor, output: torch.Tensor) -> None:
        """`attend` on raw projections."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            output.zero_()
            return
        assert self.kv_cache is not None, f"{self.layer_name} has no KV cache"
        assert self._rotation is not None, f"{self.layer_name} was not told how to rotate"
        self.backend.forward_packed(qkv, positions, self._rotation(), self.kv_cache, metadata, output)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        """Store key and value, and write the attention's result; [T, H, D] each."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a profiling run: there is no cache yet
            output.zero_()
            return
        assert self.kv_cache is not None, f"{self.layer_name} has no KV cache"
        self.backend.forward(query, key, value, self.kv_cache, metadata, output)


def unified_attention_with_output(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: str,
    positions: torch.Tensor | None = None,
) -> None:
    """What the op does; with positions, `query` is the packed projection, and there are no key and value."""
    layer = get_forward_context().layers[layer_name]
    if positions is None:
        layer.attend(query, key, value, output)
    else:
        layer.attend_packed(positions, query, output)


# The op at which compilation splits a model's graph; it finds its layer through the forward context.
_library = torch.library.Library("aiter", "FRAGMENT")
_library.define(
    "unified_attention_with_output(Tensor query, Tensor? key, Tensor? value, Tensor(a!) output, str layer_name, "
    "Tensor? positions=None) -> ()"
)
_library.impl("unified_attention_with_output", unified_attention_with_output, "CompositeExplicitAutograd")
_library.impl("unified_attention_with_output", lambda *_: None, "Meta")
