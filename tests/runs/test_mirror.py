"""Checkpoints go elsewhere behind the training, and come back from there whole or not at all.

uv run pytest -m "not long" tests/runs/test_mirror.py
"""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from finetuning.common.bounds import MIRROR_END
from finetuning.common.errors import RunStopped, UserError
from finetuning.common.files import sealed_json
from finetuning.common.process import StopSignal
from finetuning.common.remote import RemoteFolder, check_address, hidden_parts, shown_address
from finetuning.config import OutputSettings
from finetuning.events.reading import read_metrics, read_run
from finetuning.runs import mirror as module
from finetuning.runs.bundle import FORMAT, read_bundle
from finetuning.runs.directory import MIRRORING, RunDirectory, disk_faults_stop_the_run
from finetuning.runs.mirror import Mirror
from finetuning.runs.recorded import find_runs, read_recorded
from finetuning.training.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from tests.helpers.ranks import on_ranks, results_of
from tests.helpers.services import until
from tests.helpers.sessions import settings, stop_at, train, train_on_ranks

RUN, OTHER = "qwen3_4b_thinking_20260101_000000", "qwen3_4b_thinking_20260202_000000"
SECRETS = ("Qx7pl41n", "b4rW0rd5")


class Heard:
    """A terminal that keeps what it was told."""

    def __init__(self) -> None:
        self.infos: list[str] = []
        self.warnings: list[str] = []
        self.info, self.warning = self.infos.append, self.warnings.append

    def working(self, what: str) -> nullcontext:
        return nullcontext()


@pytest.fixture(params=["folder", "memory"])
def address(request, tmp_path: Path) -> str:
    """A place of each kind, empty."""
    return str(tmp_path / "mirror") if request.param == "folder" else f"memory://{tmp_path.name}"


@pytest.fixture
def memory(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}"


def output(folder: Path, address: str, keep: int = 3) -> OutputSettings:
    return OutputSettings(output_dir=str(folder), mirror=address, save_total_limit=keep)


def begin(folder: Path, address: str, keep: int = 3) -> tuple[Mirror, Heard]:
    heard = Heard()
    return Mirror(output(folder, address, keep), heard, is_main=True), heard


def checkpoint(folder: Path, step: int, run: str = RUN, best: int | None = None) -> Path:
    """A checkpoint of `run`, with records until then."""
    where = RunDirectory(folder, run)
    for place, name in ((where.tensorboard, "events"), (where.logs, "metrics.jsonl")):
        place.mkdir(parents=True, exist_ok=True)
        with open(place / name, "a", encoding="utf-8") as file:
            file.write(f"step {step}\n")
    tensors = {"adapter_model": {"w": torch.full((50,), float(step))}}
    state = {"train_state": {"best_step": best}}
    options = {"run": run, "tensors": tensors, "documents": {}, "state": state}
    return save_checkpoint(folder / "checkpoints", step, **options)


def best_model(folder: Path, step: int) -> Path:
    place = folder / "best_model"
    place.mkdir(parents=True, exist_ok=True)
    (place / "weights").unlink(missing_ok=True)
    (place / "weights").write_text(f"of step {step}", encoding="utf-8")
    return place


def arrives(heard: Heard, path: Path) -> None:
    """Wait until it is at the mirror."""
    until(lambda: heard.warnings or f"mirrored {path.name} to " in " ".join(heard.infos))


def mirrored(folder: Path, address: str, *steps: int, best: int | None = None) -> None:
    """One session that saves these steps, and the best model at `best`."""
    mirror, heard = begin(folder, address)
    run = RunDirectory(folder, RUN)
    with mirror:
        if best:
            mirror.add_model(run, best_model(folder, best), best)
        for step in steps:
            path = checkpoint(folder, step, best=best)
            mirror.add_checkpoint(run, path, best)
            arrives(heard, path)
    assert heard.warnings == [] and not (folder / MIRRORING).exists()


def fetched(folder: Path, address: str, run: str | None = None) -> tuple[list[str], Heard]:
    """What an empty machine gets: the names of its checkpoints, which are whole."""
    mirror, heard = begin(folder, address)
    mirror.fetch(run)
    names = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    for name in names:
        load_checkpoint(folder / "checkpoints" / name)
    return names, heard


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def files_at(address: str) -> dict[str, bytes]:
    """All that lies at a mirror."""
    files, root = fsspec.core.url_to_fs(address)
    return {path[len(root) + 1 :]: files.cat_file(path) for path in files.find(root)}


def whole_at(address: str) -> set[str]:
    """Names of what is whole there."""
    mirror = RemoteFolder(address)
    pairs = [(run, name) for run in mirror.names() for name in mirror.names(run)]
    return {name for run, name in pairs if read_bundle(mirror, run, name)}


