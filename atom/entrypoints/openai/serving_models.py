"""/v1/models."""

import time
from typing import Any

from atom.entrypoints.openai.context import ServingContext


class ModelList:
    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._created = int(time.time())

    def all(self) -> dict[str, Any]:
        names = self._context.settings.served_model_names
        return {"object": "list", "data": [self._card(name) for name in names]}

    def one(self, name: str) -> dict[str, Any]:
        """ApiError 404 if it isn't served."""
        return self._card(self._context.check_model(name))

    def _card(self, name: str) -> dict[str, Any]:
        config = self._context.engine.config
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "atom",
            "root": config.model,
            "parent": None,
            "max_model_len": config.max_model_len,
        }
