"""Warming up leaves no trace: the same tokens as without, nothing in use."""

import pytest
from tiny_models import make_checkpoint

from atom.config import config_from_kwargs
from atom.layers.attention.long_prompts import LongPrompts
from atom.model_engine import model_runner
from atom.model_engine.engine_client import make_client
from atom.model_engine.protocol import EngineRequest
from atom.model_engine.warm_up import _LONG, warm_up
from atom.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(make_checkpoint("llama", tmp_path_factory.mktemp("model")))


def tokens_of(path, warm, settings):
    client = make_client(config_from_kwargs(path, device="cpu", torch_dtype="float32", **settings))
    runner = client.core.executor._runner
    if warm:
        warm_up(runner, runner.config.num_kvcache_blocks * runner.config.kv_cache_block_size)
        assert not runner.batch.row_of
    for i in range(3):
        params = SamplingParams(temperature=0.8, seed=i, max_tokens=4, ignore_eos=True)
        client.add_request(
            EngineRequest(request_id=str(i), prompt_token_ids=[5 + i, 9, 77], sampling_params=params, arrival_time=0.0)
        )
    tokens = {}
    while client.has_unfinished():
        for out in client.step():
            tokens.setdefault(out.request_id, []).extend(out.new_token_ids)
    client.close()
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"max_model_len": 128, "num_kvcache_blocks": 16},
        {"max_model_len": 16, "num_kvcache_blocks": 16, "kv_cache_block_size": 1, "max_num_seqs": 2},
        {"max_model_len": 64, "num_kvcache_blocks": 8, "max_num_seqs": 1, "max_num_batched_tokens": 8},
    ],
    ids=["plain", "small", "alone"],
)
def test_it_changes_nothing(path, settings):
    assert tokens_of(path, True, settings) == tokens_of(path, False, settings)


def test_its_long_prompt_has_a_part_for_their_own_kernel_and_a_rest():
    assert LongPrompts().find(_LONG, 0) == (0, 4096)
    assert _LONG > 4096


def test_it_steps_through_each_kind_of_kernel(path, monkeypatch):
    steps = []
    original = model_runner.ModelRunner.submit
    monkeypatch.setattr(
        model_runner.ModelRunner, "submit", lambda self, batch: steps.append(batch) or original(self, batch)
    )
    tokens_of(path, True, {"max_model_len": 128, "num_kvcache_blocks": 16})
    prompts = [list(batch.num_scheduled_tokens.values()) for batch in steps[:7]]
    assert prompts == [[127], [2], *[[1, 32]] * 5]