def damage(address: str, name: str) -> None:
    """One byte in the middle is another one."""
    files, root = fsspec.core.url_to_fs(address)
    data = bytearray(files.cat_file(f"{root}/{name}"))
    data[len(data) // 2] ^= 1
    files.pipe_file(f"{root}/{name}", bytes(data))


# ------------------------------------------------------------------------ there and back


def test_what_was_saved_comes_back_on_an_empty_machine(tmp_path: Path, address: str):
    mirrored(tmp_path / "a", address, 2, 4, best=3)
    names, heard = fetched(tmp_path / "b", address)
    assert names == ["checkpoint-4"] and heard.warnings == []
    there, here = contents(tmp_path / "a"), contents(tmp_path / "b")
    for part in ("checkpoints/checkpoint-4/", f"tensorboard_logs/{RUN}/", f"training_logs/{RUN}/"):
        assert {n: b for n, b in there.items() if n.startswith(part)} == {
            n: b for n, b in here.items() if n.startswith(part)
        }
    assert here[f"earlier_models/{RUN}/best_model/weights"] == b"of step 3"
    assert heard.infos == [
        f"checkpoint-4 of {RUN} comes from the mirror, with curves, texts and files until then"
    ]


@pytest.mark.parametrize("when", ["before", "after"])
def test_records_are_those_of_the_checkpoint(tmp_path: Path, address: str, when: str):
    """What the run writes before or after each file that is sent harms no upload and does not come along."""
    mirror, heard = begin(tmp_path / "a", address)
    run, put = RunDirectory(tmp_path / "a", RUN), RemoteFolder.put

    def while_the_run_writes(*arguments: object) -> None:
        for step, moment in ((3, "before"), (4, "after")):
            if moment == when:
                for file in (run.logs / "metrics.jsonl", run.tensorboard / "events"):
                    with open(file, "a", encoding="utf-8") as live:
                        live.write(f"step {step}\n")
            if moment == "before":
                put(*arguments)

    with mock.patch.object(RemoteFolder, "put", while_the_run_writes), mirror:
        path = checkpoint(tmp_path / "a", 2)
        mirror.add_checkpoint(run, path, None)
        arrives(heard, path)
    assert heard.warnings == []
    fetched(tmp_path / "b", address)
    for place in ("training_logs", "tensorboard_logs"):
        (file,) = (tmp_path / "b" / place / RUN).iterdir()
        assert file.read_text() == "step 2\n"


def test_of_several_runs_the_one_that_was_mirrored_last_goes_on(tmp_path: Path, memory: str):
    """Not the one with the later name, nor the higher step; unless one is asked for."""
    for run, step in ((OTHER, 90), (RUN, 4)):
        folder = tmp_path / run
        mirror, _ = begin(folder, memory)
        with mirror:
            mirror.add_checkpoint(RunDirectory(folder, run), checkpoint(folder, step, run), None)
    assert fetched(tmp_path / "b", memory)[0] == ["checkpoint-4"]
    assert fetched(tmp_path / "c", memory, OTHER)[0] == ["checkpoint-90"]
    assert fetched(tmp_path / "d", memory, RUN + "1")[0] == []


def test_an_empty_mirror_gives_nothing_which_is_told(tmp_path: Path, address: str):
    (tmp_path / "mirror").mkdir()
    names, heard = fetched(tmp_path / "a", address)
    assert names == [] and heard.infos == [f"mirror {address}: there is no checkpoint yet"]
    names, heard = fetched(tmp_path / "a", "")
    assert names == heard.infos == []


def test_a_folder_that_is_not_there_or_a_file_is_no_empty_mirror(tmp_path: Path):
    """A disk that is not mounted, or a wrong name: a fresh start would leave the run behind."""
    place, root = tmp_path / "mirror", RemoteFolder(f"memory://{tmp_path.name}")
    with pytest.raises(RunStopped, match="no such folder; make it if it is a new one"):
        fetched(tmp_path / "a", str(place))
    place.write_text("a file, not a folder", encoding="utf-8")
    root.write("file", b"the same")
    for address in (str(place), f"memory://{tmp_path.name}/file"):
        with pytest.raises(RunStopped, match="a file, and not a folder"):
            fetched(tmp_path / "a", address)
    place.unlink()
    (tmp_path / "a").mkdir()
    place.symlink_to(tmp_path / "a", target_is_directory=True)
    assert fetched(tmp_path / "b", str(place))[0] == []


def test_a_file_with_the_name_of_a_run_or_checkpoint_is_none(tmp_path: Path, address: str):
    mirrored(tmp_path / "a", address, 2)
    for name in (OTHER, f"{RUN}/checkpoint-9"):
        RemoteFolder(address).write(name, b"of somebody else")
    names, heard = fetched(tmp_path / "b", address)
    assert names == ["checkpoint-2"] and heard.warnings == []


@pytest.mark.parametrize("clock", ["right", "an hour behind"])
def test_a_run_that_goes_on_elsewhere_keeps_its_newest(
    tmp_path: Path, address: str, monkeypatch, clock: str
):
    """There its numbers may begin anew, and the clock may be wrong."""
    mirrored(tmp_path / "a", address, 2, 4, 6)
    if clock != "right":
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() - 3600)
    mirror, heard = begin(tmp_path / "b", address, keep=2)
    with mirror:
        for step in (5, 7):  # from a copy of checkpoint-4
            path = checkpoint(tmp_path / "b", step)
            mirror.add_checkpoint(RunDirectory(tmp_path / "b", RUN), path, None)
            arrives(heard, path)
    assert heard.warnings == []
    assert whole_at(address) == {"checkpoint-5", "checkpoint-7", "records"}
    assert fetched(tmp_path / "c", address)[0] == ["checkpoint-7"]


def test_two_sessions_of_a_run_at_once_keep_what_each_has_just_saved(tmp_path: Path, memory: str):
    sessions = [begin(tmp_path / name, memory, keep=1) for name in ("a", "b")]
    for step in (50, 60):  # its numbers are higher
        checkpoint(tmp_path / "a", step)
    with sessions[0][0], sessions[1][0]:
        for step in (2, 3, 4, 5):
            folder, (mirror, heard) = tmp_path / "ab"[step % 2], sessions[step % 2]
            path = checkpoint(folder, step)
            mirror.add_checkpoint(RunDirectory(folder, RUN), path, None)
            arrives(heard, path)
            assert whole_at(memory) == {path.name}
    assert not [line for _, heard in sessions for line in heard.warnings]


