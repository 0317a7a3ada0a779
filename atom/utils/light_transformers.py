"""Keeps transformers' configurations from importing all of its modelling code, which takes longer than torch.

Since 5.x a configuration checks the names of activations against the table of their implementations, and that module
imports Dynamo, distributed tensors and the kernels hub. Here the table is loaded when a name is looked up.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

_ACTIVATIONS, _VALIDATORS = "transformers.activations", "transformers.utils.type_validators"
_lock = threading.Lock()


class _Activations(Mapping[str, Any]):
    """transformers' own table, on first use."""

    def _table(self) -> Mapping[str, Any]:
        from transformers.activations import ACT2FN

        return ACT2FN

    def __getitem__(self, name: str) -> Any:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())


def import_validators() -> None:
    """Import the configurations' checks without the activations; nothing happens where either is imported already.

    A transformers that is laid out differently is left alone.
    """
    with _lock:
        if _ACTIVATIONS in sys.modules or _VALIDATORS in sys.modules:
            return
        with suppress(ImportError):
            # What the checks import beside the activations, so that nothing else meets the stand-in.
            import transformers.image_utils
            import transformers.tokenization_utils_base
            import transformers.video_utils
        if _ACTIVATIONS in sys.modules:
            return
        stand_in: Any = ModuleType(_ACTIVATIONS)
        stand_in.ACT2FN = _Activations()
        sys.modules[_ACTIVATIONS] = stand_in
        try:
            with suppress(ImportError):
                import transformers.utils.type_validators  # noqa: F401
        finally:
            if sys.modules.get(_ACTIVATIONS) is stand_in:
                del sys.modules[_ACTIVATIONS]
