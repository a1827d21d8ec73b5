"""The record of a session: what an earlier one wrote beyond the checkpoint is told once.

uv run pytest tests/test_run_record.py
"""

import json
from pathlib import Path

import pytest

from run_directory import RunDirectory, new_run
from run_record import RunRecord
from tb_logger import read_metrics, read_run


def session(run: RunDirectory, resume_step: int | None, steps: range, bad: int) -> RunRecord:
    """One session that logs these steps, of which one has an infinite gradient."""
    record = RunRecord(
        run,
        is_main=True,
        samples_hardware=False,
        resume_step=resume_step,
        gpu_uuids=(),
        first_gpu_index=0,
        alert_state=None,
        alert_actions={},
        warn=lambda text: None,
    )
    for step in steps:
        norm = float("inf") if step == bad else 1.0
        nonfinite = float(bad <= step)
        record.log(
            step,
            {
                "Training/Loss": 1.0,
                "Training/Gradient_Norm": norm,
                "Monitoring/NonFinite_Steps": nonfinite,
            },
        )
    record.close(None)
    return record


def alerts(run: RunDirectory) -> list[tuple[str, int]]:
    text = (run.logs / "alerts.jsonl").read_text(encoding="utf-8")
    return [(a["name"], a["step"]) for a in map(json.loads, text.splitlines())]


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
