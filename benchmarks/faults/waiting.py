"""F31: nobody waits long for a run that is asked to end, in whichever phase, and no process of it stays."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import direct_finetuning_with_existing_modules as program
from finetuning.common import limited, process, terminal
from finetuning.readers import dataset, opening
from finetuning.runs import report as run_report

from .bounds import of_session, workers_outlive_their_parent
from .rig import Rig, fork, replaced, status_of, wait_until, write_records
from .tally import Row, Tally, Trial

SECONDS, AFTER = 2.0, 5.0  # to the end, on a machine of its own; until no process is left
BUSY = 3.0  # times as long beside other rows
RECORDS = 2500  # so that each way of working with several processes is used
# Phase, the seconds after its begin when the signal comes, and whether there is something to save by then.
PHASES = [
    ("reading", 0.1, False),
    ("looking", 0.2, False),
    ("getting", 0.0, False),
    ("tokenizing", 0.5, False),
    ("trying", 0.0, False),
    ("loading", 0.0, False),
    ("describing", 0.2, True),
    ("evaluation", 0.1, True),
    ("saving", 0.0, True),
    ("writing", 0.3, True),
]
CODES = {"SIGINT": 130, "SIGTERM": 143}  # where nothing is to be saved


def many_records(rig: Rig) -> None:
    """Data for which the phases take a while."""
    write_records(rig.root / "many.jsonl", RECORDS)


def send_in(phase: str, delay: float, number: int, note: Path) -> None:
    """In a child: a signal so many seconds after a phase begins, to all of the session as a terminal sends
    Ctrl-C, or to this process alone."""
    working, begun = terminal.Terminal.working, []

    def send() -> None:
        threading.Event().wait(delay)
        note.write_text(json.dumps(time.time()))
        if number == signal.SIGINT:
            os.killpg(0, number)
        else:
            os.kill(os.getpid(), number)

    @contextmanager
    def watched(self, what: str):
        if what.startswith(phase) and not begun:
            begun.append(what)
            threading.Thread(target=send, daemon=True).start()
        with working(self, what) as progress:
            yield progress

    replaced(terminal.Terminal, "working", watched)


def ended(rig: Rig, phase: str, delay: float, name: str, saves: bool) -> Trial:
    """One signal in one phase: exit code, time, what is left, no traceback, and what was saved."""
    place = rig.place("f31")
    output, note = place / "out", place / "note"
    options = ["--data-path", str(rig.root / "many.jsonl"), "--workers", "2", "--save-steps", "4"]
    options += ["--cache-dir", str(place / "cache"), "--eval-steps", "3", "--max-steps", "8"]

    def action() -> int:
        for module in (dataset, opening):
            replaced(module, "CHUNK", 2**18)
        replaced(dataset, "LARGE_DATA", 0)
        replaced(run_report, "run_limited", limited.run_limited)
        send_in(phase, delay, getattr(signal, name), note)
        return program.main(rig.arguments(output, *options))

    child = fork(place / "console.txt", action)
    wait_until(lambda: note.exists() or not child.running())
    wait_until(lambda: not child.running())
    seconds = time.time() - json.loads(note.read_text()) if note.exists() else 0.0
    # A tracker of what processes share ends by itself when the last of them has.
    gone = wait_until(lambda: not set(of_session(child.pid)) - {child.pid}, AFTER)
    outcome = child.wait()
    wanted = {-signal.SIGKILL} if name == "SIGKILL" else {0 if saves else CODES[name]}
    problems = [] if outcome.code in wanted else [f"exit {outcome.code}: {outcome.output[-300:]}"]
    problems += [f"{seconds:.1f} s"] if seconds > SECONDS * BUSY else []
    problems += [] if gone else ["a process is left after 5 s"]
    broken = ("Traceback", "BrokenProcess")
    problems += ["a traceback: " + outcome.output[-400:]] if _says(outcome.output, broken) else []
    if saves and name != "SIGKILL" and phase != "writing":
        problems += _saved(output)
    came = note.exists()
    shutil.rmtree(place, ignore_errors=True)
    return came, problems


def _says(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def _saved(output: Path) -> list[str]:
    status = status_of(output)
    saved = (output / "checkpoints" / f"checkpoint-{status.get('step')}").is_dir()
    right = status.get("status") == "preempted" and saved
    return [] if right else [f"not saved: {status}"]


def f31(rig: Rig, tally: Tally, count: int) -> None:
    """Every phase with a signal, in turns; `count` of the turns."""
    names = ("SIGTERM", "SIGKILL", "SIGINT")
    for turn in range(count):
        for number, (phase, delay, saves) in enumerate(PHASES):
            name = names[(number + turn) % len(names)]
            tally.attempt(
                f"{name} while {phase}",
                lambda p=phase, d=delay, n=name, s=saves: ended(rig, p, d, n, s),
            )


def no_handlers() -> None:
    """Mutant: signals have their default effect."""
    replaced(process.StopSignal, "__enter__", lambda self: self)


ROWS = [
    Row(
        "F31",
        "Ctrl-C, SIGTERM and SIGKILL in every phase: soon over, nothing left, what is done is saved",
        f31,
        full=3,
        quick=1,
        mutants={
            "no handlers": no_handlers,
            "workers outlive their parent": workers_outlive_their_parent,
        },
        mutant_count=3,
        needs=(many_records,),
    ),
]
