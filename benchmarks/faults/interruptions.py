"""F01, F04, F06, F15, F26: kills, stops, signals, double starts and many short runs."""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import direct_finetuning_with_existing_modules as program
from finetuning.common import process
from finetuning.runs import directory
from finetuning.training import checkpoint_manager, engine

from . import hook
from .checkpoints import stop_at
from .rig import (
    LIMIT,
    NUM_STEPS,
    SAVE_STEPS,
    Rig,
    after_step,
    announced_is_kept,
    before_call,
    fork,
    ledger_of,
    nothing_lost,
    read_ledger,
    replaced,
    status_of,
    steps_of,
    wait_until,
)
from .tally import Row, Tally, Trial

ROOT = Path(program.__file__).parent


def late_enough(rig: Rig) -> int:
    """A change to a file behind which a run computes for some steps more, so that a signal meets it."""
    return 2 * len(rig.changes) // 3


# -----------------------------------------------------------------------------
# F01: kill -9


def f01(rig: Rig, tally: Tally, count: int) -> None:
    """kill -9 anywhere, the same command again until the run is done; a trial is a kill.

    It comes when the process has computed for a drawn part of a step after a drawn change to a file:
    the second of a run behind its first checkpoint, the others soon after a start.
    """
    if not hook.preloaded():
        tally.skip("needs a C compiler and LD_PRELOAD")
        return
    draw, redone = random.Random(1), []
    for kills in [4] * (count // 4) + [count % 4] * bool(count % 4):
        output, log = rig.place("f01") / "out", rig.place("f01") / "hook.log"
        killed: list[tuple[str, bool, list[str]]] = []
        before = 0
        for number in range(kills):
            behind = range(len(rig.changes) // 3, late_enough(rig))
            first = draw.choice(behind if number == 1 else range(1, 60))
            later = draw.uniform(0.0, rig.cpu_seconds / NUM_STEPS)
            log.unlink(missing_ok=True)

            def kill(first=first, later=later, log=log, output=output) -> None:
                hook.arm(
                    output,
                    action=hook.SIGNAL,
                    number=signal.SIGKILL,
                    first=first,
                    computing=later,
                    log=log,
                )

            outcome = rig.run(output, patch=kill)
            fired = hook.fired(log) and outcome.code == -signal.SIGKILL
            kept = announced_is_kept(output) if (output / "checkpoints").is_dir() else []
            killed.append((f"{later * 1000:.0f} ms after change {first}", fired, kept))
            again = read_ledger(output)[1] if ledger_of(output).exists() else 0
            redone.append(again - before)
            before = again
        killed[-1][2].extend(nothing_lost(output, rig.reference, rig.run(output)))
        if redone[-kills:] and max(redone[-kills:]) > SAVE_STEPS + 1:  # one more: killed in a save
            killed[-1][2].append(f"{max(redone[-kills:])} steps were done again")
        for name, fired, problems in killed:
            tally.add(name, fired, problems)
        shutil.rmtree(output.parent, ignore_errors=True)
    tally.measures["steps done again after a kill, median"] = statistics.median(redone or [0])
    tally.measures["steps done again after a kill, most"] = max(redone or [0])


def no_random_state() -> None:
    """Mutant: the random state is not restored."""
    replaced(checkpoint_manager, "restore_rng", lambda tensors, device: None)


def no_optimizer_state() -> None:
    """Mutant: the moments start from nothing."""
    replaced(engine, "restore_optimizer", lambda optimizer, parameters, tensors: None)


# -----------------------------------------------------------------------------
# F04: stop after every step


def chain(rig: Rig, stops: list[int]) -> list[tuple[int, bool, list[str]]]:
    """One run that is stopped after each of `stops` and resumed each time: (stop, fired, faults)."""
    output = rig.place("f04") / "out"
    results = []
    for stop in stops:
        outcome = rig.run(output, patch=lambda s=stop: stop_at(s))
        truncation = read_ledger(output)[0]
        faults = [f"exit {outcome.code}: {outcome.output[-300:]}"] if outcome.code else []
        fired = max(truncation, default=0) == stop
        status = status_of(output)
        if (status.get("status"), status.get("step")) != ("preempted", stop):
            faults.append(f"status file says {status}")
        if stop not in set(steps_of(output)):
            faults.append(f"no checkpoint of step {stop}")
        faults += _different(rig, truncation)
        results.append((stop, fired, faults))
    last = nothing_lost(output, rig.reference, rig.run(output))
    again = read_ledger(output)[1]
    last += [f"{again} steps were done twice"] if again else []
    results[-1][2].extend(last)
    shutil.rmtree(output.parent, ignore_errors=True)
    return results


def _different(rig: Rig, truncation: dict[int, dict]) -> list[str]:
    wrong = [s for s, record in truncation.items() if rig.reference.truncation[s] != record]
    return [f"step {wrong[0]} is not bit-equal"] if wrong else []


def f04(rig: Rig, tally: Tally, count: int) -> None:
    """Stop and resume after `count` of the steps, in one chain; all of them: also one by one."""
    steps = list(range(1, NUM_STEPS))
    first = [1, SAVE_STEPS - 1, SAVE_STEPS, NUM_STEPS - 1]
    more = random.Random(4).sample(steps, max(0, count - len(first)))
    for stop, fired, faults in chain(
        rig, steps if count >= len(steps) else sorted({*first, *more})
    ):
        tally.add(f"chain, stop {stop}", fired, faults)
    for stop in steps if count >= len(steps) else ():
        for _, fired, faults in chain(rig, [stop]):
            tally.add(f"stop {stop}", fired, faults)


# -----------------------------------------------------------------------------
# F06: signals


def signalled(rig: Rig, patch: Callable[[Path], None], fired: Callable[[Path], bool]) -> Trial:
    """A signal to a run: exit 0, the step in progress saved, nothing lost after resuming."""
    output = rig.place("f06") / "out"
    note = output.with_name("fired")
    outcome = rig.run(output, patch=lambda: patch(note, output))
    came = outcome.code != 0 or status_of(output).get("status") == "preempted"
    if outcome.code == 0:
        problems = _preempted(output, outcome)
    else:  # before the run is open the signal's own effect is right: there is nothing to save
        started = ledger_of(output).exists() and bool(read_ledger(output)[0])
        started |= bool(list(output.glob("training_logs/*/status.json")))
        problems = [f"exit {outcome.code}: {outcome.output[-400:]}"] if started else []
    problems += nothing_lost(output, rig.reference, rig.run(output))
    problems += ["steps were done twice"] if read_ledger(output)[1] else []
    happened = fired(note) and came
    shutil.rmtree(output.parent, ignore_errors=True)
    return happened, problems


def _preempted(output: Path, outcome) -> list[str]:
    problems = [f"exit {outcome.code}: {outcome.output[-400:]}"] if outcome.code else []
    status, last = status_of(output), max(read_ledger(output)[0], default=0)
    # In the last step both are right: the final model is made by the next start.
    wanted = {"preempted"} | ({"completed"} if last == NUM_STEPS else set())
    if status.get("status") not in wanted or status.get("step") != last:
        problems.append(f"status file: {status}, last step done: {last}")
    if last and last not in set(steps_of(output)):
        problems.append(f"step {last} was done, checkpoints are {sorted(steps_of(output))}")
    return problems


def signal_during(owner: object, name: str, when: int) -> Callable[[Path, Path], None]:
    """In a child: SIGTERM to itself at the beginning of the `when`-th call of a function."""

    def patch(note: Path, _: Path) -> None:
        def kill() -> None:
            note.write_text(name)
            os.kill(os.getpid(), signal.SIGTERM)

        before_call(owner, name, when, kill)

    return patch


def signal_at(number: int, first: int, times: int, later: float) -> Callable[[Path, Path], None]:
    """In a child: a signal when it has computed for so long after the `first`-th change to a file."""

    def patch(note: Path, output: Path) -> None:
        hook.arm(
            output,
            action=hook.SIGNAL,
            number=number,
            first=first,
            count=times,
            computing=later,
            log=note,
        )

    return patch


SIGNAL_PLACES = [  # what is called then, and the how manieth time
    ("during the first step", engine, "forward_backward", 1),
    ("during evaluation", program.DirectTrainer, "evaluate", 2),
    ("during save", checkpoint_manager, "save_checkpoint", 2),
    ("during pruning", checkpoint_manager, "prune_checkpoints", 3),
    ("between loss and update", engine, "clip_gradients", 7),
]


def f06(rig: Rig, tally: Tally, count: int) -> None:
    """SIGTERM, SIGINT, SIGHUP at chosen places, and `count` times anywhere."""
    for name, owner, function, when in SIGNAL_PLACES:
        patch = signal_during(owner, function, when)
        tally.attempt(name, lambda p=patch: signalled(rig, p, Path.exists))
    if not hook.preloaded():
        tally.skip("signals anywhere: need a C compiler and LD_PRELOAD")
        return
    draw = random.Random(6)
    kinds = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    for number in range(count):
        first = draw.randrange(1, late_enough(rig))
        kind, times = kinds[number % 3], 1 + (number % 4 == 1)
        later = draw.uniform(0.0, rig.cpu_seconds / NUM_STEPS) if number % 2 else 0.0
        patch = signal_at(kind, first, times, later)
        name = f"{kind.name} after change {first}{', and again' * (times - 1)}"
        tally.attempt(name, lambda p=patch: signalled(rig, p, hook.fired))


def no_handlers() -> None:
    """Mutant: signals have their default effect."""
    replaced(process.StopSignal, "__enter__", lambda self: self)


# -----------------------------------------------------------------------------
# F15: two starts


def two_at_once(rig: Rig) -> Trial:
    """A second start in the same directory while the first lives, and stands still: refused."""
    output, log = rig.place("f15") / "out", rig.place("f15") / "hook.log"

    def stand_still() -> None:
        hook.arm(
            output,
            action=hook.SIGNAL,
            number=signal.SIGSTOP,
            operations=hook.RENAME,
            contains="checkpoint-5",
            log=log,
        )

    first = rig.start(output, patch=stand_still)
    fired = first.stopped() and hook.fired(log)
    second = fork(
        output.with_name("second.txt"), lambda: program.main(rig.arguments(output))
    ).wait()
    problems = []
    if second.code != 2 or "another run" not in second.output:
        problems.append(f"the second start: exit {second.code}: {second.output[-300:]}")
    first.kill(signal.SIGCONT)
    problems += nothing_lost(output, rig.reference, first.wait())
    return fired, problems + _one_run(output)


def _one_run(output: Path) -> list[str]:
    runs = len(list((output / "tensorboard_logs").iterdir()))
    shutil.rmtree(output.parent, ignore_errors=True)
    return [f"{runs} run directories"] if runs != 1 else []


def after_a_kill(rig: Rig) -> Trial:
    """The owner of a directory was killed: it is free."""
    output = rig.place("f15") / "out"
    killed = rig.run(
        output, patch=lambda: after_step(7, lambda: os.kill(os.getpid(), signal.SIGKILL))
    )
    locked = (output / directory.LOCK_NAME).exists()
    problems = nothing_lost(output, rig.reference, rig.run(output))
    return killed.code == -signal.SIGKILL and locked, problems + _one_run(output)


def same_second(rig: Rig, starts: int) -> Trial:
    """Many processes make their run directory at one frozen time: all different."""
    place = rig.place("f15s")
    gate = place / "go"

    def start(number: int) -> None:
        replaced(time, "strftime", lambda form, moment=None: "20260101_000000")
        (place / f"ready{number}").touch()
        wait_until(gate.exists)
        (place / f"name{number}").write_text(directory.new_run(place / "out").name)

    children = [fork(place / f"{n}.txt", lambda n=n: start(n)) for n in range(starts)]
    wait_until(lambda: len(list(place.glob("ready*"))) == starts)
    gate.touch()
    outcomes = [child.wait() for child in children]
    names = [path.read_text() for path in place.glob("name*")]
    problems = [o.output[-300:] for o in outcomes if o.code]
    if len(set(names)) != starts:
        problems.append(f"{len(set(names))} names for {starts} starts")
    return all("20260101_000000" in name for name in names), problems


def f15(rig: Rig, tally: Tally, count: int) -> None:
    """Second start in the same directory, restart after kill -9, many starts in one second."""
    if not hook.preloaded():
        tally.skip("a second start beside the first: needs a C compiler and LD_PRELOAD")
    for number in range(count):
        if hook.preloaded():
            tally.attempt(f"live owner {number}", lambda: two_at_once(rig))
        tally.attempt(f"killed owner {number}", lambda: after_a_kill(rig))
        tally.attempt(f"same second {number}", lambda: same_second(rig, 8))


def no_lock() -> None:
    """Mutant: nobody asks whether another run lives."""

    class Free:
        def release(self) -> None:
            """Nothing to release."""

    replaced(directory, "lock_output", lambda output_dir: Free())


# -----------------------------------------------------------------------------
# F26: real processes, many times


def real_process(rig: Rig, arguments: list[str], **environment: str) -> subprocess.Popen:
    """The command itself, as a user starts it."""
    script = str(ROOT / "direct_finetuning_with_existing_modules.py")
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


ENDINGS = {  # of a short run: options, exit code, what it says then
    "ok": ((), 0, "done: 2 steps"),
    "bad": (("--learning-rate", "-1"), 2, "learning_rate"),
    "missing": (("--data-path", "/nowhere/no.jsonl"), 2, "no.jsonl"),
    "interrupted": ((), 0, "SIGINT: saved step"),
}


def short_run(rig: Rig, kind: str) -> Trial:
    """One short run that is done, refused or interrupted: exit code, children, time."""
    output, log = rig.place("f26") / "out", rig.place("f26") / "hook.log"
    options, wanted, said = ENDINGS[kind]
    environment = {}
    if kind == "interrupted":
        place = {"contains": "status.json", "operations": hook.RENAME}
        environment = hook.in_environment(output, **place, number=signal.SIGINT, log=log)
    arguments = rig.arguments(output, "--max-steps", "2", *options)
    process = real_process(rig, arguments, **environment)
    try:
        text, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    problems = [] if process.returncode == wanted else [f"exit {process.returncode}: {text[-400:]}"]
    problems += ["a traceback"] if "Traceback" in text else []
    problems += [] if said in text else [f"does not say {said!r}: {text[-400:]}"]
    try:
        os.killpg(process.pid, signal.SIGKILL)
        problems.append("a child is left")
    except ProcessLookupError:
        pass
    shutil.rmtree(output.parent, ignore_errors=True)
    return hook.fired(log) if environment else bool(text), problems


def f26(rig: Rig, tally: Tally, count: int) -> None:
    """Short real runs of every ending, and a soak in which descriptors and memory must stay flat."""
    kinds = [kind for kind in ENDINGS if kind != "interrupted" or hook.preloaded()]
    if len(kinds) < len(ENDINGS):
        tally.skip("interrupted: needs a C compiler and LD_PRELOAD")
    for number in range(count):
        kind = kinds[-1 - number % len(kinds)]
        tally.attempt(f"{kind} {number}", lambda k=kind: short_run(rig, k))
    if count >= 40:
        tally.attempt("soak of 2,000 steps", lambda: soak(rig, tally, 2000))


def soak(rig: Rig, tally: Tally, steps: int) -> Trial:
    """One long run: open files, threads and memory in its second half against its first."""
    output = rig.place("soak") / "out"
    seen = output.with_name("seen.jsonl")

    def patch() -> None:
        advance = program.DirectTrainer.advance

        def measured(self, step, planned):
            if step % 20 == 0:
                own = Path("/proc/self")
                counts = [len(list((own / name).iterdir())) for name in ("fd", "task")]
                pages = int((own / "statm").read_text().split()[1])
                with open(seen, "a") as file:
                    file.write(json.dumps([*counts, pages * os.sysconf("SC_PAGE_SIZE")]) + "\n")
            return advance(self, step, planned)

        replaced(program.DirectTrainer, "advance", measured)

    outcome = rig.run(
        output, "--max-steps", str(steps), "--save-steps", "200", patch=patch, limit=3600
    )
    values = [json.loads(line) for line in seen.read_text().splitlines()] if seen.exists() else []
    if len(values) < 20:
        return False, [outcome.output[-300:]]
    quarter = len(values) // 4
    early, late = values[quarter : 2 * quarter], values[-quarter:]
    growth = [max(s[i] for s in late) - max(s[i] for s in early) for i in range(3)]
    tally.measures["soak: growth of open files, threads, resident MB"] = (
        f"{growth[0]}, {growth[1]}, {growth[2] / 1e6:.1f}"
    )
    problems = [f"exit {outcome.code}: {outcome.output[-300:]}"] if outcome.code else []
    problems += [f"open files grow by {growth[0]}"] if growth[0] > 3 else []
    problems += [f"threads grow by {growth[1]}"] if growth[1] > 2 else []
    problems += [f"memory grows by {growth[2] / 1e6:.0f} MB"] if growth[2] > 60e6 else []
    return len(values) >= steps // 20, problems


def in_every_process(code: str) -> None:
    """From now on, every Python that is started runs this first."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["FAULTS_WORK"]))
    (folder / "sitecustomize.py").write_text(code)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def signals_are_not_heard() -> None:
    """Mutant: no handler is ever set, in a real process."""
    in_every_process("import signal\nsignal.signal = lambda number, handler: None\n")


def refusals_end_with_0() -> None:
    """Mutant: the exit code is lost, in a real process."""
    in_every_process("import sys\nend = sys.exit\nsys.exit = lambda code=0: end(0)\n")


ROWS = [
    Row(
        "F01",
        "kill -9 anywhere, the same command again",
        f01,
        full=200,
        quick=8,
        mutants={"random state": no_random_state, "optimizer state": no_optimizer_state},
        mutant_count=4,
    ),
    Row(
        "F04",
        "stop after any step, resume: equal to the last bit",
        f04,
        full=23,
        quick=4,
        mutants={"random state": no_random_state, "optimizer state": no_optimizer_state},
        mutant_count=4,
    ),
    Row(
        "F06",
        "SIGTERM, SIGINT, SIGHUP: the step in progress is saved",
        f06,
        full=40,
        quick=3,
        mutants={"no handlers": no_handlers},
        mutant_count=0,
    ),
    Row(
        "F15",
        "second start in one directory, restart after kill -9, starts in one second",
        f15,
        full=10,
        quick=1,
        mutants={"no lock": no_lock},
    ),
    Row(
        "F26",
        "short real runs of every ending; soak",
        f26,
        full=100,
        quick=4,
        mutants={
            "signals are not heard": signals_are_not_heard,
            "the exit code is lost": refusals_end_with_0,
        },
        mutant_count=3,
    ),
]
