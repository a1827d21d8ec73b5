"""One run, one writer; a directory that can't be written is refused at once; how a run ended is written.

uv run pytest -m "not long" tests/runs/test_directory.py
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from finetuning.common.errors import RunStopped, UserError
from finetuning.runs import directory
from finetuning.runs.directory import (
    RunDirectory,
    check_writable,
    disk_faults_stop_the_run,
    is_abandoned,
    known_run,
    lock_output,
    new_run,
    only_writer,
    own_models,
    shared_run,
)

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from finetuning.runs.directory import lock_output
lock = lock_output(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def other_owner(output_dir: Path):
    """A process that holds the lock of `output_dir`."""
    command = [sys.executable, "-c", HOLDER, str(output_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_live_owner_is_respected_and_a_dead_one_leaves_nothing(tmp_path: Path):
    with other_owner(tmp_path) as owner:
        with pytest.raises(UserError, match="another run is writing there"):
            lock_output(tmp_path)
        assert not is_abandoned(tmp_path)
        owner.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        owner.wait()
        assert is_abandoned(tmp_path)
        lock_output(tmp_path).release()


def test_the_lock_is_free_after_release(tmp_path: Path):
    lock_output(tmp_path).release()
    lock_output(tmp_path).release()


def test_who_looks_at_a_lock_stops_nobody_and_leaves_nothing(tmp_path: Path):
    """Files that were copied have none: whether their run is at work can't be seen."""
    assert not is_abandoned(tmp_path) and not list(tmp_path.iterdir())
    with only_writer(tmp_path, is_main=True):
        assert not is_abandoned(tmp_path)
    looking = FileLock(tmp_path / directory.LOCK_NAME, thread_local=False)
    with looking.acquire(timeout=0):
        threading.Timer(directory.TO_LOOK / 4, looking.release).start()
        lock_output(tmp_path).release()


@pytest.mark.slow
def test_what_a_dead_owner_left_half_written_goes(tmp_path: Path):
    logs = tmp_path / "training_logs" / "qwen3_4b_thinking_x"
    logs.mkdir(parents=True)
    (tmp_path / "final_model").mkdir()
    for path in (
        logs / ".status.json.abc.tmp",
        tmp_path / "final_model" / ".curves.png.tmp",
        tmp_path / ".probe-7",
        tmp_path / ".training_statistics.json.q.tmp",
    ):
        path.write_text("half")
    (tmp_path / ".final_model-12").mkdir()
    (tmp_path / ".best_model-old-12").mkdir()
    (tmp_path / ".best_model-old-12" / "weights").write_text("good")
    (logs / "status.json").write_text("{}")
    (tmp_path / ".mine").write_text("not ours")
    lock_output(tmp_path).release()
    assert {p.name for p in logs.iterdir()} == {"status.json"}
    # The old model had been put aside and the new one was not in its place yet.
    assert (tmp_path / "best_model" / "weights").read_text() == "good"
    left = {p.name for p in tmp_path.iterdir()}
    assert not list((tmp_path / "final_model").iterdir())
    assert left - {directory.LOCK_NAME} == {".mine", "best_model", "final_model", "training_logs"}


@pytest.mark.slow
def test_nothing_is_removed_while_the_owner_lives(tmp_path: Path):
    with other_owner(tmp_path):
        (tmp_path / ".final_model-12").mkdir()
        with pytest.raises(UserError):
            lock_output(tmp_path)
        assert (tmp_path / ".final_model-12").is_dir()


def start(output_dir: str) -> str:
    directory.time.strftime = lambda form: "20260101_120000"
    return new_run(Path(output_dir)).name


@pytest.mark.slow
def test_starts_in_one_second_get_directories_of_their_own(tmp_path: Path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        names = pool.map(start, [str(tmp_path)] * 12)
    assert len(set(names)) == 12
    assert all((tmp_path / "training_logs" / name).is_dir() for name in names)


def test_a_file_in_the_way_is_refused(tmp_path: Path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="can't be written"):
        lock_output(tmp_path / "out")


def as_nobody(tmp_path: Path, call: str) -> subprocess.CompletedProcess:
    """Run `call` on `tmp_path` as a user who may read it only."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to become a user without rights")
    code = f"""
from finetuning.common.errors import RunStopped, UserError
from pathlib import Path
from finetuning.runs.directory import *
try:
    {call}
except UserError as error:
    print("refused:", error)
"""
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
    environment = {**os.environ, "OUT": str(tmp_path)}
    return subprocess.run(
        [*command, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def open_for_reading(tmp_path: Path) -> Path:
    """A directory of root's, below directories that anybody may enter."""
    folder = tmp_path / "of_root"
    folder.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == "root" and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("call", ["lock_output(Path({}))", "check_writable(Path({}), 1)"])
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, call: str):
    folder = open_for_reading(tmp_path)
    done = as_nobody(tmp_path, call.format(repr(str(folder))))
    if "No module named" in done.stderr or "Permission denied" in done.stderr.split("\n")[0]:
        pytest.skip(f"that user can't run this Python here: {done.stderr.strip()[-200:]}")
    assert done.stdout.startswith("refused:") and "can't be written" in done.stdout, done
    assert "Permission denied" in done.stdout


