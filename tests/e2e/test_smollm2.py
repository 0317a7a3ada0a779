"""The embedded model, straight from its GGUF: text that makes sense, tokens equal to transformers'."""

import pytest
import torch

from atom import LLM, SamplingParams
from atom.utils.model_path import resolve_model

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
TEXTS = ["Once upon a time", "def fibonacci(n):\n    ", "The 3 laws of thermodynamics, stated in 1 line each:\n1."]


@pytest.fixture(scope="module")
def llm():
    with LLM(model="smollm2", dtype="float32", device="cpu", max_model_len=512, max_num_seqs=8) as llm:
        yield llm


def test_chat_answers_a_question(llm):
    output = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)[0]
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"


def test_greedy_tokens_equal_transformers_on_the_dequantized_weights(llm):
    from transformers import AutoModelForCausalLM

    path = resolve_model("smollm2")
    reference = AutoModelForCausalLM.from_pretrained(
        path.directory, gguf_file=path.gguf_file, dtype=torch.float32
    ).eval()
    outputs = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    for output in outputs:
        # Each token is the likeliest after those before it: so a greedy search finds the same, at a pass for each text.
        tokens = output.outputs[0].token_ids
        with torch.inference_mode():
            logits = reference(torch.tensor([output.prompt_token_ids + tokens[:-1]])).logits[0]
        assert len(tokens) == 40
        assert logits[-40:].argmax(-1).tolist() == tokens


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(llm):
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, max_tokens=24, seed=7)
    alone = llm.generate(TEXTS[0], params, use_tqdm=False)[0].outputs[0].token_ids
    others = [SamplingParams(temperature=1.3, max_tokens=24, seed=i) for i in range(len(TEXTS))]
    batch = llm.generate([*TEXTS, TEXTS[0]], [*others, params], use_tqdm=False)
    assert batch[-1].outputs[0].token_ids == alone
    assert batch[0].outputs[0].token_ids != alone


def test_float8_cache_still_answers():
    with LLM(model="smollm2", dtype="bfloat16", kv_cache_dtype="fp8", device="cpu", max_model_len=512) as llm:
        output = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)[0]
        assert "Paris" in output.outputs[0].text
