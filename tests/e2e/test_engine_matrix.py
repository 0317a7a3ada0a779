"""Greedy tokens equal transformers' however a request is batched, chunked, cached or preempted."""

import itertools

import pytest
import torch
from tiny_models import FAMILIES, make_model

from atom.config import config_from_kwargs
from atom.model_engine.engine_client import make_client
from atom.model_engine.protocol import EngineRequest
from atom.sampling_params import SamplingParams

NUM_OUTPUT = 64
PROMPT_LENGTHS = [23, 1, 2, 15, 16, 17, 31, 33, 48, 64, 65, 70, 7, 90, 40, 3, 55]  # the first is the one also run alone


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    """(checkpoint, prompts, transformers' greedy continuations)"""
    model = make_model(request.param)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    prompts[8][:32] = prompts[10][:32]  # a shared prefix
    return path, prompts, greedy(model, prompts, run(client_of(path), prompts, ""))


def greedy(model, prompts, guesses):
    """What transformers continues the prompts with: of a guess each token that is the likeliest after those before it.

    One pass tells whether a guess is right; a wrong one ends with the token that should have come.
    """
    expected = []
    for prompt, guess in zip(prompts, guesses, strict=True):
        with torch.inference_mode():
            likeliest = model(torch.tensor([prompt + guess])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        right = next((i for i, pair in enumerate(zip(guess, likeliest, strict=True)) if pair[0] != pair[1]), len(guess))
        expected.append(likeliest[: right + 1])
    return expected


def client_of(path, **settings):
    defaults = {"max_model_len": 192, "max_num_batched_tokens": 4096, "enforce_eager": True}
    return make_client(config_from_kwargs(str(path), torch_dtype="float32", device="cpu", **(defaults | settings)))


def run(client, prompts, tag, num_output=NUM_OUTPUT):
    outputs = {}
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, seed=0)
        client.add_request(
            EngineRequest(request_id=f"{tag}{i}", prompt_token_ids=prompt, sampling_params=params, arrival_time=0.0)
        )
    while client.has_unfinished():
        for out in client.step():
            outputs.setdefault(out.request_id, []).extend(out.new_token_ids)
    return [outputs[f"{tag}{i}"] for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("chunked", "prefix", "block_size", "preempt"),
    list(itertools.product([False, True], [False, True], [1, 16, 64], [False, True])),
)
def test_greedy_tokens_equal_transformers(family, chunked, prefix, block_size, preempt):
    path, prompts, expected = family
    longest = max(PROMPT_LENGTHS) + NUM_OUTPUT
    capacity = 3 * longest if preempt else 32 * longest  # tokens; three long requests at most fit when preempting
    client = client_of(
        path,
        max_num_batched_tokens=19 if chunked else 4096,
        enable_prefix_caching=prefix,
        kv_cache_block_size=block_size,
        num_kvcache_blocks=-(-capacity // block_size),
    )
    assert run(client, prompts[:1], "alone-") == expected[:1]
    assert run(client, prompts, "batched-") == expected
    stats = client.stats()
    assert (stats["preemptions"] > 0) == preempt
    assert (stats["prefix_hit_rate"] > 0) == (prefix and (block_size < 64 or preempt))
    assert stats["kv_cache_usage"] == 0
    client.close()
