"""Whatever the OpenAPI document lets a client send, no answer is a server's error."""

import re

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402

# They change what other tests see, or take as long as a client wants.
_EXCLUDED = re.compile("profile")


def _check_all(server, examples):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tested = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if _EXCLUDED.search(operation.path):
            continue

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def check(case):
            if isinstance(case.body, dict):  # short answers: how long they are tests nothing
                for name, most in (("max_tokens", 4), ("max_completion_tokens", 4), ("max_output_tokens", 4), ("n", 2)):
                    if isinstance(case.body.get(name, most), int | None):
                        case.body[name] = min(case.body.get(name) or most, most)
            response = case.call(timeout=30)
            assert response.status_code < 500, response.text

        check()
        tested += 1
    assert tested > 10


def test_a_few_requests_to_every_path(server):
    _check_all(server, 4)


@pytest.mark.slow
def test_many_requests_to_every_path(server):
    _check_all(server, 300)
