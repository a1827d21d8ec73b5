"""Tensors and state to a directory that is whole or absent, and back, verified.

    checkpoints/checkpoint-50/
        adapter_model.safetensors, adapter_config.json   loadable by PEFT as they are
        optimizer.safetensors, rng.safetensors           what is large goes on in optimizer.2.safetensors
        state.json                                       strict JSON: step, counters, monitors
        manifest.json                                    written last: SHA-256 of every file

A checkpoint is staged in a hidden directory, every file is fsynced, the directory is renamed and its
parent fsynced; only then does the caller say "saved", and only then are old ones pruned (ALICE,
Pillai et al., OSDI 2014: a rename alone is not durable). Nothing here reads or writes pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors

from finetuning.common.errors import UserError
from finetuning.common.files import (
    durable_file,
    json_bytes,
    rename_durably,
    sealed_json,
    staging_folder,
)
from finetuning.common.text import clean_line
from finetuning.model.parallel import full_tensor, placed_like
from finetuning.training.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    DamagedCheckpoint,
    manifests,
    put_aside,
    read_manifest,
)

STAGING_PREFIX = ".staging-"
FILE_BYTES = 4 * 2**30  # of tensors in one file: saving holds twice that, and not the whole state

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: the digests of its files were right.

    The tensors are mapped from the files: a process reads what it uses, and all of a machine share it.
    """

    path: Path
    step: int
    run: str
    tensors: dict[str, Tensors]  # by file name without number and ending
    state: dict[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """As its run recorded them; empty where the file has none, which a restore refuses."""
        found = self.state.get("config") if isinstance(self.state, Mapping) else None
        return found if isinstance(found, Mapping) else {}


class NonFiniteTensor(Exception):
    """A NaN or an infinity in what is to be saved, which would be worth nothing; the message says where."""


# -----------------------------------------------------------------------------
# Saving


def save_checkpoint(
    directory: Path,
    step: int,
    *,
    run: str,
    tensors: Mapping[str, Tensors],
    documents: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
) -> Path:
    """Write `checkpoint-<step>` below `directory` and return its path once it is durable.

    Args:
        tensors: file name without ending -> named tensors, each its own safetensors file, or several
            where it is large. Shards are gathered one by one: the other ranks call `give_shards`.
        documents: file name -> JSON content of further files (the adapter's configuration).
        state: the JSON state of the run.

    Raises OSError (disk full, quota, I/O) or NonFiniteTensor with nothing published and the staging
    removed.
    """
    whole = _gathered(tensors)
    try:
        return _publish(directory, step, run, whole, documents, state)
    finally:
        for _ in whole:  # after an error the other ranks still wait for the rest
            pass


def give_shards(tensors: Mapping[str, Tensors]) -> None:
    """The part in `save_checkpoint` of a rank that does not write."""
    for _ in _gathered(tensors):
        pass


def _gathered(tensors: Mapping[str, Tensors]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(file, name, tensor) of every tensor, whole; in the same order on all ranks."""
    for file, content in tensors.items():
        for name, tensor in content.items():
            yield file, name, full_tensor(tensor.detach())


def _files(
    whole: Iterable[tuple[str, str, torch.Tensor]],
) -> Iterator[tuple[str, Tensors]]:
    """Name and content of every file, on the host; a file is full at `FILE_BYTES`."""
    content: Tensors = {}
    file, size, number = "", 0, 1
    for stem, name, tensor in whole:
        if content and (stem != file or size + tensor.nbytes > FILE_BYTES):
            yield _file_name(file, number), content
            content, size, number = {}, 0, number + 1 if stem == file else 1
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteTensor(f"{stem}: {name}")
        file, size = stem, size + tensor.nbytes
        content[name] = tensor.cpu().contiguous()
    if content:
        yield _file_name(file, number), content


def _file_name(stem: str, number: int) -> str:
    return f"{stem}.safetensors" if number == 1 else f"{stem}.{number}.safetensors"


def _publish(
    directory: Path,
    step: int,
    run: str,
    whole: Iterable[tuple[str, str, torch.Tensor]],
    documents: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
) -> Path:
    """Stage every file, then rename the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with staging_folder(directory, STAGING_PREFIX, f"{step}-{os.getpid()}") as staging:
        digests = {}
        for name, content in _files(whole):
            digests[name] = _write(staging / name, save_safetensors(content))
        for name, content in {**documents, STATE: state}.items():
            digests[name] = _write(staging / name, json_bytes(content))
        manifest = {
            "format": FORMAT,
            "step": step,
            "run": run,
            "sequence": 1 + max((m["sequence"] for _, m in manifests(directory)), default=0),
            "files": digests,
        }
        _write(staging / MANIFEST, sealed_json(manifest))
        target = free_name(directory, step)
        rename_durably(staging, target)
    return target


def prune_checkpoints(
    directory: Path, *, run: str, keep: int, protect: Path | None, warn: Callable[[str], None]
) -> None:
    """Remove this run's oldest checkpoints beyond `keep`; never the newest, nor `protect`, nor others'.

    A directory without our manifest, of another run, or reached through a link is not ours to remove.
    What can't be removed is warned about.
    """
    ours = [
        path for path, manifest in manifests(directory) if manifest["run"] == run
    ]  # oldest first
    for path in ours[: -max(1, keep)]:
        if path == protect or path.is_symlink():
            continue
        # Renamed first: a crash in the middle of the removal leaves no half checkpoint behind.
        doomed = path.with_name(f"{STAGING_PREFIX}removed-{path.name}")
        try:
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warn(f"could not remove the old checkpoint {path}: {error}")


def remove_leftovers(directory: Path) -> None:
    """Remove staging directories of a run that died; call it with the run lock held."""
    for path in directory.glob(f"{STAGING_PREFIX}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write and fsync one file; returns its manifest entry."""
    with durable_file(path) as file:
        file.write(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def free_name(directory: Path, step: int) -> Path:
    """`checkpoint-<step>`, or with a further number where another run's or branch's stands there."""
    target, number = directory / f"checkpoint-{step}", 1
    while target.exists() or target.is_symlink():
        number += 1
        target = directory / f"checkpoint-{step}.{number}"
    return target


# -----------------------------------------------------------------------------
# Loading


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify every file of a checkpoint against the manifest and map its tensors.

    Raises DamagedCheckpoint for anything missing, extra in name, short, altered, or of another format.
    """
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        if not isinstance(name, str) or Path(name).name != name:
            raise DamagedCheckpoint(f"{path / MANIFEST}: a file name leads out of the checkpoint")
        _verify(path / name, entry)
    tensors: dict[str, Tensors] = {}
    try:
        state = json.loads((path / STATE).read_bytes())
        for name in manifest["files"]:
            if name.endswith(".safetensors"):
                content = load_file(path / name)
                tensors.setdefault(name.partition(".")[0], {}).update(content)
    except (
        ValueError,
        RecursionError,
        SafetensorError,
    ) as error:  # digests right, content made by hand
        raise DamagedCheckpoint(
            f"{path}: can't be decoded ({clean_line(str(error), 200)})"
        ) from error
    return Checkpoint(path, manifest["step"], manifest["run"], tensors, state)


def newest_checkpoint(
    directory: Path, *, warn: Callable[[str], None], run: str | None = None
) -> Checkpoint | None:
    """The newest good checkpoint; damaged newer ones are named and put aside as `<name>.damaged`.

    Newest is what was saved last, not the highest step: an older run's `checkpoint-9999` in the same
    directory does not win. With `run` given, only that run's checkpoints count.
    """
    for path, manifest in reversed(manifests(directory, warn)):
        if run is not None and manifest["run"] != run:
            continue
        try:
            return load_checkpoint(path)
        except (DamagedCheckpoint, OSError) as error:
            aside = put_aside(path)
            warn(f"damaged checkpoint, kept aside as {aside.name}: {error}")
    return None


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint a user named. Raises UserError if it is not a good one."""
    try:
        return load_checkpoint(path)
    except (DamagedCheckpoint, OSError) as error:
        raise UserError(
            f"--resume {path}: not a usable checkpoint ({error}); name another directory below "
            "checkpoints/, or use --resume latest"
        ) from error


@contextmanager
def misfits_are_told(path: Path) -> Iterator[None]:
    """Within it, tensors that are missing or of another kind are a UserError: who wrote them was another
    program, or another version."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(
            f"--resume {path}: its tensors are of another version of this program "
            f"({clean_line(repr(error), 200)}); go on with the version that wrote it, or start a new run "
            "with --init-adapter and this folder"
        ) from error


def _verify(file: Path, entry: Any) -> None:
    if file.is_symlink() or not file.is_file():
        raise DamagedCheckpoint(f"{file}: missing or not a plain file")
    if not isinstance(entry, dict) or file.stat().st_size != entry.get("bytes"):
        raise DamagedCheckpoint(f"{file}: its size is not the manifest's")
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != entry.get("sha256"):
        raise DamagedCheckpoint(f"{file}: its SHA-256 is not the manifest's")


# -----------------------------------------------------------------------------
# Optimizer and random state as named tensors


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]
) -> Tensors:
    """AdamW's moments and step counts as they lie, keyed `<parameter name>::<field>`."""
    return {
        f"{names[parameter]}::{field}": value
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], tensors: Tensors
) -> None:
    """Put `optimizer_tensors` back; every parameter must be there with its shape."""
    for key, value in tensors.items():
        name, _, field = key.rpartition("::")
        if name not in parameters:
            raise UserError(
                f"--resume: the checkpoint has optimizer state of {name}, the model has not"
            )
        parameter = parameters[name]
        if value.dim() and value.shape != parameter.shape:
            raise UserError(f"--resume: optimizer state of {name} has another shape than the model")
        whole = value.dim() == 0  # the step count
        optimizer.state[parameter][field] = (
            value.to(parameter.device, copy=True) if whole else placed_like(value, parameter)
        )


def rng_tensors(device: torch.device) -> Tensors:
    """The state of torch's generators, the only ones that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(tensors: Tensors, device: torch.device) -> None:
    """Put `rng_tensors` back."""
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
