"""Every setting of the engine: the user's, and what follows from them and from the checkpoint.

Importing this module loads neither torch nor transformers; building a `Config` does.
Fields that no code acts on yet are listed at the end, in `_UNSUPPORTED` and `_INACTIVE`.
"""

import ast
import contextlib
import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

from atom.quant_spec import (
    LayerQuantConfig,
    ParsedQuantConfig,
    QuantType,
    parse_quant_config,
    quant_method_of,
    unserved_reason,
)
from atom.utils import envs
from atom.utils.errors import ConfigError
from atom.utils.logging import LEVELS, configure_logging, get_logger, log_once
from atom.utils.network import get_open_port
from atom.utils.strict import StrictConfig, did_you_mean

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig

    from atom.utils.model_path import ModelPath

__all__ = [
    "CUDAGraphMode",
    "CompilationConfig",
    "CompilationLevel",
    "Config",
    "KVCacheConfig",
    "KVCacheTensor",
    "LayerQuantConfig",
    "ParallelConfig",
    "QuantType",
    "QuantizationConfig",
    "SpeculativeConfig",
    "config_from_kwargs",
    "get_generation_config",
    "get_hf_config",
]

logger = get_logger(__name__)

DTYPE_NAMES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda", "rocm")
KV_CACHE_DTYPES = ("bf16", "fp8")


