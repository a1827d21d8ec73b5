"""The step clock on clocks we turn by hand."""

import math

import pytest
import torch

from finetuning.training.step_clock import CudaTimeline, StepClock, straggler


class HandClock:
    """A host clock that moves when told."""

    def __init__(self):
        self.now = 1000.0

    def stamp(self):
        return self.now

    def ready(self, stamp):
        return True

    def seconds(self, start, end):
        return end - start


class HandDevice:
    """A device queue: `work` is queued at once and takes its time later; `finish` ends some of it."""

    def __init__(self):
        self.queued = 0.0  # device time at the end of all that is queued
        self.finished = 0.0

    def work(self, seconds):
        self.queued += seconds

    def stamp(self):
        return self.queued

    def ready(self, stamp):
        return stamp <= self.finished

    def seconds(self, start, end):
        return end - start


def train_step(clock, hand, *, tokens=1000, supervised=600, samples=4, flops=0.0):
    """0.1 s data, 0.7 s forward and backward, 0.2 s optimizer."""
    for phase, seconds in (("data", 0.1), ("forward_backward", 0.7), ("optimizer", 0.2)):
        with clock.phase(phase):
            hand.now += seconds
    clock.count(tokens=tokens, supervised=supervised, samples=samples, flops=flops)


@pytest.fixture
def hand():
    return HandClock()


@pytest.fixture
def clock(hand):
    return StepClock(timeline=hand)


def test_rates_and_parts(clock, hand):
    for _ in range(4):
        train_step(clock, hand)
    hand.now += 0.4  # between phases: training time of no part
    assert clock.read() == pytest.approx(
        {
            "Throughput/Tokens_Per_Second": 4000 / 4.4,
            "Throughput/Supervised_Tokens_Per_Second": 2400 / 4.4,
            "Throughput/Samples_Per_Second": 16 / 4.4,
            "Throughput/Step_Seconds": 1.1,
            "Throughput/Step_Seconds_Data": 0.1,
            "Throughput/Step_Seconds_Forward_Backward": 0.7,
            "Throughput/Step_Seconds_Optimizer": 0.2,
            "Throughput/Step_Seconds_Logging": 0.0,
            "Throughput/Evaluation_Percent": 0.0,
            "Throughput/Saving_Percent": 0.0,
        }
    )


@pytest.mark.parametrize("phase", ["evaluation", "saving"])
def test_evaluation_and_saving_leave_the_rates_unchanged(clock, hand, phase):
    train_step(clock, hand)
    plain = clock.read()
    train_step(clock, hand)
    with clock.phase(phase):
        hand.now += 60
    rates, share = clock.read(), f"Throughput/{phase.title()}_Percent"
    assert rates == pytest.approx(plain | {share: 100 * 60 / 62})
    train_step(clock, hand)
    assert clock.read()[share] == pytest.approx(100 * 60 / 63), "of the whole session"


def test_time_before_the_first_phase_does_not_count_nor_does_an_earlier_run(clock, hand):
    assert clock.read() == {}
    hand.now += 500  # a model is loaded, a checkpoint restored
    train_step(clock, hand)
    assert clock.read()["Throughput/Tokens_Per_Second"] == pytest.approx(1000)


def test_each_read_starts_a_new_interval(clock, hand):
    train_step(clock, hand)
    clock.read()
    train_step(clock, hand, tokens=3000)
    assert clock.read()["Throughput/Tokens_Per_Second"] == pytest.approx(3000)


def test_a_read_before_a_step_ends_keeps_its_time_for_it(clock, hand):
    with clock.phase("data"):
        hand.now += 2.0
    assert clock.read() == {}
    with clock.phase("forward_backward"):
        hand.now += 2.0
    clock.count(tokens=400, supervised=1, samples=1)
    rates = clock.read()
    assert rates["Throughput/Tokens_Per_Second"] == pytest.approx(100)
    assert rates["Throughput/Step_Seconds_Data"] == pytest.approx(2.0)


