"""Tokens are the same at every compilation level and in every CUDA graph mode.

Without a GPU a stand-in records the device work of a capture: replaying calls it again, on whatever the
captured addresses hold by then, and writes the results where the capture put them. A static buffer that
is not filled, or a result that moves, gives other tokens, as it would on a GPU.
"""

from pathlib import Path

import pytest
import torch
from tiny_models import make_checkpoint

from atom.compilation import compiled_model, cuda_graph
from atom.config import CompilationConfig, config_from_kwargs
from atom.model_engine import model_runner
from atom.model_engine.engine_client import make_client
from atom.model_engine.protocol import EngineRequest
from atom.platforms.cpu import CpuPlatform
from atom.sampling_params import SamplingParams

LENGTHS = [5, 1, 9, 30, 2, 17]


class RecordingCapturer(cuda_graph.GraphCapturer):
    def __init__(self):
        self.num_captured = 0
        self.num_replays = 0

    def capture(self, call):
        self.num_captured += 1
        results = call()

        def replay():
            self.num_replays += 1
            fresh = call()
            for old, new in zip(_tensors(results), _tensors(fresh), strict=True):
                old.copy_(new)

        return replay, results


def _tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [v for v in value if isinstance(v, torch.Tensor)]


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def checkpoint(request, tmp_path_factory):
    return str(make_checkpoint(request.param, tmp_path_factory.mktemp("model")))


def run(path, **settings):
    """settings: fields of CompilationConfig."""
    config = config_from_kwargs(
        path,
        compilation_config=CompilationConfig(**settings),
        torch_dtype="float32",
        device="cpu",
        max_model_len=64,
        num_kvcache_blocks=40,
        max_num_batched_tokens=24,
    )
    client = make_client(config)
    generator = torch.Generator().manual_seed(3)
    for i, length in enumerate(LENGTHS):
        client.add_request(
            EngineRequest(
                request_id=str(i),
                prompt_token_ids=torch.randint(0, 150, (length,), generator=generator).tolist(),
                sampling_params=SamplingParams(temperature=0, max_tokens=6 + 3 * i, ignore_eos=True, seed=0),
                arrival_time=0.0,
            )
        )
    outputs = {}
    while client.has_unfinished():
        for out in client.step():
            outputs.setdefault(out.request_id, []).extend(out.new_token_ids)
    return outputs


@pytest.fixture(scope="module")
def expected(checkpoint):
    return run(checkpoint)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_levels_without_inductor(checkpoint, expected, level, tmp_path):
    settings = {"level": level, "use_inductor": False, "cache_dir": str(tmp_path)}
    assert run(checkpoint, **settings) == expected


@pytest.mark.parametrize(
    ("level", "mode", "copy_inputs"),
    [
        (0, "FULL", False),
        (0, "FULL_DECODE_ONLY", False),
        (2, "FULL_DECODE_ONLY", False),
        (3, "PIECEWISE", False),
        (3, "PIECEWISE", True),  # only graphs of pieces have inputs of their own
        (3, "FULL_AND_PIECEWISE", False),
        (3, "FULL_AND_PIECEWISE", True),
        (3, "NONE", False),
    ],
)
def test_graph_modes(checkpoint, expected, level, mode, copy_inputs, monkeypatch, tmp_path):
    capturer = RecordingCapturer()
    monkeypatch.setattr(CpuPlatform, "has_graphs", True)
    monkeypatch.setattr(model_runner, "make_capturer", lambda _: capturer)
    outputs = run(
        checkpoint,
        level=level,
        cudagraph_mode=mode,
        cudagraph_capture_sizes=[1, 2, 4, 16],
        cudagraph_copy_inputs=copy_inputs,
        use_inductor=False,
        cache_dir=str(tmp_path),
    )
    assert outputs == expected
    assert (capturer.num_captured > 0) == (mode != "NONE")
    assert (capturer.num_replays > capturer.num_captured) == (mode != "NONE")


@pytest.mark.parametrize("mode", ["NONE", "FULL", "FULL_AND_PIECEWISE"])
def test_graphs_with_overlapping_steps(checkpoint, expected, mode, monkeypatch, tmp_path):
    """The next step is prepared before the host knows the tokens that go into it."""
    capturer = RecordingCapturer()
    monkeypatch.setattr(CpuPlatform, "has_graphs", True)
    monkeypatch.setattr(model_runner, "make_capturer", lambda _: capturer)
    monkeypatch.setattr(model_runner.ModelRunner, "max_in_flight", 2)
    settings = {"cudagraph_capture_sizes": [1, 2, 4, 16], "use_inductor": False, "cache_dir": str(tmp_path)}
    level = 3 if mode == "FULL_AND_PIECEWISE" else 0
    assert run(checkpoint, level=level, cudagraph_mode=mode, **settings) == expected


def test_debug_dump_is_readable_at_every_start(checkpoint, expected, tmp_path, monkeypatch):
    """Compiling is left out: the artifacts are graphs kept here."""
    compiled = {}

    def compile_piece(piece, size, options, path):
        Path(path).write_bytes(b"code")
        compiled[Path(path).name] = piece.graph
        return piece.graph

    monkeypatch.setattr(compiled_model, "compile_piece", compile_piece)
    monkeypatch.setattr(compiled_model, "load_piece", lambda path: compiled[Path(path).name])

    def dump(name):
        settings = {"level": 3, "cache_dir": str(tmp_path / "cache"), "debug_dump_path": str(tmp_path / name)}
        assert run(checkpoint, **settings) == expected
        return {path.name: path.read_text() for path in (tmp_path / name).iterdir()}

    traced = dump("traced")
    assert "plan.json" in traced
    pieces = [text for name, text in traced.items() if name.startswith("piece_")]
    assert 2 <= len(pieces) <= 4
    assert all("def forward" in text for text in pieces)
    monkeypatch.setattr(compiled_model, "trace_model", None)
    assert dump("loaded") == traced


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 2, 3])
def test_levels_with_inductor_and_a_warm_second_start(checkpoint, expected, level, tmp_path):
    settings = {"level": level, "cache_dir": str(tmp_path), "compile_sizes": [1, 4]}
    assert run(checkpoint, **settings) == expected
    if level > 1:
        manifest = next(tmp_path.glob("*/manifest.json"))
        before = manifest.stat().st_mtime_ns
        assert run(checkpoint, **settings) == expected
        assert next(tmp_path.glob("*/manifest.json")).stat().st_mtime_ns == before
