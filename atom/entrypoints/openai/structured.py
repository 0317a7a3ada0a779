"""Which structure a request asks its answer to have, as SamplingParams know it."""

from typing import Any

from atom.entrypoints.openai.protocol import SamplingFields
from atom.model_engine.async_llm_engine import AsyncLLMEngine
from atom.sampling_params import STRUCTURES, SamplingParams
from atom.utils.errors import RequestError

_GUIDES = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")


def structured_output_of(request: SamplingFields) -> tuple[dict[str, Any] | None, str]:
    """What is asked for, and by which field.

    {"json": schema}, {"regex": text}, {"grammar": text}, {"choice": texts}, {"json_object": True}, or None.
    Raises RequestError for several at once.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in _GUIDES:
        value = getattr(request, name)
        if value is not None:
            found[name] = {name.removeprefix("guided_"): value}
    if request.structured_outputs:
        given = {kind: value for kind, value in request.structured_outputs.items() if value is not None}
        if len(given) != 1 or not set(given) <= set(STRUCTURES):
            raise RequestError(
                f"structured_outputs must have exactly one of {', '.join(STRUCTURES)}", "structured_outputs"
            )
        found["structured_outputs"] = given
    if request.response_format is not None and request.response_format.type != "text":
        found["response_format"] = _of_response_format(request)
    if len(found) > 1:
        raise RequestError(f"{' and '.join(found)} contradict each other; give one of them", next(iter(found)))
    for name, structure in found.items():
        return structure, name
    return None, "response_format"


async def checked(engine: AsyncLLMEngine, structure: dict[str, Any] | None, field: str) -> dict[str, Any] | None:
    """The structure, if answers can be held to it; its grammar is made off the event loop. RequestError for `field`."""
    if structure is None:
        return None
    try:
        params = SamplingParams(structured_output=structure)
        await engine.in_thread(lambda processor: processor.grammar_of(params))
    except RequestError as error:
        kind = next(iter(structure))
        raise RequestError(str(error).replace(f"structured_output.{kind}", field), field) from None
    return structure


def _of_response_format(request: SamplingFields) -> dict[str, Any]:
    form = request.response_format
    assert form is not None
    if form.type == "json_object":
        return {"json_object": True}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise RequestError("response_format.json_schema.schema is missing", "response_format")
    return {"json": form.json_schema.schema_}
