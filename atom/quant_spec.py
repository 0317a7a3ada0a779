"""How a layer's weights are stored: the specification of one layer and the readers of checkpoint formats.

A reader turns a checkpoint's `quantization_config` dict into a `ParsedQuantConfig`. It decides nothing
about kernels and reads no tensor.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from atom.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch


class QuantType(Enum):
    """Which weights share a scale."""

    No = 0
    per_Tensor = 1
    per_Token = 2  # per token of the activation, per output channel of the weight
    per_1x32 = 3
    per_1x128 = 4
    per_128x128 = 5


# Our key of a storage format -> torch's name of it; the x2 formats pack two values a byte.
_DTYPE_NAMES = {"fp8": "float8_e4m3fn", "fp4x2": "float4_e2m1fn_x2", "i8": "int8", "i4x2": "int4"}
_BITS = {(8, True): "fp8", (8, False): "i8", (4, True): "fp4x2", (4, False): "i4x2"}  # (bits, is a float)


def quant_dtype(key: str) -> "torch.dtype":
    """torch dtype of "fp8", "fp4x2", "i8" or "i4x2", as checkpoints store them (platforms may convert)."""
    import torch

    return getattr(torch, _DTYPE_NAMES[key])


def dtype_key(dtype: "torch.dtype") -> str:
    """The inverse of `quant_dtype`; "" for others."""
    return {name: key for key, name in _DTYPE_NAMES.items()}.get(str(dtype).removeprefix("torch."), "")


def _bfloat16() -> "torch.dtype":
    import torch

    return torch.bfloat16


@dataclass(frozen=True)
class LayerQuantConfig:
    """Quantization of one layer, or the default of all.

    quant_dtype: of the weights. is_dynamic: activation scales are computed at run time.
    """

    quant_type: QuantType = QuantType.No
    quant_dtype: "torch.dtype" = field(default_factory=_bfloat16)
    is_dynamic: bool = True
    quant_method: str = ""


@dataclass(frozen=True)
class ParsedQuantConfig:
    """What a reader found. Patterns are fnmatch globs or "re:" + regular expression, first match wins."""

    global_spec: LayerQuantConfig
    layer_pattern_specs: list[tuple[str, LayerQuantConfig]] = field(default_factory=list)
    exclude_layers: list[str] = field(default_factory=list)


def parse_quant_config(config: dict[str, Any]) -> ParsedQuantConfig:
    """Read a checkpoint's quantization_config; ConfigError when it can't be understood."""
    if not isinstance(config, dict):
        raise ConfigError(f"quantization_config={config!r} must be a JSON object")
    method = quant_method_of(config)
    parser = {"quark": parse_quark, "compressed-tensors": parse_compressed_tensors}.get(method, parse_generic)
    return parser(config)


# Whose names of tensors the loader knows.
SERVED_METHODS = ("compressed-tensors", "fp8", "quark")
# What dense layers can be, as atom/layers/quant/registry.py says, which stands above this module.
SERVED = ((QuantType.per_Tensor, "fp8"), (QuantType.per_Token, "fp8"), (QuantType.per_1x128, "fp8"))


def unserved_reason(config: dict[str, Any], parsed: ParsedQuantConfig) -> str:
    """What of a checkpoint's quantization no layer serves, or ""."""
    if quant_method_of(config) not in SERVED_METHODS:
        return f"a method other than {', '.join(SERVED_METHODS)}"
    for spec in (parsed.global_spec, *(spec for _, spec in parsed.layer_pattern_specs)):
        if spec.quant_type is QuantType.No:
            continue
        if (spec.quant_type, dtype_key(spec.quant_dtype)) not in SERVED:
            return f"{str(spec.quant_dtype).removeprefix('torch.')} weights, {spec.quant_type.name}"
        if not spec.is_dynamic:
            return "static scales of activations"
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, dict)]
    if any(not g.get("input_activations") for g in groups):
        return "activations that are not quantized"
    if config.get("kv_cache_scheme"):
        return "a calibrated KV cache"
    return ""


def quant_method_of(config: dict[str, Any]) -> str:
    return str(config.get("quant_method") or "")


def _spec(
    quant_type: QuantType, dtype_key: str | None, is_dynamic: bool, method: str, source: object
) -> LayerQuantConfig:
    if dtype_key is None:
        raise ConfigError(f"quantization_config: no weight format (fp8, mxfp4, int8, int4) found in {source!r:.200}")
    if dtype_key == "fp4x2":
        quant_type = QuantType.per_1x32  # microscaling: one scale for 32 values, by definition
    return LayerQuantConfig(quant_type, quant_dtype(dtype_key), is_dynamic, method)


def _dtype_key(text: object) -> str | None:
    """The format that a name such as "fp8_e4m3", "mxfp4", "float8_e4m3fn" or "int4" means."""
    name = str(text).lower()
    for key, parts in (
        ("fp4x2", ("fp4", "float4", "e2m1")),
        ("fp8", ("fp8", "float8", "f8_e4m3", "e4m3")),
        ("i8", ("int8",)),
        ("i4x2", ("int4",)),
    ):
        if any(part in name for part in parts):
            return key
    return None


