import subprocess
import sys

import pytest

from atom.utils import logging as atom_logging


def run(code):
    """What a fresh interpreter writes to stderr."""
    prelude = "import logging; from atom.utils.logging import *; log = get_logger('atom.x.y');"
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, check=True).stderr


def test_one_short_line_however_often_configured():
    lines = run("configure_logging(); configure_logging('INFO'); log.info('hello %d', 3); log.debug('no')").splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("I ")
    assert lines[0].endswith(": hello 3")


def test_level_is_kept_unless_chosen_again():
    assert run("configure_logging('warning'); configure_logging(); log.info('no')") == ""
    assert "yes" in run("configure_logging('error'); configure_logging('debug'); log.debug('yes')")


def test_an_application_that_logs_itself_gets_each_record_once():
    code = "logging.basicConfig(format='APP %(message)s'); configure_logging(); log.info('hello')"
    assert run(code) == "APP hello\n"


def test_nothing_is_written_unconfigured_below_warning():
    assert run("log.info('hello')") == ""


@pytest.mark.parametrize(
    ("name", "logger"), [("atom", "atom"), ("atom.a.b", "atom.a.b"), ("other", "atom.other"), ("atoms", "atom.atoms")]
)
def test_names_are_under_atom(name, logger):
    assert atom_logging.get_logger(name).name == logger


def test_log_once(caplog, monkeypatch):
    monkeypatch.setattr(atom_logging, "_seen", set())
    logger = atom_logging.get_logger("once")
    with caplog.at_level("INFO", logger="atom"):
        for value in (1, 1, 2):
            atom_logging.log_once(logger, "value %d%%", value)
        atom_logging.log_once(logger, "100%")
    assert [r.getMessage() for r in caplog.records] == ["value 1%", "value 2%", "100%"]
    assert caplog.records[0].module == "test_logging"
