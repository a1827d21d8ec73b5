"""What a logged step takes from training is what `Monitoring/Logging_Overhead_Percent` says.

uv run pytest tests/runs/test_logged_step.py
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import direct_finetuning_with_existing_modules as program
from finetuning.monitoring import alerts, convergence, system_monitor
from finetuning.runs import record
from finetuning.training import step_clock

BUSY = 0.004  # seconds that each part of a logged step takes here, so that one left out is seen
STEPS = 14
PARTS = [
    (convergence.ConvergenceMonitor, "observe"),
    (alerts.AlertMonitor, "observe"),
    (alerts.AlertMonitor, "scalars"),
    (system_monitor.SystemMonitor, "read"),
    (step_clock.StepClock, "read"),
    (record.RunRecord, "status"),
]


def busy(function: Callable) -> Callable:
    def longer(*arguments, **options):
        end = time.perf_counter() + BUSY
        while time.perf_counter() < end:
            pass
        return function(*arguments, **options)

    return longer


@pytest.mark.slow
def test_all_of_a_logged_step_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run):
    """Counted seconds against those of the whole calls by the clock, from the fourth step to the last."""
    measured, seen = [0.0], []

    def timed(function: Callable) -> Callable:
        def call(*arguments):
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                measured[0] += time.perf_counter() - began

        return call

    counted = record.RunRecord.overhead_percent

    def noted(self, seconds: float, elsewhere: float):
        found = counted(self, seconds, elsewhere)
        (percent,) = found.values()
        seen.append((percent * seconds / 100, measured[0]))
        return found

    monkeypatch.setattr(record, "STATUS_SECONDS", 0.0)
    for owner, name in PARTS:
        monkeypatch.setattr(owner, name, busy(getattr(owner, name)))
    monkeypatch.setattr(record.RunRecord, "overhead_percent", noted)
    for name in ("training_metrics", "log"):
        monkeypatch.setattr(
            program.DirectTrainer, name, timed(getattr(program.DirectTrainer, name))
        )
    options = ["--max-steps", str(STEPS), "--logging-steps", "1", "--eval-steps", "1000"]
    assert run(tmp_path, *options, "--num-probes", "0", "--save-steps", "1000") == 0
    assert len(seen) == STEPS
    (first, before), (last, after) = seen[3], seen[-2]
    share = (last - first) / (after - before)
    least = (STEPS - 5) * 6 * BUSY
    assert after - before > least
    assert 0.93 < share < 1.05, share  # each part is at least a tenth of a step
