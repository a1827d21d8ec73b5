"""F29: what alerts start: commands that fail, hang, are not there, say gigabytes or leave others behind."""

import dataclasses
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from finetuning.common.bounds import ACTION_OUTPUT
from finetuning.monitoring import alert_command
from finetuning.runs import identity

from .numbers import poison_loss
from .rig import Rig, after_step, replaced, wait_until
from .tally import Row, Tally, Trial

SECRET = "geheim-0014-argument"
MOST_MB = 300  # that a run with a command may be larger than one without
# Each notes its process, and those that it starts, and what came on its standard input.
BEGIN = """
import json, os, pathlib, signal, subprocess, sys
ran = pathlib.Path(sys.argv[2])
def note(*others):
    ran.with_suffix(".tmp").write_text(json.dumps([os.getpid(), *others]))
    ran.with_suffix(".tmp").replace(ran)
"""
CHILD = "subprocess.Popen([sys.executable, '-S', '-c', 'import signal; signal.pause()']).pid"
HANGS = "closes its input, and hangs"
SCRIPTS = {
    "does as it should": "note(); ran.with_name('got').write_bytes(sys.stdin.buffer.read())",
    "fails, and shows its arguments": "note(); sys.exit(f'no access: {sys.argv}')",
    "says a gigabyte": "note()\n"
    "for _ in range(2**13): sys.stdout.write('x' * 2**17), sys.stderr.write('y' * 2**17)",
    "hangs, and hears no signal": "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    f"note({CHILD})\nsignal.pause()",
    "leaves a process behind that holds its output": f"note({CHILD})",
    HANGS: "note(); os.close(0); signal.pause()",
}
SAID = {  # on the terminal
    "fails, and shows its arguments": "exited 1: no access",
    "says a gigabyte": f"it wrote more than {ACTION_OUTPUT} of messages",
    "hangs, and hears no signal": "was ended with the run",
    "leaves a process behind that holds its output": "was ended with the run",
    HANGS: "was ended with the run",
    "is not there": "No such file or directory",
}


def acted(rig: Rig, kind: str, *, killed: bool = False) -> Trial:
    """A run whose loss is not finite once, which starts a command: the run ends well, nothing is left of
    the command, and its argument stands nowhere. `killed`: the run is killed while the command is at work.
    """
    place = rig.place("f29")
    output, script, ran = place / "out", place / "action.py", place / "ran"
    script.write_text(BEGIN + SCRIPTS.get(kind, ""))
    words = [sys.executable, "-S", str(script), f"--token={SECRET}", str(ran)]
    if kind == "is not there":
        words[0] = "/nowhere/no-such-program"
    command = shlex.join(words)
    marker = output.with_name("fired")

    def patch() -> None:
        poison_loss(float("nan"))(3, marker)
        if killed:
            after_step(5, lambda: wait_until(ran.exists) and signal.raise_signal(signal.SIGKILL))

    options = ["--max-steps", "6", "--nonfinite", "skip", "--alert-actions", "NonFinite", command]
    outcome = rig.run(output, *options, patch=patch)
    wanted = -signal.SIGKILL if killed else 0
    problems = [] if outcome.code == wanted else [f"exit {outcome.code}: {outcome.output[-300:]}"]
    problems += _left(ran, killed)
    script.unlink()
    problems += [
        f"its argument stands in {path.relative_to(place)}"
        for path in place.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    grown = outcome.peak_mb - rig.peak_mb
    problems += [f"{grown:.0f} MB more than without"] if grown > MOST_MB else []
    said = "" if killed else SAID.get(kind, "")
    problems += [] if said in outcome.output else [f"does not say {said}: {outcome.output[-500:]}"]
    if kind == "does as it should":
        problems += _delivered(place / "got")
    fired = marker.exists() and (ran.exists() or kind == "is not there")
    shutil.rmtree(place, ignore_errors=True)
    return fired, problems


def _delivered(got: Path) -> list[str]:
    alert = json.loads(got.read_text()) if got.exists() else {}
    return [] if alert.get("name") == "NonFinite" else [f"the alert that came is {alert}"]


def _left(ran: Path, killed: bool) -> list[str]:
    """Processes of a command that still live five seconds after its run; of a run that was killed, the
    command itself only: nobody is there to end what that has started."""
    processes = json.loads(ran.read_text()) if ran.exists() else []
    processes = processes[:1] if killed else processes
    gone = wait_until(lambda: not any(map(_lives, processes)), 5)
    for number in filter(_lives, processes):
        psutil.Process(number).kill()
    return [] if gone else ["the command is at work after the run"]


def _lives(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def plain_run(rig: Rig) -> None:
    """How large a run is without a command."""
    outcome = rig.run(rig.place("f29") / "out", "--max-steps", "6")
    rig.peak_mb = outcome.peak_mb


def f29(rig: Rig, tally: Tally, count: int) -> None:
    """Every kind of command; a run that is killed beside one."""
    for _ in range(count):
        for kind in [*SCRIPTS, "is not there"]:
            tally.attempt(f"a command that {kind}", lambda k=kind: acted(rig, k))
        if sys.platform.startswith("linux"):
            tally.attempt("kill -9 of the run", lambda: acted(rig, HANGS, killed=True))
        else:
            tally.skip("kill -9 of the run: needs PR_SET_PDEATHSIG")


def arguments_are_recorded() -> None:
    """Mutant: a command is recorded as it was given."""
    shown = identity.SHOWN_PART | {"alert_actions": lambda command: command}
    replaced(identity, "SHOWN_PART", shown)


def all_that_is_said_is_kept() -> None:
    """Mutant: what a command says has no bound."""
    without = dataclasses.replace(ACTION_OUTPUT, limit=900 << 20)
    replaced(alert_command, "ACTION_OUTPUT", without)


def nobody_ends_it() -> None:
    """Mutant: neither its time nor the end of the run ends a command with what it started."""
    replaced(alert_command.AlertCommand, "end", lambda self, reason: None)


MUTANTS: dict[str, Callable[[], None]] = {
    "arguments are recorded": arguments_are_recorded,
    "all that is said is kept": all_that_is_said_is_kept,
    "nobody ends it": nobody_ends_it,
}
ROWS = [
    Row(
        "F29",
        "commands of alerts: secrets, failing, hanging, missing, gigabytes of output",
        f29,
        full=5,
        quick=1,
        mutants=MUTANTS,
        needs=(plain_run,),
    ),
]
