"""The Triton kernels, for NVIDIA and AMD GPUs."""

from atom.kernels import unavailable_reason
from atom.layers.attention.backends.paged import PagedAttentionBackend
from atom.layers.attention.base import AttentionSpec


class TritonAttentionBackend(PagedAttentionBackend):
    name = "triton"
    kernel_backends = ("triton",)

    @classmethod
    def unsupported_reasons(cls, spec: AttentionSpec, device_type: str) -> list[str]:
        reasons = []
        if device_type == "cpu":
            reasons.append("it runs on a GPU, not on a CPU")
        if spec.head_dim > 256:
            reasons.append(f"head_dim={spec.head_dim} is over 256")
        reason = unavailable_reason("triton")
        return reasons if reason is None else [*reasons, reason]
