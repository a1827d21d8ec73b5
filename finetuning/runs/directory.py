"""Where a run writes: its directories, the lock that gives it to one writer, and how it ended.

<output_dir>/tensorboard_logs/<run>/    one live event file
<output_dir>/training_logs/<run>/       metrics.jsonl, training.log, status.json, …
<output_dir>/checkpoints/, final_model/, best_model/, training_statistics.json
<output_dir>/earlier_models/<run>/      final_model/ and best_model/ of the runs before
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from finetuning.common.errors import RunStopped, UserError
from finetuning.common.files import atomic_write, write_json
from finetuning.common.paths import check_name

if TYPE_CHECKING:
    from finetuning.common.distributed import (
        Distributed,  # imports torch, which a report has no need of
    )

RUN_PREFIX = "qwen3_4b_thinking_"
LOCK_NAME = ".run.lock"
TO_LOOK = 0.2  # seconds, in which somebody may ask whether the lock is free
MODELS = ("final_model", "best_model")
MIRRORING = ".mirroring"  # what is on its way to a mirror
RUN_NAME = "run.txt"  # in the folder of a model: the run that trained it
ORIGIN = "origin.json"  # there as well: its step, its loss, and what its base held


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run. Nothing is written outside `output_dir`."""

    output_dir: Path
    name: str

    @property
    def tensorboard(self) -> Path:
        """The event files."""
        return self.output_dir / "tensorboard_logs" / self.name

    @property
    def logs(self) -> Path:
        """metrics.jsonl, training.log, dataset statistics, broken samples, status."""
        return self.output_dir / "training_logs" / self.name

    @property
    def final_model(self) -> Path:
        """The adapter after the last step."""
        return self.output_dir / "final_model"

    @property
    def best_model(self) -> Path:
        """The adapter with the lowest held-out loss."""
        return self.output_dir / "best_model"

    @property
    def statistics(self) -> Path:
        """Configuration, dataset, model, throughput and monitoring of the last run."""
        return self.output_dir / "training_statistics.json"

    def write_status(self, status: str, **details: object) -> None:
        """How the run stands or ended: running, completed, preempted, stopped or failed."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        where = {"host": socket.gethostname()}  # whose locks tell whether it is still at work
        write_json(self.logs / "status.json", {"status": status, "at": now, **where, **details})


def lock_output(output_dir: Path) -> FileLock:
    """Take the output directory for this process; the operating system frees it when we die.

    What an owner that died left half-written is removed. Raises UserError if another live run holds it
    or it can't be written.
    """
    check_name(output_dir, "output_dir", only_text=True)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / LOCK_NAME)
        lock.acquire(timeout=TO_LOOK, poll_interval=TO_LOOK / 4)
        _remove_leftovers(output_dir)
    except Timeout as error:
        raise UserError(
            f"output_dir {output_dir}: another run is writing there; wait for it or choose another "
            "--output-dir"
        ) from error
    except OSError as error:
        raise UserError(
            f"output_dir {output_dir}: can't be written ({error.strerror or error}); choose another "
            "--output-dir"
        ) from error
    return lock


def is_abandoned(output_dir: Path) -> bool:
    """Whether a run was at work here and no process holds its lock: it was killed, or the machine went down.

    False where that can't be seen: copied files have no lock, and on some disks nothing can be locked.
    """
    path = output_dir / LOCK_NAME
    if not path.is_file():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except OSError:  # Timeout is one: somebody holds it
        return False
    lock.release()
    return True


@contextmanager
def only_writer(output_dir: Path, is_main: bool) -> Iterator[None]:
    """Within it, no other run writes below the output directory; see `lock_output`. Rank 0 locks for all."""
    lock = lock_output(output_dir) if is_main else None
    try:
        yield
    finally:
        if lock:
            lock.release()


def _remove_leftovers(output_dir: Path) -> None:
    """Temporary files and model folders that were in the making; an old folder that was put aside returns."""
    for pattern in (".probe-*", ".training_statistics.json.*.tmp", "training_logs/*/.*.tmp"):
        for path in output_dir.glob(pattern):
            path.unlink(missing_ok=True)
    shutil.rmtree(output_dir / MIRRORING, ignore_errors=True)
    for name in MODELS:
        for path in output_dir.glob(f"{name}/.*.tmp"):  # of a card that was being completed
            path.unlink(missing_ok=True)
        for path in sorted(output_dir.glob(f".{name}-old-*")):
            if not (output_dir / name).exists():
                path.rename(output_dir / name)
        for path in output_dir.glob(f".{name}-*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)


@contextmanager
def disk_faults_stop_the_run(output_dir: Path) -> Iterator[None]:
    """A disk that fails is no crash: RunStopped with what the system said."""
    try:
        yield
    except OSError as error:
        raise RunStopped(
            f"output_dir {output_dir}: {error}; the last checkpoint is intact. Free some space and go on "
            "with --resume latest"
        ) from error


def check_writable(output_dir: Path, needed_bytes: int) -> None:
    """Write and rename a probe file, and see that `needed_bytes` are free. Raises UserError."""
    probe = output_dir / f".probe-{os.getpid()}"
    try:
        with atomic_write(probe.with_suffix(".renamed"), probe) as file:
            file.write(b"probe")
        probe.with_suffix(".renamed").unlink()
        free = shutil.disk_usage(output_dir).free
    except OSError as error:
        raise UserError(
            f"output_dir {output_dir}: can't be written ({error.strerror or error}); choose another "
            "--output-dir or free its disk"
        ) from error
    if free < needed_bytes:
        raise UserError(
            f"output_dir {output_dir}: {free / 1e6:.0f} MB free, about {needed_bytes / 1e6:.0f} MB "
            "needed for checkpoints; free some space or choose another --output-dir"
        )


def new_run(output_dir: Path, given_name: str = "") -> RunDirectory:
    """A fresh run directory named by the clock, and by what the user calls it; two starts in one second
    get two directories."""
    stamp = time.strftime("%Y%m%d_%H%M%S")
    number = 1
    while True:
        suffix = ("" if number == 1 else f"_{number}") + (f"_{given_name}" if given_name else "")
        run = RunDirectory(output_dir, f"{RUN_PREFIX}{stamp}{suffix}")
        try:
            run.tensorboard.mkdir(parents=True)
            run.logs.mkdir(parents=True)
            return run
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(
                f"output_dir {output_dir}: can't be written ({error.strerror or error})"
            ) from error


def open_directory(
    output_dir: Path,
    dist: Distributed,
    known: str,
    *,
    given_name: str = "",
    needed_bytes: int,
    say: Callable[[str], None],
) -> RunDirectory:
    """The directory of the run `known`, or of a new run where that is empty; alike on all ranks.

    Raises UserError where `needed_bytes` are not free. Another run's models are put aside, and told.
    """
    if dist.is_main:
        check_writable(output_dir, needed_bytes)
    name = dist.broadcast(dist.is_main and (known or new_run(output_dir, given_name).name))
    dist.put("run", name)
    if not dist.is_main:
        return shared_run(output_dir, name)
    run = known_run(output_dir, name)
    for model in own_models(run):
        say(f"the model of an earlier run is now {model}")
    return run


def is_run_name(name: str) -> bool:
    """Whether a run of this program may be called so: such a name leads nowhere else."""
    return name.startswith(RUN_PREFIX) and Path(name).name == name


def known_run(output_dir: Path, name: str) -> RunDirectory:
    """The directory of a run that is resumed."""
    if not is_run_name(name):
        raise UserError(f"--resume: {name!r} is not the name of a run of this program")
    run = RunDirectory(output_dir, name)
    run.tensorboard.mkdir(parents=True, exist_ok=True)
    run.logs.mkdir(parents=True, exist_ok=True)
    return run


def own_models(run: RunDirectory) -> list[Path]:
    """Make final_model/ and best_model/ this run's: another run's are put aside, its own come back.

    Returns where others' are now. A folder that no run of ours has left is not touched.
    """
    aside, moved = run.output_dir / "earlier_models", []
    for name in MODELS:
        place = run.output_dir / name
        other = owner(place)
        if other and other != run.name:
            target = aside / other / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            place.rename(target)
            moved.append(target)
        own = aside / run.name / name
        if own.is_dir() and not place.exists():
            own.rename(place)
    return moved


def owner(model: Path) -> str:
    """Name of the run that trained a saved model; empty where it does not say."""
    note = model / RUN_NAME
    name = note.read_text(encoding="utf-8", errors="replace").strip() if note.is_file() else ""
    return name if is_run_name(name) else ""


def shared_run(output_dir: Path, name: str, patience: float = 60.0) -> RunDirectory:
    """The run's directory as another process has made it; it may take a network file system a while.

    Raises UserError where it does not appear within `patience` seconds.
    """
    run = RunDirectory(output_dir, name)
    deadline = time.monotonic() + patience
    while not run.logs.is_dir():
        if time.monotonic() > deadline:
            raise UserError(
                f"output_dir {output_dir.absolute()} on {socket.gethostname()}: not the one that rank 0 "
                "writes to; several nodes need a file system that they share, for checkpoints above all"
            )
        time.sleep(0.2)
        if run.logs.parent.is_dir():
            os.listdir(run.logs.parent)  # makes NFS look again
    return run
