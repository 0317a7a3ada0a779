"""`atom config`: every setting as resolved for this model and machine, and why."""

import argparse
import dataclasses
import json
from enum import Enum
from typing import TYPE_CHECKING, Any

from atom.entrypoints.commands.common import add_flag, quick_start

if TYPE_CHECKING:
    from atom.config import Config

_NOT_SHOWN = {"hf_config", "generation_config", "model_path", "reasons", "quant_config"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from atom.model_engine.arg_utils import EngineArgs

    parser.usage = "atom config [options]"
    add_flag(parser, "json", action="store_true", help="print one JSON object")
    add_flag(parser, "no_load", action="store_true", help="don't load the model: no memory plan")
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(log_level="warning")


def run(arguments: argparse.Namespace) -> int:
    from atom.model_engine.arg_utils import EngineArgs

    plan: dict[str, Any] | None = None
    with quick_start():
        config = EngineArgs.from_cli_args(arguments).create_config()
        if not arguments.no_load:
            from atom.model_engine.engine_client import make_client

            client = make_client(config)  # may shrink limits that were left open
            plan = client.describe()
            client.close()
    settings = _settings(config)
    if arguments.json:
        report = {"config": settings, "reasons": config.reasons, "inactive": config.inactive_settings()}
        print(json.dumps(report | {"memory_plan": plan}))
    else:
        _print(config, settings, plan)
    return 0


def _print(config: "Config", settings: dict[str, Any], plan: dict[str, Any] | None) -> None:
    width = max(map(len, settings))
    print("Configuration")
    for name, value in settings.items():
        why = config.reasons.get(name) or ("given" if config.is_user_set(name) else "")
        print(f"  {name:{width}}  {_short(value)}" + (f"  ({why})" if why else ""))
    if plan is not None:
        print("Memory plan")
        width = max(map(len, plan))
        for name, value in plan.items():
            size = f"  ({_bytes(value)})" if "bytes" in name and isinstance(value, int) else ""
            print(f"  {name:{width}}  {_short(value)}{size}")
    for setting in config.inactive_settings():
        print(f"Not yet active: {setting}")


def _settings(config: "Config") -> dict[str, Any]:
    """Field -> plain value; a sub-config's fields as "compilation_config.level"."""
    found: dict[str, Any] = {}
    text_config = config.hf_config.get_text_config()
    found["model"] = config.model
    found["architecture"] = ", ".join(config.hf_config.architectures or [config.hf_config.model_type])
    found["vocab_size"] = text_config.vocab_size
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in _NOT_SHOWN:
            continue
        if dataclasses.is_dataclass(value):
            for part in dataclasses.fields(value):
                found[f"{f.name}.{part.name}"] = _plain(getattr(value, part.name))
        else:
            found[f.name] = _plain(value)
    found["quant_config"] = config.quant_config.get_name() or None
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value).removeprefix("torch.")


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) and not value else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
