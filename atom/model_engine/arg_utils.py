"""The command line's flags: one dataclass, from which flags, defaults and the Config follow."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from atom.config import (
    DEVICES,
    DTYPE_NAMES,
    KV_CACHE_DTYPES,
    CompilationConfig,
    Config,
    CUDAGraphMode,
    config_from_kwargs,
)
from atom.utils.logging import LEVELS
from atom.utils.strict import StrictConfig, did_you_mean

if TYPE_CHECKING:
    from atom.model_engine.llm_engine import LLMEngine

_GIVEN = "_given_flags"  # attribute of a parsed namespace: the fields whose flags the user typed
_COMPILATION = ("level", "cudagraph_capture_sizes", "cudagraph_mode")


def _flag(default: Any, help: str, **options: Any) -> Any:
    """options: of ArgumentParser.add_argument, plus short="-x"."""
    return field(default=default, metadata={"help": help, **options})


@dataclass(kw_only=True)
class EngineArgs(StrictConfig):
    """Flags of the engine (guide, section 7), under the names of their fields."""

    _positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str = field(
        default="Qwen/Qwen3-0.6B",
        kw_only=False,
        metadata={"help": "model's directory, .gguf file or hub name; smollm2 is the one that needs no download"},
    )
    tokenizer: str | None = _flag(None, "directory, .gguf file or hub name, where it isn't the model's own")
    trust_remote_code: bool = _flag(False, "run code that comes with the checkpoint")
    dtype: str = _flag("auto", "of weights and activations", choices=DTYPE_NAMES)
    device: str = _flag("auto", "where to run; auto takes the best there is", choices=DEVICES)
    tensor_parallel_size: int = _flag(1, "GPUs that share every layer, 1 to 8", short="-tp")
    data_parallel_size: int = _flag(1, "copies of the model that share the requests", short="-dp")
    enable_expert_parallel: bool = _flag(False, "give each rank whole experts of a mixture-of-experts model")
    enable_dp_attention: bool = _flag(False, "run attention data-parallel")
    enforce_eager: bool = _flag(False, "no compilation and no CUDA graphs")
    level: int = _flag(3, "compilation: 0 none, 1 dynamo, 2 dynamo once, 3 piecewise", choices=(0, 1, 2, 3))
    cudagraph_capture_sizes: str = _flag("[1,2,4,8,16,32,48,64,128,256]", "batch sizes to capture as CUDA graphs")
    cudagraph_mode: str | None = _flag(
        None, "what to capture; PIECEWISE at level 3", choices=tuple(CUDAGraphMode.__members__), type=str.upper
    )
    max_model_len: int | None = _flag(None, "longest prompt + output; the model's own limit if not given")
    max_num_seqs: int = _flag(512, "requests that run at once, at most")
    max_num_batched_tokens: int = _flag(16384, "tokens computed in a step, at most")
    scheduler_delay_factor: float = _flag(0.0, "hold a new prompt back for this x the last prefill's duration")
    enable_prefix_caching: bool = _flag(False, "reuse the cache of prompts that begin alike")
    block_size: int = _flag(16, "tokens in a KV cache block: a multiple of 16, or 1")
    num_kvcache_blocks: int = _flag(-1, "KV cache blocks; -1 fills the memory allowed")
    kv_cache_dtype: str = _flag("bf16", "bf16: that of the activations; fp8: half the memory", choices=KV_CACHE_DTYPES)
    gpu_memory_utilization: float = _flag(0.9, "share of the GPU's memory for weights and cache")
    cpu_memory_utilization: float = _flag(0.4, "share of the free RAM for the cache, on a CPU")
    attention_backend: str = _flag("auto", "attention implementation; auto takes the best that fits")
    num_threads: int | None = _flag(None, "CPU threads; torch's choice if not given")
    method: str | None = _flag(None, "speculative decoding", choices=("mtp",))
    num_speculative_tokens: int = _flag(1, "tokens speculated in a step")
    load_dummy: bool = _flag(False, "random weights instead of the checkpoint's; for speed tests")
    seed: int = _flag(0, "makes requests without a seed of their own repeatable")
    port: int = _flag(8006, "internal port of the engine (not the HTTP server's)")
    torch_profiler_dir: str | None = _flag(None, "where profiler traces go; default ATOM_TORCH_PROFILER_DIR")
    log_level: str = _flag("info", "least important message shown", choices=LEVELS, type=str.lower)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add every flag, spelt with '-' (as help shows it) and with '_'."""
        group = parser.add_argument_group("engine")
        for f in fields(EngineArgs):
            options = dict(f.metadata)
            kind = _scalar_type(f.type)
            short = options.pop("short", None)
            text = options.pop("help")
            if kind is bool:
                options["nargs"] = 0
            else:
                options.setdefault("type", kind)
                if f.default is not None:
                    text += " (default: %(default)s)"
                if "choices" not in options:
                    options["metavar"] = "N" if kind in (int, float) else "X"
            name = f.name.replace("_", "-")
            spellings = dict.fromkeys(["--" + name, "--" + f.name, *([short] if short else [])])
            action = group.add_argument(
                *spellings, dest=f.name, default=f.default, help=text, action=_Remember, **options
            )
            action.option_strings = [s for s in action.option_strings if "_" not in s]
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> "EngineArgs":
        """From a namespace of a parser that had add_cli_args; other attributes are left alone."""
        given = getattr(args, _GIVEN, ())
        values = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        # What differs from the default was chosen as well: by a command's own defaults, or by hand.
        chosen = {f.name for f in fields(cls) if f.name in values and values[f.name] != f.default}.union(given)
        return cls(**{name: value for name, value in values.items() if name in chosen})

    def create_config(self) -> Config:
        """The checked and completed Config; ConfigError or ModelLoadError."""
        given = {f.name for f in fields(self) if self.is_user_set(f.name) or getattr(self, f.name) != f.default}
        settings = {name: getattr(self, name) for name in given if name not in ("model", *_COMPILATION)}
        compilation = CompilationConfig(
            level=self.level,
            cudagraph_capture_sizes=self.cudagraph_capture_sizes,  # type: ignore[arg-type]  # a text is taken too
            cudagraph_mode=self.cudagraph_mode,  # type: ignore[arg-type]  # so is a name
        )
        compilation.mark_user_set(name for name in _COMPILATION if name in given)
        return config_from_kwargs(self.model, compilation_config=compilation, **settings)

    def create_engine(self) -> "LLMEngine":
        from atom.model_engine.llm_engine import LLMEngine

        return LLMEngine(self.create_config())


def _scalar_type(annotation: Any) -> type:
    """int of `int` and of `int | None`."""
    args = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    return args[0] if args else annotation


class _Remember(argparse.Action):
    """Stores a value, or True for a flag without one, and that the user gave it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
        given = getattr(namespace, _GIVEN, None) or set()
        given.add(self.dest)
        setattr(namespace, _GIVEN, given)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake in one line, naming the nearest right flag, and exits with 2.

    Flags can't be abbreviated; a later release's flag would change what an abbreviation means.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuses what it doesn't know, so that a sub-command's parser suggests its own flags."""
        result, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error("unrecognized " + ", ".join(self._explain(text) for text in self._flags_of(unknown)))
        return result, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    @staticmethod
    def _flags_of(unknown: list[str]) -> Iterable[str]:
        """Unknown flags without the values after them; everything, if there are none."""
        return [text for text in unknown if text.startswith("-")] or unknown

    def _explain(self, text: str) -> str:
        if not text.startswith("-"):
            return f"argument {text!r}"
        name = text.split("=", 1)[0]
        known = [option for action in self._actions for option in action.option_strings]
        return f"flag {name}" + did_you_mean(name.replace("_", "-"), known)