def test_a_run_whose_clock_is_behind_is_still_the_one_that_was_mirrored_last(
    tmp_path: Path, memory: str, monkeypatch
):
    mirrored(tmp_path / "a", memory, 90)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    mirror, _ = begin(tmp_path / "o", memory)
    with mirror:
        path = checkpoint(tmp_path / "o", 4, OTHER)
        mirror.add_checkpoint(RunDirectory(tmp_path / "o", OTHER), path, None)
    assert fetched(tmp_path / "b", memory)[0] == ["checkpoint-4"]


def test_old_checkpoints_go_as_they_do_here(tmp_path: Path, address: str):
    folder, run = tmp_path / "a", RunDirectory(tmp_path / "a", RUN)
    mirror, heard = begin(folder, address, keep=2)
    other, _ = begin(tmp_path / "o", address)
    with other:
        place = checkpoint(tmp_path / "o", 1, OTHER)
        other.add_checkpoint(RunDirectory(tmp_path / "o", OTHER), place, None)
    RemoteFolder(address).write(f"{RUN}/checkpoint-99/state.json", b"an upload that was cut")
    with mirror:
        for step in (2, 4, 6, 8, 10):
            path = checkpoint(folder, step)
            mirror.add_checkpoint(run, path, 4)
            prune_checkpoints(
                folder / "checkpoints",
                run=RUN,
                keep=2,
                protect=folder / "checkpoints" / "checkpoint-4",
                warn=heard.warning,
            )
            arrives(heard, path)
    names = RemoteFolder(address).names(RUN)
    here = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert [name for name in names if name != "records"] == here
    assert here == ["checkpoint-10", "checkpoint-4", "checkpoint-8"] and heard.warnings == []
    assert read_bundle(RemoteFolder(address), OTHER, "checkpoint-1").step == 1


# ------------------------------------------------------------------------ cut uploads, damage


