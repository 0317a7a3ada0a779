"""How each vocabulary splits text before its merges apply, by the name in a GGUF file's `tokenizer.ggml.pre`.

A GGUF file carries only that name. Each entry is the list of patterns, applied one after the other, that the
vocabulary was trained with: every match becomes a piece of its own, and so does the text between matches.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizerSpec:
    """ignore_merges: a piece that is a token as a whole is taken as such. add_bos: where the file doesn't say."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SYMBOLS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GLUE = r"[^\r\n\p{L}\p{N}]?"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"


def _words(digits: str) -> str:
    """The pattern of cl100k and its descendants, which differ in how many digits stay together."""
    return rf"{_CONTRACTION}|{_GLUE}\p{{L}}+|{digits}|{_SYMBOLS}|{_SPACES}"


def _cased_words(contraction: str, digits: str) -> str:
    """The pattern of o200k and tekken: a word also ends where lower case turns into upper case."""
    return (
        rf"{_GLUE}{_UPPER}*{_LOWER}+{contraction}|{_GLUE}{_UPPER}+{_LOWER}*{contraction}"
        rf"|{digits}|{_SYMBOLS_SLASH}|{_SPACES}"
    )


_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The letters with case as DeepSeek's first tokenizer lists them, in ranges.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

_DEEPSEEK_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"

_LLAMA3 = PreTokenizerSpec(patterns=(_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizerSpec(patterns=(_words(_DIGIT),))
_PLAIN_GPT2 = PreTokenizerSpec(patterns=(_GPT2,))
_DIGITS_THEN_GPT2 = PreTokenizerSpec(patterns=(_DIGIT, _GPT2))
_GPT4O = PreTokenizerSpec(patterns=(_cased_words(f"{_CONTRACTION}?", r"\p{N}{1,3}"),))

PRE_TOKENIZERS: dict[str, PreTokenizerSpec] = {
    "default": PreTokenizerSpec(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN_GPT2,
    "mpt": _PLAIN_GPT2,
    "olmo": _PLAIN_GPT2,
    "exaone4": _PLAIN_GPT2,
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "command-r": _DIGITS_THEN_GPT2,
    "codeshell": _DIGITS_THEN_GPT2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "lfm2": _LLAMA3,
    "dbrx": PreTokenizerSpec(patterns=_LLAMA3.patterns),
    "smaug-bpe": PreTokenizerSpec(patterns=_LLAMA3.patterns),
    "chatglm-bpe": PreTokenizerSpec(patterns=_LLAMA3.patterns),
    "glm4": PreTokenizerSpec(patterns=_LLAMA3.patterns, ignore_merges=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "hunyuan": _QWEN2,
    "stablelm2": _QWEN2,
    "qwen35": PreTokenizerSpec(
        patterns=(rf"{_CONTRACTION}|{_GLUE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",)
    ),
    "tekken": PreTokenizerSpec(patterns=(_cased_words("", _DIGIT),), ignore_merges=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "minimax-m2": _GPT4O,
    "deepseek-llm": PreTokenizerSpec(
        patterns=(
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[" + _DEEPSEEK_PUNCTUATION + r"]+",
            r"\s+$",
            _CJK_HANGUL,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizerSpec(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, _DIGIT)),
    "deepseek-v3": PreTokenizerSpec(patterns=(r"\p{N}{1,3}", _CJK, _DEEPSEEK_V3)),
    "hunyuan-dense": PreTokenizerSpec(patterns=(r"\p{N}{1,3}", _CJK, _DEEPSEEK_V3)),
}

FALLBACK = _PLAIN_GPT2


def build_pre_tokenizer(spec: PreTokenizerSpec) -> "PreTokenizer":
    """The splits, then the byte alphabet of GPT-2, in which byte-level vocabularies are written."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in spec.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
