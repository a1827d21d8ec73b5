"""Alerts: told once, kept over a resume, shown in a table, and handed to a command of the user's."""

import json
import math

import pytest

from finetuning.common.files import json_text
from finetuning.monitoring.alerts import NAMES, AlertMonitor
from finetuning.monitoring.convergence import ConvergenceMonitor
from tests.helpers.metric_traces import FAULT, FAULTS, clean_trace, play


def test_an_alert_has_a_tag_once_it_was_raised():
    monitor = AlertMonitor()
    assert monitor.scalars() == {"Monitoring/Alerts_Active": 0.0}
    monitor.observe(1, {"Training/Loss": math.inf})
    assert monitor.scalars() == {"Monitoring/Alerts_Active": 1.0, "Alerts/NonFinite": 1.0}
    monitor = AlertMonitor(monitor.state_dict())  # a resume
    monitor.observe(2, {"Training/Loss": 1.0})
    assert monitor.scalars() == {"Monitoring/Alerts_Active": 0.0, "Alerts/NonFinite": 0.0}
    assert "NonFinite" in NAMES


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_what_a_run_remembers_is_fit_to_go_on_with(fault):
    """At its begin, in its middle, and after its trouble, as the checkpoint's file has it."""
    alerts, forecasts = AlertMonitor(), ConvergenceMonitor(FAULT + 40)
    for step, row in clean_trace(3, FAULT + 40):
        if fault and step >= FAULT:
            FAULTS[fault][0](step, row)
        forecasts.observe(step, row["Training/Loss"], row["Training/Learning_Rate"])
        alerts.observe(step, row, {})
        if step in (1, 2, 7, 8, 20, 64, 130, FAULT + 1, FAULT + 40):
            saved = json.loads(json_text([alerts.state_dict(), forecasts.state_dict()]))
            assert AlertMonitor(saved[0]).state_dict() == saved[0]
            again = ConvergenceMonitor(FAULT + 40, None, saved[1])
            assert json.loads(json_text(again.state_dict())) == saved[1]


def test_a_lasting_trouble_is_news_once():
    monitor = AlertMonitor()
    raised = [a for s in range(50) for a in monitor.observe(s, {"GPU_0/Temperature_C": 95.0})]
    assert len(raised) == 1


def test_the_row_of_an_alert_tells_of_its_last_time():
    """Value, limit, evidence, advice and end belong together; the step says where it was first seen."""
    monitor, raised = AlertMonitor(), []
    for step in range(1, 301):
        spiked = step in (140, 280)
        level = 2.0 if step < 200 else 1.0
        told = {"samples": [f"a.jsonl:{step}"]} if spiked else {}
        row = {"Training/Loss": level * (5 if spiked else 1 + 0.01 * (step % 3))}
        raised += [a for a in monitor.observe(step, row, told) if a.name == "Loss_Spike"]
    first, last = raised
    assert first.threshold != last.threshold and first.ends != last.ends
    row = monitor.rows["Loss_Spike"]
    assert row == last.record() | {"step": 140, "times": 2, "steps": [140, 280]}
    assert AlertMonitor(monitor.state_dict()).rows["Loss_Spike"] == row


def test_300_alerts_stay_readable():
    monitor = AlertMonitor()
    for step in range(300 * 12):
        heat = {"GPU_0/Temperature_C": 95.0 if step % 12 == 0 else 60.0}
        monitor.observe(step, heat, {"note": "a | b\n<b>"})
    table = monitor.table()
    rows = table.splitlines()
    assert len(rows) == 3 and "| 300 |" in rows[2]
    assert all(f" {step}" in rows[2] for step in range(0, 3600, 12))
    assert rows[2].replace("\\|", "").count("|") == rows[0].count("|")
    assert "<b>" not in table


@pytest.mark.parametrize("cut", [1, 3, 6, 9, 20])
def test_a_run_that_explodes_early_is_resumed_as_it_was(cut):
    trace = [(0, {"Eval/Loss": 1.5})]
    trace += [(s, {"Training/Loss": 1.5 if s <= 5 else 7.0 + 0.1 * (s % 3)}) for s in range(1, 40)]
    whole, all_raised = play(trace)
    first, raised = play(trace[:cut])
    second, more = play(trace[cut:], AlertMonitor(json.loads(json.dumps(first.state_dict()))))
    assert raised + more == all_raised and [a.name for a in all_raised] == ["Divergence"]
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("cut", [1, 137, 500, 640])
def test_interrupted_and_uninterrupted_runs_agree(cut):
    trace = clean_trace(5)
    for name in ("Divergence", "Memory_Leak", "Thinking_Collapse"):
        for step, row in trace:
            if step >= FAULT:
                FAULTS[name][0](step, row)
    whole, all_raised = play(trace)
    first, raised = play(trace[:cut])
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second, more = play(trace[cut:], AlertMonitor(state))
    assert raised + more == all_raised and all_raised
    assert second.state_dict() == whole.state_dict() and second.table() == whole.table()


def test_state_is_bounded_and_strict_json_even_with_nan():
    monitor = AlertMonitor()
    for step in range(8000):
        monitor.observe(step, {"Training/Loss": math.nan if step % 20 else 1.0})
    assert len(json.dumps(monitor.state_dict(), allow_nan=False)) < 40_000


def test_the_slowest_rank_is_evidence_of_a_slow_rank_only():
    monitor, evidence = AlertMonitor(), {"slowest_rank": 3}
    row = {"Throughput/Straggler_Percent": 60.0, "Monitoring/NonFinite_Steps": 1.0}
    raised = {a.name: a for i in range(5) for a in monitor.observe(i, row, evidence)}
    assert raised["Slow_Rank"].evidence["slowest_rank"] == 3
    assert "slowest_rank" not in raised["NonFinite"].evidence
