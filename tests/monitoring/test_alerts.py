"""Each injected fault fires its own detector and no other; clean runs are silent."""

import json
import math
import sys

import numpy as np
import pytest

from finetuning.common.errors import UserError
from finetuning.monitoring.alerts import ADVICE, NAMES, Alert, AlertMonitor, run_command
from finetuning.monitoring.detectors import AlertLimits, phase_shares

LENGTH = 1000
FAULT = 500  # the logged step at which a fault begins


def clean_trace(seed, length=LENGTH):
    """A healthy run: falling loss, noisy gradients, warm caches, two GPUs, probes now and then."""
    rng = np.random.default_rng(seed)
    trace = []
    for step in range(1, length + 1):
        rate = 1e-4 * min(step / 50, (length + 1 - step) / length)
        row = {
            "Training/Loss": (1 + 1.2 * math.exp(-step / 150)) * math.exp(0.05 * rng.normal()),
            "Training/Gradient_Norm": 0.6 * math.exp(0.3 * rng.normal()),
            "Training/Learning_Rate": rate,
            "Memory/Host_RSS_MB": 6000 + 800 * (1 - math.exp(-step / 60)) + 20 * rng.normal(),
            "Memory/Host_Percent": 40 + rng.normal(),
            "Memory/GPU_Allocated_MB": 22_000 + 300 * rng.normal(),
            "Memory/GPU_Peak_MB": 60_000 + 500 * rng.normal(),
            "Memory/GPU_Total_MB": 80_000.0,
            "Memory/GPU_Utilization_Percent": 78 + rng.normal(),
            "Throughput/Step_Seconds_Data": 0.02 + 0.01 * rng.random(),
            "Throughput/Step_Seconds_Forward_Backward": 0.9 + 0.1 * rng.random(),
            "Throughput/Step_Seconds_Optimizer": 0.05,
            "Throughput/Step_Seconds_Logging": 0.005,
            "Throughput/Straggler_Percent": abs(3 * rng.normal()),
            "Monitoring/NonFinite_Steps": 0.0,
        }
        for gpu in range(2):
            row[f"GPU_{gpu}/Temperature_C"] = 74 + 2 * rng.normal()
            row[f"GPU_{gpu}/Utilization_Percent"] = 95 + 2 * rng.normal()
        if step % 50 == 0:
            row["Eval/Loss"] = 1.1 + 1.2 * math.exp(-step / 150) + 0.003 * rng.normal()
            row["Eval/Think_Length_Ratio"] = 1 + 0.08 * rng.normal()
            row["Eval/Format_Valid_Rate"] = 0.9 + 0.05 * rng.normal()
        trace.append((step, row))
    return trace


def play(trace, monitor=None):
    monitor = monitor or AlertMonitor()
    raised = []
    for step, row in trace:
        raised += monitor.observe(step, row, {})
    return monitor, raised


@pytest.mark.parametrize("seed", range(3))
def test_clean_traces_raise_nothing(seed):
    assert play(clean_trace(seed))[1] == []


def set_to(name, value):
    return lambda step, row: row.update({name: value})


def add(name, per_step):
    return lambda step, row: row.update({name: row[name] + per_step * (step - FAULT)})


def scale(name, factor, only=None):
    def change(step, row):
        if name in row and (only is None or step == only):
            row[name] *= factor

    return change


def held_out_rises(step, row):
    if "Eval/Loss" in row:
        row["Eval/Loss"] *= 1 + 0.0005 * (step - FAULT)


def busy_elsewhere(step, row):
    row["GPU_1/Utilization_Percent"] = 45.0
    row["Throughput/Step_Seconds_Logging"] = 0.3