def failing_after(count: int, how) -> mock._patch:
    """`RemoteFolder.put` and `write`: after so many files `how` happens, in the middle of the next one."""
    put, write, done = RemoteFolder.put, RemoteFolder.write, []

    def broken(kind, self, source, name):
        if len(done) == count:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            write(self, name, data[: len(data) // 2])
            how()
        done.append(name)
        kind(self, source, name)

    class Broken(RemoteFolder):
        def put(self, source: Path, name: str) -> None:
            broken(put, self, source, name)

        def write(self, name: str, data: bytes) -> None:
            broken(lambda s, d, n: write(s, n, d), self, data, name)

    return mock.patch.object(module, "RemoteFolder", Broken)


def gone() -> None:
    raise OSError("the line is cut")


def test_an_upload_that_is_cut_at_any_file_is_never_taken_for_whole(tmp_path: Path, memory: str):
    folder, run = tmp_path / "a", RunDirectory(tmp_path / "a", RUN)
    mirrored(folder, memory, 2)
    files = len(files_at(f"{memory}/{RUN}/checkpoint-2"))
    assert files >= 6
    for count in range(files):
        mirror, heard = begin(folder, memory)
        path = checkpoint(folder, 4)
        with failing_after(count, gone):
            mirror.add_checkpoint(run, path, None)
            until(lambda: heard.warnings)  # noqa: B023
        assert fetched(tmp_path / f"b{count}", memory)[0] == ["checkpoint-2"]
        shutil.rmtree(path)
        shutil.rmtree(folder / MIRRORING)  # as the lock of the next session does it
    mirrored(folder, memory, 4)
    assert fetched(tmp_path / "c", memory)[0] == ["checkpoint-4"]


def test_damaged_files_are_told_and_the_checkpoint_before_is_taken(tmp_path: Path, address: str):
    mirrored(tmp_path / "a", address, 2, 4)
    newest = [name for name in files_at(address) if "/checkpoint-4/" in name]
    own = [name for name in newest if name.count("/") == 2]
    whole, root = files_at(address), address
    assert len(own) >= 4
    for i, name in enumerate(own):
        damage(address, name)
        names, heard = fetched(tmp_path / f"b{i}", address)
        assert names == ["checkpoint-2"]
        told = (
            f"mirror: {name} is damaged; it is passed over"
            if name.endswith("mirror.json")
            else f"mirror: {name} is not what its manifest says; the checkpoint before it is looked for"
        )
        assert heard.warnings == [told]
        RemoteFolder(root).write(name, whole[name])
    assert fetched(tmp_path / "c", address)[0] == ["checkpoint-4"]


def test_a_damaged_manifest_of_a_best_model_is_told(tmp_path: Path, memory: str):
    mirrored(tmp_path / "a", memory, 4, best=3)
    damage(memory, f"{RUN}/best_model/mirror.json")
    names, heard = fetched(tmp_path / "b", memory)
    assert names == ["checkpoint-4"] and heard.warnings == [
        f"mirror: {RUN}/best_model/mirror.json is damaged; the best model is not carried"
    ]


def test_an_upload_that_was_cut_is_told(tmp_path: Path, address: str):
    for run in (RUN, OTHER):
        RemoteFolder(address).write(f"{run}/checkpoint-9/state.json", b"half")
    told = [
        f"mirror: {r}/checkpoint-9 is an upload that was cut; it is passed over"
        for r in (RUN, OTHER)
    ]
    names, heard = fetched(tmp_path / "b", address)
    assert names == heard.warnings == []
    assert heard.infos == [f"mirror {address}: there is no checkpoint yet", *told]
    mirrored(tmp_path / "o", address, 2)  # which removes what was cut of its run
    names, heard = fetched(tmp_path / "c", address)
    assert names == ["checkpoint-2"] and heard.infos[0] == told[1] and len(heard.infos) == 2


@pytest.mark.parametrize("file", ["state.json", "mirror.json"])
def test_no_other_run_takes_the_place_of_a_damaged_one(tmp_path: Path, address: str, file: str):
    mirror, _ = begin(tmp_path / "o", address)
    with mirror:
        path = checkpoint(tmp_path / "o", 90, OTHER)
        mirror.add_checkpoint(RunDirectory(tmp_path / "o", OTHER), path, None)
    mirrored(tmp_path / "a", address, 2, 4)
    for step in (4, 2):
        damage(address, f"{RUN}/checkpoint-{step}/{file}")
    with pytest.raises(RunStopped, match=f"remove {RUN}.* there") as error:
        fetched(tmp_path / "b", address)
    assert "start without --resume" in str(error.value)
    assert not list((tmp_path / "b").glob("checkpoints/*"))
    assert fetched(tmp_path / "c", address, OTHER)[0] == ["checkpoint-90"]
    RemoteFolder(address).remove(RUN)  # as the message says
    assert fetched(tmp_path / "d", address)[0] == ["checkpoint-90"]


def test_a_damaged_manifest_may_be_that_of_the_newest(tmp_path: Path, memory: str):
    """Of which run, so, is not known; but where its own run is the newest anyway, it is passed over."""
    mirrored(tmp_path / "a", memory, 2, 4)
    mirror, _ = begin(tmp_path / "o", memory)
    with mirror:
        path = checkpoint(tmp_path / "o", 90, OTHER)
        mirror.add_checkpoint(RunDirectory(tmp_path / "o", OTHER), path, None)
    damage(memory, f"{RUN}/checkpoint-4/mirror.json")
    with pytest.raises(RunStopped, match=f"{RUN}/checkpoint-4/mirror.json is damaged"):
        fetched(tmp_path / "b", memory)
    names, heard = fetched(tmp_path / "c", memory, RUN)
    assert names == ["checkpoint-2"] and len(heard.warnings) == 1


def test_what_is_damaged_is_not_removed(tmp_path: Path, memory: str):
    """As here: its tensors may still be of use to somebody."""
    mirrored(tmp_path / "a", memory, 2)
    damage(memory, f"{RUN}/checkpoint-2/mirror.json")
    mirror, _ = begin(tmp_path / "a", memory, keep=1)
    with mirror:
        path = checkpoint(tmp_path / "a", 4)
        mirror.add_checkpoint(RunDirectory(tmp_path / "a", RUN), path, None)
    assert RemoteFolder(memory).names(RUN) == ["checkpoint-2", "checkpoint-4", "records"]


def test_damaged_records_and_best_models_are_left_behind_and_told(tmp_path: Path, memory: str):
    mirrored(tmp_path / "a", memory, 4, best=3)
    damage(memory, f"{RUN}/checkpoint-4/training_logs/metrics.jsonl")
    damage(memory, f"{RUN}/best_model/weights")
    names, heard = fetched(tmp_path / "b", memory)
    assert names == ["checkpoint-4"] and len(heard.warnings) == 2
    assert "curves of the run until step 4 are not carried" in heard.warnings[0]
    assert "the best model is not carried" in heard.warnings[1]
    assert not (tmp_path / "b" / "training_logs" / RUN).exists()
    assert not (tmp_path / "b" / "earlier_models" / RUN / "best_model").exists()


def test_the_best_model_of_another_step_is_not_carried(tmp_path: Path, memory: str):
    mirrored(tmp_path / "a", memory, 4, best=3)
    mirror, heard = begin(tmp_path / "a", memory)
    with mirror:
        place = best_model(tmp_path / "a", 6)
        mirror.add_model(RunDirectory(tmp_path / "a", RUN), place, 6)
    names, heard = fetched(tmp_path / "b", memory)
    assert names == ["checkpoint-4"]
    assert "best_model, of step 3, is not at the mirror: not carried" in heard.infos
    assert not (tmp_path / "b" / "earlier_models").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../../evil",
        "/etc/evil",
        "a/../evil",
        "a/b/c",
        "",
        ".",
        "..",
        "a//b",
        "C:evil",
        "a\\b",
        "a\0",
    ],
)
def test_names_that_lead_elsewhere_are_no_bundle(memory: str, name: str):
    entry = {"bytes": 0, "sha256": ""}
    about = {"run": RUN, "name": "checkpoint-1", "step": 1, "at": 1.0}
    for files, taken in (
        ({"state.json": entry}, True),
        ({"state.json": entry, name: entry}, False),
    ):
        data = sealed_json({"format": FORMAT, **about, "files": files})
        RemoteFolder(memory).write(f"{RUN}/checkpoint-1/mirror.json", data)
        assert bool(read_bundle(RemoteFolder(memory), RUN, "checkpoint-1")) == taken
    RemoteFolder(memory).write(f"{RUN}/checkpoint-2/mirror.json", data)
    assert read_bundle(RemoteFolder(memory), RUN, "checkpoint-2") is None


# ------------------------------------------------------------------------ targets that are away


