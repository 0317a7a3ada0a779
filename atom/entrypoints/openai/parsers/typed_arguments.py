"""Arguments written as plain text, as JSON of the types that the tool's schema gives its parameters."""

import json
from typing import Any, NoReturn

STRING = frozenset({"string"})

_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def parameter_types(request: Any, tool: str, parameter: str) -> frozenset[str]:
    """The JSON types that the parameter of a request's tool may have; a string where nothing is known."""
    for known in request.tools or ():
        if known.function.name == tool:
            schema = known.function.parameters or {}
            properties = schema.get("properties")
            if isinstance(properties, dict):
                return _types(properties.get(parameter), schema) or STRING
    return STRING


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


def _types(schema: Any, root: dict[str, Any]) -> frozenset[str]:
    """Users write schemas, so anything may stand anywhere."""
    types: set[str] = set()
    seen = set()
    rest = [schema]
    while rest:
        schema = rest.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        named = schema.get("type")
        types.update(name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str))
        for value in _listed(schema.get("enum")) + ([schema["const"]] if "const" in schema else []):
            types |= _type_of(value)
        for word in ("anyOf", "oneOf", "allOf"):
            rest += _listed(schema.get(word))
        if isinstance(reference := schema.get("$ref"), str):
            rest.append(_resolve(reference, root))
    return frozenset(types)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


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
