"""Errors a user can cause. Each message is one line: the field, the value, and what would be right."""


class AtomError(ValueError):
    """Base of every user-caused error; the command line prints it and exits with 2."""


class ConfigError(AtomError):
    """A setting or flag is wrong."""


class ModelLoadError(AtomError):
    """A checkpoint, its config or its tokenizer is missing, damaged or not supported."""


class RequestError(AtomError):
    """One request is invalid; `param` names the offending parameter."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CacheMemoryError(AtomError):
    """There is not enough memory for the KV cache."""
