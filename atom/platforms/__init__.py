"""Which machine this is: detected once."""

from functools import cache

from atom.platforms.base import Platform

__all__ = ["Platform", "current_platform", "get_platform", "select_platform"]


def get_platform(name: str) -> Platform:
    """The platform called `name` ("cpu", "cuda", "rocm"); ValueError when it isn't usable here."""
    if name == "cpu":
        from atom.platforms.cpu import CpuPlatform

        return CpuPlatform()
    if name in ("cuda", "rocm"):
        import torch

        found = "rocm" if torch.version.hip else "cuda"
        if not torch.cuda.is_available() or found != name:
            raise ValueError(f"device={name!r}: torch {torch.__version__} finds no {name} device; use device='cpu'")
        if name == "rocm":
            from atom.platforms.rocm import RocmPlatform

            return RocmPlatform()
        from atom.platforms.cuda import CudaPlatform

        return CudaPlatform()
    raise ValueError(f"device={name!r} is unknown; use one of auto, cpu, cuda, rocm")


_selected: Platform | None = None


def current_platform() -> Platform:
    """The platform this process runs on: the selected one, else the machine's best."""
    return _selected or _detect()


def select_platform(name: str) -> Platform:
    """Make `name` ("auto" = the machine's best) the platform of this process."""
    global _selected
    _selected = _detect() if name == "auto" else get_platform(name)
    return _selected


@cache
def _detect() -> Platform:
    import torch

    if not torch.cuda.is_available():
        return get_platform("cpu")
    return get_platform("rocm" if torch.version.hip else "cuda")
