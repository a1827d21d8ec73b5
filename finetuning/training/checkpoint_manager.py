"""The checkpoints of a run: when one is due, how all ranks write it, and which one a run goes on from.

What a checkpoint is on the disk belongs to `checkpoint.py`.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from finetuning.common.distributed import Distributed
from finetuning.common.errors import RunStopped, UserError
from finetuning.training.checkpoint import (
    Checkpoint,
    NonFiniteTensor,
    Tensors,
    checkpoint_at,
    give_shards,
    newest_checkpoint,
    prune_checkpoints,
    remove_leftovers,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)

MIN_SAVE_STEPS = 50  # between two automatic checkpoints that cost little
LATE_SAVE_STEPS = 10  # between two looks whether work has waited too long for one
SAVING_SHARE = 0.05  # of the time between two automatic checkpoints, which the second may take
MOST_UNSAVED_SECONDS = 900  # of work, however long a checkpoint takes


class CheckpointManager:
    """One run's checkpoints, the same on all ranks; rank 0 looks for them and writes them.

    Args:
        directory: the checkpoints of all runs of an output directory.
        save_steps: steps between two; "auto": as far apart as they cost.
        keep: how many of the run's remain, beside the protected one.
        say, warn: told what is saved, and what a person should look at.
    """

    def __init__(
        self,
        directory: Path,
        dist: Distributed,
        *,
        save_steps: int | str,
        keep: int,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.directory, self._dist = directory, dist
        self._save_steps, self._keep, self._say, self._warn = save_steps, keep, say, warn
        self.step = -1  # of the newest one; -1: the run has none
        self.newest_path: Path | None = None  # what this session has saved last, on rank 0
        self._saved_at = time.monotonic()  # the end of the last save, and how long it took
        self._saving_seconds = 0.0

    # -------------------------------------------------------------------------
    # Saving

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint belongs here. Left to us: every 50 steps when 20 times as long has passed as
        the last one took, and every 10 when a quarter of an hour has; rank 0, which writes it, decides
        for all."""
        if self._save_steps != "auto":
            return self._save_steps > 0 and step % self._save_steps == 0
        if step % LATE_SAVE_STEPS:
            return False
        wait = MOST_UNSAVED_SECONDS
        if step % MIN_SAVE_STEPS == 0:
            wait = min(self._saving_seconds / SAVING_SHARE, wait)
        waited = time.monotonic() - self._saved_at
        return any(self._dist.any(self._dist.is_main and waited >= wait))

    def save(
        self,
        run: str,
        step: int,
        tensors: Mapping[str, Tensors],
        *,
        documents: Mapping[str, Mapping[str, Any]],
        state: Mapping[str, Any],
        protect: int | None,
    ) -> None:
        """Write one, and remove the run's oldest but for that of step `protect`. A collective.

        Raises RunStopped on all ranks where the disk or a number that is not finite forbids it.
        """
        start = time.monotonic()
        everything = {**tensors, "rng": self._random_state()}
        write = partial(self._write, run, step, documents=documents, state=state)
        fault = self._dist.broadcast(
            write(everything) if self._dist.is_main else give_shards(everything)
        )
        if fault:
            raise RunStopped(
                f"no checkpoint of step {step}: {fault}. The one before it is intact: go on with "
                "--resume latest"
            )
        if self._dist.is_main:
            prune_checkpoints(
                self.directory,
                run=run,
                keep=self._keep,
                protect=self.directory / f"checkpoint-{protect}" if protect else None,
                warn=self._warn,
            )
        self._saved_at = time.monotonic()
        self._saving_seconds = self._saved_at - start
        self._is_there(step)

    def _random_state(self) -> Tensors:
        """The generators of all ranks, by `<rank>.<device>`. A collective."""
        return {
            f"rank{rank}.{device}": tensor
            for rank, states in enumerate(self._dist.gather(rng_tensors(self._dist.device)))
            for device, tensor in states.items()
        }

    def _write(self, run: str, step: int, tensors: Mapping[str, Tensors], **content: Any) -> str:
        """Write and say so. Returns what went wrong, or nothing."""
        try:
            path = save_checkpoint(self.directory, step, run=run, tensors=tensors, **content)
        except NonFiniteTensor as error:
            return f"{error} is not finite; lower --learning-rate"
        except OSError as error:
            reason = error.strerror or error
            return f"{self.directory} can't be written ({reason}); free some space"
        number = path.name.partition(".")[2]
        among = (
            f" (checkpoint {number} of step {step}: others have been here before)" if number else ""
        )
        self._say(f"saved {path}{among}")
        self.newest_path = path
        return ""

    def _is_there(self, step: int) -> None:
        self.step = step
        self._dist.put("saved", str(step))

    # -------------------------------------------------------------------------
    # Going on

    def resolve_resume(
        self, resume: str, fetch: Callable[[str | None], None] = lambda run: None
    ) -> Checkpoint | None:
        """The checkpoint that `--resume` asks for. Raises UserError where it must be there and is not.

        fetch: asked, where there is none, to bring one from elsewhere into the directory: of the run that is
        named, or of any. It may take long.
        """
        path = None
        with self._dist.wait_alive("resume"):
            if self._dist.is_main:
                path = self._wanted(resume, fetch)
        found = self._on_all_ranks(path)
        if found is None and resume == "latest":
            raise UserError(
                f"--resume latest: no usable checkpoint in {self.directory}; --resume auto starts fresh "
                "where there is none"
            )
        return found

    def _wanted(self, resume: str, fetch: Callable[[str | None], None]) -> Path | None:
        remove_leftovers(self.directory)
        # A group that torchrun has restarted goes on with its run, whatever --resume says.
        run, path = self._dist.get("run") or None, None
        if run or resume in ("latest", "auto"):
            path = self._newest(run)
            if path is None and (run is None or self._dist.get("saved")):
                fetch(run)
                path = self._newest(run)
        return Path(resume) if path is None and resume not in ("", "latest", "auto") else path

    def newest(self, run: str) -> Checkpoint | None:
        """The run's newest good checkpoint."""
        return self._on_all_ranks(self._newest(run) if self._dist.is_main else None)

    def run_before_first_checkpoint(self) -> str:
        """Name of the run that an earlier group of this torchrun began and died before it saved anything."""
        return "" if self._dist.get("saved") else self._dist.get("run")

    def load_rng(self, checkpoint: Checkpoint) -> None:
        """This rank's generators as they were there; a rank that did not exist then starts from the seed."""
        prefix = f"rank{self._dist.rank}."
        states = {
            name.removeprefix(prefix): tensor
            for name, tensor in checkpoint.tensors["rng"].items()
            if name.startswith(prefix)
        }
        if states:
            restore_rng(states, self._dist.device)
        self._is_there(checkpoint.step)

    def _newest(self, run: str | None) -> Path | None:
        found = newest_checkpoint(self.directory, warn=self._warn, run=run)
        return found.path if found else None

    def _on_all_ranks(self, path: Path | None) -> Checkpoint | None:
        path = self._dist.broadcast(path)
        return checkpoint_at(path) if path else None
