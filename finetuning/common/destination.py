"""A place for what takes long to make: looked at before the work, and one maker's until it is filled."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from finetuning.common.errors import UserError
from finetuning.common.files import fsync_files, rename_durably, staging_folder
from finetuning.common.paths import check_name, fault_above


@dataclass(frozen=True)
class Destination:
    """A name, absolute, under which a file or a folder is to appear, whole or not at all."""

    path: Path
    is_file: bool
    option: str
    """What names it on the command line, for messages."""

    def check_free(self) -> None:
        """UserError where nothing can be written or something is there; a folder may replace an empty one."""
        check_name(self.path, self.option)
        try:
            if fault := fault_above(self.path):
                raise OSError(fault, os.strerror(fault))
            if not os.path.lexists(self.path):
                return
            if self.path.is_symlink():
                raise UserError(
                    f"{self.option} {self.path}: a link; give the place that it leads to, or another name"
                )
            if os.path.ismount(self.path):
                raise UserError(
                    f"{self.option} {self.path}: a disk begins there; choose a name below it"
                )
            if self.is_file or not self.path.is_dir() or any(self.path.iterdir()):
                raise UserError(f"{self.option} {self.path}: exists; choose one that does not")
        except OSError as error:
            raise self._unwritable(error) from error

    def check_outside(self, model: Path) -> None:
        """UserError where it lies in the folder of a saved model, which does not stay."""
        if self.path.resolve().is_relative_to(model.resolve()):
            raise UserError(
                f"{self.option} {self.path}: lies in {model}, which a run replaces with all that is in it; "
                "choose another place"
            )

    @contextmanager
    def held(self, needed_bytes: int) -> Iterator[Path]:
        """A folder beside it to work in; within the block no other process makes anything for this name.

        UserError where another does, where it can't be written, or where `needed_bytes` are not free.
        """
        self.check_free()
        with ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Where no file can be made, the lock would seem to be held.
                tempfile.TemporaryFile(dir=self.path.parent).close()
                stack.enter_context(_locked(self._beside("lock")))
                self.check_free()  # it may have been filled since
                self._check_room(needed_bytes)
                prefix = self._beside("").name
                staging = stack.enter_context(staging_folder(self.path.parent, prefix, "unchecked"))
            except Timeout as error:
                raise UserError(
                    f"{self.option} {self.path}: another process is writing it; wait for it, or choose "
                    "another name"
                ) from error
            except OSError as error:
                raise self._unwritable(error) from error
            yield staging

    def publish(self, made: Path) -> None:
        """Give what was made its name, once it is on the disk."""
        fsync_files(made if made.is_dir() else made.parent)
        if self.path.exists():
            self.path.rmdir()
        rename_durably(made, self.path)

    def _check_room(self, needed_bytes: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < needed_bytes:
            raise UserError(
                f"{self.option} {self.path}: {free / 1e6:.0f} MB free, about {needed_bytes / 1e6:.0f} MB "
                "needed; free some space, or choose another place"
            )

    def _beside(self, end: str) -> Path:
        return self.path.with_name(f".{self.path.name}-{end}")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.option} {self.path}: can't be written ({error.strerror or error}); choose another place"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is gone afterwards. Raises Timeout where another process holds it."""
    lock = FileLock(path)
    lock.acquire(timeout=0)
    try:
        yield
    finally:
        if os.name != "nt":  # there the lock itself removes it
            path.unlink(missing_ok=True)  # still held: the next process makes a file of its own
        lock.release()
