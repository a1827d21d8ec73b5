"""A copy of a run's checkpoints and models elsewhere, made behind the training; and the way back from there.

What is to be copied is held by hard links, so that the training may remove and replace its own files
meanwhile. A thread uploads; of each kind the newest counts, so a slow target gets fewer, not older ones.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from finetuning.common.bounds import MIRROR_END
from finetuning.common.errors import RunStopped, UserError
from finetuning.common.files import read_json_object, rename_durably, staging_folder
from finetuning.common.remote import RemoteFolder, check_address, hidden_parts, shown_address
from finetuning.common.terminal import Terminal
from finetuning.common.text import without
from finetuning.config import OutputSettings
from finetuning.runs.bundle import Bundle, DamagedBundle, fetch_files, read_bundle, write_bundle
from finetuning.runs.directory import MIRRORING, RunDirectory, is_run_name
from finetuning.training.checkpoint import MANIFEST, STAGING_PREFIX, STATE, free_name

KINDS = ("best_model", "final_model", "checkpoint", "records")  # in the order of their upload
LOGS = ("tensorboard_logs", "training_logs")


@dataclass(frozen=True)
class _Copy:
    """What is to be uploaded: its files, held by links, each up to a size."""

    about: dict[str, Any]
    files: dict[str, tuple[Path, int]]
    folder: Path  # of the links
    protect: str  # checkpoint that is kept beside the newest


class Mirror:
    """The mirror of an output directory; without an address it does nothing.

    Args:
        output: address of the mirror, what is mirrored, and how many checkpoints of a run remain.
        is_main: whether this rank writes; the others have no mirror.

    Raises UserError for an address that needs a package which is not here. As a context it waits at the end,
    `MIRROR_END` at most, for what is under way; not after a second signal.
    """

    def __init__(self, output: OutputSettings, terminal: Terminal, *, is_main: bool) -> None:
        check_address(output.mirror, "mirror")
        self._address = output.mirror if is_main else ""
        self._output, self._keep = Path(output.output_dir), output.save_total_limit
        self._staging = self._output / MIRRORING
        self._terminal, self._shown = terminal, shown_address(output.mirror)
        self._waiting: dict[str, _Copy] = {}  # by kind
        self._changed = threading.Condition()
        self._rests = self._ends = self._told = False  # until the next save; for good; of the fault
        self._number = 0  # of the newest copy
        self._run: RunDirectory | None = None
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
        with self._faults_are_told():
            self._add("records", "records", 0, self._logs(self._run))
        with self._changed:
            self._ends = True
            self._changed.notify()
        if self._thread.ident is None:
            return
        with self._terminal.working("mirroring"), suppress(KeyboardInterrupt):  # of who won't wait
            self._thread.join(MIRROR_END.limit)
        if self._thread.is_alive():
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
            with self._faults_are_told():
                self._add(folder.name, folder.name, step, _files(folder))

    def add_checkpoint(self, run: RunDirectory, path: Path, protect: int | None) -> None:
        """A checkpoint that has just been saved, with the run's records. protect: step of one to keep."""
        if self:
            self._run = run
            with self._faults_are_told():
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
        """Hold the files by links, in place of what waits of this kind."""
        with self._changed:
            self._number += 1
        folder = self._staging / str(self._number)
        sequence = read_json_object(files[MANIFEST])["sequence"] if MANIFEST in files else 0
        about = {"run": self._run.name, "name": name, "step": step, "sequence": sequence}
        held = dict(_held(files, folder))
        with self._changed:
            old = self._waiting.pop(kind, None)
            self._waiting[kind] = _Copy(about, held, folder, protect)
            self._rests = False
            self._changed.notify()
        if old:
            shutil.rmtree(old.folder, ignore_errors=True)
        if self._thread.ident is None:
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ends or (self._waiting and not self._rests))
                if self._rests or not self._waiting:
                    return
                kind, newest = min(self._waiting, key=KINDS.index), self._number
                copy = self._waiting.pop(kind)
            if self._upload(copy):
                shutil.rmtree(copy.folder, ignore_errors=True)
                continue
            with self._changed:
                self._rests = self._number == newest  # until the next save, which may have come
                if self._waiting.setdefault(kind, copy) is not copy:
                    shutil.rmtree(copy.folder, ignore_errors=True)

    def _upload(self, copy: _Copy) -> bool:
        """Whether it is there now."""
        try:
            mirror = RemoteFolder(self._address)
            files = {name: _cut(path, size) for name, (path, size) in copy.files.items()}
            write_bundle(mirror, copy.about, files)
        except Exception as error:  # libraries of object stores raise what they like
            self._fail(f"{type(error).__name__}: {error}")
            return False
        self._told = False
        self._terminal.info(f"mirrored {copy.about['name']} to {self._shown}")
        try:
            if copy.about["sequence"]:
                self._prune(mirror, copy)
        except Exception as error:  # the same
            self._fail(f"old checkpoints can't be removed ({type(error).__name__}: {error})")
        return True

    def _prune(self, mirror: RemoteFolder, copy: _Copy) -> None:
        """Remove the run's oldest checkpoints beyond `keep`, and what was cut; never another run's."""
        run = copy.about["run"]
        names = [name for name in mirror.names(run) if name.startswith("checkpoint-")]
        bundles = {name: read_bundle(mirror, run, name) for name in names}
        whole = sorted((b for b in bundles.values() if b), key=lambda bundle: bundle.sequence)
        kept = {bundle.name for bundle in whole[-self._keep :]} | {copy.protect}
        for name in names:
            if name not in kept or bundles[name] is None:
                mirror.remove(f"{run}/{name}")

    @contextmanager
    def _faults_are_told(self) -> Iterator[None]:
        """A disk that fails where files are taken harms no run."""
        try:
            yield
        except (OSError, UserError) as error:
            self._fail(str(getattr(error, "strerror", None) or error))

    def _fail(self, reason: str) -> None:
        """One line for each time that the target is away."""
        if not self._told:
            self._told = True
            reason = without(reason, *hidden_parts(self._address))
            self._terminal.warning(
                f"mirror {self._shown}: {reason}; the run goes on, and the next save tries again"
            )

    # -------------------------------------------------------------------------
    # And back

    def fetch(self, run: str | None) -> None:
        """Bring the newest whole checkpoint of `run`, or of the run that was mirrored last, into the output
        directory, with the run's records and best model. Nothing where there is none.

        Raises RunStopped where the mirror can't be read: a fresh start would leave the run behind.
        """
        if not self:
            return
        with self._faults_stop_the_run(), self._terminal.working("asking the mirror"):
            mirror = RemoteFolder(self._address)
            bundles = _newest_first(mirror, run)
        for bundle in bundles:
            with self._faults_stop_the_run(), self._terminal.working(f"fetching {bundle.name}"):
                try:
                    self._fetch_run(mirror, bundle)
                    return
                except DamagedBundle as error:
                    self._terminal.warning(
                        f"mirror: {error}; the checkpoint before it is looked for"
                    )

    @contextmanager
    def _faults_stop_the_run(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # libraries of object stores raise what they like
            reason = without(f"{type(error).__name__}: {error}", *hidden_parts(self._address))
            raise RunStopped(
                f"mirror {self._shown}: can't be read ({reason}), so it is not known whether the run goes on "
                "from there; try again, or start without --resume"
            ) from error

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


def _newest_first(mirror: RemoteFolder, run: str | None) -> list[Bundle]:
    """The whole checkpoints: of the run that was mirrored last first, and of a run what was saved last."""
    runs = [name for name in mirror.names() if is_run_name(name) and run in (None, name)]
    by_run = [[read_bundle(mirror, r, name) for name in mirror.names(r)] for r in runs]
    own = [[b for b in found if b and b.sequence] for found in by_run]
    own = sorted((found for found in own if found), key=lambda found: -max(b.at for b in found))
    return [b for found in own for b in sorted(found, key=lambda b: -b.sequence)]


def _files(folder: Path) -> dict[str, Path]:
    """The files directly in a folder, but hidden ones, by name."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {p.name: p for p in paths if p.is_file() and not p.name.startswith(".")}


def _held(files: Mapping[str, Path], folder: Path) -> Iterator[tuple[str, tuple[Path, int]]]:
    """Links to files, and their sizes now; copies where the disk has no links."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, path) in enumerate(files.items()):
        held = folder / str(number)
        size = path.stat().st_size
        try:
            os.link(path, held)
        except OSError:
            shutil.copyfile(path, held)
        yield name, (held, size)


def _cut(path: Path, size: int) -> Path:
    """The file, or its beginning where the run has written on."""
    if path.stat().st_size <= size:
        return path
    beginning = path.with_name(f"{path.name}.cut")
    shutil.copyfile(path, beginning)
    os.truncate(beginning, size)
    return beginning
