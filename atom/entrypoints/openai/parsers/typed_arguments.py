"""Arguments written as plain text, as JSON of the types that the tool's schema gives its parameters."""

import json
from typing import Any, NoReturn

STRING = frozenset({"string"})

_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_MOST_REFERENCES = 8


def parameter_types(request: Any, tool: str) -> dict[str, frozenset[str]]:
    """The JSON types that each parameter of a request's tool may have; none for an unknown tool."""
    for known in request.tools or ():
        if known.function.name == tool:
            schema = known.function.parameters or {}
            properties = schema.get("properties")
            if isinstance(properties, dict):
                return {key: frozenset(_types(value, schema)) or STRING for key, value in properties.items()}
    return {}


def as_json(text: str, types: frozenset[str]) -> str:
    """The value that a model wrote as `text`: JSON of one of the types if it is that, else a JSON string."""
    if types != STRING:
        bare = text.strip()
        bare = _PYTHON_WORDS.get(bare, bare)
        try:
            value = json.loads(bare, parse_constant=_refuse)
        except (ValueError, RecursionError):
            pass
        else:
            if "string" not in types or _type_of(value) & types - STRING:
                return bare
    return json.dumps(text, ensure_ascii=False)


def _types(schema: Any, root: dict[str, Any], references: int = 0) -> set[str]:
    if not isinstance(schema, dict) or references > _MOST_REFERENCES:
        return set()
    found = schema.get("type", [])
    types = {found} if isinstance(found, str) else {kind for kind in found if isinstance(kind, str)}
    for value in schema.get("enum") or ():
        types |= _type_of(value)
    if "const" in schema:
        types |= _type_of(schema["const"])
    for word in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(word) or ():
            types |= _types(part, root, references + 1)
    if isinstance(reference := schema.get("$ref"), str):
        types |= _types(_resolve(reference, root), root, references + 1)
    return types


def _resolve(reference: str, root: Any) -> Any:
    for step in reference.removeprefix("#").split("/")[1:]:
        root = root.get(step) if isinstance(root, dict) else None
    return root


def _type_of(value: Any) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number"}
        case str():
            return {"string"}
        case list():
            return {"array"}
        case _:
            return {"object"}


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