@contextlib.contextmanager
def mounted(target: Path, *options: str):
    """A mount, or a skip where this user may not."""
    command = ["mount", *options, str(target)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.slow
def test_a_read_only_disk_is_refused(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    with mounted(out, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        for refused in (lambda: lock_output(out), lambda: check_writable(out, 1)):
            with pytest.raises(UserError, match="Read-only file system"):
                refused()


@pytest.mark.slow
def test_too_small_a_disk_is_refused_and_no_probe_is_left(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    with mounted(out, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        check_writable(out, 100_000)
        with pytest.raises(UserError, match="1 MB free, about 50 MB needed"):
            check_writable(out, 50_000_000)
        assert list(out.iterdir()) == []


def test_status_is_strict_json_and_says_how_it_ended(tmp_path: Path):
    run = new_run(tmp_path)
    run.write_status("running", step=3)
    run.write_status("preempted", step=7, signal="SIGTERM", loss=float("nan"))
    text = (run.logs / "status.json").read_text()
    status = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (status["status"], status["step"], status["signal"]) == ("preempted", 7, "SIGTERM")
    assert status["loss"] is None and "T" in status["at"]
    assert [p.name for p in run.logs.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    "name", ["../elsewhere", "", "checkpoints", "/etc", "qwen3_4b_thinking_/x"]
)
def test_the_name_of_a_resumed_run_leads_nowhere_else(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="not the name of a run"):
        known_run(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_everything_lies_below_the_output_directory(tmp_path: Path):
    run = RunDirectory(tmp_path, "qwen3_4b_thinking_1")
    paths = (
        run.tensorboard,
        run.logs,
        run.final_model,
        run.best_model,
        run.statistics,
    )
    assert all(path.is_relative_to(tmp_path) for path in paths) and len(set(paths)) == 5


def models(output_dir: Path) -> dict[str, str]:
    """Where saved models lie, and what is in them."""
    paths = sorted(output_dir.glob("**/weights"))
    return {str(p.parent.relative_to(output_dir)): p.read_text() for p in paths}


def save_model(run: RunDirectory, place: Path, weights: str) -> None:
    place.mkdir(parents=True)
    (place / "weights").write_text(weights)
    (place / directory.RUN_NAME).write_text(f"{run.name}\n")


def test_models_of_an_earlier_run_are_put_aside_and_come_back_with_it(tmp_path: Path):
    one, two = (RunDirectory(tmp_path, f"qwen3_4b_thinking_{n}") for n in "12")
    assert own_models(one) == []
    save_model(one, one.final_model, "1 final")
    save_model(one, one.best_model, "1 best")
    assert own_models(one) == [], "resumed"
    aside = tmp_path / "earlier_models" / one.name
    assert own_models(two) == [aside / "final_model", aside / "best_model"]
    save_model(two, two.final_model, "2 final")  # and none that was better than before it
    assert models(tmp_path) == {
        f"earlier_models/{one.name}/best_model": "1 best",
        f"earlier_models/{one.name}/final_model": "1 final",
        "final_model": "2 final",
    }
    own_models(one)
    assert models(tmp_path) == {
        "best_model": "1 best",
        "final_model": "1 final",
        f"earlier_models/{two.name}/final_model": "2 final",
    }


@pytest.mark.parametrize("note", ["", "../../elsewhere", "qwen3_4b_thinking_/x", "my own"])
def test_a_model_that_no_run_has_left_stays(tmp_path: Path, note: str):
    mine = tmp_path / "best_model"
    mine.mkdir()
    (mine / directory.RUN_NAME).write_text(note)
    assert own_models(RunDirectory(tmp_path, "qwen3_4b_thinking_1")) == [] and mine.is_dir()


def test_a_disk_that_fails_stops_the_run_with_its_reason(tmp_path: Path):
    with (
        pytest.raises(RunStopped, match=r"No such file.*--resume latest"),
        disk_faults_stop_the_run(tmp_path),
    ):
        (tmp_path / "gone" / "x").write_text("")
    with pytest.raises(ValueError), disk_faults_stop_the_run(tmp_path):
        raise ValueError("another fault is not the disk's")


def test_a_node_without_the_common_file_system_is_refused(tmp_path):
    run = new_run(tmp_path / "rank-0")
    assert shared_run(tmp_path / "rank-0", run.name) == run
    (tmp_path / "rank-1").mkdir()
    with pytest.raises(UserError, match="not the one that rank 0 writes to"):
        shared_run(tmp_path / "rank-1", run.name, patience=0.3)
    assert not list((tmp_path / "rank-1").iterdir())
