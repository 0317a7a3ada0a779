"""Splitting a start into phases, by a clock that the tests move."""

import logging
import threading

import pytest

from atom.utils import startup
from atom.utils.startup import StartupTimer


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def pass_(self, seconds):
            self.now += seconds

    it = Clock()
    monkeypatch.setattr(startup.time, "perf_counter", lambda: it.now)
    yield it
    timer = startup.current()
    if timer is not None:
        timer.end()


def test_phases_other_and_total(clock):
    timer = StartupTimer()
    clock.pass_(0.5)
    with timer.phase("a"):
        clock.pass_(1)
    with timer.phase("b"):
        clock.pass_(2)
    with timer.phase("a"):
        clock.pass_(4)
    timer.end()
    clock.pass_(100)
    assert timer.seconds() == {"a": 5, "b": 2, "other": 0.5, "total": 7.5}
    assert list(timer.seconds()) == ["a", "b", "other", "total"]


def test_inner_phase_takes_its_time_from_the_outer(clock):
    timer = StartupTimer()
    with timer.phase("load"):
        clock.pass_(1)
        with timer.phase("build"):
            clock.pass_(2)
            with timer.phase("kernels"):
                clock.pass_(4)
        clock.pass_(8)
    timer.end()
    assert timer.seconds() == {"load": 9, "build": 2, "kernels": 4, "other": 0, "total": 15}


def test_phase_that_fails_counts_too(clock):
    timer = StartupTimer()

    def fail():
        with timer.phase("a"):
            with timer.phase("b"):
                clock.pass_(1)
            clock.pass_(2)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    with timer.phase("c"):
        clock.pass_(3)
    assert timer.seconds() == {"a": 2, "b": 1, "c": 3, "other": 0, "total": 6}


def test_waiting_for_the_first_request_is_not_part_of_the_start(clock):
    with startup.measured() as timer, startup.phase("load"):
        clock.pass_(3)
    clock.pass_(1000)
    timer.add_first_token(0.25)
    assert timer.seconds() == {"load": 3, "first token": 0.25, "other": 0, "total": 3.25}


def test_nothing_is_measured_where_nobody_asked(clock):
    assert startup.current() is None
    with startup.phase("a"):
        startup.note("a", "unseen")
    assert startup.phase("a") is startup.phase("b")  # nothing is even made
    startup.finish()


def test_inner_start_is_part_of_the_outer_and_ends_with_it(clock):
    with startup.measured() as outer:
        with startup.measured() as inner:
            clock.pass_(1)
        assert inner is outer is startup.current()
    assert startup.current() is None


def test_failed_start_leaves_nothing_behind(clock):
    with pytest.raises(ValueError, match="no"), startup.measured():
        raise ValueError("no")
    assert startup.current() is None


def test_each_thread_has_its_own(clock):
    found = []
    with startup.measured() as timer:
        thread = threading.Thread(target=lambda: found.append(startup.current()))
        thread.start()
        thread.join()
        assert startup.current() is timer
    assert found == [None]


def test_split_of_another_process_fills_the_wait_for_it(clock):
    timer = StartupTimer()
    with timer.phase("tokenizer"):
        clock.pass_(1)
    with timer.phase("engine process"):
        clock.pass_(10)
    timer.end()
    timer.split_up("engine process", {"load": 6, "other": 1, "total": 7}, "engine: ")
    assert timer.seconds() == {
        "tokenizer": 1, "engine process": 3, "engine: load": 6, "engine: other": 1, "other": 0, "total": 11,
    }  # fmt: skip


def test_only_the_end_of_another_process_was_waited_for(clock):
    timer = StartupTimer()
    with timer.phase("engine process"):
        clock.pass_(4)
    timer.end()
    timer.split_up("engine process", {"import": 5, "load": 3, "other": 0.5, "total": 8.5}, "engine: ")
    assert timer.seconds() == {
        "engine process": 0, "engine: import": 0.5, "engine: load": 3, "engine: other": 0.5, "other": 0, "total": 4,
    }  # fmt: skip


def test_since_process_counts_what_passed_before(clock, monkeypatch):
    monkeypatch.setattr(startup, "process_age", lambda: 2.0)
    timer = StartupTimer(since_process=True)
    clock.pass_(1)
    timer.end()
    assert timer.seconds() == {"python": 2, "other": 1, "total": 3}


def test_process_age_grows_with_the_process():
    before = startup.process_age()
    assert 0 < before < 24 * 3600
    assert startup.process_age() >= before


def test_log_has_a_line_a_phase_and_the_notes(clock, caplog):
    with caplog.at_level(logging.DEBUG, logger="atom"), startup.measured():
        with startup.phase("compile"):
            clock.pass_(1.5)
        startup.note("compile", "7 pieces, none from the cache")
    lines = [" ".join(record.message.split()) for record in caplog.records]
    assert lines == ["compile 1.500 s (7 pieces, none from the cache)", "total 1.500 s"]