def _group_type(size: object) -> QuantType:
    if isinstance(size, list | tuple):  # a block of [rows, columns]
        if list(size) == [128, 128]:
            return QuantType.per_1x128  # activations 1x128, weights 128x128
        size = size[-1] if len(size) == 2 and size[0] == 1 else tuple(size)
    types = {32: QuantType.per_1x32, 128: QuantType.per_1x128, -1: QuantType.per_Token}
    if size not in types:
        raise ConfigError(f"quantization_config: group size {size} is not supported; 32, 128 or [128, 128] are")
    return types[size]


def _strings(value: object) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple) else []


# --- quark ---------------------------------------------------------------------------------------


def parse_quark(config: dict[str, Any]) -> ParsedQuantConfig:
    method = quant_method_of(config)
    overrides = config.get("layer_quant_config") or {}
    return ParsedQuantConfig(
        _quark_spec(config.get("global_quant_config") or {}, method),
        [(pattern, _quark_spec(entry, method)) for pattern, entry in overrides.items()],
        _strings(config.get("exclude")),
    )


def _quark_spec(entry: dict[str, Any], method: str) -> LayerQuantConfig:
    weight = entry.get("weight")
    if not weight:  # an override may say that a layer isn't quantized
        return LayerQuantConfig(quant_method=method)
    if not isinstance(weight, dict):
        raise ConfigError(f"quantization_config: quark weight={weight!r:.100} must be one JSON object")
    scheme = weight.get("qscheme")
    types = {"per_channel": QuantType.per_Token, "per_tensor": QuantType.per_Tensor, "per_group": QuantType.per_1x32}
    if scheme not in types:
        raise ConfigError(f"quantization_config: quark qscheme={scheme!r} is not one of {', '.join(types)}")
    quant_type = types[scheme]
    if scheme == "per_group" and weight.get("group_size") is not None:
        quant_type = _group_type(weight["group_size"])
    inputs = entry.get("input_tensors") or {}
    is_dynamic = inputs.get("is_dynamic") if isinstance(inputs, dict) else None
    return _spec(quant_type, _dtype_key(weight.get("dtype")), is_dynamic is not False, method, weight)


# --- compressed-tensors --------------------------------------------------------------------------


def parse_compressed_tensors(config: dict[str, Any]) -> ParsedQuantConfig:
    """Several groups: the one that targets "Linear" is the default, targets that name layers override it."""
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, dict)]
    if not groups:
        return parse_generic(config)
    overrides: list[tuple[str, LayerQuantConfig]] = []
    default: LayerQuantConfig | None = None
    for group in groups:
        spec = _compressed_spec(config, group)
        targets = _strings(group.get("targets")) or ["Linear"]
        for target in targets:
            # A target is a class name of torch, a layer's name, or "re:" + expression over layer names.
            if target.startswith("re:") or "." in target:
                overrides.append((target, spec))
            else:
                default = default or spec
    unquantized = LayerQuantConfig(quant_method=quant_method_of(config))
    return ParsedQuantConfig(default or unquantized, overrides, _strings(config.get("ignore")))


def _compressed_spec(config: dict[str, Any], group: dict[str, Any]) -> LayerQuantConfig:
    weights = group.get("weights") or {}
    strategy = weights.get("strategy")
    quant_type = QuantType.per_Token
    if strategy == "tensor":
        quant_type = QuantType.per_Tensor
    elif strategy == "block":
        quant_type = _group_type(weights.get("block_structure"))
    elif strategy in ("group", "tensor_group"):
        quant_type = _group_type(weights.get("group_size"))
    bits: Any = weights.get("num_bits")
    is_float = str(weights.get("type", "int")).startswith("float")
    key = _BITS.get((bits, is_float))
    inputs = group.get("input_activations") or {}
    is_dynamic = inputs.get("dynamic", True) is not False and config.get("activation_scheme") != "static"
    return _spec(quant_type, key, is_dynamic, quant_method_of(config), weights)


# --- fp8, mxfp4, gptq, awq and other flat dicts --------------------------------------------------


def parse_generic(config: dict[str, Any]) -> ParsedQuantConfig:
    method = quant_method_of(config)
    weights = config.get("weights") if isinstance(config.get("weights"), dict) else {}
    flat = {**(weights or {}), **config}
    block = flat.get("weight_block_size")
    group = block if block is not None else flat.get("group_size")
    if group is not None:
        quant_type = _group_type(group)
    elif method == "compressed-tensors" or "channel" in _all_strings(config):
        quant_type = QuantType.per_Token
    else:
        quant_type = QuantType.per_Tensor
    exclude = [*_strings(config.get("ignore")), *_strings(config.get("modules_to_not_convert"))]
    is_dynamic = config.get("activation_scheme") != "static"
    return ParsedQuantConfig(_spec(quant_type, _generic_dtype(flat), is_dynamic, method, config), [], exclude)


def _generic_dtype(config: dict[str, Any]) -> str | None:
    for name in ("dtype", "weight_dtype", "quant_method", "fmt"):
        key = _dtype_key(config.get(name) or "")
        if key is not None:
            return key
    bits = config.get("num_bits", config.get("bits"))
    is_float = str(config.get("type", "int")).startswith("float")
    return _BITS.get((bits, is_float)) if isinstance(bits, int) else None


def _all_strings(value: object) -> set[str]:
    """Every string value inside nested dicts and lists."""
    if isinstance(value, dict):
        return set().union(*(_all_strings(v) for v in value.values())) if value else set()
    if isinstance(value, list | tuple):
        return set().union(*(_all_strings(v) for v in value)) if value else set()
    return {value} if isinstance(value, str) else set()