def get_hf_config(model: str, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The transformers configuration of a model (directory, GGUF file, "smollm2" or hub name); ModelLoadError."""
    from atom.utils.hf_config import load_hf_config
    from atom.utils.model_path import resolve_model

    return load_hf_config(resolve_model(model, weights=False), trust_remote_code)


def get_generation_config(model: str) -> "GenerationConfig":
    """The generation defaults of a model; those its configuration implies where it ships none. ModelLoadError."""
    from atom.utils.hf_config import load_generation_config, load_hf_config
    from atom.utils.model_path import resolve_model

    path = resolve_model(model, weights=False)
    return load_generation_config(path, load_hf_config(path))


# --- compilation ---------------------------------------------------------------------------------


class CompilationLevel:
    NO_COMPILATION = 0
    DYNAMO_AS_IS = 1
    DYNAMO_ONCE = 2
    PIECEWISE = 3


class CUDAGraphMode(Enum):
    """What is captured; a pair means (decode batches, batches with prompts)."""

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_DECODE_ONLY = (FULL, NONE)
    FULL_AND_PIECEWISE = (FULL, PIECEWISE)

    def decode_mode(self) -> "CUDAGraphMode":
        """The mode of pure decode batches."""
        return CUDAGraphMode(self.value[0]) if self.separate_routine() else self

    def mixed_mode(self) -> "CUDAGraphMode":
        """The mode of batches that contain prompt tokens."""
        return CUDAGraphMode(self.value[1]) if self.separate_routine() else self

    def requires_piecewise_compilation(self) -> bool:
        return CUDAGraphMode.PIECEWISE in (self.decode_mode(), self.mixed_mode())

    def has_full_cudagraphs(self) -> bool:
        return CUDAGraphMode.FULL in (self.decode_mode(), self.mixed_mode())

    def separate_routine(self) -> bool:
        """Whether decode batches and mixed ones go different ways."""
        return isinstance(self.value, tuple)


_SPLITTING_OPS = ("aiter.unified_attention_with_output", "aiter.mla_attention")
_CAPTURE_SIZES_KEYWORD = "cudagraph_capture_sizes"
_PROMPT_GRAPH_SIZES = range(128, 1025, 128)  # longer steps keep a GPU busy while the host prepares their kernels


@dataclass(kw_only=True)
class CompilationConfig(StrictConfig):
    """torch.compile and CUDA graphs (guide, section 2)."""

    level: int = CompilationLevel.NO_COMPILATION
    use_cudagraph: bool = True
    cudagraph_capture_sizes: list[int] | None = None  # explicit (also as text); overrides cuda_graph_sizes
    cuda_graph_sizes: list[int] = field(default_factory=list)  # one value N: a ladder up to N; several: as they are
    debug_dump_path: str = ""
    cache_dir: str = ""
    use_inductor: bool = True
    cudagraph_mode: CUDAGraphMode | None = None  # also accepted: its name
    splitting_ops: list[str] | None = None
    cudagraph_copy_inputs: bool = False
    compile_sizes: list[int | str] | None = None  # integers and "cudagraph_capture_sizes"
    inductor_compile_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.level = _integer("level", self.level, 0, 3)
        for name in ("use_cudagraph", "use_inductor", "cudagraph_copy_inputs"):
            _check_bool(name, getattr(self, name))
        for name in ("debug_dump_path", "cache_dir"):
            _check_type(name, getattr(self, name), str, "a path")
        _check_type("inductor_compile_config", self.inductor_compile_config, dict, "a dict")
        self.cuda_graph_sizes = _sizes("cuda_graph_sizes", self.cuda_graph_sizes) or [512]
        if self.cudagraph_capture_sizes is not None:
            self.cudagraph_capture_sizes = _sizes("cudagraph_capture_sizes", self.cudagraph_capture_sizes)
        self._check_compile_sizes()
        self.cudagraph_mode = _cudagraph_mode(self.cudagraph_mode)
        if not self.use_cudagraph:
            if self.cudagraph_mode not in (None, CUDAGraphMode.NONE):
                raise ConfigError(f"cudagraph_mode={self.cudagraph_mode.name} contradicts use_cudagraph=False")
            self.cudagraph_mode = CUDAGraphMode.NONE
        if self.level == CompilationLevel.PIECEWISE:
            if self.cudagraph_mode is None:
                self.cudagraph_mode = CUDAGraphMode.PIECEWISE
            if self.splitting_ops is None:
                self.splitting_ops = list(_SPLITTING_OPS)
        elif self.cudagraph_mode is not None and self.cudagraph_mode.requires_piecewise_compilation():
            raise ConfigError(f"cudagraph_mode={self.cudagraph_mode.name} needs level=3, not level={self.level}")
        if self.splitting_ops is not None:
            ops = self.splitting_ops
            if not isinstance(ops, list) or not all(isinstance(op, str) for op in ops):
                raise ConfigError(f"splitting_ops={ops!r} must be a list of names of ops")

    def capture_sizes(self) -> list[int]:
        """The batch sizes to capture, ascending, before max_num_seqs limits them."""
        if self.cudagraph_capture_sizes is not None:
            sizes = self.cudagraph_capture_sizes
        elif len(self.cuda_graph_sizes) == 1:
            sizes = [1, 2, 4, 8, *range(16, self.cuda_graph_sizes[0] + 1, 16)]
        else:
            sizes = self.cuda_graph_sizes
        return sorted(set(sizes))

    def sizes_to_compile(self, capture_sizes: Iterable[int]) -> list[int]:
        """compile_sizes with its keyword replaced by the sizes that are captured."""
        sizes: set[int] = set()
        for size in self.compile_sizes or []:
            sizes.update(capture_sizes if isinstance(size, str) else [size])
        return sorted(sizes)

    def _check_compile_sizes(self) -> None:
        if self.compile_sizes is None:
            return
        _check_type("compile_sizes", self.compile_sizes, list, "a list")
        for size in self.compile_sizes:
            if size != _CAPTURE_SIZES_KEYWORD and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ConfigError(f"compile_sizes: {size!r} must be a positive integer or {_CAPTURE_SIZES_KEYWORD!r}")


def _cudagraph_mode(value: Any) -> CUDAGraphMode | None:
    if value is None or isinstance(value, CUDAGraphMode):
        return value
    if isinstance(value, str) and value.upper() in CUDAGraphMode.__members__:
        return CUDAGraphMode[value.upper()]
    raise ConfigError(f"cudagraph_mode={value!r} must be one of {', '.join(CUDAGraphMode.__members__)}")


def _sizes(name: str, value: Any) -> list[int]:
    if isinstance(value, str):  # as the command line gives it
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name}={value!r} must be a list of batch sizes such as [1,2,4,8]")
    return [_integer(name, size, 1) for size in value]


# --- quantization --------------------------------------------------------------------------------

_DEEPSEEK_PACKED = {"q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj"}


class QuantizationConfig:
    """How each layer of a checkpoint is stored (guide, section 3).

    torch_dtype: of what isn't quantized. hf_quant_config: the checkpoint's own words, None if it isn't quantized.
    exclude_layers: exact names, "re:" + regular expression, a parent module's name, or a glob.
    """

    def __init__(self, hf_config: "PretrainedConfig | None" = None) -> None:
        self.torch_dtype = _checkpoint_dtype(hf_config)[0]
        raw = getattr(hf_config, "quantization_config", None)
        if raw is None and hf_config is not None:
            from atom.utils.hf_config import text_config

            raw = getattr(text_config(hf_config), "quantization_config", None)
        if raw is not None and not isinstance(raw, dict):
            raw = raw.to_dict()  # transformers may already have made an object of it
        self.hf_quant_config: dict[str, Any] | None = raw or None
        unquantized = LayerQuantConfig(QuantType.No, self.torch_dtype)
        self._parsed = parse_quant_config(raw) if raw else ParsedQuantConfig(unquantized)
        self._unquantized = unquantized
        self.global_quant_config = self._parsed.global_spec
        self.exclude_layers = list(self._parsed.exclude_layers)
        self.quant_method = quant_method_of(raw) if raw else ""

    @property
    def is_quantized(self) -> bool:
        return self.hf_quant_config is not None

    def get_name(self) -> str:
        return self.quant_method

    def unserved_reason(self) -> str:
        """What of it no layer serves, or ""."""
        return unserved_reason(self.hf_quant_config, self._parsed) if self.hf_quant_config else ""

    def get_layer_quant_config(self, layer_name: str) -> LayerQuantConfig:
        """Exclusions first, then the first pattern that matches, then the global specification."""
        if any(_names_layer(pattern, layer_name) for pattern in self.exclude_layers):
            return self._unquantized
        for pattern, spec in self._parsed.layer_pattern_specs:
            if _matches(pattern, layer_name):
                return spec
        return self.global_quant_config

    def remap_layer_name(
        self, hf_config: "PretrainedConfig", packed_modules_mapping: Mapping[str, Any] | None = None
    ) -> None:
        """Rename checkpoint layers in exclusions and patterns to the fused layers that hold them.

        packed_modules_mapping: {"q_proj": "qkv_proj"}, {"q_proj": ("qkv_proj", shard)} or
        {"qkv_proj": ["q_proj", ...]}; DeepSeek's fused first projections are added by themselves.
        """
        renames: dict[str, str] = {}
        for key, value in (packed_modules_mapping or {}).items():
            if isinstance(value, list):
                renames.update(dict.fromkeys(value, key))
            else:
                renames[key] = value if isinstance(value, str) else value[0]
        if str(getattr(hf_config, "model_type", "")).startswith("deepseek"):
            renames = {**_DEEPSEEK_PACKED, **renames}
        if getattr(hf_config, "q_lora_rank", 0) is None:  # without it there is nothing to fuse
            renames = {k: v for k, v in renames.items() if v != "fused_qkv_a_proj"}
        if not renames:
            return
        # A whole dotted component, also inside a regular expression.
        component = re.compile(rf"(?<![A-Za-z0-9_])({'|'.join(map(re.escape, renames))})(?![A-Za-z0-9_])")

        def rename(pattern: str) -> str:
            return component.sub(lambda match: renames[match.group(1)], pattern)

        self.exclude_layers = list(dict.fromkeys(map(rename, self.exclude_layers)))
        patterns: dict[str, LayerQuantConfig] = {}
        for pattern, spec in self._parsed.layer_pattern_specs:
            patterns.setdefault(rename(pattern), spec)
        self._parsed = ParsedQuantConfig(self._parsed.global_spec, list(patterns.items()), self.exclude_layers)

    def compute_hash(self) -> str:
        """SHA-256 of everything that decides how layers are stored; for caches of compiled code."""
        parts = [
            str(self.torch_dtype),
            json.dumps(self.hf_quant_config, sort_keys=True, default=str),
            repr(self.global_quant_config),
            repr(self._parsed.layer_pattern_specs),
            repr(self.exclude_layers),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _matches(pattern: str, layer_name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer_name) is not None
    return fnmatchcase(layer_name, pattern)


def _names_layer(pattern: str, layer_name: str) -> bool:
    """As `_matches`, and a module's name also stands for the modules inside it."""
    return _matches(pattern, layer_name) or layer_name.startswith(pattern + ".")


def _checkpoint_dtype(hf_config: "PretrainedConfig | None") -> "tuple[torch.dtype, bool]":
    """(the dtype a checkpoint declares or bfloat16, whether it declares one)."""
    import torch

    from atom.utils.hf_config import text_config

    for config in (hf_config, text_config(hf_config)):
        dtype = getattr(config, "dtype", None) or getattr(config, "__dict__", {}).get("torch_dtype")
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype, True
    return torch.bfloat16, False


# --- parallelism ---------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ParallelConfig(StrictConfig):
    """Data parallelism (guide, section 4). A variable ATOM_DP_* that is set wins over the field."""

    data_parallel_size: int = 1
    data_parallel_size_local: int = 1
    data_parallel_rank: int = 0
    data_parallel_rank_local: int | None = None
    data_parallel_master_port: int = 29500
    data_parallel_base_port: int = field(default_factory=get_open_port)
    data_parallel_master_ip: str = "127.0.0.1"
    world_size: int = field(init=False, default=1)  # TP x PP; set by Config

    _ENV: ClassVar[dict[str, str]] = {
        "data_parallel_size": "ATOM_DP_SIZE",
        "data_parallel_rank": "ATOM_DP_RANK",
        "data_parallel_rank_local": "ATOM_DP_RANK_LOCAL",
        "data_parallel_master_ip": "ATOM_DP_MASTER_IP",
        "data_parallel_master_port": "ATOM_DP_MASTER_PORT",
    }

    def __post_init__(self) -> None:
        for name, variable in self._ENV.items():
            if not envs.is_set(variable):
                continue
            value = getattr(envs, variable)
            if self.is_user_set(name) and getattr(self, name) != value:
                log_once(logger, "%s=%r is overridden by %s=%r", name, getattr(self, name), variable, value)
            setattr(self, name, value)
            self._user_set |= {name}
        size = self.data_parallel_size = _integer("data_parallel_size", self.data_parallel_size, 1)
        self.data_parallel_size_local = _integer("data_parallel_size_local", self.data_parallel_size_local, 1)
        if self.data_parallel_size_local > size:
            raise ConfigError(
                f"data_parallel_size_local={self.data_parallel_size_local} exceeds data_parallel_size={size}"
            )
        self.data_parallel_rank = _integer("data_parallel_rank", self.data_parallel_rank, 0)
        if self.data_parallel_rank >= size:
            raise ConfigError(
                f"data_parallel_rank={self.data_parallel_rank} must be below data_parallel_size={size} "
                "(environment: ATOM_DP_RANK, ATOM_DP_SIZE)"
            )
        if self.data_parallel_rank_local is not None:
            self.data_parallel_rank_local = _integer("data_parallel_rank_local", self.data_parallel_rank_local, 0)
        for name in ("data_parallel_master_port", "data_parallel_base_port"):
            setattr(self, name, _integer(name, getattr(self, name), 1, 65535))
        _check_host("data_parallel_master_ip", self.data_parallel_master_ip)

    @property
    def world_size_across_dp(self) -> int:
        return self.world_size * self.data_parallel_size


# --- speculative decoding ------------------------------------------------------------------------


@dataclass(kw_only=True)
class SpeculativeConfig(StrictConfig):
    """Speculative decoding (guide, section 5). Loads the draft model's configuration from `model`."""

    method: str | None = ""
    model: str | None = None
    num_speculative_tokens: int | None = None
    draft_model_hf_config: "PretrainedConfig | None" = None

    # model_type -> model_type of its multi-token prediction layers
    _MTP_TYPE_MAP: ClassVar[dict[str, str]] = {
        "deepseek_v3": "deepseek_mtp",
        "glm_moe_dsa": "deepseek_mtp",
        "qwen3_next": "qwen3_next_mtp",
        "qwen3_5": "qwen3_5_mtp",
        "qwen3_5_moe": "qwen3_5_mtp",
        "qwen3_5_text": "qwen3_5_mtp",
        "qwen3_5_moe_text": "qwen3_5_mtp",
    }
    # MTP model_type -> (attribute that counts its layers, architecture)
    _MTP_CONFIG: ClassVar[dict[str, tuple[str, str]]] = {
        "deepseek_mtp": ("num_nextn_predict_layers", "DeepSeekMTPModel"),
        "qwen3_next_mtp": ("num_nextn_predict_layers", "Qwen3NextMTPModel"),
        "qwen3_5_mtp": ("mtp_num_hidden_layers", "Qwen3_5MTPModel"),
    }

    def __post_init__(self) -> None:
        if self.method not in (None, "", "mtp"):
            raise ConfigError(f"speculative method={self.method!r} must be 'mtp'")
        if self.num_speculative_tokens is not None:
            _integer("num_speculative_tokens", self.num_speculative_tokens, 1)
        if self.draft_model_hf_config is None:
            if self.model is None:
                return
            self.draft_model_hf_config = get_hf_config(self.model)
        else:
            # The override below must not reach the target model's configuration.
            self.draft_model_hf_config = copy.deepcopy(self.draft_model_hf_config)
        from atom.utils.hf_config import text_config

        self.draft_model_hf_config = self.hf_config_override(text_config(self.draft_model_hf_config))

    @staticmethod
    def hf_config_override(hf_config: "PretrainedConfig") -> "PretrainedConfig":
        """Turn a target model's configuration into that of its MTP layers, in place; others are left alone."""
        target_type = hf_config.model_type
        mtp_type = SpeculativeConfig._MTP_TYPE_MAP.get(target_type, target_type)
        if mtp_type not in SpeculativeConfig._MTP_CONFIG:
            return hf_config
        count_attribute, architecture = SpeculativeConfig._MTP_CONFIG[mtp_type]
        n_predict = getattr(hf_config, count_attribute, None)
        if n_predict not in (None, 1):
            log_once(logger, "%s=%r: one MTP layer is used", count_attribute, n_predict, level=30)
        changes: dict[str, Any] = {
            "model_type": mtp_type,
            "n_predict": 1,
            "num_nextn_predict_layers": 1,
            "architectures": [architecture],
        }
        if mtp_type == "qwen3_5_mtp":
            changes |= {"n_shared_experts": 1, "n_routed_experts": getattr(hf_config, "num_experts", 0) or 0}
        hf_config.update(changes)
        return hf_config


# --- KV cache ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class KVCacheTensor:
    """One layer's cache: k and v [blocks, block_size, kv_heads, head_dim]; scales, if any, without head_dim."""

    layer_num: int
    k_cache: "torch.Tensor"
    v_cache: "torch.Tensor"
    k_scale: "torch.Tensor | None" = None
    v_scale: "torch.Tensor | None" = None


@dataclass(kw_only=True)
class KVCacheConfig:
    num_blocks: int = 0
    kv_cache_tensors: list[KVCacheTensor] = field(default_factory=list)


# --- the whole -----------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Config(StrictConfig):
    """What the engine consumes (guide, section 1). Checked and completed on construction.

    reasons: for each derived value, why it is what it is. Raises ConfigError and ModelLoadError.
    """

    _positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str = field(kw_only=False)
    trust_remote_code: bool = False
    max_num_batched_tokens: int = 16384
    scheduler_delay_factor: float = 0.0
    max_num_seqs: int = 512
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    cpu_memory_utilization: float = 0.4  # share of the free RAM that the KV cache may take on a CPU
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    kv_cache_block_size: int = 16
    num_kvcache_blocks: int = -1
    kv_cache_dtype: str = "bf16"  # "bf16": that of the activations; "fp8": scaled e4m3
    enable_prefix_caching: bool = False
    port: int = 8006
    torch_profiler_dir: str | None = field(default_factory=lambda: envs.ATOM_TORCH_PROFILER_DIR)
    compilation_config: CompilationConfig = field(default_factory=CompilationConfig)
    quant_config: QuantizationConfig = None  # type: ignore[assignment]  # None: what the checkpoint says
    asyncio_mode: bool = False
    load_dummy: bool = False
    enable_expert_parallel: bool = False
    master_addr: str = "127.0.0.1"
    graph_bs: list[int] | None = None
    enable_dp_attention: bool = False
    torch_dtype: "torch.dtype" = "auto"  # type: ignore[assignment]  # a torch.dtype or a name; a dtype when completed
    speculative_config: SpeculativeConfig | None = None
    bos_token_id: int = -1
    eos_token_id: int = -1
    stop_token_ids: list[int] = field(default_factory=list)
    device: str = "auto"
    attention_backend: str = "auto"
    tokenizer: str | None = None  # where it isn't the model's own
    seed: int = 0
    num_threads: int | None = None  # of the CPU; None: torch's choice
    log_level: str = "info"

    hf_config: "PretrainedConfig" = field(init=False, repr=False)
    generation_config: "GenerationConfig" = field(init=False, repr=False)
    model_path: "ModelPath" = field(init=False, repr=False)
    per_req_cache_equiv_blocks: int = field(init=False, default=0)
    num_per_req_cache_groups: int = field(init=False, default=0)
    prompt_graph_sizes: list[int] = field(init=False, default_factory=list)  # beyond graph_bs, in tokens
    reasons: dict[str, str] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._check_values()
        configure_logging(self.log_level if self.is_user_set("log_level") else None)
        envs.warn_unknown()
        self._adopt_parts()
        self._check_speculation()
        _refuse_unsupported(self)
        self._load_checkpoint_facts()
        _refuse_unsupported(self)
        self._derive_dtype()
        self._derive_max_model_len()
        self._derive_special_tokens()
        self._derive_graph_batch_sizes()
        if self.torch_profiler_dir:
            _make_directory("torch_profiler_dir", self.torch_profiler_dir)

    def inactive_settings(self) -> list[str]:
        """What the user set, beyond its default, that nothing acts on yet: ["asyncio_mode=True", ...]."""
        found = []
        for part, names in _INACTIVE.items():
            owner = getattr(self, part) if part else self
            for name in names:
                value = getattr(owner, name)
                if owner.is_user_set(name) and value != _default_of(owner, name):
                    found.append(f"{name}={value.name if isinstance(value, Enum) else value}")
        return found

    # -- checks --

    def _check_values(self) -> None:
        for f in fields(self):
            if f.type is bool:
                _check_bool(f.name, getattr(self, f.name))
        self.max_num_batched_tokens = _integer("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        self.max_num_seqs = _integer("max_num_seqs", self.max_num_seqs, 1)
        if self.max_model_len is not None:
            self.max_model_len = _integer("max_model_len", self.max_model_len, 1)
        self.scheduler_delay_factor = _real("scheduler_delay_factor", self.scheduler_delay_factor, 0, 1e6)
        for name in ("gpu_memory_utilization", "cpu_memory_utilization"):
            setattr(self, name, _real(name, getattr(self, name), 0, 1))
            if getattr(self, name) == 0:
                raise ConfigError(f"{name}=0 leaves no memory for the KV cache; choose a share above 0, up to 1")
        self.tensor_parallel_size = _integer("tensor_parallel_size", self.tensor_parallel_size, 1, 8)
        size = self.kv_cache_block_size = _integer("kv_cache_block_size", self.kv_cache_block_size, 1)
        if size != 1 and size % 16:
            raise ConfigError(f"kv_cache_block_size={size} must be a multiple of 16 or exactly 1")
        self.num_kvcache_blocks = _integer("num_kvcache_blocks", self.num_kvcache_blocks, -1)
        if self.num_kvcache_blocks == 0:
            raise ConfigError("num_kvcache_blocks=0 must be -1 (automatic) or at least 1")
        _choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _choice("device", self.device, DEVICES)
        _check_type("attention_backend", self.attention_backend, str, "a backend's name or 'auto'")
        self.port = _integer("port", self.port, 1, 65535)
        _check_host("master_addr", self.master_addr)
        if self.torch_profiler_dir is not None:
            self.torch_profiler_dir = _path("torch_profiler_dir", self.torch_profiler_dir)
        if self.tokenizer is not None:
            self.tokenizer = _path("tokenizer", self.tokenizer)
        self.model = _path("model", self.model)
        for name in ("bos_token_id", "eos_token_id"):
            setattr(self, name, _integer(name, getattr(self, name), -1))
        if not isinstance(self.stop_token_ids, list | tuple):
            raise ConfigError(f"stop_token_ids={self.stop_token_ids!r} must be a list of token ids")
        self.stop_token_ids = [_integer("stop_token_ids", i, 0) for i in self.stop_token_ids]
        if self.graph_bs is not None:
            self.graph_bs = _sizes("graph_bs", self.graph_bs)
        self.seed = _integer("seed", self.seed, 0, 2**63 - 1)
        if self.num_threads is not None:
            self.num_threads = _integer("num_threads", self.num_threads, 1, 4096)
        self.log_level = str(self.log_level).lower()
        _choice("log_level", self.log_level, LEVELS)
        if isinstance(self.torch_dtype, str):
            _choice("torch_dtype", self.torch_dtype.removeprefix("torch."), DTYPE_NAMES)

    def _adopt_parts(self) -> None:
        """Own copies of the sub-configs, so that completing this one changes no other."""
        self.parallel_config = _part("parallel_config", self.parallel_config, ParallelConfig)
        self.parallel_config.world_size = self.tensor_parallel_size
        self.compilation_config = _part("compilation_config", self.compilation_config, CompilationConfig)
        if self.speculative_config is not None:
            self.speculative_config = _part("speculative_config", self.speculative_config, SpeculativeConfig)

    def _check_speculation(self) -> None:
        spec = self.speculative_config
        if spec is None or not spec.method:
            return
        if spec.num_speculative_tokens != 1:
            raise ConfigError(f"num_speculative_tokens={spec.num_speculative_tokens} must be 1")

    # -- what follows from the checkpoint --

    def _load_checkpoint_facts(self) -> None:
        from atom.utils.hf_config import load_generation_config, load_hf_config
        from atom.utils.model_path import resolve_model

        self.model_path = resolve_model(self.model, weights=not self.load_dummy)
        self.hf_config = load_hf_config(self.model_path, self.trust_remote_code)
        self.generation_config = load_generation_config(self.model_path, self.hf_config)
        if self.quant_config is None:
            self.quant_config = QuantizationConfig(self.hf_config)
            method = self.quant_config.quant_method
            self.reasons["quant_config"] = (
                f"the checkpoint's quantization_config ({method})" if method else "the checkpoint is not quantized"
            )
        elif not isinstance(self.quant_config, QuantizationConfig):
            raise ConfigError(f"quant_config={self.quant_config!r:.100} must be a QuantizationConfig")

    def _derive_dtype(self) -> None:
        import torch

        given = self.torch_dtype
        if isinstance(given, str) and given != "auto":
            given = getattr(torch, given.removeprefix("torch."))
        if isinstance(given, torch.dtype):
            if given not in (torch.bfloat16, torch.float16, torch.float32):
                raise ConfigError(f"torch_dtype={given} must be one of {', '.join(DTYPE_NAMES)}")
            self.torch_dtype, reason = given, "given"
        elif given == "auto":
            dtype, declared = _checkpoint_dtype(self.hf_config)
            if declared and dtype in (torch.bfloat16, torch.float16, torch.float32):
                self.torch_dtype, reason = dtype, "the checkpoint's"
            else:
                self.torch_dtype, reason = torch.bfloat16, "the default: the checkpoint names none that can be used"
        else:
            raise ConfigError(f"torch_dtype={given!r} must be a torch.dtype or one of {', '.join(DTYPE_NAMES)}")
        self.reasons["torch_dtype"] = reason

    def _derive_max_model_len(self) -> None:
        from atom.utils.hf_config import text_config

        limit = getattr(text_config(self.hf_config), "max_position_embeddings", None)
        if self.max_model_len is None:
            if limit is None:
                raise ConfigError("max_model_len must be given: the checkpoint has no max_position_embeddings")
            self.max_model_len = limit
            self.reasons["max_model_len"] = "the checkpoint's max_position_embeddings"
        elif limit is not None and self.max_model_len > limit:
            logger.warning("max_model_len: %d -> %d, the model's max_position_embeddings", self.max_model_len, limit)
            self.reasons["max_model_len"] = f"capped from {self.max_model_len} to max_position_embeddings"
            self.max_model_len = limit
        else:
            self.reasons["max_model_len"] = "given"

    def _derive_special_tokens(self) -> None:
        from atom.utils.hf_config import text_config

        own = text_config(self.hf_config)
        ends = _as_ids(self.generation_config.eos_token_id) or _as_ids(getattr(own, "eos_token_id", None))
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name) != -1:
                self.reasons[name] = "given"
                continue
            ids = _as_ids(getattr(own, name, None)) or _as_ids(getattr(self.generation_config, name))
            if ids:
                setattr(self, name, ids[0])
                self.reasons[name] = "the model's"
            else:
                self.reasons[name] = "-1: the model names none"
        given = bool(self.stop_token_ids)
        self.stop_token_ids = list(dict.fromkeys([*self.stop_token_ids, *ends]))
        source = "the tokenizer's end tokens" if self.model_path.gguf_file else "the generation config's end tokens"
        self.reasons["stop_token_ids"] = f"given, and {source}" if given else source

    @property
    def end_token_ids(self) -> list[int]:
        """The model's own, which end an answer unless a request ignores them."""
        return list(dict.fromkeys(i for i in (self.eos_token_id, *self.stop_token_ids) if i >= 0))

    def _derive_graph_batch_sizes(self) -> None:
        compilation = self.compilation_config
        if self.enforce_eager:
            compilation.level = CompilationLevel.NO_COMPILATION
            compilation.use_cudagraph = False
            compilation.cudagraph_mode = CUDAGraphMode.NONE
            self.reasons["compilation_config"] = "level 0 without CUDA graphs: enforce_eager"
        if not compilation.use_cudagraph or compilation.cudagraph_mode is CUDAGraphMode.NONE:
            self.graph_bs = []
            self.reasons["graph_bs"] = "none: enforce_eager" if self.enforce_eager else "none: CUDA graphs are off"
            return
        sizes = self.graph_bs if self.graph_bs is not None else compilation.capture_sizes()
        self.graph_bs = sorted({size for size in sizes if size <= self.max_num_seqs})
        is_given = self.is_user_set("graph_bs") or compilation.is_user_set("cudagraph_capture_sizes")
        self.prompt_graph_sizes = self._find_prompt_graph_sizes(sizes if is_given else _PROMPT_GRAPH_SIZES)
        if is_given:
            reason = "given"
        elif compilation.cudagraph_capture_sizes is not None:
            reason = "the default of --cudagraph-capture-sizes"
        else:
            reason = f"cuda_graph_sizes={compilation.cuda_graph_sizes}"
        if len(self.graph_bs) < len(set(sizes)):
            reason += f", less those over max_num_seqs={self.max_num_seqs}"
        self.reasons["graph_bs"] = reason

    def _find_prompt_graph_sizes(self, sizes: Iterable[int]) -> list[int]:
        """Those that only a step with prompts can have, where such steps have graphs."""
        mode = self.compilation_config.cudagraph_mode
        if mode is None or mode.mixed_mode() is CUDAGraphMode.NONE or not self.graph_bs:
            return []
        return sorted({size for size in sizes if self.graph_bs[-1] < size <= self.max_num_batched_tokens})


# --- building one from flat names ----------------------------------------------------------------

# Names that EngineArgs and LLM use -> the field they set (dotted: of a sub-config).
_ALIASES = {
    "block_size": "kv_cache_block_size",
    "dtype": "torch_dtype",
    "level": "compilation_config.level",
    "cudagraph_capture_sizes": "compilation_config.cudagraph_capture_sizes",
    "cudagraph_mode": "compilation_config.cudagraph_mode",
    "data_parallel_size": "parallel_config.data_parallel_size",
    "method": "speculative_config.method",
    "num_speculative_tokens": "speculative_config.num_speculative_tokens",
}


def config_from_kwargs(model: str, **kwargs: Any) -> Config:
    """A Config from any mix of Config fields and EngineArgs names.

    Lists of sizes may be a text such as "[1,2,4]". Unknown and colliding names are ConfigErrors.
    """
    known = [f.name for f in fields(Config) if f.init]
    settings: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in kwargs.items():
        target = _ALIASES.get(name, name)
        part, _, attribute = target.rpartition(".")
        if part:
            if part in kwargs:
                raise ConfigError(f"{name} and {part} are both given; set {attribute} in one place")
            parts.setdefault(part, {})[attribute] = value
        elif target not in known:
            raise ConfigError(f"unknown field {name!r}{did_you_mean(name, [*known, *_ALIASES])}")
        elif target != name and target in kwargs:
            raise ConfigError(f"{name} and {target} are the same setting; give one of them")
        else:
            settings[target] = value
    if "compilation_config" in parts:
        settings["compilation_config"] = CompilationConfig(**parts["compilation_config"])
    if "parallel_config" in parts:
        settings["parallel_config"] = ParallelConfig(**parts["parallel_config"])
    if "speculative_config" in parts:
        settings["speculative_config"] = _speculative_part(model, **parts["speculative_config"])
    return Config(model, **settings)


def _speculative_part(
    model: str, method: str | None = None, num_speculative_tokens: int = 1
) -> SpeculativeConfig | None:
    if method:
        return SpeculativeConfig(method=method, model=model, num_speculative_tokens=num_speculative_tokens)
    if num_speculative_tokens != 1:
        raise ConfigError(f"num_speculative_tokens={num_speculative_tokens} needs method='mtp' beside it")
    return None


# --- what has not landed -------------------------------------------------------------------------


def _unserved_quantization(config: Config) -> str:
    quant = config.quant_config
    reason = quant.unserved_reason() if isinstance(quant, QuantizationConfig) else ""
    return f"a quantized checkpoint with {reason} (quant_method={quant.get_name()!r})" if reason else ""


def _speculation(config: Config) -> str:
    spec = config.speculative_config
    return f"speculative decoding (method={spec.method!r})" if spec is not None and spec.method else ""


# Settings that would give wrong results if they were ignored: each says what is asked for, or "".
# A capability that lands removes its line here; so it does in _INACTIVE and in docs/status.md.
# (Checkpoints with code of their own are refused where their config is read, in utils/hf_config.py.)
_UNSUPPORTED: list[Callable[[Config], str]] = [
    lambda c: f"tensor_parallel_size={c.tensor_parallel_size}" if c.tensor_parallel_size > 1 else "",
    lambda c: (
        f"data_parallel_size={c.parallel_config.data_parallel_size}" if c.parallel_config.data_parallel_size > 1 else ""
    ),
    _unserved_quantization,
    _speculation,
]

# Settings that change only speed or placement: accepted, and reported as not yet active ("" = of Config itself).
_INACTIVE: dict[str, tuple[str, ...]] = {
    "": ("enable_expert_parallel", "enable_dp_attention", "master_addr"),
    "parallel_config": tuple(f.name for f in fields(ParallelConfig) if f.init),
}


def _refuse_unsupported(config: Config) -> None:
    for asked in _UNSUPPORTED:
        what = asked(config)
        if what:
            raise ConfigError(f"{what} is not supported yet")


# --- small checks --------------------------------------------------------------------------------


def _default_of(owner: Any, name: str) -> Any:
    f = next(f for f in fields(owner) if f.name == name)
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else None


def _part(name: str, value: Any, cls: type) -> Any:
    if isinstance(value, dict):
        return cls(**value)
    if not isinstance(value, cls):
        raise ConfigError(f"{name}={value!r:.100} must be a {cls.__name__} or a dict of its fields")
    return copy.copy(value)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name}={value!r} must be an integer")
    value = int(value)
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{name}={value} must be {bounds}")
    return value


def _real(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise ConfigError(f"{name}={value!r} must be a number")
    value = float(value)
    if not low <= value <= high:  # false for NaN as well
        raise ConfigError(f"{name}={value:g} must be between {low:g} and {high:g}")
    return value


def _check_type(name: str, value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r:.100} must be {what}")


def _check_bool(name: str, value: Any) -> None:
    _check_type(name, value, bool, "True or False")


def _check_host(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name}={value!r} must be a host name or an IP address")


def _choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(choices)}{did_you_mean(str(value), choices)}")


def _path(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"{name}={value!r} must be a path or a name")
    return os.fspath(value)


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _make_directory(name: str, path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{name}={path!r} can't be created: {error.strerror}") from None
