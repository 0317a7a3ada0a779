"""The reference backend: plain torch, any device."""

from atom.layers.attention.backends.paged import PagedAttentionBackend
from atom.layers.attention.base import AttentionSpec


class TorchAttentionBackend(PagedAttentionBackend):
    name = "torch"
    kernel_backends = ("torch",)
    can_be_captured = False

    @classmethod
    def unsupported_reasons(cls, spec: AttentionSpec, device_type: str) -> list[str]:
        return []