def test_a_target_that_is_away_is_told_once_and_tried_at_the_next_save(tmp_path: Path):
    place, folder = tmp_path / "mirror", tmp_path / "a"
    place.write_text("a file, not a folder", encoding="utf-8")
    mirror, heard = begin(folder, str(place))
    run = RunDirectory(folder, RUN)
    with mirror:
        for step in (2, 4, 6):
            if step == 6:
                place.unlink()
            mirror.add_checkpoint(run, checkpoint(folder, step), None)
            until(lambda: mirror._rests or heard.infos)
    assert len(heard.warnings) == 1 and heard.warnings[0].startswith(f"mirror {place}: ")
    assert sorted(path.name for path in (place / RUN).iterdir()) == ["checkpoint-6", "records"]
    assert not (folder / MIRRORING).exists()


def test_what_was_saved_during_an_upload_that_fails_is_tried_at_once(tmp_path: Path, memory: str):
    folder, go_on, put, tries = tmp_path / "a", threading.Event(), RemoteFolder.put, []

    def fails_once(*arguments: object) -> None:
        go_on.wait(10)
        tries.append(arguments)
        if len(tries) == 1:
            raise OSError("the line is cut")
        put(*arguments)

    mirror, heard = begin(folder, memory)
    run = RunDirectory(folder, RUN)
    with mock.patch.object(RemoteFolder, "put", fails_once), mirror:
        mirror.add_checkpoint(run, checkpoint(folder, 2), None)
        until(lambda: not mirror._waiting)
        mirror.add_checkpoint(run, checkpoint(folder, 4), None)
        go_on.set()
        until(lambda: heard.infos)
    assert [line.split()[1] for line in heard.infos] == ["checkpoint-4", "records"]
    assert len(heard.warnings) == 1


