"""F01, F04, F06, F15, F26: kills, stops, signals, double starts and many short runs."""

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import direct_finetuning_with_existing_modules as program
from finetuning.common import process
from finetuning.runs import directory
from finetuning.training import checkpoint_manager, engine

from .checkpoints import stop_at
from .rig import (
    NUM_STEPS,
    SAVE_STEPS,
    Rig,
    announced_is_kept,
    fork,
    nothing_lost,
    read_ledger,
    replaced,
    status_of,
    steps_of,
)
from .tally import Row, Tally

ROOT = Path(program.__file__).parent


def wait_until(condition: Callable[[], bool], limit: float = 60.0) -> bool:
    """Poll, gently."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


# -----------------------------------------------------------------------------
# F01: kill -9


def f01(rig: Rig, tally: Tally, count: int) -> None:
    """kill -9 at random times, the same command again until the run is done; a trial is a kill."""
    draw, kills, redone = random.Random(1), 0, []
    while kills < count:
        output = rig.place("f01") / "out"
        problems: list[str] = []
        before, own, done = 0, 0, None
        while done is None:
            child = rig.start(output)
            if own >= 8 or kills + own >= count:  # let this run come to its end
                done = child.wait(180)
                break
            time.sleep(draw.uniform(0.0, 1.1) * rig.reference.seconds)
            if child.kill(signal.SIGKILL):
                child.wait()
                own += 1
                problems += announced_is_kept(output) if (output / "checkpoints").is_dir() else []
                again = read_ledger(output)[1] if _ledger(output).exists() else 0
                redone.append(again - before)
                before = again
            else:
                done = child.wait()
        problems += nothing_lost(output, rig.reference, done)
        for number in range(own):
            tally.add(f"kill {kills + number + 1}", True, problems)
        kills += own
        shutil.rmtree(output.parent, ignore_errors=True)
    tally.measures["steps done again after a kill, median"] = statistics.median(redone or [0])
    tally.measures["steps done again after a kill, most"] = max(redone or [0])
    if max(redone or [0]) > SAVE_STEPS + 1:  # one more: killed while the checkpoint is written
        tally.add("steps done again", True, [f"{max(redone)} steps"])


def _ledger(output: Path) -> Path:
    return output.with_name(output.name + ".truncation.jsonl")


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
        outcome = rig.run(output, patch=lambda s=stop: stop_at(s), limit=120)
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
    last = nothing_lost(output, rig.reference, rig.run(output, limit=120))
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
    if count < len(steps):
        stops = sorted({1, 4, 5, NUM_STEPS - 1, *random.Random(4).sample(steps, max(0, count - 4))})
    else:
        stops = steps
    for stop, fired, faults in chain(rig, stops):
        tally.add(f"chain, stop {stop}", fired, faults)
    for stop in steps if count >= len(steps) else ():
        for _, fired, faults in chain(rig, [stop]):
            tally.add(f"stop {stop}", fired, faults)


# -----------------------------------------------------------------------------
# F06: signals


def signal_during(owner: object, name: str, number: int, marker: Path, when: int) -> None:
    """In a child: a real signal to itself at the beginning of the `when`-th call of a function."""
    real, calls = getattr(owner, name), []

    def signalled(*arguments, **options):
        calls.append(name)
        if len(calls) == when:
            marker.write_text(name)
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    replaced(owner, name, signalled)


def signalled_place(rig: Rig, patch: Callable[[Path], None]) -> tuple[bool, list[str]]:
    """A signal at a chosen place: exit 0, the step in progress saved, nothing lost after resuming."""
    output = rig.place("f06") / "out"
    marker = output.with_name("fired")
    outcome = rig.run(output, patch=lambda: patch(marker), limit=60)
    problems = _preempted(output, outcome)
    problems += nothing_lost(output, rig.reference, rig.run(output, limit=120))
    problems += ["steps were done twice"] if read_ledger(output)[1] else []
    fired = marker.exists()
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


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


def random_signal(rig: Rig, at: float, number: int, twice: bool) -> tuple[bool, list[str], float]:
    """A signal from outside after `at` seconds; (fired, problems, seconds to exit)."""
    output = rig.place("f06") / "out"
    child = rig.start(output)
    time.sleep(at)
    fired = child.kill(number)
    if fired and twice:
        time.sleep(0.1)
        child.kill(number)
    began = time.monotonic()
    outcome = child.wait(60)
    seconds = time.monotonic() - began
    started = bool(list(output.glob("training_logs/*/status.json")))
    if outcome.code == 0:
        problems = _preempted(output, outcome)
    else:  # before the run is open the signal's own effect is right: there is nothing to save
        early = not read_ledger(output)[0] if _ledger(output).exists() else True
        problems = [] if early and not started else [f"exit {outcome.code}, {status_of(output)}"]
    problems += [f"took {seconds:.1f} s"] if seconds > 10 else []
    problems += nothing_lost(output, rig.reference, rig.run(output, limit=120))
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems, seconds


SIGNAL_PLACES = [  # what is called then, and the how manieth time
    ("during the first step", engine, "forward_backward", 1),
    ("during evaluation", program.DirectTrainer, "evaluate", 2),
    ("during save", checkpoint_manager, "save_checkpoint", 2),
    ("during pruning", checkpoint_manager, "prune_checkpoints", 3),
    ("between loss and update", engine, "clip_gradients", 7),
]


def f06(rig: Rig, tally: Tally, count: int) -> None:
    """SIGTERM, SIGINT, SIGHUP at chosen places, and `count` times at random."""
    term = signal.SIGTERM
    for name, owner, function, when in SIGNAL_PLACES if count > 4 else SIGNAL_PLACES[:3]:
        tally.attempt(
            name,
            lambda o=owner, f=function, w=when: signalled_place(
                rig, lambda marker: signal_during(o, f, term, marker, w)
            ),
        )
    draw, slowest = random.Random(6), 0.0
    kinds = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    for number in range(count):
        at = draw.uniform(0.3, 0.95) * rig.reference.seconds
        kind, twice = kinds[number % 3], number % 4 == 3
        fired, problems, seconds = random_signal(rig, at, kind, twice)
        if fired:  # else the run was faster than the clock
            tally.add(f"{kind.name} after {at:.2f} s", fired, problems)
        slowest = max(slowest, seconds)
    tally.measures["slowest exit after a signal, s"] = round(slowest, 2)


def no_handlers() -> None:
    """Mutant: signals have their default effect."""
    real = signal.signal

    def not_ours(number, handler):
        if getattr(handler, "__func__", None) is not process.StopSignal._take:
            real(number, handler)

    replaced(process.signal, "signal", not_ours)


# -----------------------------------------------------------------------------
# F15: two starts


def two_at_once(rig: Rig, kill_first: bool) -> tuple[bool, list[str]]:
    """A second start in the same directory: refused while the first lives, free when it was killed."""
    output = rig.place("f15") / "out"
    first = rig.start(output)
    training = wait_until(lambda: bool(list(output.glob("checkpoints/checkpoint-*"))), 60)
    problems = []
    second_log = output.with_name("second.txt")
    if kill_first:
        first.kill(signal.SIGKILL)
        first.wait()
        problems += nothing_lost(output, rig.reference, rig.run(output, limit=120))
    else:
        second = fork(second_log, lambda: program.main(rig.arguments(output))).wait(60)
        if second.code != 2 or "another run" not in second.output:
            problems.append(f"the second start: exit {second.code}: {second.output[-300:]}")
        problems += nothing_lost(output, rig.reference, first.wait(120))
    runs = len(list((output / "tensorboard_logs").iterdir()))
    problems += [f"{runs} run directories"] if runs != 1 else []
    shutil.rmtree(output.parent, ignore_errors=True)
    return training, problems


def same_second(rig: Rig, starts: int) -> tuple[bool, list[str]]:
    """Many processes make their run directory at one frozen time: all different."""
    place = rig.place("f15s")
    gate = place / "go"

    def start(number: int) -> None:
        directory.time.strftime = lambda form: "20260101_000000"
        wait_until(gate.exists, 30)
        (place / f"name{number}").write_text(directory.new_run(place / "out").name)

    children = [fork(place / f"{n}.txt", lambda n=n: start(n)) for n in range(starts)]
    gate.touch()
    outcomes = [child.wait(60) for child in children]
    names = [path.read_text() for path in place.glob("name*")]
    problems = [o.output[-300:] for o in outcomes if o.code]
    problems += (
        [f"{len(set(names))} names for {starts} starts"] if len(set(names)) != starts else []
    )
    return len(names) == starts, problems


def f15(rig: Rig, tally: Tally, count: int) -> None:
    """Second start in the same directory, restart after kill -9, many starts in one second."""
    for number in range(count):
        tally.attempt(f"live owner {number}", lambda: two_at_once(rig, False))
        tally.attempt(f"killed owner {number}", lambda: two_at_once(rig, True))
        tally.attempt(f"same second {number}", lambda: same_second(rig, 8))


def no_lock() -> None:
    """Mutant: nobody asks whether another run lives."""

    class Free:
        def release(self) -> None:
            """Nothing to release."""

    replaced(program, "lock_output", lambda output_dir: Free())


# -----------------------------------------------------------------------------
# F26: real processes, many times


def real_process(rig: Rig, output: Path, *more: str) -> subprocess.Popen:
    """The command itself, as a user starts it."""
    script = str(ROOT / "direct_finetuning_with_existing_modules.py")
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return subprocess.Popen(
        [sys.executable, script, *rig.arguments(output, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    )


def short_run(rig: Rig, kind: str) -> tuple[bool, list[str]]:
    """One short run that is done, refused, stopped or interrupted: exit code, children, time."""
    output = rig.place("f26") / "out"
    options = {"bad": ["--learning-rate", "-1"], "missing": ["--data-path", str(rig.root / "no")]}
    process = real_process(rig, output, "--max-steps", "2", *options.get(kind, []))
    if kind == "interrupted":
        wait_until(lambda: bool(list(output.glob("training_logs/*/status.json"))), 120)
        process.send_signal(signal.SIGINT)
    try:
        text, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return True, ["it hangs"]
    wanted = {"ok": 0, "bad": 2, "missing": 2, "interrupted": 0}[kind]
    problems = [] if process.returncode == wanted else [f"exit {process.returncode}: {text[-400:]}"]
    problems += ["a traceback"] if "Traceback" in text else []
    try:
        os.killpg(process.pid, 0)
        problems.append("a child is left")
    except ProcessLookupError:
        pass
    shutil.rmtree(output.parent, ignore_errors=True)
    return True, problems


def f26(rig: Rig, tally: Tally, count: int) -> None:
    """Short real runs of every ending, and a soak in which descriptors and memory must stay flat."""
    kinds = ("ok", "bad", "missing", "interrupted")
    for number in range(count):
        kind = kinds[number % len(kinds)]
        tally.attempt(f"{kind} {number}", lambda k=kind: short_run(rig, k))
    if count >= 40:
        tally.attempt("soak of 2,000 steps", lambda: soak(rig, tally, 2000))


def soak(rig: Rig, tally: Tally, steps: int) -> tuple[bool, list[str]]:
    """One long run: open files, threads and memory in its second half against its first."""
    output = rig.place("soak") / "out"
    child = rig.start(output, "--max-steps", str(steps), "--save-steps", "200")
    seen: list[tuple[int, int, int]] = []

    def measure() -> bool:
        base = Path(f"/proc/{child.pid}")
        try:
            resident = int((base / "statm").read_text().split()[1]) * 4096
            seen.append(
                (len(list((base / "fd").iterdir())), len(list((base / "task").iterdir())), resident)
            )
        except OSError:
            return True
        time.sleep(0.5)
        return bool(seen[-1][2] == 0)

    wait_until(measure, 900)
    outcome = child.wait(900)
    if len(seen) < 20:
        return False, []
    quarter = len(seen) // 4
    early, late = seen[quarter : 2 * quarter], seen[-quarter:]
    growth = [max(s[i] for s in late) - max(s[i] for s in early) for i in range(3)]
    tally.measures["soak: growth of open files, threads, resident MB"] = (
        f"{growth[0]}, {growth[1]}, {growth[2] / 1e6:.1f}"
    )
    problems = [f"exit {outcome.code}: {outcome.output[-300:]}"] if outcome.code else []
    problems += [f"open files grow by {growth[0]}"] if growth[0] > 3 else []
    problems += [f"threads grow by {growth[1]}"] if growth[1] > 2 else []
    problems += [f"memory grows by {growth[2] / 1e6:.0f} MB"] if growth[2] > 60e6 else []
    return True, problems


ROWS = [
    Row(
        "F01",
        "kill -9 at random times, the same command again",
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
        quick=6,
        in_quick=True,
        mutants={"random state": no_random_state, "optimizer state": no_optimizer_state},
        mutant_count=4,
    ),
    Row(
        "F06",
        "SIGTERM, SIGINT, SIGHUP: the step in progress is saved",
        f06,
        full=40,
        quick=2,
        in_quick=True,
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
    Row("F26", "short real runs of every ending; soak", f26, full=100, quick=4),
]
