"""The C++ kernels."""

from atom.kernels import unavailable_reason
from atom.layers.attention.backends.paged import PagedAttentionBackend
from atom.layers.attention.base import AttentionSpec


class CpuAttentionBackend(PagedAttentionBackend):
    name = "cpu"
    kernel_backends = ("cpu", "torch")

    @classmethod
    def unsupported_reasons(cls, spec: AttentionSpec, device_type: str) -> list[str]:
        if device_type != "cpu":
            return [f"it runs on a CPU, not on {device_type}"]
        reason = unavailable_reason("cpu")
        return [] if reason is None else [reason]
