"""A copy of a run's checkpoints and models elsewhere, made behind the training; and the way back from there.

What is to be copied is held meanwhile: by hard links what nobody writes to any more, so that the training may
remove and replace its own files; the run's records, which it goes on writing, by copies of what they are.
A thread uploads; of each kind the newest counts, so a slow target gets fewer, not older ones.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from finetuning.common.bounds import MIRROR_END
from finetuning.common.errors import RunStopped, UserError
from finetuning.common.files import (
    read_json_object,
    rename_durably,
    staging_folder,
)
from finetuning.common.remote import BLOCK, RemoteFolder, check_address, hidden_parts, shown_address
from finetuning.common.terminal import Terminal
from finetuning.common.text import PIECE_OF_SECRET, clean_line, without
from finetuning.config import OutputSettings
from finetuning.runs.bundle import MANIFEST as BUNDLE
from finetuning.runs.bundle import (
    Bundle,
    Checkpoints,
    DamagedBundle,
    fetch_files,
    has_manifest,
    read_bundle,
    read_checkpoints,
    write_bundle,
)
from finetuning.runs.directory import MIRRORING, RunDirectory, is_run_name
from finetuning.training.checkpoint import STAGING_PREFIX, free_name
from finetuning.training.manifest import MANIFEST, STATE

KINDS = ("best_model", "final_model", "checkpoint", "records")  # in the order of their upload
LOGS = ("tensorboard_logs", "training_logs")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what no disk says that is read


@dataclass(frozen=True)
class _Copy:
    """What is to be uploaded: its files, held."""

    about: dict[str, Any]
    files: dict[str, Path]
    folder: Path  # in which they are held
    protect: str  # checkpoint that is kept beside the newest


class Mirror:
    """The mirror of an output directory; without an address it does nothing.

    Args:
        output: address of the mirror, what is mirrored, and how many checkpoints of a run remain.
        at_once: a block that a signal leaves; the wait at the end is one.
        is_main: whether this rank writes; the others have no mirror.

    Raises UserError for an address that needs a package which is not here. As a context it waits at the end
    for what is under way, `MIRROR_END` at most and until a signal comes; not after a second one.
    """

    def __init__(
        self,
        output: OutputSettings,
        terminal: Terminal,
        at_once: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        is_main: bool,
    ) -> None:
        check_address(output.mirror, "mirror", output_dir=output.output_dir)
        self._address = output.mirror if is_main else ""
        self._output, self._keep = Path(output.output_dir), output.save_total_limit
        self._staging = self._output / MIRRORING
        self._terminal, self._shown = terminal, shown_address(output.mirror)
        self._waiting: dict[str, _Copy] = {}  # by kind
        self._changed = threading.Condition()
        self._rests: set[str] = set()  # kinds that have failed since the last save
        self._failing: set[str] = set()  # kinds that have failed when they were tried last
        self._ends = self._told = self._held_told = False  # told: of a target that is away
        self._number = 0  # of the newest copy
        self._latest: float | None = None  # time of what was mirrored last, once something was
        self._at_once = at_once
        self._run: RunDirectory | None = None
        # Asked instead of the thread, which CPython 3.11 takes for dead once a signal breaks off a `join`.
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def __bool__(self) -> bool:
        """Whether there is an address."""
        return bool(self._address)

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._run is None or isinstance(error, KeyboardInterrupt):
            return
        with self._faults_are_told("records"):
            self._add("records", "records", 0, self._logs(self._run))
        with self._changed:
            self._ends = True
            self._changed.notify()
        begun = self._thread.ident is not None
        if begun:
            with (
                self._terminal.working("mirroring"),
                suppress(KeyboardInterrupt),  # of who won't wait: what the run has left is whole
                self._at_once(),
            ):
                self._is_over.wait(MIRROR_END.limit)
        if begun and not self._is_over.is_set():
            self._terminal.warning(
                f"mirror {self._shown}: the last upload was not done and is left"
            )
        else:
            shutil.rmtree(self._staging, ignore_errors=True)

    # -------------------------------------------------------------------------
    # To the mirror

    def add_model(self, run: RunDirectory, folder: Path, step: int) -> None:
        """A model that has just been saved at this step."""
        if self:
            self._run = run
            with self._faults_are_told(folder.name):
                self._add(folder.name, folder.name, step, _files(folder))

    def add_checkpoint(self, run: RunDirectory, path: Path, protect: int | None) -> None:
        """A checkpoint that has just been saved, with the run's records. protect: step of one to keep."""
        if self:
            self._run = run
            with self._faults_are_told(path.name):
                step = read_json_object(path / MANIFEST)["step"]
                files = {**_files(path), **self._logs(run)}
                self._add("checkpoint", path.name, step, files, f"checkpoint-{protect}")

    def _logs(self, run: RunDirectory) -> dict[str, Path]:
        folders = zip(LOGS, (run.tensorboard, run.logs), strict=True)
        return {
            f"{n}/{file}": path for n, folder in folders for file, path in _files(folder).items()
        }

    def _add(
        self, kind: str, name: str, step: int, files: Mapping[str, Path], protect: str = ""
    ) -> None:
        """Hold the files, in place of what waits of this kind."""
        with self._changed:
            self._number += 1
        folder = self._staging / str(self._number)
        about = {"run": self._run.name, "name": name, "step": step}
        try:
            held = dict(_held(files, folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # half of it takes room, and is of no use
            raise
        with self._changed:
            old = self._waiting.pop(kind, None)
            self._waiting[kind] = _Copy(about, held, folder, protect)
            self._rests.clear()
            self._changed.notify()
        if old:
            shutil.rmtree(old.folder, ignore_errors=True)
        if self._thread.ident is None:
            self._thread.start()

    def _due(self) -> set[str]:
        """The kinds that wait and have not failed since the last save."""
        return self._waiting.keys() - self._rests

    def _work(self) -> None:
        try:
            self._upload_all()
        finally:
            self._is_over.set()

    def _upload_all(self) -> None:
        """What waits, as it comes, until nothing more comes."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ends or self._due())
                if not self._due():
                    return
                kind, newest = min(self._due(), key=KINDS.index), self._number
                copy = self._waiting.pop(kind)
            if self._upload(kind, copy):
                shutil.rmtree(copy.folder, ignore_errors=True)
                continue
            with self._changed:
                if self._number == newest:  # else a save has come meanwhile
                    self._rests.add(kind)
                if self._waiting.setdefault(kind, copy) is not copy:
                    shutil.rmtree(copy.folder, ignore_errors=True)

    def _upload(self, kind: str, copy: _Copy) -> bool:
        """Whether it is there now."""
        name = copy.about["name"]
        try:
            mirror = RemoteFolder(self._address)
            if self._latest is not None:
                mirror.look()  # a disk that was unmounted leaves an empty place, which is not the mirror
            latest = _latest(mirror) if self._latest is None else self._latest
            self._latest = write_bundle(mirror, copy.about, copy.files, latest).at
        except Exception as error:  # libraries of object stores raise what they like
            self._fail(kind, f"{name}: {type(error).__name__}: {error}")
            return False
        self._goes_well(kind)
        self._terminal.info(f"mirrored {name} to {self._shown}")
        if kind == "checkpoint":
            self._prune(mirror, copy)
        return True

    def _prune(self, mirror: RemoteFolder, copy: _Copy) -> None:
        """Remove the run's oldest checkpoints beyond `keep`, and what was cut; never the newest, nor another
        run's. One that can't be removed keeps no other."""
        faults: list[Exception] = []
        try:
            found = read_checkpoints(mirror, copy.about["run"])
        except Exception as error:  # libraries of object stores raise what they like
            faults, found = [error], Checkpoints([], [], [])
        self._latest = max([self._latest, *(bundle.at for bundle in found.whole)])
        kept = {bundle.name for bundle in found.whole[: self._keep]}
        kept |= {copy.about["name"], copy.protect}
        for folder in (*found.cut, *(b.folder for b in found.whole if b.name not in kept)):
            try:
                mirror.remove(folder)
            except Exception as error:  # the same
                faults.append(error)
        if faults:
            reason = f"{type(faults[0]).__name__}: {faults[0]}"
            self._fail("pruning", f"old checkpoints can't be removed ({reason})")
        else:
            self._goes_well("pruning")

    @contextmanager
    def _faults_are_told(self, name: str) -> Iterator[None]:
        """A disk that fails where files are held harms no run; it is ours, and not the mirror's."""
        try:
            yield
            self._held_told = False
        except (OSError, UserError) as error:
            if not self._held_told:
                self._held_told = True
                reason = clean_line(str(getattr(error, "strerror", None) or error), 300)
                self._terminal.warning(
                    f"{name} can't be held in {self._staging} until it is mirrored ({reason}); the run "
                    "goes on, and the next save tries again"
                )

    def _harmless(self, reason: str) -> str:
        return without(reason, *hidden_parts(self._address), piece=PIECE_OF_SECRET)

    def _goes_well(self, what: str) -> None:
        self._told = False
        self._failing.discard(what)

    def _fail(self, what: str, reason: str) -> None:
        """One line for each time that the target is away, and one of what fails again and again there."""
        if not self._told and what not in self._failing:
            self._told = True
            reason = self._harmless(reason)
            self._terminal.warning(
                f"mirror {self._shown}: {reason}; the run goes on, and the next save tries again"
            )
        self._failing.add(what)

    # -------------------------------------------------------------------------
    # And back

    def fetch(self, run: str | None) -> None:
        """Bring the newest whole checkpoint of `run`, or of the run that was mirrored last, into the output
        directory, with the run's records and best model. Nothing, which is told, where there is none.

        Raises RunStopped where the mirror can't be read, or no checkpoint of the run is whole: a fresh start,
        or another run, would leave it behind. OSError for a disk of ours that is full.
        """
        if not self:
            return
        with self._faults_stop_the_run(), self._terminal.working("asking the mirror"):
            mirror = RemoteFolder(self._address)
            mirror.look()
            runs = [name for name in mirror.names() if is_run_name(name) and run in (None, name)]
            found = {name: read_checkpoints(mirror, name) for name in runs}
        newest = self._newest_run(found)
        if not newest:
            self._terminal.info(f"mirror {self._shown}: there is no checkpoint yet")
        for folder in (folder for of_run in found.values() for folder in of_run.cut):
            self._terminal.info(f"mirror: {folder} is an upload that was cut; it is passed over")
        if not newest:
            return
        for folder in found[newest].damaged:
            self._terminal.warning(f"mirror: {folder}/{BUNDLE} is damaged; it is passed over")
        for bundle in found[newest].whole:
            with self._faults_stop_the_run(), self._terminal.working(f"fetching {bundle.name}"):
                try:
                    self._fetch_run(mirror, bundle)
                    return
                except DamagedBundle as error:
                    self._terminal.warning(
                        f"mirror: {error}; the checkpoint before it is looked for"
                    )
        raise RunStopped(
            f"mirror {self._shown}: no checkpoint of {newest} is whole there; remove {newest} there to go on "
            "with what was mirrored before it, or start without --resume"
        )

    def _newest_run(self, found: Mapping[str, Checkpoints]) -> str:
        """The run that was mirrored last; empty where there is none. Raises RunStopped where that can't be
        known, as a damaged manifest may be that of the newest."""
        times = {run: of_run.whole[0].at for run, of_run in found.items() if of_run.whole}
        newest = max(times, key=times.__getitem__, default="")
        unknown = [
            folder for run, of_run in found.items() if run != newest for folder in of_run.damaged
        ]
        if unknown:
            raise RunStopped(
                f"mirror {self._shown}: {unknown[0]}/{BUNDLE} is damaged, so it is not known what was "
                f"mirrored last; remove {unknown[0]} there, or start without --resume"
            )
        return newest

    @contextmanager
    def _faults_stop_the_run(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # libraries of object stores raise what they like
            if self._is_of_our_disk(error):
                raise
            reason = self._harmless(f"{type(error).__name__}: {error}")
            raise RunStopped(
                f"mirror {self._shown}: can't be read ({reason}), so it is not known whether the run goes on "
                "from there; try again, or start without --resume"
            ) from error

    def _is_of_our_disk(self, error: Exception) -> bool:
        """Whether it is no fault of the mirror: what is read there fills no disk and has no name of ours."""
        name = getattr(error, "filename", None)
        ours = isinstance(name, (str, Path)) and _is_below(Path(name), self._output)
        return isinstance(error, OSError) and (error.errno in FULL or ours)

    def _fetch_run(self, mirror: RemoteFolder, bundle: Bundle) -> None:
        run = RunDirectory(self._output, bundle.run)
        checkpoints = self._output / "checkpoints"
        own = [name for name in bundle.files if "/" not in name]
        with staging_folder(checkpoints, STAGING_PREFIX, f"fetched-{os.getpid()}") as staging:
            fetch_files(mirror, bundle, own, staging)
            self._fetch_records(mirror, bundle, run)
            best_step = json.loads((staging / STATE).read_bytes())["train_state"]["best_step"]
            if best_step:
                self._fetch_best(mirror, run, best_step)
            rename_durably(staging, free_name(checkpoints, bundle.step))

    def _fetch_records(self, mirror: RemoteFolder, bundle: Bundle, run: RunDirectory) -> None:
        """Curves, texts and files of the run, where it has none here."""
        try:
            for folder, target in zip(LOGS, (run.tensorboard, run.logs), strict=True):
                names = [name for name in bundle.files if name.startswith(f"{folder}/")]
                if not target.exists():
                    self._fetch_folder(mirror, bundle, names, target)
        except DamagedBundle as error:
            self._terminal.warning(
                f"mirror: {error}; curves of the run until step {bundle.step} are not carried"
            )
        else:
            self._terminal.info(
                f"{bundle.name} of {bundle.run} comes from the mirror, with curves, texts and files "
                "until then"
            )

    def _fetch_best(self, mirror: RemoteFolder, run: RunDirectory, step: int) -> None:
        """To the place from which the run takes its models back."""
        best = read_bundle(mirror, run.name, run.best_model.name)
        folder = f"{run.name}/{run.best_model.name}"
        if best is None and has_manifest(mirror, folder):
            self._terminal.warning(
                f"mirror: {folder}/{BUNDLE} is damaged; the best model is not carried"
            )
            return
        if best is None or best.step != step:
            self._terminal.info(f"best_model, of step {step}, is not at the mirror: not carried")
            return
        target = self._output / "earlier_models" / run.name / run.best_model.name
        try:
            self._fetch_folder(mirror, best, list(best.files), target)
        except DamagedBundle as error:
            self._terminal.warning(f"mirror: {error}; the best model is not carried")

    def _fetch_folder(
        self, mirror: RemoteFolder, bundle: Bundle, names: list[str], target: Path
    ) -> None:
        """Files of a bundle to a folder that appears whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(self._staging, "", "fetched") as staging:
            fetch_files(mirror, bundle, names, staging)
            shutil.rmtree(target, ignore_errors=True)
            staging.rename(target)


def _latest(mirror: RemoteFolder) -> float:
    """The time of the checkpoint that was mirrored last, of whatever run; 0 for none."""
    times = [0.0]
    for name in filter(is_run_name, mirror.names()):
        with suppress(
            Exception
        ):  # a folder that can't be read says nothing, and holds up no upload
            times += [bundle.at for bundle in read_checkpoints(mirror, name).whole]
    return max(times)


def _is_below(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())


def _files(folder: Path) -> dict[str, Path]:
    """The files directly in a folder, but hidden ones, by name."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {p.name: p for p in paths if p.is_file() and not p.name.startswith(".")}


def _held(files: Mapping[str, Path], folder: Path) -> Iterator[tuple[str, Path]]:
    """Records as they are now; links to the other files, or copies where the disk has no links."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, path) in enumerate(files.items()):
        held = folder / str(number)
        if name.partition("/")[0] in LOGS:
            _copy_as_it_is_now(path, held)
        else:
            try:
                os.link(path, held)
            except OSError:
                shutil.copyfile(path, held)
        yield name, held


def _copy_as_it_is_now(path: Path, target: Path) -> None:
    """A file that is written to meanwhile, up to its size at the beginning."""
    with path.open("rb") as file, target.open("wb") as copy:
        left = os.fstat(file.fileno()).st_size
        while left and (data := file.read(min(left, BLOCK))):
            copy.write(data)
            left -= len(data)
