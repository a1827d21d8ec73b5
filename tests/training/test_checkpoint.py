"""A checkpoint is whole or absent, damage is found, and pruning removes only what is ours.

uv run pytest tests/training/test_checkpoint.py
"""

import json
import os
import random
import shutil
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from finetuning.common.errors import UserError
from finetuning.common.files import sealed_json
from finetuning.training import checkpoint
from finetuning.training.checkpoint import (
    DamagedCheckpoint,
    NonFiniteTensor,
    checkpoint_at,
    give_shards,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    remove_leftovers,
    restore_optimizer,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)


def save(directory: Path, step: int, run: str = "run", value: float = 1.0) -> Path:
    return save_checkpoint(
        directory,
        step,
        run=run,
        tensors={"adapter_model": {"a": torch.full((3, 2), value), "b": torch.arange(4)}},
        documents={"adapter_config.json": {"r": 4}},
        state={"step": step, "value": 0.1 + 0.2},
    )


def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path: Path):
    path = save(tmp_path, 7)
    found = load_checkpoint(path)
    assert path.name == "checkpoint-7" and found.step == 7 and found.run == "run"
    assert found.state == {"step": 7, "value": 0.1 + 0.2}
    assert torch.equal(found.tensors["adapter_model"]["a"], torch.ones(3, 2))
    assert found.tensors["adapter_model"]["b"].dtype == torch.int64
    assert json.loads((path / "adapter_config.json").read_text()) == {"r": 4}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-7"], "staging was left behind"


def test_files_then_their_names_are_on_the_disk_before_a_save_returns(tmp_path: Path, monkeypatch):
    """Written, synced, renamed, and the folder with the new name synced: a power cut finds all or nothing."""
    fsync, rename, order = os.fsync, os.rename, []

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        order.append(os.fstat(descriptor).st_ino)

    def note_rename(source, target) -> None:
        rename(source, target)
        order.append("renamed")

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    path = save(tmp_path, 3)
    before, after = order[: order.index("renamed")], order[order.index("renamed") + 1 :]
    whole = {p.stat().st_ino for p in (path, *path.iterdir())}
    assert whole <= set(before) and after == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("damage", ["empty", "short", "grown", "missing", "flipped", "link"])
def test_every_damage_of_every_file_is_found(tmp_path: Path, damage: str):
    names = [p.name for p in save(tmp_path / "sample", 1).iterdir()]
    assert len(names) == 4
    for name in names:
        file = save(tmp_path / f"{damage}-{name}", 1) / name
        data = file.read_bytes()
        if damage == "empty":
            file.write_bytes(b"")
        elif damage == "short":
            file.write_bytes(data[:-1])
        elif damage == "grown":
            file.write_bytes(data + b" {")
        elif damage == "flipped":
            place = random.Random(name).randrange(len(data))
            file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        elif damage == "missing":
            file.unlink()
        else:
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(file.parent)


def test_no_flipped_bit_of_the_manifest_passes(tmp_path: Path):
    file = save(tmp_path, 12) / "manifest.json"
    data = file.read_bytes()
    for place in range(len(data)):
        bit = 1 << random.Random(place).randrange(8)
        file.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(file.parent)


