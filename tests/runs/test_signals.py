"""A signal is obeyed wherever a run is: it saves what there is, ends, and goes on as if nothing had been.

uv run pytest -m "not long" tests/runs/test_signals.py
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finetuning.events.reading import read_metrics
from finetuning.runs.record import RunRecord
from finetuning.training import checkpoint_manager
from tests.helpers.ranks import TORCHRUN
from tests.helpers.read_events import read_texts
from tests.helpers.tiny_model import FAST

ROOT = Path(__file__).parents[2]
PROBES = ("--num-probes", "1", "--probe-max-new-tokens", "8")
TIMES = (
    *("Seconds", "Per_Second", "System/", "Memory/", "Duration", "Resume_Count"),
    *("Evaluation_Percent", "Saving_Percent", "Logging_Percent", "Overhead_Percent"),
)


def send(name: str = "SIGTERM") -> None:
    os.kill(os.getpid(), getattr(signal, name))


def at_call(number: int, monkeypatch: pytest.MonkeyPatch, place: str, name: str) -> list[int]:
    """A real signal at the n-th call of a function; the list counts the calls."""
    calls: list[int] = []
    real = _resolved(place)

    def called(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == number:
            send(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(place, called)
    return calls


def _resolved(place: str) -> Callable:
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


def logs_of(tmp_path: Path) -> Path:
    (logs,) = (tmp_path / "out" / "training_logs").iterdir()
    return logs


def status_of(tmp_path: Path) -> dict:
    return json.loads((logs_of(tmp_path) / "status.json").read_text(encoding="utf-8"))


def numbers(output_dir: Path) -> dict[tuple[int, str], float]:
    """Every number of a run that is no time, by step and tag."""
    (logs,) = (output_dir / "training_logs").iterdir()
    return {
        (record["step"], tag): value
        for record in read_metrics(logs / "metrics.jsonl")
        for tag, value in record["metrics"].items()
        if not any(word in tag for word in TIMES) and not tag.startswith(("LoRA/", "Final_"))
    }


@pytest.mark.slow
def test_within_an_evaluation_it_leaves_and_the_next_session_makes_it(
    finished, tmp_path, run, monkeypatch, capfd
):
    """The evaluation of step 3 is left at its second micro-batch; nothing is lost, no point is missing."""
    with monkeypatch.context() as patch:
        counted = at_call(10**9, patch, "finetuning.evaluation.evaluator.build_batch", "SIGTERM")
        assert run(tmp_path / "count", "--max-steps", "3") == 0
    per_evaluation = len(counted) // 2
    with monkeypatch.context() as patch:
        place = "finetuning.evaluation.evaluator.build_batch"
        calls = at_call(per_evaluation + 1, patch, place, "SIGUSR1")
        assert run(tmp_path, *PROBES) == 0
        assert len(calls) == per_evaluation + 1, "not one micro-batch more"
    status = status_of(tmp_path)
    assert (status["status"], status["signal"], status["step"]) == ("preempted", "SIGUSR1", 3)
    assert "SIGUSR1: saved step 3 of 6" in capfd.readouterr().out
    assert (3, "Eval/Loss") not in numbers(tmp_path / "out")
    assert run(tmp_path, *PROBES, "--resume", "latest") == 0
    assert numbers(tmp_path / "out") == numbers(finished)


def test_within_an_answer_it_leaves_after_the_token(tmp_path, run, monkeypatch):
    written, original = [], _resolved("finetuning.evaluation.evaluator.complete")

    def complete(*args, progress, **kwargs):
        def token(done: int, total: int) -> object:
            written.append(done)
            if len(written) == 3:
                send()
            return progress(done, total)

        return original(*args, progress=token, **kwargs)

    monkeypatch.setattr("finetuning.evaluation.evaluator.complete", complete)
    many = ["--num-probes", "1", "--probe-max-new-tokens", "400"]
    assert run(tmp_path, *many) == 0
    assert len(written) == 3, "an evaluation before the first step, left at its third token"
    assert status_of(tmp_path)["step"] == 0
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-0" / "manifest.json").is_file()


@pytest.mark.slow
def test_while_it_describes_the_data_it_leaves_and_describes_them_later(
    finished, tmp_path, run, monkeypatch
):
    describe = RunRecord.describe

    def interrupted(self: RunRecord, plan: object) -> None:
        send("SIGUSR2")
        describe(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "describe", interrupted)
        assert run(tmp_path, *PROBES) == 0
    assert status_of(tmp_path)["signal"] == "SIGUSR2"
    assert not (logs_of(tmp_path) / "dataset_statistics.json").exists()
    assert run(tmp_path, *PROBES, "--resume", "auto") == 0
    assert numbers(tmp_path / "out") == numbers(finished)
    (events,) = (tmp_path / "out" / "tensorboard_logs").iterdir()
    assert "Dataset/Mask_Audit" in read_texts(events)
    assert (logs_of(tmp_path) / "dataset_statistics.json").is_file()


def test_while_it_saves_it_ends_with_that_checkpoint(tmp_path, run, monkeypatch):
    save = checkpoint_manager.save_checkpoint

    def saving(*args: object, **kwargs: object) -> Path:
        send()
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint_manager, "save_checkpoint", saving)
    assert run(tmp_path) == 0
    status = status_of(tmp_path)
    assert (status["status"], status["step"], status["saved"]) == ("preempted", 2, 2)


def test_before_there_is_a_run_it_ends_with_the_signals_code(tmp_path, run, monkeypatch, capfd):
    at_call(1, monkeypatch, "finetuning.runs.plan.prepare_data", "SIGTERM")
    assert run(tmp_path) == 128 + signal.SIGTERM
    assert "SIGTERM: interrupted before the first step" in capfd.readouterr().err


def test_a_second_one_ends_at_once_and_the_record_says_so(tmp_path, run, monkeypatch, capfd):
    original, calls = _resolved("finetuning.training.engine.forward_backward"), []

    def passes(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            send("SIGINT")
            later = time.monotonic() + 1
            monkeypatch.setattr("finetuning.common.process.time.monotonic", lambda: later)
            send("SIGINT")
        return original(*args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr("finetuning.training.engine.forward_backward", passes)
        assert run(tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    status = status_of(tmp_path)
    assert (status["status"], status["saved"]) == ("preempted", 2)
    assert "SIGINT: ended at once by a second signal" in capfd.readouterr().err


# -----------------------------------------------------------------------------
# Processes


def wait_for(out: Path, text: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        logs = list(out.glob("training_logs/*/training.log"))
        if logs and text in logs[0].read_text(encoding="utf-8"):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{text} did not come")


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal(tmp_path, tiny_model, tiny_data, cache_dir):
    """SIGHUP and SIGINT were ignored at the start, and the terminal's end of the pipe is closed."""
    out = tmp_path / "out"
    script = str(ROOT / "direct_finetuning_with_existing_modules.py")
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data), "--num-probes", "0"]
    places = ["--output-dir", str(out), "--cache-dir", str(cache_dir), "--eval-fraction", "0"]

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, script, *inputs, *places, "--max-steps", "100000", "--logging-steps", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=ignore,
    )
    try:
        wait_for(out, "step 5/", process)
        process.stdout.close()
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        wait_for(out, "can't be written any more", process)
        steps = (next(out.glob("training_logs/*")) / "metrics.jsonl").read_text().count("\n")
        wait_for(out, f"step {steps + 50}/", process)
        process.send_signal(signal.SIGXCPU)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    status = json.loads((next(out.glob("training_logs/*")) / "status.json").read_text())
    assert (status["status"], status["signal"]) == ("preempted", "SIGXCPU")


