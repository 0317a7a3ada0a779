"""Reasoning in the text of models, by what the prompt ended with and however the text is split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom.entrypoints.openai.parsers import REASONING_PARSERS, get_reasoning_parser
from atom.entrypoints.openai.protocol import ChatCompletionRequest
from atom.utils.errors import ConfigError

USER = "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n"
OPEN = USER + "<think>\n"
CLOSED = USER + "<think>\n\n</think>\n\n"


def request(message="hi", **fields):
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": message}], **fields})


def parse(name, prompt, *pieces, request=request()):  # noqa: B008
    parser = get_reasoning_parser(name, None)(request, prompt)
    news = [parser.push(piece) for piece in pieces] + [parser.flush()]
    return "".join(reasoning for reasoning, _ in news), "".join(content for _, content in news)


@pytest.mark.parametrize(
    ("name", "prompt", "text", "reasoning", "content"),
    [
        ("qwen3", USER, "<think>\nwhy\n</think>\n\nbecause\n", "why\n", "because\n"),
        ("qwen3", USER, "\n<think>why</think>because", "why", "because"),
        ("qwen3", USER, "<think>\n\n</think>\n\nbecause", "", "because"),
        ("qwen3", USER, "just this", "", "just this"),
        ("qwen3", USER, " \n just <think> this</think>", "", " \n just <think> this</think>"),
        ("qwen3", USER, "<thin", "", "<thin"),
        ("qwen3", USER, "<think>cut</th", "cut</th", ""),
        ("qwen3", USER, "", "", ""),
        ("qwen3", OPEN, "why</think>because", "why", "because"),
        ("qwen3", OPEN, "\nwhy", "why", ""),
        ("qwen3", CLOSED, "because", "", "because"),
        ("qwen3", CLOSED, "\n<think>because</think>", "", "\n<think>because</think>"),
        ("glm45", USER, "\n<think>why</think>\nbecause", "why", "because"),
        ("deepseek_r1", USER, "why</think>\n\nbecause", "why", "because"),
        ("deepseek_r1", USER, "<think>\nwhy</think>\n\nbecause</think>", "why", "because</think>"),
        ("deepseek_r1", USER, "  why, never ending", "  why, never ending", ""),
        ("deepseek_r1", OPEN, "why</think>because", "why", "because"),
        ("deepseek_r1", CLOSED, "because", "", "because"),
        ("deepseek_v3", USER + "<think>", "why</think>because", "why", "because"),
        ("deepseek_v3", USER + "</think>", "because", "", "because"),
        ("mistral", USER, "[THINK]why[/THINK]because", "why", "because"),
        ("mistral", USER, "because", "", "because"),
    ],
)
def test_particular_texts(name, prompt, text, reasoning, content):
    assert parse(name, prompt, text) == (reasoning, content)
    assert parse(name, prompt, *text) == (reasoning, content)


parts = ["<think>", "</think>", "<thi", "</", "think>", "\n", " ", "a", "é😀", " " * 20, "</think>\n\n"]


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
@given(
    pieces=st.lists(st.sampled_from(parts), max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    prompt=st.sampled_from([USER, OPEN, CLOSED]),
)
def test_splits_make_no_difference(name, pieces, cuts, prompt):
    text = "".join(pieces)
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    split = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    whole = reasoning, content = parse(name, prompt, text)
    assert parse(name, prompt, *split) == whole
    assert parse(name, prompt, *text) == whole
    for kept in "aé😀":
        assert (reasoning + content).count(kept) == text.count(kept)


def test_reasoning_is_shown_as_it_comes():
    parser = get_reasoning_parser("deepseek_r1", None)(request(), USER)
    assert parser.push("Let me ") == ("Let me ", "")
    assert parser.push("see. <") == ("see. ", "")
    assert parser.push("b> </think>\nYes") == ("<b> ", "Yes")
    assert parser.flush() == ("", "")


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
def test_a_message_to_be_continued_decides_by_its_own_markers(name):
    def check(message, expected):
        wish = request(message, continue_final_message=True, add_generation_prompt=False)
        assert parse(name, USER + message, "on</think>end", request=wish) == expected

    check("<think>go", ("on", "end"))
    check("<think>go</think>then", ("", "on</think>end"))
    check("no marker", ("", "on</think>end"))


def test_unknown_names_are_told_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"reasoning_parser 'qwen' is unknown; .*deepseek_r1, .*qwen3"):
        get_reasoning_parser("qwen", None)


@pytest.mark.parametrize("name", REASONING_PARSERS)
def test_every_name_makes_a_parser(name):
    assert parse(name, CLOSED if name != "mistral" else USER, "Hello", " world") == ("", "Hello world")
