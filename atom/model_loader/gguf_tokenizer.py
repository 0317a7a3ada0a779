"""Builds a tokenizer from a GGUF file's metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

Not from `transformers`' own conversion: that takes seconds and forgets the pre-tokenizer of several vocabularies.
Text is not normalized, as in llama.cpp: GGUF has no field for a normalizer.
"""

import logging
import re
from typing import TYPE_CHECKING, Any

from atom.model_loader.pre_tokenizers import FALLBACK, PRE_TOKENIZERS, PreTokenizerSpec, build_pre_tokenizer
from atom.utils.errors import ModelLoadError
from atom.utils.gguf_file import GGUFFile
from atom.utils.logging import get_logger, log_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

_CONTROL, _USER_DEFINED, _UNKNOWN, _BYTE = 3, 4, 2, 6
_SPACE = "\u2581"  # SentencePiece writes a space as this


def build_tokenizer(file: GGUFFile) -> "PreTrainedTokenizerBase":
    """With special tokens and chat templates. Raises ModelLoadError for a missing vocabulary or an unknown kind."""
    from transformers import PreTrainedTokenizerFast

    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens or kind is None:
        raise ModelLoadError(f"GGUF file {file.path}: it holds no vocabulary; give tokenizer= a folder that does")
    if kind == "gpt2":
        spec = _pre_tokenizer_spec(file)
        backend, add_bos = _byte_level(metadata, spec), spec.add_bos
    elif kind == "llama":
        if metadata.get("tokenizer.ggml.scores") is None:
            raise ModelLoadError(f"GGUF file {file.path}: tokenizer.ggml.scores is missing; this vocabulary needs it")
        backend, add_bos = _sentencepiece(metadata), True
    else:
        raise ModelLoadError(
            f"GGUF file {file.path}: tokenizer.ggml.model is {kind!r}; supported are gpt2 and llama; "
            "give tokenizer= a folder with the model's own tokenizer"
        )
    _add_special_tokens(backend, metadata)
    named = {
        f"{name}_token": tokens[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None and index < len(tokens)
    }
    named.setdefault("bos_token", None)
    named.setdefault("eos_token", None)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        chat_template=_chat_template(metadata),
        clean_up_tokenization_spaces=False,
        name_or_path=str(file.path),
        **named,
    )


def _byte_level(metadata: dict[str, Any], spec: PreTokenizerSpec) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    vocab = _vocabulary(metadata)
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges", ()):
        left, _, right = merge.partition(" ")
        # A merge into something that isn't a token can never survive.
        if left + right in vocab and left in vocab and right in vocab:
            merges.append((left, right))
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=spec.ignore_merges))
    backend.pre_tokenizer = build_pre_tokenizer(spec)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: dict[str, Any]) -> "Tokenizer":
    """A vocabulary with scores: the pair whose union scores highest merges first, which is BPE with merges by score."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens = metadata["tokenizer.ggml.tokens"]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    vocab = _vocabulary(metadata)
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges_from_scores(metadata, vocab),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    return backend


def _merges_from_scores(metadata: dict[str, Any], vocab: dict[str, int]) -> list[tuple[str, str]]:
    scores, types = metadata["tokenizer.ggml.scores"], metadata.get("tokenizer.ggml.token_type")
    ranked = []
    for token, index in vocab.items():
        # Control and byte tokens never come from merging text.
        if len(token) < 2 or (types is not None and types[index] in (_CONTROL, _UNKNOWN, _BYTE)):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _vocabulary(metadata: dict[str, Any]) -> dict[str, int]:
    """Token -> id. The ids must stay dense, so a repeated or empty spelling gets a name nothing can match."""
    vocab: dict[str, int] = {}
    for index, token in enumerate(metadata["tokenizer.ggml.tokens"]):
        token = _printable(token)
        vocab[token if token and token not in vocab else f"[UNUSED_{index}]"] = index
    return vocab


def _add_special_tokens(backend: "Tokenizer", metadata: dict[str, Any]) -> None:
    """Control tokens are special; user-defined ones are matched whole in the text but stay ordinary text."""
    from tokenizers import AddedToken

    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or ()
    special, ordinary = [], []
    for token, kind in zip(tokens, types, strict=False):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(_printable(token), normalized=False, special=True))
        elif kind == _USER_DEFINED:
            ordinary.append(AddedToken(_printable(token), normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(ordinary)


def _pre_tokenizer_spec(file: GGUFFile) -> PreTokenizerSpec:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    spec = PRE_TOKENIZERS.get(name)
    if spec is None:
        log_once(
            logger,
            "tokenizer.ggml.pre is %r, which ATOM doesn't know: splitting text as GPT-2 does, "
            "so some token ids may differ from those the model was trained with",
            name,
            level=logging.WARNING,
        )
        return FALLBACK
    return spec


def _chat_template(metadata: dict[str, Any]) -> str | dict[str, str] | None:
    """One template, or by name where the file has several (`tokenizer.chat_template.tool_use`)."""
    prefix = "tokenizer.chat_template."
    default = metadata.get("tokenizer.chat_template")
    named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if not named:
        return default
    return {**named, "default": default} if default else named


def _printable(token: str) -> str:
    # The header keeps bytes that aren't UTF-8 as surrogates, which the tokenizers library can't take.
    return re.sub(r"[\ud800-\udfff]", "\ufffd", token)
