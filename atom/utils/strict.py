"""Configuration classes that name a mistyped field and remember which fields the user gave."""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, ClassVar

from atom.utils.errors import AtomError, ConfigError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)", or "" when nothing known is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


class StrictConfig:
    """Base of keyword-configured dataclasses.

    Runs before the generated __init__: an unknown field is an error with the nearest right name, and
    the fields that were given are remembered, since a default and the same value chosen mean different things.
    """

    _positional: ClassVar[tuple[str, ...]] = ()
    _error: ClassVar[type[AtomError]] = ConfigError
    _user_set: frozenset[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        settable = {f.name for f in fields(cls) if f.init}  # type: ignore[arg-type]
        for name in kwargs:
            if name in settable:
                continue
            if any(f.name == name for f in fields(cls)):  # type: ignore[arg-type]
                raise cls._error(f"{cls.__name__}: field {name!r} is derived and can't be given")
            raise cls._error(f"{cls.__name__}: unknown field {name!r}{did_you_mean(name, settable)}")
        if len(args) > len(cls._positional):
            raise cls._error(f"{cls.__name__}: fields must be given by name (beyond {cls._positional})")
        self._user_set = frozenset(kwargs) | frozenset(cls._positional[: len(args)])
        return self

    def is_user_set(self, name: str) -> bool:
        """Whether the caller gave this field, even if at its default value."""
        return name in self._user_set

    def mark_user_set(self, names: Iterable[str]) -> None:
        """Let exactly these count as given; for code that builds a config out of the user's other settings."""
        self._user_set = frozenset(names)
