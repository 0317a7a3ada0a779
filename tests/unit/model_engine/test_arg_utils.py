import argparse
import dataclasses
import json

import pytest

from atom.config import CompilationConfig, Config, CUDAGraphMode
from atom.model_engine.arg_utils import EngineArgs, FlagParser
from atom.utils.errors import ConfigError

GUIDE_DEFAULTS = {
    "model": "Qwen/Qwen3-0.6B", "trust_remote_code": False, "tensor_parallel_size": 1, "data_parallel_size": 1,
    "enforce_eager": False, "enable_prefix_caching": False, "port": 8006, "kv_cache_dtype": "bf16",
    "block_size": 16, "max_model_len": None, "cudagraph_capture_sizes": "[1,2,4,8,16,32,48,64,128,256]", "level": 3,
    "load_dummy": False, "enable_expert_parallel": False, "torch_profiler_dir": None, "enable_dp_attention": False,
    "method": None, "num_speculative_tokens": 1, "max_num_batched_tokens": 16384, "max_num_seqs": 512,
    "gpu_memory_utilization": 0.9, "scheduler_delay_factor": 0.0,
}  # fmt: skip
VALUES = {
    "model": "m", "tokenizer": "t", "dtype": "float32", "device": "cpu", "tensor_parallel_size": 2,
    "data_parallel_size": 3, "level": 1, "cudagraph_capture_sizes": "[1,2]", "cudagraph_mode": "FULL",
    "max_model_len": 100, "max_num_seqs": 5, "max_num_batched_tokens": 64, "scheduler_delay_factor": 0.5,
    "block_size": 32, "num_kvcache_blocks": 10, "kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.5,
    "cpu_memory_utilization": 0.25, "attention_backend": "torch", "num_threads": 2, "method": "mtp",
    "num_speculative_tokens": 4, "seed": 9, "port": 9000, "torch_profiler_dir": "d", "log_level": "debug",
}  # fmt: skip
ALL_FIELDS = [f.name for f in dataclasses.fields(EngineArgs)]


@pytest.fixture
def parser():
    parser = FlagParser(prog="atom")
    EngineArgs.add_cli_args(parser)
    return parser


