"""F07, F08, F20, F21: disks that are full, broken, read-only or gone, for checkpoints and for curves."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import direct_finetuning_with_existing_modules as program
import tb_logger
from finetuning.events import reading
from finetuning.runs import directory, record
from finetuning.training import checkpoint_manager

from . import hook
from .checkpoints import copy_of_stopped, two_checkpoints
from .rig import (
    NUM_STEPS,
    Reference,
    Rig,
    after_step,
    announced_is_kept,
    before_call,
    fork,
    nothing_lost,
    read_curves,
    replaced,
)
from .tally import Row, Tally, Trial


@contextlib.contextmanager
def small_disk(target: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs; PermissionError where this user may not mount."""
    target.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(target)]
    if subprocess.run(command, capture_output=True).returncode:
        raise PermissionError("mounting is not allowed here")
    try:
        yield target
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


def can_mount(rig: Rig) -> bool:
    """Whether this user may mount."""
    try:
        with small_disk(rig.place("mount") / "disk", 1):
            return True
    except (PermissionError, FileNotFoundError):
        return False


def fill(disk: Path, leave: int) -> None:
    """A ballast file until only `leave` bytes are free."""
    with open(disk / "ballast", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            state = os.statvfs(disk)
            room = state.f_bavail * state.f_frsize - leave
            if room <= 0 or not file.write(b"\0" * min(room, 1 << 20)):
                break


# -----------------------------------------------------------------------------
# F07: full


def full_disk(
    rig: Rig,
    full: tuple[object, str, int],
    *,
    leave: int = 0,
    freed: tuple[object, str, int] | None = None,
    code: int,
    said: str = "No space left",
) -> Trial:
    """The disk is full from one call on, until another or until the end; then the command again."""
    place = rig.place("f07")
    with small_disk(place / "disk", 24) as disk:
        output, ballast, fired = disk / "out", disk / "ballast", place / "fired"

        def patch() -> None:
            before_call(*full, lambda: (fill(disk, leave), fired.touch()))
            if freed:
                before_call(*freed, lambda: ballast.unlink(missing_ok=True))

        # The notes of the rig itself lie elsewhere.
        outcome = rig.run(output, patch=patch, notes=place / "out")
        problems = [] if outcome.code == code else [f"exit {outcome.code}: {outcome.output[-600:]}"]
        problems += ["a traceback"] if "Traceback" in outcome.output else []
        if code == 3 and not (said in outcome.output and str(output) in outcome.output):
            problems.append(f"the message has no reason or no path: {outcome.output[-300:]}")
        ballast.unlink(missing_ok=True)
        problems += announced_is_kept(output) if (output / "checkpoints").is_dir() else []
        again = rig.run(output, notes=place / "out") if outcome.code else outcome
        problems += nothing_lost(output, rig.reference, again, notes=place / "out")
        happened = fired.exists()
    shutil.rmtree(place, ignore_errors=True)
    return happened, problems


def f07(rig: Rig, tally: Tally, count: int) -> None:
    """A real full disk, in 13 places."""
    if not can_mount(rig):
        tally.skip("needs the right to mount a small tmpfs")
        return
    trainer = program.DirectTrainer
    update, save = (trainer, "advance"), (checkpoint_manager, "save_checkpoint")
    statistics = (record.RunRecord, "write_summary")
    cases: list[tuple[str, dict]] = [  # the first six: every place
        ("third save, room for a part", {"full": (*save, 3), "leave": 40_000, "code": 3}),
        (
            "logs and curves for two steps",
            {"full": (*update, 11), "freed": (*update, 13), "code": 0},
        ),
        ("final model", {"full": (trainer, "finish", 1), "code": 3}),
        ("best model", {"full": (trainer, "save_model", 1), "code": 3}),
        ("statistics", {"full": (*statistics, 1), "code": 3}),
        ("before the run is open", {"full": (trainer, "open", 1), "code": 2}),
        ("third save", {"full": (*save, 3), "code": 3}),
        ("first save", {"full": (*save, 1), "code": 3}),
        ("third save, freed after the run", {"full": (*update, 14), "leave": 12_000, "code": 3}),
        (
            "best model, room for a part",
            {"full": (trainer, "save_model", 1), "leave": 30_000, "code": 3},
        ),
        ("statistics, room for a part", {"full": (*statistics, 1), "leave": 4096, "code": 3}),
        ("logs and curves for 3 steps", {"full": (*update, 17), "freed": (*update, 20), "code": 0}),
        (
            "final model, room for the adapter",
            {"full": (trainer, "finish", 1), "leave": 60_000, "code": 3},
        ),
    ]
    for name, options in cases[:count]:
        tally.attempt(name, lambda o=options: full_disk(rig, **o))


def failures_count_as_saved() -> None:
    """Mutant: what the disk says while a checkpoint is written is not looked at."""
    real = checkpoint_manager.save_checkpoint

    def careless(directory, step, **content):
        try:
            return real(directory, step, **content)
        except OSError:
            return directory / f"checkpoint-{step}"

    replaced(checkpoint_manager, "save_checkpoint", careless)


# -----------------------------------------------------------------------------
# F08: errors of the disk


def disk_error(
    rig: Rig, number: int, operations: int, first: int, count: int, contains: str
) -> Trial:
    """The k-th call fails with an error; the run goes on or stops cleanly, and nothing is lost."""
    output = rig.place("f08") / "out"
    log = output.with_name("hook.log")

    def patch() -> None:
        hook.arm(
            output,
            action=hook.FAIL,
            number=number,
            operations=operations,
            first=first,
            count=count,
            contains=contains,
            log=log,
        )

    outcome = rig.run(output, patch=patch)
    problems = (
        [] if outcome.code in (0, 2, 3) else [f"exit {outcome.code}: {outcome.output[-500:]}"]
    )
    problems += ["a traceback"] if "Traceback" in outcome.output else []
    unsaved = operations == hook.SYNC and contains == "checkpoints" and number != errno.EINTR
    if unsaved and outcome.code != 3:
        problems.append("fsync failed and the checkpoint counts as saved")
    problems += announced_is_kept(output) if (output / "checkpoints").is_dir() else []
    again = rig.run(output) if outcome.code else outcome
    faults = nothing_lost(output, rig.reference, again)
    if (
        contains == "tensorboard_logs" and count == hook.FOREVER
    ):  # such a disk never holds the curves
        faults = [fault for fault in faults if not fault.startswith("curve ")]
        faults += _curves_in_metrics_file(output, rig.reference)
        faults += [] if "cannot write the log" in outcome.output else ["nobody was told"]
    problems += faults
    fired = hook.fired(log)
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def _curves_in_metrics_file(output: Path, reference: Reference) -> list[str]:
    """metrics.jsonl has every point that TensorBoard could not be given."""
    (path,) = (output / "training_logs").glob("*/metrics.jsonl")
    records = reading.read_metrics(path)
    found = {
        tag: {r["step"]: np.float32(r["metrics"][tag]) for r in records if tag in r["metrics"]}
        for tag in reference.curves
    }
    wrong = [tag for tag, curve in reference.curves.items() if found[tag] != curve]
    return [f"metrics.jsonl differs in {', '.join(wrong)}"] if wrong else []


def file_limit(rig: Rig) -> Trial:
    """`ulimit -f`: no file may grow beyond 20 KB; the signal is turned into an error."""
    import resource

    output = rig.place("f08") / "out"

    def patch() -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        before_call(checkpoint_manager, "save_checkpoint", 2, limit)

    outcome = rig.run(output, patch=patch)
    problems = [] if outcome.code == 3 else [f"exit {outcome.code}: {outcome.output[-400:]}"]
    problems += announced_is_kept(output)
    problems += nothing_lost(output, rig.reference, rig.run(output))
    return "File too large" in outcome.output, problems


def f08(rig: Rig, tally: Tally, count: int) -> None:
    """EDQUOT, EIO, EROFS, ESTALE, EINTR from write, fsync, rename, open."""
    if not hook.preloaded():
        tally.skip("needs a C compiler and LD_PRELOAD")
        return
    draw = random.Random(8)
    kinds = [
        (hook.SYNC, "checkpoints", 12),
        (hook.WRITE, "checkpoints", 12),
        (hook.RENAME, "checkpoints", 3),
        (hook.MKDIR | hook.OPEN, "checkpoints", 10),
        (hook.WRITE, "tensorboard_logs", 10),
        (hook.WRITE, "training_logs", 12),
        (hook.ALL, "final_model", 3),
        (hook.ALL, "training_statistics", 2),
    ]
    codes = [errno.EIO, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EINTR]
    for trial in range(count):
        operations, contains, most = kinds[trial % len(kinds)]
        number, first = codes[trial % len(codes)], draw.randint(1, most)
        times = draw.choice([1, hook.FOREVER]) if number != errno.EINTR else 1
        name = f"{errno.errorcode[number]} at {contains}, call {first}, {'once' if times == 1 else 'on'}"
        tally.attempt(
            name,
            lambda n=number, o=operations, f=first, t=times, c=contains: disk_error(
                rig, n, o, f, t, c
            ),
        )
    if count >= 8:
        tally.attempt("a limit on the size of files", lambda: file_limit(rig))


def fsync_errors_are_ignored() -> None:
    """Mutant: what fsync says is not looked at, so a file that never reached the disk counts as saved."""
    real = os.fsync

    def careless(descriptor: int) -> None:
        with contextlib.suppress(OSError):
            real(descriptor)

    replaced(os, "fsync", careless)


# -----------------------------------------------------------------------------
# F20: an output directory that can't be written


def refused(rig: Rig, output: Path, number: int, *, nobody: bool = False) -> Trial:
    """A clear refusal, before the model is loaded, of what the system itself refuses with this error."""
    errors = rig.place("notes") / "errors"

    def try_it() -> None:
        with contextlib.suppress(OSError):
            errors.touch()
        if nobody:
            become_nobody()
        try:
            output.mkdir(exist_ok=True)
            with open(output / "probe", "wb") as file:
                file.write(b"0" * 100_000)
        except OSError as error:
            os._exit(error.errno)

    def patch() -> None:
        if nobody:
            become_nobody()

    fired = fork(errors, try_it).wait().code == number
    if fired and number == errno.ENOSPC:
        (output / "probe").unlink(missing_ok=True)
    outcome = rig.run(output, patch=patch, notes=errors.with_name("out"))
    problems = [] if outcome.code == 2 else [f"exit {outcome.code}: {outcome.output[-400:]}"]
    problems += ["a traceback"] if "Traceback" in outcome.output else []
    problems += [] if str(output) in outcome.output else ["the path is not named"]
    # What a checkpoint takes is known only when the adapter exists.
    if "parameters" in outcome.output and number != errno.ENOSPC:
        problems.append("only after loading the model")
    return fired, problems


def become_nobody() -> None:
    """In a child: another user, who may read what we have; or one who may write nowhere else."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def turns_read_only(rig: Rig) -> Trial:
    """From step 12 on every change is refused, as on a disk that the kernel has made read-only."""
    output = rig.place("f20") / "out"
    log = output.with_name("hook.log")

    def read_only() -> None:
        hook.arm(output, action=hook.FAIL, number=errno.EROFS, count=hook.FOREVER, log=log)

    outcome = rig.run(output, patch=lambda: after_step(12, read_only))
    problems = [] if outcome.code == 3 else [f"exit {outcome.code}: {outcome.output[-500:]}"]
    problems += ["a traceback"] if "Traceback" in outcome.output else []
    problems += [] if "Read-only file system" in outcome.output else ["the reason is not said"]
    again = rig.run(output)
    return hook.fired(log), problems + nothing_lost(output, rig.reference, again)


def vanishes(rig: Rig) -> Trial:
    """The whole output directory is moved away at step 12; moved back, the run goes on."""
    output = rig.place("f20") / "out"
    aside = output.with_name("aside")

    def move() -> None:
        output.rename(aside)
        output.write_text("something else stands here now")

    outcome = rig.run(output, patch=lambda: after_step(12, move))
    fired = aside.is_dir() and output.is_file()
    problems = [] if outcome.code == 3 else [f"exit {outcome.code}: {outcome.output[-500:]}"]
    problems += ["a traceback"] if "Traceback" in outcome.output else []
    if fired:
        output.unlink()
        aside.rename(output)
    return fired, problems + nothing_lost(output, rig.reference, rig.run(output))


def f20(rig: Rig, tally: Tally, count: int) -> None:
    """Read-only, somebody else's, a file, a FIFO, too small, gone."""
    place = rig.place("f20")
    (place / "file").write_text("a file")
    os.mkfifo(place / "fifo")
    (place / "loop").symlink_to(place / "loop")
    (place / "theirs").mkdir(mode=0o555)
    long = place / ("x" * 300)
    for name, output, number in (
        ("a file", place / "file", errno.EEXIST),
        ("a FIFO", place / "fifo", errno.EEXIST),
        ("a link to itself", place / "loop", errno.EEXIST),
        ("below a file", place / "file" / "out", errno.ENOTDIR),
        ("a name of 300 characters", long, errno.ENAMETOOLONG),
    ):
        tally.attempt(f"output is {name}", lambda o=output, n=number: refused(rig, o, n))
    tally.attempt("NUL in the name", lambda: refused_name(rig, "bad\0name"))
    theirs = place / "theirs"
    tally.attempt("somebody else's", lambda: refused(rig, theirs, errno.EACCES, nobody=True))
    tally.attempt("vanishes in the run", lambda: vanishes(rig))
    if hook.preloaded():
        tally.attempt("turns read-only in the run", lambda: turns_read_only(rig))
    else:
        tally.skip("turns read-only in the run: needs a C compiler and LD_PRELOAD")
    if not can_mount(rig):
        tally.skip("read-only and too small disks: need the right to mount")
        return
    with small_disk(place / "ro", 8) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        tally.attempt("read-only disk", lambda: refused(rig, disk / "out", errno.EROFS))
    with small_disk(place / "tiny", 1) as disk:
        fill(disk, 60_000)
        tally.attempt("disk too small", lambda: refused(rig, disk / "out", errno.ENOSPC))


def refused_name(rig: Rig, name: str) -> Trial:
    """A name that no file can have."""
    place = rig.place("f20n")
    arguments = rig.arguments(place / "out")
    arguments[arguments.index("--output-dir") + 1] = str(place) + "/" + name
    outcome = fork(place / "console.txt", lambda: program.main(arguments)).wait()
    problems = [] if outcome.code == 2 else [f"exit {outcome.code}: {outcome.output[-300:]}"]
    problems += ["a traceback"] if "Traceback" in outcome.output else []
    return "output_dir" in outcome.output, problems


def nobody_looks() -> None:
    """Mutant: neither lock nor probe."""
    replaced(directory, "check_writable", lambda output_dir, needed_bytes: None)

    class Free:
        def release(self) -> None:
            """Nothing to release."""

    replaced(directory, "lock_output", lambda output_dir: Free())


# -----------------------------------------------------------------------------
# F21: TensorBoard


def torn(rig: Rig, cut: int) -> Trial:
    """The event file of a stopped run loses its last bytes; resumed, the curves are whole."""
    output = copy_of_stopped(rig, "f21")
    file = max((output / "tensorboard_logs").glob("*/*tfevents*"), key=os.path.getsize)
    size = file.stat().st_size
    with open(file, "ab") as handle:
        if cut > 0:  # the beginning of a record that never came to its end
            handle.write(b"\x40\x00\x00\x00\x00\x00\x00\x00" + b"\xa5" * cut)
        else:
            handle.truncate(size + cut)
    fired = not whole_records(file)
    problems = nothing_lost(output, rig.reference, rig.run(output))
    if cut < 0:  # the cut points were of the steps before the checkpoint: only they may be missing
        problems = [p for p in problems if not p.startswith("curve")]
        problems += _whole_after(output, 13)
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def whole_records(file: Path) -> bool:
    """Whether an event file ends with the end of a record: length, its sum, data, their sum."""
    data, position = file.read_bytes(), 0
    while position + 12 <= len(data):
        position += 16 + int.from_bytes(data[position : position + 8], "little")
    return position == len(data)


def _whole_after(output: Path, step: int) -> list[str]:
    curve = read_curves(output)["Training/Loss"]
    problems = ["a step is twice"] if -1.0 in curve.values() else []
    missing = set(range(step, NUM_STEPS + 1)) - set(curve)
    return problems + ([f"steps {sorted(missing)} are missing"] if missing else [])


def resumed_often(rig: Rig) -> Trial:
    """Killed in the middle of a step's records, three times; each step once in the curves."""
    output = rig.place("f21") / "out"
    for k in (6, 9, 12):
        log = output.with_name(f"hook{k}.log")
        patch = lambda k=k, log=log: hook.arm(  # noqa: E731
            output,
            action=hook.KILL_IN_HALF,
            first=k,
            operations=hook.WRITE,
            contains="tfevents",
            log=log,
        )
        rig.run(output, patch=patch)
    fired = all(hook.fired(output.with_name(f"hook{k}.log")) for k in (6, 9, 12))
    return fired, nothing_lost(output, rig.reference, rig.run(output))


def f21(rig: Rig, tally: Tally, count: int) -> None:
    """Torn records, a full disk in the event file, kills in the middle of records, no directory."""
    for cut in (1, 7, 30, 100)[:count]:
        tally.attempt(f"{cut} bytes of a torn record", lambda c=cut: torn(rig, c))
    for cut in (-9, -1, -200)[:count]:
        tally.attempt(f"the last {-cut} bytes are gone", lambda c=cut: torn(rig, c))
    if not hook.preloaded():
        tally.skip("kills and errors in records: need a C compiler and LD_PRELOAD")
    else:
        tally.attempt("killed in the middle of records, three times", lambda: resumed_often(rig))
        for name, number in (("ENOSPC", errno.ENOSPC), ("EIO", errno.EIO)):
            tally.attempt(
                f"{name} for five writes",
                lambda n=number: disk_error(rig, n, hook.WRITE, 4, 5, "tfevents"),
            )


def curves_are_appended() -> None:
    """Mutant: a resumed run's event file is appended to, dead branch and torn end included."""
    replaced(tb_logger, "rewind_events", lambda run_dir, rewind: {})


ROWS = [
    Row(
        "F07",
        "disk full: saves, curves, models, statistics; freed and not",
        f07,
        full=13,
        quick=6,
        mutants={"a save that failed counts": failures_count_as_saved},
        mutant_count=1,
    ),
    Row(
        "F08",
        "errors of the disk: quota, EIO, read-only, stale, interrupted, limits",
        f08,
        full=25,
        quick=8,
        mutants={"fsync's errors are ignored": fsync_errors_are_ignored},
        mutant_count=4,
    ),
    Row(
        "F20",
        "output directory read-only, somebody else's, gone, no directory",
        f20,
        full=1,
        quick=1,
        mutants={"nobody looks": nobody_looks},
    ),
    Row(
        "F21",
        "TensorBoard: torn records, kills in records, errors",
        f21,
        full=4,
        quick=1,
        mutants={"appended": curves_are_appended},
        needs=(two_checkpoints,),
    ),
]
