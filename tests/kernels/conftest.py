"""Fixtures of several kernel tests."""

import pytest
import torch


@pytest.fixture
def threads_restored():
    """The test may set torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
