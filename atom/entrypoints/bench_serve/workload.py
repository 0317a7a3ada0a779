"""Prompts and arrival times. Equal seeds give equal ones, on every machine and in every version of the server."""

import json
import random
from pathlib import Path
from typing import Any

from atom.entrypoints.bench_serve.records import Prompt
from atom.utils.errors import ConfigError

# One token each, with the space before them, in the vocabularies in use.
_WORDS = (
    "the of and to in a is that for it was on are as with his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many some "
    "so these would other into has more her two like him see time could no make than first been its who now people "
    "my made over did down only way find use may water long little very after words called just where most know"
)
# Below are the special and single-byte tokens of most vocabularies.
_FIRST_COMMON_ID = 1000
_CHARACTERS_A_TOKEN = 4  # of English text, roughly
_MIN_LEN = 4


def random_prompts(
    count: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    vocab_size: int | None,
    seed: int,
) -> list[Prompt]:
    """Lengths uniform in ±range_ratio around input_len and output_len. Ids below vocab_size; words if it is None."""
    source = random.Random(seed)
    prompts = []
    for _ in range(count):
        length = _around(source, input_len, range_ratio)
        answer = _around(source, output_len, range_ratio)
        prompts.append(Prompt(prompt=_tokens(source, length, vocab_size), input_len=length, output_len=answer))
    return prompts


def prefix_prompts(
    count: int,
    *,
    num_prefixes: int,
    prefix_len: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    vocab_size: int | None,
    seed: int,
) -> list[Prompt]:
    """num_prefixes shared beginnings of prefix_len tokens, each before equally many own endings, in random order."""
    source = random.Random(seed)
    prefixes = [_tokens(source, prefix_len, vocab_size) for _ in range(num_prefixes)]
    endings = random_prompts(
        count,
        input_len=input_len,
        output_len=output_len,
        range_ratio=range_ratio,
        vocab_size=vocab_size,
        seed=source.getrandbits(64),
    )
    for index, ending in enumerate(endings):
        prefix: Any = prefixes[index % num_prefixes]
        ending.prompt = prefix + ending.prompt if vocab_size is not None else f"{prefix} {ending.prompt}"
        ending.input_len += prefix_len
    source.shuffle(endings)
    return endings


def load_sharegpt(path: str) -> list[tuple[str, str]]:
    """The first question and answer of each conversation. Raises ConfigError."""
    try:
        conversations = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"dataset_path={path!r}: {error.strerror}") from None
    except ValueError as error:  # also of broken UTF-8
        raise ConfigError(f"dataset_path={path!r} is not JSON: {error}") from None
    pairs = [pair for item in conversations if (pair := _pair(item))] if isinstance(conversations, list) else []
    if not pairs:
        raise ConfigError(
            f"dataset_path={path!r} has no conversation of ShareGPT's form: "
            '[{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}]'
        )
    return pairs


def sharegpt_prompts(
    pairs: list[tuple[str, str]], count: int, *, output_len: int | None = None, max_len: int = 2048, seed: int
) -> list[Prompt]:
    """Random pairs whose question and answer fit into about max_len tokens; repeated if there are too few.

    An answer may have output_len tokens, or about as many as the one in the file. Lengths are estimates, at four
    characters a token.
    """
    prompts = []
    for question, answer in pairs:
        length, answer_length = _estimate(question), output_len or _estimate(answer)
        too_short = length < _MIN_LEN or (output_len is None and answer_length < _MIN_LEN)
        if not too_short and length + answer_length <= max_len:
            prompts.append((question, length, answer_length))
    if not prompts:
        raise ConfigError(f"max_total_len={max_len} is below the length of every conversation in the file")
    source = random.Random(seed)
    source.shuffle(prompts)
    chosen = [prompts[index % len(prompts)] for index in range(count)]
    return [Prompt(prompt=text, input_len=length, output_len=answer) for text, length, answer in chosen]


def arrival_times(count: int, rate: float, burstiness: float = 1.0, *, seed: int) -> list[float]:
    """Seconds after the start at which requests arrive, the first at 0.

    rate: requests a second, math.inf for all at once. Gaps have a gamma distribution of shape `burstiness`: 1 is a
    Poisson process, less comes in bursts, more is even.
    """
    if rate == float("inf"):
        return [0.0] * count
    source = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += source.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


def _around(source: random.Random, length: int, ratio: float) -> int:
    low = max(1, int(length * (1 - ratio)))
    return source.randint(low, max(low, int(length * (1 + ratio))))


def _tokens(source: random.Random, length: int, vocab_size: int | None) -> Any:
    if vocab_size is None:
        return " ".join(source.choices(_WORDS.split(), k=length))
    first = min(_FIRST_COMMON_ID, vocab_size // 2)
    return [source.randrange(first, vocab_size) for _ in range(length)]


def _pair(item: Any) -> tuple[str, str] | None:
    turns = item.get("conversations", item.get("conversation")) if isinstance(item, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    question, answer = texts
    if isinstance(question, str) and isinstance(answer, str) and turns[0].get("from") in (None, "human", "user"):
        return question, answer
    return None


def _estimate(text: str) -> int:
    return -(-len(text) // _CHARACTERS_A_TOKEN)
