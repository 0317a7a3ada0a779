"""The command line without a model: flags, errors, exit codes, and what it imports."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atom import __version__
from atom.entrypoints import cli
from atom.entrypoints.commands import bench
from atom.entrypoints.commands.common import quick_start, run_guarded, sampling_params
from atom.model_engine.arg_utils import EngineArgs
from atom.utils.errors import ConfigError, RequestError

COMMANDS = [[], ["generate"], ["chat"], ["config"], ["bench"]]
COMMANDS += [["bench", kind] for kind in ("throughput", "latency", "serve")]
GUIDE_FLAGS = """
--model --trust-remote-code --tensor-parallel-size --data-parallel-size --enforce-eager --enable_prefix_caching
--port --kv_cache_dtype --block-size --max-model-len --cudagraph-capture-sizes --level --load_dummy
--enable-expert-parallel --torch-profiler-dir --enable-dp-attention --method --num-speculative-tokens
--max-num-batched-tokens --max-num-seqs --gpu-memory-utilization --scheduler-delay-factor --prompt
"""
HEAVY = ["torch", "transformers", "tokenizers", "numpy", "rich", "jinja2"]


def parse(*argv):
    return cli.make_parser(argv[0]).parse_args(argv)


def run_python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command):
    code = f"""
import sys
from atom.entrypoints.cli import main
try:
    main({[*command, "--help"]!r})
except SystemExit as end:
    assert end.code == 0
print("imported:", [m for m in {HEAVY!r} if m in sys.modules])
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")
    assert result.stdout.endswith("imported: []\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"atom {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--max-tokns", "3"], "did you mean '--max-tokens'"),
        (["genrate"], "'genrate'"),
        (["bench", "throughput", "--num-prompts", "many"], "--num-prompts"),
        ([], "COMMAND"),
    ],
)
def test_mistyped_flags_are_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--temperature", "-1", "x"], "temperature=-1.0"),
        (["generate", "--model", "/no/such/model", "x"], "/no/such/model"),
        (["bench", "latency", "--input-len", "9-3"], "input_len='9-3'"),
        (["bench", "throughput", "--repeat", "0"], "repeat=0"),
        (["config", "--block-size", "17"], "kv_cache_block_size=17"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("atom: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_both_spellings_of_a_flag():
    assert parse("generate", "--max-tokens", "3", "--top_p", "0.5").max_tokens == 3
    arguments = parse("generate", "--max_tokens=4", "--kv_cache_dtype", "fp8")
    assert (arguments.max_tokens, arguments.kv_cache_dtype) == (4, "fp8")


def test_sampling_flags_become_parameters():
    arguments = parse("generate", "--temperature", "0", "--n", "2", "--stop", "a", "--stop", "b", "--ignore-eos", "hi")
    params = sampling_params(arguments)
    assert (params.temperature, params.n, params.stop_strings, params.ignore_eos) == (0, 2, ["a", "b"], True)
    assert params.max_tokens == 64
    assert arguments.prompts == ["hi"]


def test_a_commands_defaults_reach_the_engine():
    engine_args = EngineArgs.from_cli_args(parse("chat", "--max-model-len", "128"))
    assert engine_args.model == "smollm2"
    assert engine_args.enable_prefix_caching
    assert engine_args.max_model_len == 128
    assert not EngineArgs.from_cli_args(parse("generate")).enable_prefix_caching


def test_lengths_of_benchmarks():
    assert bench._length_range("7") == (7, 7)
    assert bench._length_range("16-128") == (16, 128)
    for wrong in ("0", "-3", "a", "3-x", "9-3", ""):
        with pytest.raises(ConfigError):
            bench._length_range(wrong)


def raiser(error):
    def call():
        raise error

    return call


def test_how_errors_end_a_program(capsys):
    assert run_guarded("p", lambda: 0) == 0
    assert run_guarded("p", raiser(RequestError("two\nlines"))) == 2
    assert capsys.readouterr().err == "p: error: two lines\n"
    assert run_guarded("p", raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):  # a bug keeps its trace
        run_guarded("p", raiser(ZeroDivisionError()))


def test_a_closed_pipe_is_quiet():
    code = """
import sys
from atom.entrypoints.commands.common import run_guarded
def call():
    for i in range(100000):
        print("line", i)
    return 0
sys.exit(run_guarded("p", call))
"""
    command = f"{sys.executable} -c '{code}' | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.stdout == "line 0\n"
    assert result.stderr == ""
    assert result.returncode == 141


def test_entrypoint_has_the_guides_flags():
    result = subprocess.run(
        [sys.executable, "-m", "atom.entrypoint", "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    for flag in GUIDE_FLAGS.split():
        assert flag.replace("_", "-") + " " in result.stdout.replace("\n", " ").replace(",", " "), flag


def test_config_reports_every_field_and_why(capsys, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 1,
                "vocab_size": 100,
                "max_position_embeddings": 256,
                "eos_token_id": 2,
                "torch_dtype": "float32",
            }
        )
    )
    argv = ["config", "--no-load", "--load-dummy", "--model", str(tmp_path), "--block-size", "32"]
    assert cli.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["kv_cache_block_size"] == 32
    assert report["config"]["torch_dtype"] == "float32"
    assert report["config"]["max_model_len"] == 256
    assert report["config"]["vocab_size"] == 100
    assert report["config"]["compilation_config.level"] == 3
    assert report["reasons"]["max_model_len"] == "the checkpoint's max_position_embeddings"
    assert report["memory_plan"] is None
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["kv_cache_block_size", "32", "(given)"] for line in lines)
    assert any("max_model_len" in line and "(the checkpoint's max_position_embeddings)" in line for line in lines)


def test_modules_of_commands_are_all_reachable():
    folder = Path(cli.__file__).parent / "commands"
    assert {p.stem for p in folder.glob("*.py")} - {"__init__", "common", "bench_serve"} == set(cli._COMMANDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_module_swallows_still_ends_the_start(number):
    def handler(number, frame):
        raise SystemExit(number)

    def start():
        with quick_start():
            with contextlib.suppress(BaseException):
                signal.raise_signal(number)
            passed.append("the module")

    passed = []
    before = signal.signal(number, handler)
    try:
        with pytest.raises(SystemExit) as caught:
            start()
        assert caught.value.code == number
        assert passed
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
