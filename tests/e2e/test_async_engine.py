"""The engine core in a process of its own: the same tokens, and a death that is told at once."""

import asyncio
import os
import signal
import time

import pytest
from tiny_models import make_checkpoint

from atom import LLM, SamplingParams
from atom.config import config_from_kwargs
from atom.model_engine.async_llm_engine import AsyncLLMEngine

SETTINGS = {"device": "cpu", "max_model_len": 256, "load_dummy": True, "torch_dtype": "float32"}
PROMPTS = [{"prompt_token_ids": [3 + i, 5, 7 * i + 1]} for i in range(6)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint("llama", tmp_path_factory.mktemp("model")))


async def collect(engine, i, max_tokens, begun=None):
    """The tokens; sets the event `begun` at the first."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    tokens = []
    async for output in engine.generate(PROMPTS[i], params, f"r{i}"):
        tokens += output.outputs[0].token_ids
        if begun is not None:
            begun.set()
    return tokens


def test_streams_equal_the_offline_engine(checkpoint):
    async def run():
        engine = await AsyncLLMEngine.create(config_from_kwargs(checkpoint, asyncio_mode=True, **SETTINGS))
        try:
            return await asyncio.gather(*(collect(engine, i, 20) for i in range(len(PROMPTS))))
        finally:
            await engine.close()

    with LLM(checkpoint, **SETTINGS) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        expected = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert asyncio.run(run()) == expected


def test_a_killed_core_fails_its_requests_within_two_seconds(checkpoint):
    async def run():
        engine = await AsyncLLMEngine.create(config_from_kwargs(checkpoint, asyncio_mode=True, **SETTINGS))
        try:
            begun = asyncio.Event()
            requests = [asyncio.create_task(collect(engine, i, 240, begun)) for i in range(len(PROMPTS))]
            await begun.wait()
            os.kill(engine.core_pid, signal.SIGKILL)
            killed = time.monotonic()
            results = await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 10)
            assert time.monotonic() - killed < 2
            assert not engine.is_healthy
            return results
        finally:
            await engine.close()

    results = asyncio.run(run())
    assert any(isinstance(result, Exception) for result in results)
    assert all(isinstance(result, Exception) or len(result) == 240 for result in results)
