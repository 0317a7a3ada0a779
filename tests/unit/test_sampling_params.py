import dataclasses
import math

import msgspec
import numpy as np
import pytest

from atom.sampling_params import MAX_STOP_STRINGS, SamplingParams
from atom.utils.errors import RequestError


def test_defaults_are_the_guides():
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.ignore_eos, params.stop_strings) == (1.0, 64, False, None)
    assert [f.name for f in dataclasses.fields(SamplingParams)][:4] == [
        "temperature", "max_tokens", "ignore_eos", "stop_strings",
    ]  # fmt: skip


def test_the_constructor_takes_every_field_with_its_default():
    for f in dataclasses.fields(SamplingParams):
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        assert getattr(SamplingParams(), f.name) == default
        assert SamplingParams(**{f.name: default}) == SamplingParams()


def test_first_four_fields_are_positional():
    params = SamplingParams(0.5, 10, True, ["x"])
    assert (params.temperature, params.max_tokens, params.ignore_eos, params.stop_strings) == (0.5, 10, True, ["x"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
        ("temperature", True), ("temperature", None), ("temperature", 10**400), ("temperature", 1e9),
        ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", None),
        ("ignore_eos", 1), ("ignore_eos", "yes"),
        ("top_p", 0), ("top_p", 1.01), ("top_p", math.nan), ("top_k", -2), ("top_k", 2**40), ("top_k", 1.0),
        ("min_p", -0.1), ("min_p", 1.1), ("seed", 1.5), ("seed", 2**64), ("seed", "7"),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("frequency_penalty", math.nan),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", math.inf),
        ("stop_token_ids", [-1]), ("stop_token_ids", 5), ("stop_token_ids", "5"), ("stop_token_ids", [1.5]),
        ("stop_token_ids", list(range(2000))), ("min_tokens", -1), ("min_tokens", 65),
        ("logprobs", -1), ("logprobs", 21), ("prompt_logprobs", 21), ("prompt_logprobs", True),
        ("n", 0), ("n", 129),
        ("stop_strings", [""]), ("stop_strings", ""), ("stop_strings", [1]), ("stop_strings", 3),
        ("stop_strings", ["x"] * (MAX_STOP_STRINGS + 1)), ("stop_strings", ["x" * 2000]),
        ("logit_bias", [1]), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: 101}), ("logit_bias", {1: math.nan}),
        ("logit_bias", {"x": 1}), ("logit_bias", {"9" * 30: 1}), ("logit_bias", dict.fromkeys(range(2000), 1.0)),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_in_one_line(name, value):
    with pytest.raises(RequestError, match=name) as info:
        SamplingParams(**{name: value})
    assert "\n" not in str(info.value)
    assert info.value.param.split("[")[0].split()[0] == name


def test_stop_is_another_name_for_stop_strings():
    assert SamplingParams(stop="END").stop_strings == ["END"]
    assert SamplingParams(stop=["a", "b"]).stop_strings == ["a", "b"]
    assert SamplingParams(stop=[]).stop_strings is None
    with pytest.raises(RequestError, match="not both"):
        SamplingParams(stop="a", stop_strings=["b"])


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(RequestError, match="'max_tokens'") as info:
        SamplingParams(max_token=3)
    assert info.value.param == "max_token"


def test_numbers_become_plain_python_numbers():
    params = SamplingParams(
        temperature=np.float32(0.5),
        max_tokens=np.int64(3),
        top_k=-1,
        stop_token_ids=np.array([4, 5]),
        logit_bias={"7": 1},
    )
    assert (type(params.temperature), type(params.max_tokens)) == (float, int)
    assert params.top_k == 0
    assert params.stop_token_ids == [4, 5]
    assert {type(t) for t in params.stop_token_ids} == {int}
    assert params.logit_bias == {7: 1.0}


def test_a_vanishing_temperature_is_greedy():
    assert SamplingParams(temperature=1e-6).temperature == 0
    assert SamplingParams(temperature=1e-4).temperature == 1e-4


def test_lists_are_not_shared_between_requests():
    stops, tokens = ["a"], [1]
    params = SamplingParams(stop_strings=stops, stop_token_ids=tokens)
    stops.append("b")
    tokens.append(2)
    assert (params.stop_strings, params.stop_token_ids) == (["a"], [1])
    SamplingParams().stop_token_ids.append(3)
    assert SamplingParams().stop_token_ids == []


def test_survives_msgpack_and_replace():
    params = SamplingParams(0.7, 9, stop="x", top_p=0.9, seed=3, logit_bias={5: -1.0}, stop_token_ids=[2], logprobs=4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert dataclasses.replace(params, max_tokens=10).stop_strings == ["x"]
    with pytest.raises(RequestError):
        dataclasses.replace(params, max_tokens=0)
