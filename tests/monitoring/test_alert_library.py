"""Alerts on a part of the library of runs with and without faults: they speak where something is wrong.

The whole of it: uv run python -m benchmarks.alert_quality
"""

import pytest

from benchmarks.alert_quality import (
    Case,
    equal_sources_runs,
    judged,
    library,
    play,
    recorded_runs,
    summary,
    two_kinds_runs,
)
from finetuning.monitoring.alerts import NAMES, AlertMonitor


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return library([])


def test_every_alert_has_its_faults(cases):
    assert {case.expected for case in cases} == {"", *NAMES}
    assert sum(not case.expected for case in cases) >= 40 and len(cases) >= 340


@pytest.mark.slow
def test_faults_are_found_and_healthy_runs_are_silent(cases):
    total = summary(judged(cases[::11], show=False))
    assert total["loud"] == []
    assert total["precision"] >= 0.95 and total["f1"] >= 0.95, total
    assert total["late"] <= 0.05 * total["delays"]


def test_two_kinds_of_rows_are_no_divergence():
    """45 of 60 samples of one template, one row a step: the loss has two levels, and no trouble."""
    runs = [run for run in recorded_runs() if run.name.startswith("bimodal")]
    assert len(runs) >= 3
    for run in runs:
        assert play(Case(run)) == [], run.name


def test_rare_hard_rows_and_equal_sources_raise_nothing():
    """A part of the simulated healthy runs; the benchmark plays them all."""
    runs = [*two_kinds_runs()][::3] + [*equal_sources_runs()][::5]
    assert len(runs) >= 10
    for run in runs:
        assert play(Case(run)) == [], run.name


def test_a_hard_source_is_no_spike_but_a_step_above_its_source_is():
    monitor = AlertMonitor()
    raised = []
    for step in range(1, 200):
        hard = step % 8 == 0
        loss = (3.0 if hard else 0.5) * (4.0 if step == 160 else 1.0)
        source = "Training/By_Source/" + ("hard" if hard else "easy")
        row = {"Training/Loss": loss * (1 + 0.01 * (step % 3)), source: loss}
        raised += monitor.observe(step, row, {"samples": ["a.jsonl:7"]})
    assert [(a.name, a.step) for a in raised] == [("Loss_Spike", 160)]
    assert raised[0].evidence["samples"] == ["a.jsonl:7"] and "a.jsonl:7" in raised[0].line()


def test_advice_names_the_runs_settings():
    monitor = AlertMonitor(settings={"learning_rate": 3e-4, "max_grad_norm": 1.0})
    rows = [{"Training/Loss": 1.0 + 0.01 * (i % 2)} for i in range(60)]
    rows += [{"Training/Loss": 5.0}] * 5
    raised = [a for i, row in enumerate(rows) for a in monitor.observe(i, row)]
    (divergence,) = [a for a in raised if a.name == "Divergence"]
    assert "it is 0.0003; try --learning-rate 0.0001" in divergence.advice
    assert divergence.ends.startswith("It ends when the smoothed loss is below")
