"""Which structure a request asks its answer to have, as SamplingParams know it."""

from typing import Any

from atom.entrypoints.openai.protocol import SamplingFields
from atom.sampling_params import SamplingParams
from atom.utils.errors import RequestError

_GUIDES = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
_KINDS = ("json", "regex", "grammar", "choice", "json_object")


def structured_output_of(request: SamplingFields) -> dict[str, Any] | None:
    """{"json": schema}, {"regex": text}, {"grammar": text}, {"choice": texts} or {"json_object": True}; or None.

    Raises RequestError for several at once.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in _GUIDES:
        value = getattr(request, name)
        if value is not None:
            found[name] = {name.removeprefix("guided_"): value}
    if request.structured_outputs:
        given = {kind: value for kind, value in request.structured_outputs.items() if value is not None}
        if len(given) != 1 or not set(given) <= set(_KINDS):
            raise RequestError(f"structured_outputs must have exactly one of {', '.join(_KINDS)}", "structured_outputs")
        found["structured_outputs"] = given
    if request.response_format is not None and request.response_format.type != "text":
        found["response_format"] = _of_response_format(request)
    if len(found) > 1:
        raise RequestError(f"{' and '.join(found)} contradict each other; give one of them", next(iter(found)))
    return next(iter(found.values()), None)


def with_structure(values: dict[str, Any], structure: dict[str, Any] | None, param: str = "response_format") -> None:
    """Put it into the keyword arguments of SamplingParams."""
    if structure is None:
        return
    if "structured_output" not in SamplingParams.__dataclass_fields__:
        raise RequestError(f"{param}: structured output is not supported yet", param)
    values["structured_output"] = structure


def _of_response_format(request: SamplingFields) -> dict[str, Any]:
    form = request.response_format
    assert form is not None
    if form.type == "json_object":
        return {"json_object": True}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise RequestError("response_format.json_schema.schema is missing", "response_format")
    return {"json": form.json_schema.schema_}
