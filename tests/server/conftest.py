import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))  # tiny_models
from live import LiveServer, live_server


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> LiveServer:
    """One server for all tests that harm it in no lasting way."""
    flags = ["--max-num-seqs", "16"]
    with live_server(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


@pytest.fixture(scope="session")
def guarded_server(tmp_path_factory) -> LiveServer:
    """Another for all, with the key "secret", small requests, a prefix cache, and a line of log for each request."""
    flags = ["--api-key", "secret", "--max-request-bytes", "5000", "--enable-prefix-caching", "--log-requests"]
    with live_server(tmp_path_factory.mktemp("guarded"), *flags, "--max-num-seqs", "4") as server:
        yield server
