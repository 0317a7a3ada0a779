"""A Config as plain data and back: the settings its user gave, which the other side resolves anew."""

from dataclasses import fields
from enum import Enum
from typing import Any

from atom.config import CompilationConfig, Config, ParallelConfig, SpeculativeConfig
from atom.utils.errors import ConfigError

_PARTS: dict[str, type] = {
    "compilation_config": CompilationConfig,
    "parallel_config": ParallelConfig,
    "speculative_config": SpeculativeConfig,
}
_NOT_SENT = ("draft_model_hf_config",)  # derived from the draft model's name


def config_to_plain(config: Config) -> dict[str, Any]:
    """Call it before the engine resolves what is open. ConfigError for a setting that only exists in memory."""
    if config.is_user_set("quant_config") and config.quant_config is not None:
        raise ConfigError("quant_config can't be given as an object with asyncio_mode: leave it to the checkpoint")
    plain: dict[str, Any] = {}
    for f in fields(config):
        if f.init and f.name not in _PARTS and f.name != "quant_config" and config.is_user_set(f.name):
            plain[f.name] = _plain(getattr(config, f.name))
    for name in _PARTS:
        part = getattr(config, name)
        if part is not None:
            sent = [f.name for f in fields(part) if f.init and f.name not in _NOT_SENT]
            plain[name] = {
                "values": {key: _plain(getattr(part, key)) for key in sent},
                "user_set": [key for key in sent if part.is_user_set(key)],
            }
    plain["parts_given"] = [name for name in _PARTS if config.is_user_set(name)]
    return plain


def config_from_plain(plain: dict[str, Any]) -> Config:
    """The Config those settings make here. ConfigError, ModelLoadError."""
    settings = dict(plain)
    given = settings.pop("parts_given")
    for name, cls in _PARTS.items():
        if name in settings:
            part = cls(**settings[name]["values"])
            part.mark_user_set(settings[name]["user_set"])
            settings[name] = part
    config = Config(settings.pop("model"), **settings)
    config.mark_user_set([name for name in plain if name not in _PARTS and name != "parts_given"] + given)
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str | dict):
        return value
    return str(value).removeprefix("torch.")  # a torch.dtype