FAULTS = {  # detector: (change of a row, logged steps until it must have spoken)
    "Gradient_Explosion": (scale("Training/Gradient_Norm", 50), 1),
    "Loss_Spike": (scale("Training/Loss", 2, only=FAULT), 1),
    "NonFinite": (set_to("Training/Loss", math.nan), 1),
    "Divergence": (add("Training/Loss", 0.005), 120),
    "Memory_Leak": (add("Memory/Host_RSS_MB", 4.0), 400),
    "GPU_Overheat": (set_to("GPU_1/Temperature_C", 90.0), 1),
    "Data_Starvation": (set_to("Throughput/Step_Seconds_Data", 1.5), 10),
    "Low_GPU_Utilization": (busy_elsewhere, 10),
    "OOM_Risk": (set_to("Memory/GPU_Utilization_Percent", 98.0), 1),
    "Thinking_Collapse": (scale("Eval/Think_Length_Ratio", 0.35), 50),
    "Overfitting": (held_out_rises, 200),
    "Slow_Rank": (set_to("Throughput/Straggler_Percent", 60.0), 5),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fires_its_own_detector_and_no_other(name):
    change, within = FAULTS[name]
    trace = clean_trace(7)
    for step, row in trace:
        if step >= FAULT:
            change(step, row)
    _, raised = play(trace)
    assert {alert.name for alert in raised} == {name}
    assert FAULT <= raised[0].step <= FAULT + within
    assert raised[0].advice == ADVICE[name]


def test_a_loss_that_never_moves_is_stagnation_and_nothing_else():
    rng = np.random.default_rng(3)
    trace = clean_trace(7)
    for _, row in trace:
        row["Training/Loss"] = 11.2 * math.exp(0.01 * rng.normal())
        row.pop("Eval/Loss", None)
    _, raised = play(trace)
    assert {alert.name for alert in raised} == {"Stagnation"} and raised[0].step <= 400


def test_a_loss_that_stops_above_its_forecast_is_stagnation():
    trace = clean_trace(7, 800)
    for step, row in trace:
        row["Training/Loss"] = max(3 - step / 200, 2.0)
        row["Training/Learning_Rate"] = 1e-4
        row["Monitoring/Forecast_Final_Loss_High"] = 1.2 if step < 230 else 2.1
        row.pop("Eval/Loss", None)
    _, raised = play(trace)
    assert [alert.name for alert in raised] == ["Stagnation"]
    assert raised[0].evidence["form"] == "stalled"


def test_a_leak_on_the_device_is_found_and_measured():
    trace = clean_trace(4)
    for step, row in trace:
        row["Memory/GPU_Allocated_MB"] += 5.0 * step
    _, raised = play(trace)
    assert [alert.name for alert in raised] == ["Memory_Leak"]
    assert raised[0].evidence["memory"] == "Memory/GPU_Allocated_MB"
    assert raised[0].evidence["MB per logged step"] == pytest.approx(5, rel=0.5)


def test_heat_alarm_has_hysteresis():
    monitor = AlertMonitor()
    seen = []
    for step, celsius in enumerate([84, 86, 83, 81, 86, 79, 84], 1):
        monitor.observe(step, {"GPU_3/Temperature_C": float(celsius)})
        seen.append(monitor.scalars()["Alerts/GPU_Overheat"])
    assert seen == [0, 1, 1, 1, 1, 0, 0]


def test_low_utilization_names_gpu_and_phase():
    trace = clean_trace(7, 40)
    for step, row in trace:
        busy_elsewhere(step, row)
    _, (alert,) = play(trace)
    assert alert.evidence["phase"] == "logging" and alert.evidence["gpu"] == 1


def test_starvation_explains_low_utilization():
    trace = clean_trace(7, 100)
    for _, row in trace:
        row["Throughput/Step_Seconds_Data"] = 2.0
        row["GPU_0/Utilization_Percent"] = 35.0
    assert [alert.name for alert in play(trace)[1]] == ["Data_Starvation"]


@pytest.mark.parametrize("form", ["Throughput/Data_Seconds", "Throughput/Step_Seconds_Data"])
def test_phase_shares_read_the_step_parts(form):
    parts = {form: 1.0, "Throughput/Forward_Backward_Seconds": 3.0, "Throughput/Step_Seconds": 4.0}
    assert phase_shares(parts) == {"data": 0.25, "forward_backward": 0.75}


def probed(rates):
    """The monitor after evaluations with these format rates, and what it raised."""
    return play([(i, {"Eval/Format_Valid_Rate": rate}) for i, rate in enumerate(rates)])


def test_broken_format_is_thinking_collapse():
    monitor, raised = probed([1.0, 0.75, 1.0, 0.25, 0.0])
    assert [(a.name, a.step) for a in raised] == [("Thinking_Collapse", 4)]
    assert raised[0].value < raised[0].threshold < 0.75
    monitor.observe(5, {"Training/Loss": 1.0})  # no probe at this step: still so
    assert monitor.scalars()["Alerts/Thinking_Collapse"] == 1.0
    assert [a.step for a in probed([1.0, 1.0, 1.0, 0.0])[1]] == [3]


def test_the_chance_of_four_probes_is_no_thinking_collapse():
    rng = np.random.default_rng(0)
    rates = [rng.binomial(4, 0.75, 20) / 4 for _ in range(200)]
    assert sum(bool(probed(run)[1]) for run in rates) <= 4


def test_learning_the_right_length_is_no_thinking_collapse():
    lengths = [2.2, 1.02, 0.98, 1.0, 0.5]  # it rambles untrained; the reference's length is 1
    trace = [(40 * i, {"Eval/Think_Length_Ratio": x}) for i, x in enumerate(lengths)]
    _, (alert,) = play(trace)
    assert alert.step == 160 and alert.threshold == pytest.approx(0.6)


def test_overfitting_is_found_where_the_untrained_model_was_best():
    trace = [(0, {"Eval/Loss": 2.0})]  # as the loop logs it: no training loss at step 0
    for step in range(1, 121):
        row = {"Training/Loss": 2 * 0.995**step}
        trace.append((step, row | ({"Eval/Loss": 2 + step / 200} if step % 40 == 0 else {})))
    assert [(a.name, a.step) for a in play(trace)[1]] == [("Overfitting", 80)]


def test_an_episode_after_a_long_quiet_is_news_though_evaluations_are_rare():
    held_out = {40: 1.0, 80: 1.2, 120: 1.2, 160: 0.9, 240: 1.2, 280: 1.2}
    trace = [
        (s, {"Training/Loss": 3 * 0.99**s} | ({"Eval/Loss": held_out[s]} if s in held_out else {}))
        for s in range(1, 300)
    ]
    assert [a.step for a in play(trace)[1]] == [120, 280]


def test_a_loss_of_zero_from_the_start_has_learned_nothing():
    trace = [(s, {"Training/Loss": 0.0, "Training/Learning_Rate": 1e-4}) for s in range(1, 250)]
    assert [(a.name, a.step) for a in play(trace)[1]] == [("Stagnation", 200)]


def test_a_negative_loss_raises_nothing():
    trace = [
        (s, {"Training/Loss": x, "Eval/Loss": x, "Training/Learning_Rate": 1e-4})
        for s, x in enumerate(-5 + np.exp(-np.arange(1, 400) / 50))
    ]
    assert play(trace)[1] == []


def test_suppressed_updates_between_logged_steps_are_non_finite():
    monitor = AlertMonitor()
    assert monitor.observe(10, {"Monitoring/NonFinite_Steps": 0.0}) == []
    (alert,) = monitor.observe(20, {"Monitoring/NonFinite_Steps": 2.0}, {"samples": ["a1"]})
    assert alert.name == "NonFinite" and alert.evidence["samples"] == ["a1"]
    monitor.observe(30, {"Monitoring/NonFinite_Steps": 2.0})
    assert monitor.scalars()["Alerts/NonFinite"] == 0.0


def test_every_name_is_zero_or_one_at_every_step():
    monitor = AlertMonitor()
    assert monitor.scalars() == {f"Alerts/{name}": 0.0 for name in NAMES}
    monitor.observe(1, {"Training/Loss": math.inf})
    assert sum(monitor.scalars().values()) == 1.0 and len(monitor.scalars()) == len(NAMES)


def test_a_lasting_trouble_is_news_once():
    monitor = AlertMonitor()
    raised = [a for s in range(50) for a in monitor.observe(s, {"GPU_0/Temperature_C": 95.0})]
    assert len(raised) == 1


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


def test_thresholds_are_plain_values():
    (alert,) = AlertMonitor(limits=AlertLimits(overheat_c=70.0)).observe(
        1, {"GPU_0/Temperature_C": 75.0}
    )
    assert alert.threshold == 70.0
    with pytest.raises(TypeError):
        AlertMonitor(limits=AlertLimits(overheat=70.0))


# ------------------------------------------------------------------------ a command of the user's

EVIL = Alert("Loss_Spike", 7, math.nan, 2.0, {"text": "$(touch broken); `id` \"' \u4f60\n"}, "look")


def test_command_gets_the_alert_as_json_and_nothing_is_interpreted(tmp_path):
    out = tmp_path / "got.json"
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"
    run_command([sys.executable, "-c", code, str(out)], EVIL).join(30)
    got = json.loads(out.read_text())
    assert got["name"] == "Loss_Spike" and got["value"] == "nan"
    assert got["evidence"]["text"] == EVIL.evidence["text"]


def test_command_does_not_wait(tmp_path):
    thread = run_command([sys.executable, "-c", "import time; time.sleep(60)"], EVIL, timeout_s=3)
    assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "command", [["/no/such/program"], [sys.executable, "-c", "raise SystemExit(3)"]]
)
def test_a_failing_command_is_one_line_on_stderr(command, capsys):
    run_command(command, EVIL).join(30)
    assert capsys.readouterr().err.startswith("alert command")


@pytest.mark.parametrize("command", ["", [], "echo 'open"])
def test_an_unusable_command_is_the_users_error(command):
    with pytest.raises(UserError):
        run_command(command, EVIL)


def test_the_slowest_rank_is_evidence_of_a_slow_rank_only():
    monitor, evidence = AlertMonitor(), {"slowest_rank": 3}
    row = {"Throughput/Straggler_Percent": 60.0, "Monitoring/NonFinite_Steps": 1.0}
    raised = {a.name: a for i in range(5) for a in monitor.observe(i, row, evidence)}
    assert raised["Slow_Rank"].evidence["slowest_rank"] == 3
    assert "slowest_rank" not in raised["NonFinite"].evidence
