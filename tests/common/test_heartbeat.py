"""Without a terminal a line comes at least every ten seconds while something is done."""

import io
import sys
import threading
import time

import pytest

from finetuning.common import heartbeat
from finetuning.common.bounds import SILENCE
from finetuning.common.heartbeat import Heartbeat
from finetuning.common.terminal import Terminal


@pytest.fixture
def hurried(monkeypatch):
    """The same in a hundredth of the time."""
    most = heartbeat.PATIENCE + heartbeat.SHORTEST + 2 * heartbeat.POLL_SECONDS
    assert SILENCE.limit >= most
    monkeypatch.setattr(heartbeat, "SHORTEST", 0.02)
    monkeypatch.setattr(heartbeat, "PATIENCE", 0.06)
    monkeypatch.setattr(heartbeat, "POLL_SECONDS", 0.01)


def until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_silence_is_broken(hurried, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    terminal = Terminal()
    with terminal.working("tokenizing") as report:
        report(20, 1000)
        assert until(lambda: out.getvalue().count("\n") >= 2)
    line = out.getvalue().splitlines()[0]
    assert line == "tokenizing: 20 of 1,000, 0 s so far"
    terminal.start_progress(500, 3, 10)
    with terminal.working("saving"):
        assert until(lambda: "saving: " in out.getvalue())
    terminal.advance(7)
    assert until(lambda: "training: 7 of 500" in out.getvalue())
    terminal.stop_progress()


def test_who_speaks_anyway_needs_no_line(hurried):
    said, began = [], time.monotonic()
    beat = Heartbeat(said.append, time.monotonic)
    with beat.doing("reading"):
        while time.monotonic() - began < 0.2:
            time.sleep(0.01)
    assert said == []


def test_the_thread_ends_with_what_is_done(hurried):
    said: list[str] = []
    beat = Heartbeat(said.append, lambda: 0.0)
    before = threading.active_count()
    outer = beat.begin("outer")
    with pytest.raises(KeyboardInterrupt), beat.doing("inner"):
        assert until(lambda: any(line.startswith("inner") for line in said))
        raise KeyboardInterrupt
    assert until(lambda: said[-1].startswith("outer"))
    beat.end(outer)
    assert until(lambda: threading.active_count() == before)


def test_a_quiet_run_stays_quiet(hurried, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with Terminal(quiet=True).working("reading"):
        time.sleep(0.15)
    assert out.getvalue() == ""


def test_what_is_over_in_a_moment_is_not_told(hurried, monkeypatch):
    """But what it is a part of is; and of short work alone, as nothing else would be said."""
    monkeypatch.setattr(heartbeat, "SHORTEST", 0.2)
    said: list[str] = []
    beat = Heartbeat(said.append, lambda: 0.0 if beat_silent else time.monotonic() - 0.1)
    beat_silent, outer = False, beat.begin("training")
    outer.since -= 10
    with beat.doing("saving"):
        assert until(lambda: bool(said))
    beat.end(outer)
    assert all(line.startswith("training: 10 s") for line in said)
    said.clear()
    beat_silent = True
    with beat.doing("evaluation"):
        assert until(lambda: bool(said))
    assert said[0].startswith("evaluation")
