"""Whether an optional package is here, in a version that we know."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def missing_reason(distribution: str, at_least: str, below: str, remedy: str) -> str | None:
    """Why a distribution can't be used, ending in the remedy; None when its version is in [at_least, below)."""
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        return f"the package {distribution} is not installed: {remedy}"
    if _release(at_least) <= _release(installed) < _release(below):
        return None
    return f"{distribution} {installed} is installed, but {at_least} or newer, below {below}, is needed: {remedy}"


def _release(text: str) -> tuple[int, ...]:
    """(major, minor, patch) of a version, whatever follows them."""
    numbers = [int(n) for n in re.findall(r"\d+", re.match(r"[\d.]*", text)[0])[:3]]  # type: ignore[index]
    return (*numbers, *(0 for _ in range(3 - len(numbers))))