def test_numbers_that_are_not_finite_are_named_and_not_saved(tmp_path: Path):
    save(tmp_path, 5)
    with pytest.raises(NonFiniteTensor, match="adapter_model: a"):
        save(tmp_path, 6, value=float("inf"))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_large_state_is_written_file_by_file(tmp_path: Path, monkeypatch):
    """No file holds more than its share, but a tensor is never cut."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    tensors = {
        "adapter_model": {f"w{i}": torch.full((10,), float(i)) for i in range(5)},
        "optimizer": {"large": torch.ones(50), "step": torch.tensor(3.0)},
    }
    path = save_checkpoint(tmp_path, 1, run="r", tensors=tensors, documents={}, state={})
    assert sorted(p.name for p in path.glob("*.safetensors")) == [
        "adapter_model.2.safetensors",
        "adapter_model.3.safetensors",
        "adapter_model.safetensors",
        "optimizer.2.safetensors",
        "optimizer.safetensors",
    ]
    found = load_checkpoint(path).tensors
    assert found.keys() == tensors.keys()
    for file, content in tensors.items():
        assert found[file].keys() == content.keys()
        assert all(torch.equal(found[file][name], tensor) for name, tensor in content.items())


def test_no_rank_ever_holds_the_whole_state(tmp_path: Path, monkeypatch):
    """Gathered tensors that are alive together: one where nothing is written, two files where it is."""
    alive, peaks = set(), []

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.clone()
        alive.add(id(whole))
        weakref.finalize(whole, alive.discard, id(whole))
        peaks[-1] = max(peaks[-1], len(alive))
        return whole

    monkeypatch.setattr(checkpoint, "full_tensor", gather)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 4 * 40)  # four tensors
    tensors = {"optimizer": {f"w{i}": torch.full((10,), float(i)) for i in range(40)}}
    write = partial(save_checkpoint, tmp_path, 1, run="r", documents={}, state={})
    for take_part in (give_shards, lambda t: write(tensors=t)):
        peaks.append(0)
        take_part(tensors)
        assert not alive
    assert peaks[0] <= 2 and peaks[1] <= 2 * 4 + 1


def test_after_an_error_the_other_ranks_are_not_left_waiting(tmp_path: Path, monkeypatch):
    """Gathering goes on to the end, whatever happens to the files."""
    gathered = []
    monkeypatch.setattr(checkpoint, "full_tensor", lambda t: gathered.append(1) or t)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 1)
    assert len(gathered) == 2 and not list(tmp_path.iterdir())


def test_what_was_loaded_outlives_its_files(tmp_path: Path):
    """The optimizer gets copies: a checkpoint is mapped, and pruned while the run goes on."""
    weight = torch.nn.Parameter(torch.ones(4))
    tensors = {"optimizer": {"w::exp_avg": torch.full((4,), 2.0), "w::step": torch.tensor(3.0)}}
    path = save_checkpoint(tmp_path, 1, run="r", tensors=tensors, documents={}, state={})
    optimizer = torch.optim.AdamW([weight])
    restore_optimizer(optimizer, {"w": weight}, load_checkpoint(path).tensors["optimizer"])
    file = path / "optimizer.safetensors"
    with open(file, "r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert optimizer.state[weight]["exp_avg"].tolist() == [2.0] * 4


def test_a_damaged_newest_is_put_aside_and_the_one_before_is_used(tmp_path: Path):
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    (newest / "state.json").write_text("{}")
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, warn=warnings.append).step == 5
    assert len(warnings) == 1 and "state.json" in warnings[0]
    assert (tmp_path / "checkpoint-10.damaged" / "adapter_model.safetensors").is_file()
    assert newest_checkpoint(tmp_path, warn=warnings.append).step == 5
    assert len(warnings) == 1, "the one put aside was looked at again"


def test_the_manifest_of_another_step_is_damage(tmp_path: Path):
    older, newest = save(tmp_path, 5), save(tmp_path, 10)
    shutil.copy(older / "manifest.json", newest / "manifest.json")
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, warn=warnings.append).step == 5
    assert "checkpoint-10" in warnings[0] and (tmp_path / "checkpoint-10.damaged").is_dir()


def test_newest_is_what_was_saved_last_not_the_highest_step(tmp_path: Path):
    save(tmp_path, 9999, run="older")
    save(tmp_path, 5, run="newer")
    assert newest_checkpoint(tmp_path, warn=pytest.fail).step == 5
    assert newest_checkpoint(tmp_path, warn=pytest.fail, run="older").step == 9999


def test_the_same_step_again_does_not_overwrite(tmp_path: Path):
    first, second = save(tmp_path, 5, value=1.0), save(tmp_path, 5, value=2.0)
    assert first != second
    newest = newest_checkpoint(tmp_path, warn=pytest.fail)
    assert newest.path == second and newest.tensors["adapter_model"]["a"][0, 0] == 2.0


def test_pruning_keeps_newest_best_and_others(tmp_path: Path):
    save(tmp_path, 9999, run="older")
    (tmp_path / "checkpoint-notes").mkdir()
    paths = [save(tmp_path, step) for step in (10, 20, 30, 40)]
    linked = tmp_path / "checkpoint-15"
    shutil.move(save(tmp_path, 15), tmp_path.parent / "kept-elsewhere")
    linked.symlink_to(tmp_path.parent / "kept-elsewhere")
    last = save(tmp_path, 50)
    prune_checkpoints(tmp_path, run="run", keep=2, protect=paths[1], warn=pytest.fail)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {
        "checkpoint-9999",
        "checkpoint-notes",
        "checkpoint-20",
        "checkpoint-15",
        last.name,
    }
    assert (tmp_path.parent / "kept-elsewhere" / "manifest.json").is_file()
    prune_checkpoints(tmp_path, run="run", keep=0, protect=None, warn=pytest.fail)
    assert last.exists(), "the newest was removed"


def test_a_failed_save_publishes_nothing_and_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path, 5)
    real, calls = checkpoint._write, []

    def full_disk(path: Path, data: bytes):
        calls.append(path.name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(checkpoint, "_write", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 10)
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    assert newest_checkpoint(tmp_path, warn=pytest.fail).step == 5


def test_leftovers_of_a_crash_are_removed_and_never_loaded(tmp_path: Path):
    staging = tmp_path / ".staging-20-1"
    shutil.copytree(save(tmp_path, 5), staging)
    assert newest_checkpoint(tmp_path, warn=pytest.fail).path.name == "checkpoint-5"
    remove_leftovers(tmp_path)
    assert not staging.exists() and (tmp_path / "checkpoint-5").exists()


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path):
    path = save(tmp_path, 5)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../outside"] = {"bytes": 1, "sha256": ""}
    (path / "manifest.json").write_bytes(sealed_json(manifest))
    with pytest.raises(DamagedCheckpoint, match="out of the checkpoint"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="not a usable checkpoint"):
        checkpoint_at(path)


def test_optimizer_and_random_state_come_back_exactly():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([weight], fused=True)

    def steps(count: int) -> None:
        for _ in range(count):
            weight.grad = torch.randn(4, 3)
            optimizer.step()

    steps(3)
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizer, {weight: "w"}).items()}
    assert set(saved) == {"w::step", "w::exp_avg", "w::exp_avg_sq"}
    rng, before = rng_tensors(torch.device("cpu")), weight.detach().clone()
    steps(2)
    uninterrupted = weight.detach().clone()

    with torch.no_grad():
        weight.copy_(before)
    optimizer = torch.optim.AdamW([weight], fused=True)
    restore_optimizer(optimizer, {"w": weight}, saved)
    restore_rng(rng, torch.device("cpu"))
    steps(2)
    assert torch.equal(weight.detach(), uninterrupted)
    with pytest.raises(UserError, match="another shape"):
        restore_optimizer(optimizer, {"w": weight}, {"w::exp_avg": torch.zeros(2, 2)})
    with pytest.raises(UserError, match="the model has not"):
        restore_optimizer(optimizer, {"w": weight}, {"v::exp_avg": torch.zeros(4, 3)})