@pytest.fixture
def model(tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 32,
        "max_position_embeddings": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def failure(parser, arguments, capsys):
    with pytest.raises(SystemExit) as info:
        parser.parse_args(arguments)
    assert info.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_defaults_are_the_guides(parser):
    args = EngineArgs()
    assert {name: getattr(args, name) for name in GUIDE_DEFAULTS} == GUIDE_DEFAULTS
    assert EngineArgs.from_cli_args(parser.parse_args([])) == args


@pytest.mark.parametrize("name", ALL_FIELDS)
def test_every_flag_is_spelt_with_dashes_and_with_underscores(name, parser):
    for flag in ("--" + name.replace("_", "-"), "--" + name):
        if isinstance(getattr(EngineArgs(), name), bool):
            arguments, value = [flag], True
        else:
            value = VALUES[name]
            arguments = [flag, str(value)]
        args = EngineArgs.from_cli_args(parser.parse_args(arguments))
        assert getattr(args, name) == value
        assert dataclasses.replace(args, **{name: getattr(EngineArgs(), name)}) == EngineArgs()
        if len(arguments) == 2:
            assert parser.parse_args([f"{flag}={value}"]) == parser.parse_args(arguments)


def test_short_forms(parser):
    args = parser.parse_args(["-tp", "4", "-dp", "2"])
    assert (args.tensor_parallel_size, args.data_parallel_size) == (4, 2)


def test_help_shows_one_spelling(parser):
    text = parser.format_help()
    assert "--max-num-seqs" in text
    assert "--max_num_seqs" not in text
    assert "-tp" in text


def test_any_argparse_parser_will_do(model):
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    parser.add_argument("--other", default=1)
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", model, "--max_num_seqs", "3"]))
    assert (args.model, args.max_num_seqs) == (model, 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max-num-seq", "3"], "unrecognized flag --max-num-seq (did you mean '--max-num-seqs'?)"),
        (["--enforce_eagr"], "did you mean '--enforce-eager'?"),
        (["--enforce"], "--enforce "),
        (["--qqqqqqq=3"], "unrecognized flag --qqqqqqq (see"),
        (["stray"], "argument 'stray'"),
        (["--level", "4"], "--level"),
        (["--dtype", "int8"], "--dtype"),
        (["--kv_cache_dtype", "fp16"], "--kv-cache-dtype"),
        (["--method", "eagle"], "--method"),
        (["--max-num-seqs", "many"], "--max-num-seqs"),
        (["--max-num-seqs"], "--max-num-seqs"),
        (["--cudagraph-mode", "half"], "--cudagraph-mode"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, expected, parser, capsys):
    assert expected in failure(parser, arguments, capsys)


def test_a_sub_command_suggests_its_own_flags(capsys):
    parser = FlagParser(prog="atom")
    commands = parser.add_subparsers(dest="command")
    EngineArgs.add_cli_args(commands.add_parser("generate"))
    assert "did you mean '--seed'" in failure(parser, ["generate", "--sead", "3"], capsys)
    args = EngineArgs.from_cli_args(parser.parse_args(["generate", "--seed", "3"]))
    assert args.is_user_set("seed")
    assert not args.is_user_set("level")


def test_create_config_maps_every_flag(model, tmp_path):
    values = {
        name: value for name, value in VALUES.items()
        if name not in ("model", "tensor_parallel_size", "data_parallel_size", "method", "num_speculative_tokens")
    }  # fmt: skip
    values |= {"torch_profiler_dir": str(tmp_path / "traces"), "max_num_seqs": 5, "enable_prefix_caching": True}
    config = EngineArgs(model=model, **values).create_config()
    renamed = {"block_size": "kv_cache_block_size"}
    special = {"dtype", "level", "cudagraph_capture_sizes", "cudagraph_mode"}
    for name in values.keys() - special:
        assert getattr(config, renamed.get(name, name)) == values[name], name
        assert config.is_user_set(renamed.get(name, name))
    assert str(config.torch_dtype) == "torch.float32"
    assert config.compilation_config.level == 1
    assert config.compilation_config.cudagraph_mode is CUDAGraphMode.FULL
    assert config.graph_bs == [1, 2]


def test_untouched_flags_are_not_the_users_choice(model):
    config = EngineArgs(model=model).create_config()
    assert config.compilation_config.level == 3
    assert config.compilation_config.cudagraph_mode is CUDAGraphMode.PIECEWISE
    assert config.graph_bs == [1, 2, 4, 8, 16, 32, 48, 64, 128, 256]
    assert config.inactive_settings() == []
    assert not config.is_user_set("max_model_len")
    untouched = Config(model, compilation_config=CompilationConfig(level=3, cudagraph_capture_sizes=config.graph_bs))
    for field in dataclasses.fields(Config):
        if field.type in (int, float, str, bool):
            assert getattr(config, field.name) == getattr(untouched, field.name), field.name


def test_a_level_that_was_given_is_the_users_choice(model, parser):
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", model, "--level", "3"]))
    assert args.create_config().compilation_config.is_user_set("level")
    assert not EngineArgs(model=model).create_config().compilation_config.is_user_set("level")


def test_a_field_set_afterwards_counts(model):
    args = EngineArgs(model=model)
    args.max_num_seqs = 2
    args.asyncio_mode = True  # not a field: ignored like any attribute
    config = args.create_config()
    assert (config.max_num_seqs, config.asyncio_mode) == (2, False)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cudagraph_capture_sizes": "[1,x]"}, "cudagraph_capture_sizes"),
        ({"cudagraph_capture_sizes": "8"}, "cudagraph_capture_sizes"),
        ({"tensor_parallel_size": 16}, "tensor_parallel_size"),
        ({"num_speculative_tokens": 2, "method": "mtp"}, "num_speculative_tokens=2"),
        ({"method": "mtp"}, "not supported yet"),
        ({"data_parallel_size": 2}, "not supported yet"),
    ],
)
def test_bad_settings_are_config_errors(model, settings, named):
    with pytest.raises(ConfigError, match=named):
        EngineArgs(model=model, **settings).create_config()


def test_mistyped_field():
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        EngineArgs(blocksize=3)
