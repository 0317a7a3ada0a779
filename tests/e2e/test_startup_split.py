"""The split of a real engine's start: every part is there and they sum to the whole."""

import pytest

from atom import LLM, SamplingParams

EXPECTED = {"load", "build model", "pack weights", "memory", "other", "total"}


SMALL = {"model": "smollm2", "device": "cpu", "num_kvcache_blocks": 64, "max_model_len": 128}


def check(split):
    assert set(split) >= EXPECTED
    assert all(seconds >= 0 for seconds in split.values())
    assert sum(split.values()) - split["total"] == pytest.approx(split["total"])


def test_engine_in_this_process():
    with LLM(**SMALL) as llm:
        client = llm.engine.client
        ready = client.startup
        check(ready)
        assert "first token" not in ready
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3), use_tqdm=False)
        served = client.startup
        check(served)
        assert served["total"] == pytest.approx(ready["total"] + served["first token"])
        assert "step" not in vars(client.core)  # later steps aren't timed
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3), use_tqdm=False)
        assert client.startup == served


def test_engine_in_another_process():
    with LLM(**SMALL, asyncio_mode=True) as llm:
        split = llm.engine.client.startup
        check(split)
        assert {"python", "import torch", "config"} <= set(split)