@pytest.mark.parametrize("broken", ["best_model", "checkpoint"])
def test_what_always_fails_is_told_once_and_blocks_nothing_else(
    tmp_path: Path, memory: str, broken: str
):
    put = RemoteFolder.put

    def refuses(self: RemoteFolder, source: Path, name: str) -> None:
        if f"/{broken}" in name:
            raise OSError("too large for this place")
        put(self, source, name)

    mirror, heard = begin(tmp_path / "a", memory)
    run = RunDirectory(tmp_path / "a", RUN)
    with mock.patch.object(RemoteFolder, "put", refuses), mirror:
        for step in (2, 4):
            mirror.add_model(run, best_model(tmp_path / "a", step), step)
            mirror.add_checkpoint(run, checkpoint(tmp_path / "a", step), None)
            until(lambda: not mirror._due() and len(heard.infos) >= step // 2)  # noqa: B023
    whole = {"best_model": {"checkpoint-2", "checkpoint-4"}, "checkpoint": {"best_model"}}
    assert whole_at(memory) == {*whole[broken], "records"}
    assert len(heard.warnings) == 1 and "too large for this place" in heard.warnings[0]
    assert f"mirror {memory}: {broken}" in heard.warnings[0]


def test_a_folder_of_others_that_can_not_be_read_holds_up_no_upload(tmp_path: Path, memory: str):
    RemoteFolder(memory).write(f"{OTHER}/checkpoint-1/mirror.json", b"of somebody else")
    names = RemoteFolder.names

    def refuses(self: RemoteFolder, folder: str = "") -> list[str]:
        if folder == OTHER:
            raise PermissionError("not yours")
        return names(self, folder)

    with mock.patch.object(RemoteFolder, "names", refuses):
        mirrored(tmp_path / "a", memory, 2)
    assert whole_at(memory) == {"checkpoint-2", "records"}


def test_a_disk_that_is_unmounted_meanwhile_is_a_target_that_is_away(tmp_path: Path):
    """What is written into its empty place fills another disk and is no copy elsewhere."""
    place, run = tmp_path / "disk" / "mirror", RunDirectory(tmp_path / "a", RUN)
    mirror, heard = begin(tmp_path / "a", str(place))
    with mirror:
        for step in (2, 4, 6):
            if step == 4:
                place.rename(tmp_path / "elsewhere")
            if step == 6:
                (tmp_path / "elsewhere").rename(place)
            mirror.add_checkpoint(run, checkpoint(tmp_path / "a", step), None)
            until(lambda: not mirror._due() and len(heard.infos + heard.warnings) == step // 2)  # noqa: B023
    assert len(heard.warnings) == 1 and "no such folder" in heard.warnings[0]
    assert whole_at(str(place)) == {"checkpoint-2", "checkpoint-6", "records"}


def test_old_checkpoints_that_stay_are_told_and_the_new_one_is_there(tmp_path: Path, memory: str):
    mirror, heard = begin(tmp_path / "a", memory, keep=1)
    run, remove = RunDirectory(tmp_path / "a", RUN), RemoteFolder.remove

    def refuses(self: RemoteFolder, folder: str) -> None:
        if folder.endswith("checkpoint-2") and "mirror.json" in self.names(folder):
            raise PermissionError("not yours")
        remove(self, folder)

    with mock.patch.object(RemoteFolder, "remove", refuses), mirror:
        for step in (2, 4, 6, 8):
            path = checkpoint(tmp_path / "a", step)
            mirror.add_checkpoint(run, path, None)
            until(lambda: f"mirrored {path.name} to {memory}" in heard.infos)  # noqa: B023
    assert len(heard.warnings) == 1 and "old checkpoints can't be removed" in heard.warnings[0]
    assert whole_at(memory) == {"checkpoint-2", "checkpoint-8", "records"}
    assert fetched(tmp_path / "b", memory)[0] == ["checkpoint-8"]


def test_of_what_waits_for_a_slow_target_the_newest_goes(tmp_path: Path, memory: str):
    folder, go_on, put = tmp_path / "a", threading.Event(), RemoteFolder.put
    mirror, heard = begin(folder, memory)
    run = RunDirectory(folder, RUN)
    with mock.patch.object(RemoteFolder, "put", lambda *a: (go_on.wait(10), put(*a))), mirror:
        for step in (2, 4, 6, 8):
            path = checkpoint(folder, step)
            mirror.add_checkpoint(run, path, None)
            until(lambda: len(mirror._waiting) == (step > 2))  # noqa: B023
            shutil.rmtree(path)  # the run removes its own as it likes
        assert len(list((folder / MIRRORING).iterdir())) == 2
        go_on.set()
    assert [line.split()[1] for line in heard.infos] == ["checkpoint-2", "checkpoint-8", "records"]


def test_a_target_that_hangs_is_left(tmp_path: Path, memory: str, monkeypatch):
    monkeypatch.setattr(module, "MIRROR_END", replace(MIRROR_END, limit=0.2))
    go_on, begun = threading.Event(), time.monotonic()
    mirror, heard = begin(tmp_path / "a", memory)
    with mock.patch.object(RemoteFolder, "put", lambda *a: go_on.wait(20)):
        with mirror:
            path = checkpoint(tmp_path / "a", 2)
            mirror.add_checkpoint(RunDirectory(tmp_path / "a", RUN), path, None)
        assert 0.15 < time.monotonic() - begun < 5
        assert heard.warnings == [f"mirror {memory}: the last upload was not done and is left"]
        go_on.set()


def test_a_second_signal_waits_for_nothing(tmp_path: Path, memory: str):
    go_on, begun = threading.Event(), time.monotonic()
    mirror, _ = begin(tmp_path / "a", memory)
    with mock.patch.object(RemoteFolder, "put", lambda *a: go_on.wait(20)):
        with pytest.raises(KeyboardInterrupt), mirror:
            path = checkpoint(tmp_path / "a", 2)
            mirror.add_checkpoint(RunDirectory(tmp_path / "a", RUN), path, None)
            raise KeyboardInterrupt
        assert time.monotonic() - begun < 5
        go_on.set()


@pytest.mark.parametrize("before", ["", "SIGUSR1"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_wait_and_not_the_run(
    tmp_path: Path, memory: str, monkeypatch, before: str, name: str
):
    """Also one after that which has ended the run: what was saved is on its way then."""
    monkeypatch.setattr(StopSignal, "AGAIN_SECONDS", 0.05)
    go_on, heard, stop = threading.Event(), Heard(), StopSignal()
    mirror = Mirror(output(tmp_path / "a", memory), heard, stop.at_once, is_main=True)
    number = getattr(signal, name)
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident, number))
    with mock.patch.object(RemoteFolder, "put", lambda *a: go_on.wait(20)), stop:
        stop.wait_for_loop()
        if before:
            os.kill(os.getpid(), getattr(signal, before))
        with mirror:
            path = checkpoint(tmp_path / "a", 2)
            mirror.add_checkpoint(RunDirectory(tmp_path / "a", RUN), path, None)
            timer.start()
            begun = time.monotonic()
        assert 0.2 < time.monotonic() - begun < 5 and stop.name == (before or name)
        assert heard.warnings == [f"mirror {memory}: the last upload was not done and is left"]
        go_on.set()


def test_a_disk_without_links_gets_copies(tmp_path: Path, memory: str):
    with mock.patch("os.link", side_effect=OSError("not supported")):
        mirrored(tmp_path / "a", memory, 2)
    assert fetched(tmp_path / "b", memory)[0] == ["checkpoint-2"]


def test_a_full_disk_harms_no_run(tmp_path: Path, memory: str):
    mirror, heard = begin(tmp_path / "a", memory)
    path, full = checkpoint(tmp_path / "a", 2), OSError(28, "No space left on device")
    with (
        mock.patch("os.link", side_effect=full),
        mock.patch("shutil.copyfile", side_effect=full),
        mirror,
    ):
        mirror.add_checkpoint(RunDirectory(tmp_path / "a", RUN), path, None)
    (told,) = heard.warnings
    assert told == (
        f"checkpoint-2 can't be held in {tmp_path / 'a' / MIRRORING} until it is mirrored (No space left on "
        "device); the run goes on, and the next save tries again"
    )


def test_what_was_held_by_half_goes_at_once(tmp_path: Path, memory: str):
    """On a disk that is full it takes the place of what is saved next."""
    mirror, heard = begin(tmp_path / "a", memory)
    run, copies = RunDirectory(tmp_path / "a", RUN), []

    def fills(source: Path, target: Path) -> None:
        copies.append(target)
        Path(target).write_bytes(Path(source).read_bytes()[:9])
        if len(copies) == 3:
            raise OSError(28, "No space left on device")

    with (
        mock.patch("os.link", side_effect=OSError("not supported")),
        mock.patch("shutil.copyfile", fills),
    ):
        mirror.add_checkpoint(run, checkpoint(tmp_path / "a", 2), None)
    assert len(copies) == 3 and len(heard.warnings) == 1
    assert list((tmp_path / "a" / MIRRORING).iterdir()) == []
    with mirror:
        path = checkpoint(tmp_path / "a", 4)
        mirror.add_checkpoint(run, path, None)
        until(lambda: heard.infos)
    assert whole_at(memory) == {"checkpoint-4", "records"} and len(heard.warnings) == 1


def test_a_disk_that_is_full_where_a_checkpoint_comes_to_is_not_the_mirrors_fault(
    tmp_path: Path, memory: str
):
    mirrored(tmp_path / "a", memory, 2)
    for fault, blamed in (
        (OSError(28, "No space left"), "output_dir"),
        (PermissionError(13, "not yours", str(tmp_path / "b" / "checkpoints")), "output_dir"),
        (PermissionError(13, "not yours", str(tmp_path / "bucket")), "mirror"),
    ):
        told = pytest.raises(RunStopped, match=rf"^{blamed} .*{fault.strerror}")
        broken = mock.patch.object(RemoteFolder, "get", side_effect=fault)
        with broken, told, disk_faults_stop_the_run(tmp_path / "b"):
            fetched(tmp_path / "b", memory)
    assert [p for p in (tmp_path / "b").rglob("*") if p.is_file()] == []


def test_a_mirror_that_can_not_be_read_stops_a_resume(tmp_path: Path, memory: str):
    """A fresh start would leave the run behind that lies there."""
    mirror, _ = begin(tmp_path / "a", memory)
    broken = mock.patch.object(RemoteFolder, "names", side_effect=OSError("no route"))
    with broken, pytest.raises(RunStopped, match=r"can't be read \(OSError: no route\)"):
        mirror.fetch(None)


# ------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    "address",
    ["out", "out/", "out/copy", ".", "..", "link", "link/copy", "x/../out", "file://{}/out/copy"],
)
def test_a_mirror_within_the_output_or_around_it_is_refused(
    tmp_path: Path, run, capfd, monkeypatch, address: str
):
    """A copy that would copy itself, or that goes with what it is a copy of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    begun = time.monotonic()
    assert run(tmp_path, "--mirror", address.format(tmp_path)) == 2
    assert time.monotonic() - begun < 5 and not (tmp_path / "out").exists()
    printed = capfd.readouterr().err
    assert printed.startswith("error: mirror ") and printed.count("\n") == 1
    assert "give the mirror a place of its own" in printed
    chained = f"simplecache::file://{tmp_path}/out"
    with pytest.raises(UserError):
        check_address(chained, "mirror", output_dir="out")


def test_a_mirror_beside_the_output_is_taken(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_address(f"simplecache::memory://{tmp_path.name}", "mirror", output_dir=".")
    out = str(tmp_path / "out")
    for address in (tmp_path / "outer", tmp_path / "o", f"memory://{out}", f"file://{out}2"):
        check_address(str(address), "mirror", output_dir=out)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"s3://me:{SECRETS[0]}/{SECRETS[1]}@bucket/x", "s3://bucket/x"),
        (f"memory://bucket/x?sig={SECRETS[0]}#{SECRETS[1]}", "memory://bucket/x"),
        (f"ftp://me:a?b#{SECRETS[0]}@host/x", "ftp://host/x"),
        (f"s3://bucket/x#{SECRETS[0]}@{SECRETS[1]}", "s3://[redacted]"),
        (f"s3://bucket:99#{SECRETS[0]}@{SECRETS[1]}", "s3://[redacted]"),
        (f"s3://bucket/x@y/z?{SECRETS[0]}@{SECRETS[1]}", "s3://[redacted]"),
        ("s3://bucket/x@y/z", "s3://y/z"),
        ("/data/mirror", "/data/mirror"),
    ],
)
def test_what_is_shown_of_an_address(address: str, shown: str):
    assert shown_address(address) == shown
    hidden = " ".join(hidden_parts(address))
    assert all((secret in address) == (secret in hidden) for secret in SECRETS)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/x", "mirror s3://: Install s3fs to access S3; install what it takes"),
        (f"nosuch://me:{SECRETS[0]}@x", "mirror nosuch://: Protocol not known: nosuch; "),
    ],
)
def test_a_package_that_is_missing_is_named_at_once(tmp_path: Path, run, capfd, address, said):
    begun = time.monotonic()
    assert run(tmp_path, "--mirror", address) == 2
    assert time.monotonic() - begun < 5 and not (tmp_path / "out").exists()
    printed = capfd.readouterr().err
    assert printed.startswith(f"error: {said}") and printed.count("\n") == 1
    assert SECRETS[0] not in printed
    with pytest.raises(UserError):
        check_address(address, "mirror")


@pytest.mark.parametrize(
    "address", ["memory://place/x#ab+cd/ef==", "memory://place/x?s=ab%2Bcd/ef=="]
)
def test_no_fragment_of_a_secret_is_in_what_goes_wrong(tmp_path: Path, address: str):
    """A library names the folder above a file: half a secret, where that has a slash."""
    mirror, heard = begin(tmp_path / "a", address)
    root = fsspec.core.url_to_fs(address)[1]
    for place in (root, root.rpartition("/")[0], root.replace("%2B", "+"), root[:-3]):
        mirror._failing.clear()
        mirror._fail("checkpoint", f"FileNotFoundError: {place}: no such folder")
        with pytest.raises(RunStopped) as error, mirror._faults_stop_the_run():
            raise FileNotFoundError(f"{place}: no such folder")
        for told in (heard.warnings.pop(), str(error.value)):
            assert "no such folder" in told and "memory://place/x" in told
            assert not [piece for piece in ("ab+c", "ab%2", "cd/e", "/ef=") if piece in told]
        mirror._goes_well("checkpoint")


@pytest.mark.slow
def test_no_secret_of_an_address_is_in_what_a_run_leaves(tmp_path: Path, run, capfd, monkeypatch):
    address = f"memory://me:{SECRETS[0]}@{tmp_path.name}?sig={SECRETS[1]}"
    monkeypatch.setattr(
        RemoteFolder, "put", mock.Mock(side_effect=OSError(f"no {address} and no {SECRETS[1]}"))
    )
    few = ("--max-steps", "2", "--save-steps", "1")
    assert run(tmp_path, *few, "--mirror", address) == 0
    printed = capfd.readouterr()
    written = contents(tmp_path / "out")
    holders = [n for n, data in written.items() for s in SECRETS if s.encode() in data]
    assert len(written) > 10 and holders == []
    assert not [s for s in SECRETS if s in printed.out + printed.err]
    assert (printed.out + printed.err).count("warning: mirror memory://") == 1
    (settings_,) = (data for n, data in written.items() if n.endswith("/configuration.json"))
    assert json.loads(settings_)["config"]["mirror"] == f"memory://{tmp_path.name}"


# ------------------------------------------------------------------------ whole runs


CURVES = ("Training/Loss", "Eval/Loss", "Training/Gradient_Norm")
Outcome = tuple[dict, dict, dict, dict]


def outcome(folder: Path) -> Outcome:
    """The final tensors, AdamW's, and the curves of metrics.jsonl and of the events, point after point."""
    (metrics,) = folder.glob("training_logs/*/metrics.jsonl")
    (events,) = folder.glob("tensorboard_logs/*")
    rows = [(row["step"], row["metrics"]) for row in read_metrics(metrics)]
    lines = {n: [(step, row[n]) for step, row in rows if n in row] for n in CURVES}
    shown = read_run(events)
    adapter = load_file(folder / "final_model" / "adapter_model.safetensors")
    moments = load_file(folder / "checkpoints" / "checkpoint-6" / "optimizer.safetensors")
    return adapter, moments, lines, {n: shown[n] for n in CURVES}


def same(one: Outcome, other: Outcome) -> bool:
    assert [step for step, _ in one[3]["Training/Loss"]] == [1, 2, 3, 4, 5, 6]
    tensors = zip(one[:2], other[:2], strict=True)
    equal = all(
        a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in tensors
    )
    return equal and one[2:] == other[2:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model: Path, cache_dir: Path) -> Outcome:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(settings(folder, tiny_model, cache_dir, max_steps=6, save_steps=2), folder)
    return outcome(folder / "out")


@pytest.mark.slow
def test_a_run_goes_on_from_the_mirror_to_the_last_bit(
    tmp_path: Path, memory: str, tiny_model, cache_dir, uninterrupted
):
    config = settings(tmp_path, tiny_model, cache_dir, max_steps=6, save_steps=2, mirror=memory)
    train(config, tmp_path, before_update=stop_at(3))
    shutil.rmtree(tmp_path / "out")
    train(config, tmp_path, resume="latest")
    assert same(outcome(tmp_path / "out"), uninterrupted)
    assert (tmp_path / "out" / "best_model").is_dir()


def train_until(count: int, *arguments: object, **session: object) -> None:
    """A session that is killed in the middle of the upload of its `count`-th file."""
    with failing_after(count, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        train(*arguments, **session)


@pytest.mark.slow
def test_a_signal_to_a_run_that_waits_for_its_mirror(
    tmp_path: Path, run, memory: str, capfd, monkeypatch
):
    """The run is done, and its end no ten minutes away."""

    class Limit:
        @property
        def limit(self) -> int:
            """Asked when the wait begins."""
            process = os.getpid()
            threading.Timer(0.5, lambda: os.kill(process, signal.SIGTERM)).start()
            return MIRROR_END.limit

    go_on = threading.Event()
    monkeypatch.setattr(module, "MIRROR_END", Limit())
    monkeypatch.setattr(RemoteFolder, "put", lambda *a: go_on.wait(60))
    begun = time.monotonic()
    assert run(tmp_path, "--max-steps", "2", "--mirror", memory) == 0
    assert time.monotonic() - begun < 50
    go_on.set()
    printed = capfd.readouterr()
    told = f"warning: mirror {memory}: the last upload was not done and is left"
    assert told in " ".join((printed.out + printed.err).split())
    (status,) = (tmp_path / "out").glob("training_logs/*/status.json")
    assert json.loads(status.read_text())["status"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("count", [11, 30])
def test_a_kill_in_the_middle_of_an_upload(
    tmp_path: Path, tiny_model, cache_dir, uninterrupted, count: int
):
    place = str(tmp_path / "mirror")
    config = settings(tmp_path, tiny_model, cache_dir, max_steps=6, save_steps=2, mirror=place)
    (ended,) = on_ranks(0, partial(train_until, count, config, tmp_path))
    assert ended.exit_code == -signal.SIGKILL
    (run,) = find_runs([tmp_path / "out"])
    assert read_recorded(run).status["status"] == "killed"
    assert bool(whole_at(place)) == (count > 20)
    shutil.rmtree(tmp_path / "out")
    train(config, tmp_path, resume="auto")
    assert same(outcome(tmp_path / "out"), uninterrupted)


@pytest.mark.slow
def test_of_two_ranks_the_first_mirrors(tmp_path: Path, tiny_model, cache_dir):
    place = str(tmp_path / "mirror")
    config = settings(tmp_path, tiny_model, cache_dir, max_steps=4, save_steps=2, mirror=place)
    results_of(train_on_ranks(2, config, tmp_path, before_update=stop_at(2)))
    shutil.rmtree(tmp_path / "out")
    sessions = results_of(train_on_ranks(2, config, tmp_path, resume="auto"))
    assert len(sessions[0].updates) == len(sessions[1].updates) < 4
    assert {"best_model", "checkpoint-4", "final_model", "records"} <= whole_at(place)
