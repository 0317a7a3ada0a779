"""Whether an optional package is here, in a version that we know, and works."""

import importlib
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def missing_reason(module: str, distribution: str, at_least: str, below: str, remedy: str) -> str | None:
    """Why a module can't be used; None when its distribution's version is in [at_least, below) and it is imported."""
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        return f"the package {distribution} is not installed: {remedy}"
    if not _release(at_least) <= _release(installed) < _release(below):
        return f"{distribution} {installed} is installed, but {at_least} or newer, below {below}, is needed: {remedy}"
    try:
        importlib.import_module(module)
    except Exception as error:  # an incomplete installation raises what it likes
        return f"{module} can't be imported ({type(error).__name__}: {error})".splitlines()[0]
    return None


def _release(text: str) -> tuple[int, ...]:
    """(major, minor, patch) of a version, whatever follows them."""
    numbers = [int(n) for n in re.findall(r"\d+", re.match(r"[\d.]*", text)[0])[:3]]  # type: ignore[index]
    return (*numbers, *(0 for _ in range(3 - len(numbers))))