TWO_RANKS = """
import os, signal, sys
from finetuning.evaluation import evaluator
build, calls = evaluator.build_batch, []
def built(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGUSR1)
    return build(*args, **kwargs)
evaluator.build_batch = built
complete = evaluator.complete
def completed(*args, progress, **kwargs):
    def token(done, total):
        if os.environ["RANK"] == "1" and done == {token}:
            os.kill(os.getpid(), signal.SIGUSR1)
        return progress(done, total)
    return complete(*args, progress=token, **kwargs)
evaluator.complete = completed
from direct_finetuning_with_existing_modules import main, process
process.exit_process(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "call", "token"), [("ddp", 1, 0), ("fsdp", 1, 0), ("ddp", 0, 3), ("fsdp", 0, 3)]
)
def test_one_rank_that_gets_it_makes_all_leave_the_evaluation(
    mode, call, token, tmp_path, tiny_model, tiny_data, cache_dir
):
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS.format(call=call, token=token), encoding="utf-8")
    out = tmp_path / "out"
    options = [option for option in FAST if option != "--quiet"]
    places = ["--output-dir", str(out), "--cache-dir", str(cache_dir), "--device", "cpu"]
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    probes = ["--num-probes", "1", "--probe-max-new-tokens", "64", "--parallel", mode]
    launch = [*TORCHRUN, "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), *options, *inputs, *places, *probes],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "saved step 0 of 6" in done.stdout
    status = json.loads((next(out.glob("training_logs/*")) / "status.json").read_text())
    assert (status["status"], status["step"]) == ("preempted", 0)
    assert np.all([(p / "manifest.json").is_file() for p in out.glob("checkpoints/*")])
