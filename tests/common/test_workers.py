"""Worker processes import only what their task needs, and a signal while one is started leaves none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetuning.common import workers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

LIGHT = """
import sys
import torch_of_the_program

if __name__ == "__main__":
    from finetuning.analysis.facts import observe_span
    from finetuning.common.workers import in_order
    from finetuning.readers.sample import Sample

    samples = [Sample(question="问", thinking="想", answer="答")]
    jobs = [(samples, 0, 1)]
    (facts,) = in_order(observe_span, jobs, 1)
    assert facts.counts["samples"] == 1
    names = ("torch", "transformers", "torch_of_the_program", "pandas", "scipy", "matplotlib")
    found = f"[n for n in {names} if n in __import__('sys').modules]"
    (there,) = in_order(eval, [(f"(__import__('finetuning.analysis.facts'), {found})[1]",)], 1)
    assert there == [], there
    main = sys.modules["__main__"]
    assert main.__file__ == sys.argv[0] and main.__spec__ is None
"""


def started(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The text as a program of that folder, as workers are started by a file."""
    (folder / "program.py").write_text(program, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(folder / "program.py"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )


def test_workers_import_neither_the_program_nor_torch(tmp_path):
    (tmp_path / "torch_of_the_program.py").write_text("")
    done = started(tmp_path, LIGHT)
    assert done.returncode == 0, done.stderr


STARTING = """
import multiprocessing, os, signal, sys, threading
from multiprocessing import popen_spawn_posix, resource_tracker

from finetuning.common.process import Interrupted, StopSignal
from finetuning.common.workers import in_order
from tests.common.test_workers import nap

NUMBER, NTH = getattr(signal, sys.argv[1]), int(sys.argv[2])
started, real = [], popen_spawn_posix.util.spawnv_passfds

def start(*arguments):
    started.append(real(*arguments))
    if len(started) == NTH:
        for _ in range(2):  # a launcher passes on what the terminal has sent already
            os.kill(os.getpid(), NUMBER)
    return started[-1]

if __name__ == "__main__":
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # signals may go to it
    resource_tracker.ensure_running()  # no worker, and started in the same way
    with StopSignal():
        handler = signal.getsignal(NUMBER)
        popen_spawn_posix.util.spawnv_passfds = start
        try:
            list(in_order(nap, [(n,) for n in range(20)], 3))
        except Interrupted as end:
            print(end.code, len(started))
        assert signal.getsignal(NUMBER) == handler
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        for process in multiprocessing.active_children():
            process.join(20)
        for number in started:
            try:
                os.kill(number, 0)
            except ProcessLookupError:
                continue
            raise SystemExit("a worker stays")
"""


def nap(n: int) -> int:
    time.sleep(0.05)
    return n


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_worker_is_started_waits_for_it(tmp_path, name, nth):
    """An exception of a handler came amid what the worker is sent: it showed a traceback, and nobody
    ended it."""
    done = started(tmp_path, STARTING, name, str(nth))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(128 + getattr(signal, name)), str(nth)]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no tracker of resources")
def test_where_no_process_can_be_started_signals_are_handled_as_before(monkeypatch):
    def full() -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(workers.resource_tracker, "ensure_running", full)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(OSError, match="no more"):
        list(workers.in_order(nap, [(0,)], 1))
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


MUCH = """
import time

from finetuning.common.process import exit_process
from finetuning.common.workers import in_order
from tests.common.test_workers import much

if __name__ == "__main__":
    results = in_order(much, [(n,) for n in range(20)], 2)
    next(results)
    time.sleep(0.5)  # more of them come than a pipe takes
    results.close()
    print("closed", flush=True)
    exit_process(3)
"""


def much(n: int) -> bytes:
    return bytes(100_000_000)


def test_a_program_ends_though_its_workers_were_writing(tmp_path):
    """A thread waited for the rest of what an ended worker had been writing, and the program for it."""
    began = time.monotonic()
    done = started(tmp_path, MUCH)
    assert (done.returncode, done.stdout) == (3, "closed\n")
    assert "Traceback" not in done.stderr and time.monotonic() - began < 30


CLOSING = """
import time
from multiprocessing import connection

from finetuning.common.process import exit_process
from finetuning.common.workers import in_order
from tests.common.test_workers import nap

real = connection.Connection._close

def slowly(self, *arguments):
    time.sleep(0.05)  # so that another thread comes in between
    real(self, *arguments)

if __name__ == "__main__":
    results = in_order(nap, [(n,) for n in range(20)], 2)
    next(results)
    connection.Connection._close = slowly
    results.close()
    exit_process(3)
"""


def test_nothing_is_closed_twice_at_the_end(tmp_path):
    """A pool's own thread and the end of the process closed the same pipe: `Bad file descriptor`."""
    done = started(tmp_path, CLOSING)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
