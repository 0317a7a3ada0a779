"""Traces hold what ran, in the format that Perfetto and chrome://tracing read."""

import gzip
import json

import pytest
from tiny_models import make_checkpoint

from atom import LLM, SamplingParams
from atom.entrypoints.cli import main

PROMPT = {"prompt_token_ids": [5, 6, 7]}


def read_trace(directory):
    (path,) = directory.glob("*.json.gz")
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


@pytest.mark.parametrize("more", ["0", "1"])
def test_a_trace_names_the_kernels(tmp_path, monkeypatch, more):
    monkeypatch.setenv("ATOM_PROFILER_MORE", more)
    path = make_checkpoint("llama", tmp_path / "model")
    settings = {"device": "cpu", "max_model_len": 64, "load_dummy": True}  # dummies need no tokenizer
    with LLM(str(path), torch_profiler_dir=str(tmp_path / "traces"), **settings) as llm:
        llm.start_profile()
        llm.generate([PROMPT], SamplingParams(max_tokens=4), use_tqdm=False)
        assert str(tmp_path / "traces") in llm.stop_profile()
        assert llm.stop_profile() is None
    events = read_trace(tmp_path / "traces")
    assert any(event.get("name", "").startswith("aten::") for event in events)
    has_shapes = any("Input Dims" in event.get("args", {}) for event in events)
    assert has_shapes == (more == "1")


def test_the_flag_alone_writes_a_trace(tmp_path, capsys):
    path = make_checkpoint("llama", tmp_path / "model")
    flags = ["--model", str(path), "--load_dummy", "--device", "cpu", "--max-model-len", "64", "--torch-profiler-dir"]
    code = main(["bench", "latency", *flags, str(tmp_path / "traces"), "--input-len", "4", "--output-len", "3"])
    assert code == 0, capsys.readouterr().err
    assert read_trace(tmp_path / "traces")
