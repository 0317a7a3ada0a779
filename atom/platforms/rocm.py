"""AMD GPUs: torch drives them through the same `cuda` device type."""

import torch

from atom.platforms.cuda import CudaPlatform


class RocmPlatform(CudaPlatform):
    name = "rocm"

    def __init__(self) -> None:
        # CDNA3 (gfx942) has its own float8 encoding; gfx950 uses the OCP one.
        arch = getattr(torch.cuda.get_device_properties(0), "gcnArchName", "")
        if arch.startswith("gfx94"):
            self.fp8_dtype = torch.float8_e4m3fnuz