def test_an_inner_phase_stops_the_outer_one(clock, hand):
    with clock.phase("logging"):
        hand.now += 1.0
        with clock.phase("saving"):
            hand.now += 50.0
        hand.now += 2.0
    clock.count(tokens=1, supervised=1, samples=1)
    rates = clock.read()
    assert rates["Throughput/Step_Seconds_Logging"] == pytest.approx(3.0)
    assert rates["Throughput/Step_Seconds"] == pytest.approx(3.0)


def test_a_read_inside_logging_splits_the_logging_time(clock, hand):
    train_step(clock, hand)
    with clock.phase("logging"):
        hand.now += 0.25
        first = clock.read()
        hand.now += 0.5
    train_step(clock, hand)
    assert first["Throughput/Step_Seconds_Logging"] == pytest.approx(0.25)
    assert clock.read()["Throughput/Step_Seconds_Logging"] == pytest.approx(0.5)


def test_an_error_inside_a_phase_ends_it(clock, hand):
    with pytest.raises(KeyError), clock.phase("data"):
        raise KeyError
    hand.now += 5.0
    clock.count(tokens=1, supervised=1, samples=1)
    assert clock.read()["Throughput/Step_Seconds_Data"] == 0.0


def test_no_time_no_rate(clock):
    with clock.phase("data"):
        pass
    clock.count(tokens=1, supervised=1, samples=1)
    rates = clock.read()
    assert "Throughput/Tokens_Per_Second" not in rates
    assert rates["Throughput/Step_Seconds"] == 0.0


def test_an_unknown_phase_is_our_mistake(clock):
    with pytest.raises(AssertionError), clock.phase("lunch"):
        pass


def test_the_default_clock_is_the_monotonic_one(monkeypatch):
    monkeypatch.setattr("time.time", lambda: math.nan)
    clock = StepClock()
    with clock.phase("data"):
        pass
    clock.count(tokens=5, supervised=5, samples=5)
    assert clock.read()["Throughput/Tokens_Per_Second"] > 0


# ---- the device's timeline ----------------------------------------------------------------------


def device_step(clock, device, waiting_for_data=0.0):
    with clock.phase("data"):
        device.work(waiting_for_data)  # the queue ran dry while the host was reading
    with clock.phase("forward_backward"):
        device.work(0.8)
    with clock.phase("optimizer"):
        device.work(0.2)
    clock.count(tokens=1000, supervised=500, samples=2)


def test_only_steps_that_the_device_has_finished_are_reported():
    device = HandDevice()
    clock = StepClock(timeline=device)
    for _ in range(3):
        device_step(clock, device)
    assert clock.read() == {}  # all queued, nothing done: no wait for it
    device.finished = 2.0
    rates = clock.read()
    assert rates["Throughput/Tokens_Per_Second"] == pytest.approx(1000)
    assert rates["Throughput/Step_Seconds_Forward_Backward"] == pytest.approx(0.8)
    device.finished = 3.0
    assert clock.read()["Throughput/Tokens_Per_Second"] == pytest.approx(1000)


def test_data_time_on_the_device_is_the_time_it_stood_waiting():
    device = HandDevice()
    clock = StepClock(timeline=device)
    device_step(clock, device, waiting_for_data=1.0)
    device.finished = device.queued
    rates = clock.read()
    assert rates["Throughput/Step_Seconds_Data"] == pytest.approx(1.0)
    assert rates["Throughput/Tokens_Per_Second"] == pytest.approx(500)


def test_evaluation_is_left_out_on_the_device_even_with_training_work_still_queued():
    device = HandDevice()
    clock = StepClock(timeline=device)
    device_step(clock, device)
    with clock.phase("evaluation"):
        device.work(30.0)
    device_step(clock, device)
    device.finished = device.queued
    assert clock.read()["Throughput/Tokens_Per_Second"] == pytest.approx(1000)


