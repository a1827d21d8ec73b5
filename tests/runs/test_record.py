"""The record of a session: what an earlier one wrote beyond the checkpoint is told once.

uv run pytest tests/runs/test_record.py
"""

import json
from pathlib import Path

import pytest

from finetuning.events.reading import read_metrics, read_run
from finetuning.monitoring.system_monitor import SystemMonitor
from finetuning.runs.directory import RunDirectory, new_run
from finetuning.runs.record import RunRecord
from tb_logger import TensorBoardLogger


def open_record(run: RunDirectory, resume_step: int | None) -> RunRecord:
    metrics = run.logs / "metrics.jsonl"
    return RunRecord(
        run,
        TensorBoardLogger(run.tensorboard, metrics_path=metrics, resume_step=resume_step),
        SystemMonitor((), run.output_dir),
        resume_step=resume_step,
        alert_state={},
        alert_actions={},
        warn=lambda text: None,
    )


def log(record: RunRecord, step: int, bad: int) -> None:
    """One step; the gradient of step `bad` is infinite."""
    metrics = {
        "Training/Loss": 1.0,
        "Training/Gradient_Norm": float("inf") if step == bad else 1.0,
        "Monitoring/NonFinite_Steps": float(bad <= step),
    }
    record.log(step, metrics)


def session(run: RunDirectory, resume_step: int | None, steps: range, bad: int) -> None:
    """One session that logs these steps."""
    record = open_record(run, resume_step)
    for step in steps:
        log(record, step, bad)
    record.close(None)


def read_alerts(run: RunDirectory) -> list[dict]:
    text = (run.logs / "alerts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def alerts(run: RunDirectory) -> list[tuple[str, int]]:
    return [(a["name"], a["step"]) for a in read_alerts(run)]


@pytest.mark.parametrize(("resume_step", "told"), [(3, 1), (6, 2), (-1, 1)])
def test_a_resumed_run_tells_an_alert_once(tmp_path: Path, resume_step: int, told: int):
    run = new_run(tmp_path)
    session(run, None, range(8), bad=5)
    first = alerts(run)
    assert len(first) == 1 and first[0][1] == 5
    session(run, resume_step, range(resume_step + 1, 12), bad=max(5, resume_step + 3))
    assert len(alerts(run)) == told and alerts(run)[: told - 1] == first[: told - 1]
    assert [step for step, _ in read_run(run.tensorboard)["Training/Loss"]] == list(range(12))
    assert [r["step"] for r in read_metrics(run.logs / "metrics.jsonl")] == list(range(12))


def test_a_run_that_goes_back_takes_back_its_alerts_and_evidence(tmp_path: Path):
    run = new_run(tmp_path)
    record = open_record(run, resume_step=None)
    for step in range(6):
        log(record, step, bad=5)
    spent = record.overhead_percent(1.0, 0.0)
    record.evidence["samples"] = ["of a step that is done again"]
    record.rewind(3, {})
    assert alerts(run) == []
    tag = "Monitoring/Logging_Overhead_Percent"
    assert record.overhead_percent(1.0, 0.0)[tag] >= spent[tag] > 0
    more = record.overhead_percent(1.0, 0.5)[tag] - record.overhead_percent(1.0, 0.0)[tag]
    assert more == pytest.approx(50)
    log(record, 4, bad=4)
    record.close(None)
    (alert,) = read_alerts(run)
    assert alert["step"] == 4 and "samples" not in alert["evidence"]
