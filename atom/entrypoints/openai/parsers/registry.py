"""From the name of a parser to what makes one for each answer."""

import importlib
from dataclasses import dataclass
from typing import Any

from atom.utils.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ParserFactory:
    """Called as factory(request, prompt_text) for each answer.

    needs_special_tokens: some of the format's markers are special tokens of this tokenizer, so the text
    must be made with skip_special_tokens=False for the parser to see them.
    """

    parser: type[Any]
    needs_special_tokens: bool = False

    def __call__(self, request: Any, prompt_text: str) -> Any:
        return self.parser(request, prompt_text)


def require_known(flag: str, table: dict[str, str], name: str) -> None:
    """ConfigError, naming those there are, for a name that isn't in the table."""
    if name not in table:
        raise ConfigError(f"{flag} {name!r:.100} is unknown; it must be one of {', '.join(sorted(table))}")


def find_parser(flag: str, table: dict[str, str], name: str, tokenizer: Any) -> ParserFactory:
    """The factory that `table` ("module:class" by name) has for the flag's value. ConfigError for an unknown name."""
    require_known(flag, table, name)
    module, _, attribute = table[name].partition(":")
    parser = getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
    return ParserFactory(parser, bool(_special_texts(tokenizer) & set(parser.markers)))


def _special_texts(tokenizer: Any) -> set[str]:
    """The texts of the tokens that decoding skips."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content for token in added.values() if token.special}