def test_cuda_events_need_no_synchronisation():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here; a hand-made device queue stands in for it above")
    clock = StepClock(timeline=CudaTimeline())
    matrix = torch.randn(1024, 1024, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            with clock.phase("forward_backward"):
                matrix = matrix @ matrix
            clock.count(tokens=1, supervised=1, samples=1)
        clock.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with clock.phase("forward_backward"):
        matrix @ matrix
    clock.count(tokens=1, supervised=1, samples=1)
    torch.cuda.synchronize()
    assert clock.read()["Throughput/Step_Seconds_Forward_Backward"] > 0


# ---- energy -------------------------------------------------------------------------------------


def test_energy_per_1k_tokens_is_the_counters_difference(clock, hand):
    tag = "Throughput/Energy_J_Per_1K_Tokens"
    assert tag not in clock.read({"GPU_0/Energy_J": 5.0, "GPU_1/Energy_J": 50.0})
    train_step(clock, hand)
    assert tag not in clock.read({})  # no new sample: its tokens wait for the next one
    train_step(clock, hand)
    rates = clock.read({"GPU_0/Energy_J": 305.0, "GPU_1/Energy_J": 150.0, "GPU_0/Power_W": 1e9})
    assert rates[tag] == pytest.approx(200.0)


@pytest.mark.parametrize(
    "later", [{"GPU_0/Energy_J": 1.0}, {"GPU_0/Energy_J": 90.0, "GPU_1/Energy_J": 90.0}]
)
def test_energy_is_absent_when_a_counter_restarts_or_a_gpu_comes_or_goes(clock, hand, later):
    clock.read({"GPU_0/Energy_J": 5.0})
    train_step(clock, hand)
    assert "Throughput/Energy_J_Per_1K_Tokens" not in clock.read(later)


# ---- FLOPs and peak -----------------------------------------------------------------------------


def test_mfu_is_flops_over_time_and_peak(hand):
    clock = StepClock(peak_flops=1e6, timeline=hand)
    train_step(clock, hand, flops=4e5)
    assert clock.read()["Throughput/MFU_Percent"] == pytest.approx(40.0)


def test_mfu_is_absent_for_an_unknown_gpu_or_unknown_flops(hand):
    for clock, flops in ((StepClock(timeline=hand), 4e5), (StepClock(peak_flops=1e6), 0.0)):
        train_step(clock, hand, flops=flops)
        assert "Throughput/MFU_Percent" not in clock.read()


# ---- several ranks ------------------------------------------------------------------------------


def test_waiting_for_other_ranks_is_not_a_ranks_own_time():
    hand = HandClock()
    clock = StepClock(timeline=hand)
    with clock.phase("data"):
        hand.now += 1.0
    with clock.phase("forward_backward"):
        hand.now += 2.0
        clock.gradients_are_ready()
        hand.now += 5.0
    with clock.phase("optimizer"):
        hand.now += 0.5
    clock.count(tokens=1, supervised=1, samples=1)
    read = clock.read()
    assert clock.own_seconds == pytest.approx(3.0)
    assert read["Throughput/Step_Seconds_Forward_Backward"] == pytest.approx(7.0)
    assert read["Throughput/Step_Seconds"] == pytest.approx(8.5)


def test_without_a_wait_own_time_is_unknown():
    hand = HandClock()
    clock = StepClock(timeline=hand)
    train_step(clock, hand)
    clock.read()
    assert clock.own_seconds is None


@pytest.mark.parametrize(
    ("seconds", "percent", "rank"),
    [([1.0, 1.0, 1.5, 1.0], 50.0, 2), ([3.0, 1.0], 50.0, 0), ([2.0, 2.0], 0.0, 0)],
)
def test_the_slowest_rank_against_the_median(seconds, percent, rank):
    assert straggler(seconds) == (pytest.approx(percent), rank)
