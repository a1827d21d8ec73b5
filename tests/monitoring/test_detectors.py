"""Every fault fires its own detector and no other; clean runs fire none."""

import math

import numpy as np
import pytest

from finetuning.monitoring.advice import advice
from finetuning.monitoring.alerts import AlertMonitor
from finetuning.monitoring.detector_memory import AlertLimits, DetectorMemory
from finetuning.monitoring.detectors import DETECTORS, is_watched
from finetuning.monitoring.hardware_detectors import phase_shares
from tests.helpers.metric_traces import FAULT, FAULTS, busy_elsewhere, clean_trace, play


@pytest.mark.parametrize("seed", range(3))
def test_clean_traces_raise_nothing(seed):
    assert play(clean_trace(seed))[1] == []


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
    assert raised[0].advice == advice(name, {}) and raised[0].ends


def test_a_loss_that_never_moves_is_stagnation_and_nothing_else():
    rng = np.random.default_rng(3)
    trace = clean_trace(7)
    for _, row in trace:
        row["Training/Loss"] = 11.2 * math.exp(0.01 * rng.normal())
        row.pop("Eval/Loss", None)
    _, raised = play(trace)
    assert {alert.name for alert in raised} == {"Stagnation"} and raised[0].step <= 400


def exploding(few: int, low: float, high: float, length: int = 200) -> list:
    """Losses of which only the first few are low, at a rate that falls."""
    rng = np.random.default_rng(few)
    return [
        (s, {"Training/Loss": (low if s <= few else high) * math.exp(0.05 * rng.normal()),
             "Training/Learning_Rate": 3e-4 * (1 - s / length)})
        for s in range(1, length)
    ]  # fmt: skip


@pytest.mark.parametrize("few", [2, 3, 4, 6, 8, 12, 15, 16, 20, 31, 32, 40])
def test_a_run_that_explodes_early_is_a_divergence_and_no_stagnation(few):
    """Three points after the first high loss; Stagnation would say to raise the rate."""
    _, raised = play(exploding(few, 1.5, 7.0))
    assert {a.name for a in raised} <= {"Divergence", "Loss_Spike"}
    assert next(a.step for a in raised if a.name == "Divergence") <= few + 4


def test_where_two_losses_are_known_a_smaller_explosion_takes_some_more():
    found = [play(exploding(few, 2.0, 4.0))[1][0] for few in (2, 3, 4, 12)]
    assert [a.name for a in found] == ["Divergence"] * 4
    assert [a.step - few for a, few in zip(found, (2, 3, 4, 12), strict=True)] == [8, 6, 4, 4]


def test_the_held_out_loss_at_step_0_stands_for_losses_before():
    losses = [1.01, 6.13, 6.38, 9.28, 7.0, 5.0]
    trace = [(0, {"Eval/Loss": 1.07})]
    trace += [(s, {"Training/Loss": x}) for s, x in enumerate(losses, 1)]
    (alert,) = play(trace)[1]
    assert (alert.name, alert.step) == ("Divergence", 4)
    assert alert.evidence["held-out loss at step 0"] == 1.07
    assert play(trace[1:])[1] == []  # one loss alone is nothing to compare with


def test_a_held_out_loss_far_above_that_of_step_0_is_a_divergence_unless_training_fell():
    """Logged every ten steps: the first logged loss holds the explosion already."""
    trace = [(0, {"Eval/Loss": 1.07})]
    trace += [(10, {"Training/Loss": 5.9}), (20, {"Training/Loss": 4.0, "Eval/Loss": 4.6})]
    assert [(a.name, a.step) for a in play(trace)[1]] == [("Divergence", 20)]
    trace[1:] = [(10, {"Training/Loss": 0.9}), (20, {"Training/Loss": 0.7, "Eval/Loss": 4.6})]
    assert play(trace)[1] == []


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
        seen.append(monitor.scalars().get("Alerts/GPU_Overheat", 0.0))
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
    assert monitor.scalars().get("Alerts/Thinking_Collapse", 0.0) == 1.0
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
    assert monitor.scalars().get("Alerts/NonFinite", 0.0) == 0.0


def test_thresholds_are_plain_values():
    (alert,) = AlertMonitor(limits=AlertLimits(overheat_c=70.0)).observe(
        1, {"GPU_0/Temperature_C": 75.0}
    )
    assert alert.threshold == 70.0
    with pytest.raises(TypeError):
        AlertMonitor(limits=AlertLimits(overheat=70.0))


def test_all_that_a_detector_asks_for_is_watched():
    """The others of a step's numbers are not handed to the detectors."""
    asked = set()

    class Noting(dict):
        def get(self, name, default=None):
            asked.add(name)
            return super().get(name, default)

    memory = DetectorMemory(AlertLimits(), {})
    for _, row in clean_trace(1, 120):
        for detector in DETECTORS.values():
            detector(memory, Noting(row))
    assert len(asked) > 12 and not [name for name in asked if not is_watched(name)]
    assert all(map(is_watched, ("GPU_7/Temperature_C", "GPU_0/Utilization_Percent")))
    assert phase_shares({n: 1.0 for n in row if is_watched(n)}).keys() == {
        "data", "forward_backward", "optimizer", "logging",
    }  # fmt: skip
    assert not is_watched("LoRA/q_proj/Norm") and not is_watched("GPU_0/Power_W")


def test_a_rise_after_a_steep_start_is_a_divergence():
    """As a speech model did whose warm-up went too high: the rise and the start are no noise of the rows."""
    losses = [0.83, 0.49, 0.16, 0.12, 0.118]
    losses += [0.118 + 0.19 * min(1, i / 16) for i in range(1, 40)]
    monitor = AlertMonitor()
    raised = [
        a.name for s, x in enumerate(losses) for a in monitor.observe(s, {"Training/Loss": x})
    ]
    assert raised == ["Divergence"]


@pytest.mark.parametrize("factor", [1, 10_000])
def test_losses_of_one_digit_do_not_diverge_by_it(factor):
    for high, expected in ((2, []), (3, []), (5, ["Divergence"])):
        losses = [1e-4 * factor] * 80 + [round(high * 1e-4 * factor, 4)] * 4
        monitor = AlertMonitor()
        raised = [
            a.name for s, x in enumerate(losses) for a in monitor.observe(s, {"Training/Loss": x})
        ]
        assert raised == expected


def test_the_last_digit_of_a_logged_loss_is_no_spike():
    """Losses of four decimals near zero: 0.0002 after 0.0001 is twice as much, and says nothing."""
    losses = [0.0001] * 150
    for high, expected in ((0.0002, []), (0.0003, []), (0.0005, ["Loss_Spike"])):
        monitor, raised = AlertMonitor(), []
        for step, loss in enumerate([*losses, high, 0.0001]):
            if step % 40 == 7:
                loss = 0.0002
            row = {"Training/Loss": loss, "Training/Epoch": (step + 1) / 50}
            raised += [alert.name for alert in monitor.observe(step, row)]
        assert raised == expected
