"""The compilation levels: how a model's forward is run, by `CompilationConfig.level`."""

import os
import platform as python_platform
from collections.abc import Callable

import torch
from torch import nn

from atom.config import CompilationLevel, Config
from atom.platforms import Platform
from atom.utils import envs
from atom.utils.logging import get_logger

logger = get_logger(__name__)

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_forward(model: nn.Module, config: Config, platform: Platform, device: torch.device) -> Forward:
    """forward(input_ids [T], positions [T]) -> hidden [T, H] at the configured level.

    0 the model itself; 1 torch.compile as it is; 2 traced once and compiled whole; 3 the same in pieces, split
    at `splitting_ops`. Raises CompilationError naming the part that failed.
    """
    compilation = config.compilation_config
    if compilation.level == CompilationLevel.NO_COMPILATION:
        return model
    if compilation.level == CompilationLevel.DYNAMO_AS_IS:
        if not compilation.use_inductor:
            return torch.compile(model, backend="eager")
        return torch.compile(model, options=compilation.inductor_compile_config or None)

    from atom.compilation.cache import CompilationCache, cache_key, default_root
    from atom.compilation.compiled_model import compile_model

    root = compilation.cache_dir or default_root()
    splitting_ops = compilation.splitting_ops or [] if compilation.level == CompilationLevel.PIECEWISE else []
    sizes = compilation.sizes_to_compile(config.graph_bs or [])
    facts = {
        # Where it was read from doesn't matter.
        "model": {k: v for k, v in config.hf_config.to_dict().items() if k != "_name_or_path"},
        "dtype": str(config.torch_dtype),
        "max_model_len": config.max_model_len,
        "attention": config.attention_backend,
        "fuses_qkv": envs.ATOM_ENABLE_QK_NORM_ROPE_CACHE_QUANT_FUSION,
        "quantization": config.quant_config.compute_hash(),
        "fuses_quant": (
            envs.ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_RMSNORM_QUANT,
            envs.ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_SILU_MUL_QUANT,
        ),
        "splitting_ops": splitting_ops,
        "sizes": sizes,
        "inductor": compilation.inductor_compile_config,
        "device": platform.chip(),
        "torch": torch.__version__,
        "python": python_platform.python_version(),
    }
    return compile_model(
        model,
        device,
        splitting_ops=splitting_ops,
        sizes=sizes,
        use_inductor=compilation.use_inductor,
        inductor_options=compilation.inductor_compile_config,
        cache=CompilationCache(os.path.expanduser(root), cache_key(facts)),
        debug_dump=compilation.debug_dump_path,
    )
