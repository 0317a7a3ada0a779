"""The engine on a GPU: greedy tokens equal transformers' in float32, whatever runs them."""

import pytest
from engine_cases import CASES, FAMILIES, make_family

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("case", CASES)
def test_engine_on_the_device(family, case, tmp_path):
    CASES[case](family, tmp_path)
