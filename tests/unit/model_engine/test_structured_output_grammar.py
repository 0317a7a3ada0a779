"""What a request may ask its answer to look like, and what is refused."""

import pytest

from atom.model_engine.structured_output import grammar_of
from atom.sampling_params import SamplingParams
from atom.utils.errors import RequestError


@pytest.mark.parametrize(
    "structure",
    [
        {"json": {"type": "strnig"}},
        {"json": "{"},
        {"json": '"text"'},
        {"json": {"$ref": "http://localhost/schema"}},
        {"regex": "(a"},
        {"grammar": "root ::= nothing"},
        {"grammar": "start: " + "(" * 60_000},
        {"json": {"const": "\ud800"}},
        {"regex": "a" * 300_000},
        {"regex": "(" * 5000 + "a" + ")" * 5000},
        {"regex": "a", "json": {}},
        {"choice": []},
        {"choice": ["a", 1]},
        {"json_object": False},
        {"colour": "red"},
        {},
        "json",
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_structure_is_refused_in_one_line(structure):
    with pytest.raises(RequestError) as caught:
        grammar_of(SamplingParams(structured_output=structure).structured_output)
    assert caught.value.param == "structured_output"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_deep_schema_is_refused():
    schema = {"type": "string"}
    for _ in range(100_000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nested more than"):
        grammar_of({"json": schema})
