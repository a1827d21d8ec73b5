"""What chance does is measured here as often as the formulas say that it does it."""

import math

import numpy as np
import pytest

from finetuning.monitoring.alerts import AlertMonitor
from finetuning.monitoring.chances import above_tail, in_a_row, least_sigmas, news_above, too_high
from finetuning.monitoring.detector_memory import KEEP, AlertLimits, DetectorMemory
from finetuning.monitoring.loss_detectors import _sudden, divergence
from finetuning.monitoring.model_detectors import source_regression


def rate(detector, rows, runs: int) -> float:
    """Share of runs in which the detector speaks; `rows` makes one of a generator."""
    loud = 0
    for seed in range(runs):
        memory = DetectorMemory(AlertLimits(), {})
        found = [detector(memory, row) for row in rows(np.random.default_rng(seed))]
        loud += any(f is not None and f is not KEEP for f in found)
    return loud / runs


def test_the_union_bound_grows_with_looks_and_series():
    assert least_sigmas(100) == pytest.approx(4.753 * math.sqrt(2), rel=1e-3)  # Q(1e-6)
    assert least_sigmas(10) < least_sigmas(100) < least_sigmas(100, 8) < least_sigmas(100_000)


def test_losses_are_too_high_by_their_order_or_by_their_height():
    assert not too_high(4, [2.0] * 3, 1.0) and too_high(4, [2.0] * 4, 1.0)  # 1 of 70 orders
    assert not too_high(3, [2.0] * 5, 1.0) and too_high(3, [2.0] * 6, 1.0)  # 1 of 84
    assert too_high(1, [5.9] * 3, 1.0) and not too_high(1, [5.8] * 3, 1.0)  # 200 times the stake
    assert not too_high(1, [500.0] * 2, 1.0)


@pytest.mark.parametrize(("share", "most"), [(0.05, 0.001), (0.25, 0.01), (0.6, 0.04)])
def test_two_kinds_of_rows_explode_as_rarely_as_said(share, most):
    """p^3 (1-p)^4 + p^4 (1-p)^2 (2-p), and what 300 such runs may differ from it by three sigma."""

    def rows(rng):
        hard = rng.random(32) < share
        return [{"Training/Loss": float(x)} for x in np.where(hard, 1.8, 0.5)]

    assert rate(divergence, rows, 300) <= most + 3 * math.sqrt(most / 300)


def test_longer_runs_ask_for_more_losses_in_a_row():
    """C(64, r) against 69.3 times the losses: 41,664, 635,376 and 7,624,512 cases."""
    assert [in_a_row(n) for n in (1, 601, 602, 9_166, 9_167)] == [3, 3, 4, 4, 5]


def test_long_runs_of_scattered_losses_do_not_jump_by_chance():
    """Lognormal, sigma 1: with three in a row 4 of 16 runs of 5,000 had such a place."""

    def rows(rng):
        return [{"Training/Loss": math.exp(rng.normal())} for _ in range(5000)]

    def sudden(memory, metrics):
        divergence(memory, metrics)
        return _sudden(memory)

    assert rate(sudden, rows, 6) == 0


def test_equal_sources_get_worse_by_chance_in_few_runs():
    def rows(rng):
        return [
            {f"Training/By_Source/{n}": math.exp(0.15 * rng.normal()) for n in range(3)}
            for _ in range(300)
        ]

    assert rate(source_regression, rows, 30) <= 2 / 30


def test_a_tail_is_as_long_as_its_peaks_say():
    assert above_tail([1.0], 4.0, 0.1) == pytest.approx(1.1)
    assert above_tail([3.0, 2.0, 1.0], 2.0, 0.1) == pytest.approx(3 + 2 * 1.5 / math.log(2))
    assert above_tail([3.0, 2.0, 1.0], 0.0, 0.1, place=1) == pytest.approx(2.1)


def test_what_was_as_high_before_is_no_news():
    """None before a hundred steps, then the first of its kind, then a second one among two hundred."""
    memory = DetectorMemory(AlertLimits(), {})
    news = []
    for step in range(1, 400):
        log = 1.0 if step in (50, 150, 250, 300) else 0.0
        limit = news_above(memory, "loss", log, 0.0, 0.2)
        news += [step] * (log > limit)
        assert (limit == math.inf) == (step < 99)
    assert news == []  # the one at 50 was as high, and from 200 on those at 50 and 150
    memory = DetectorMemory(AlertLimits(), {})
    logs = [1.0 if step in (150, 250, 300) else 0.0 for step in range(1, 400)]
    news = [s for s, x in enumerate(logs, 1) if x > news_above(memory, "loss", x, 0.0, 0.2)]
    assert news == [150, 250]


def test_a_step_is_news_early_where_every_row_has_been_seen():
    """After 31 values instead of 98, but not if it was as high in the epoch that has shown all."""
    for before, news in ((None, [40]), (10, [])):
        memory = DetectorMemory(AlertLimits(), {})
        logs = [1.0 if step in (before, 40) else 0.0 for step in range(1, 80)]
        limits = [
            news_above(memory, "loss", x, 0.0, 0.2, all_seen=s > 20) for s, x in enumerate(logs, 1)
        ]
        assert [s for s, x in enumerate(logs, 1) if x > limits[s - 1]] == news
        assert limits[29] == math.inf and limits[30] < math.inf


@pytest.mark.parametrize("first", [0.05, 1, 0, 2.5])
def test_an_epoch_after_the_first_logged_step_has_shown_every_row(first):
    """Epochs as a share, counted from 1, and from 0; a log that begins in the middle of a run."""
    memory = DetectorMemory(AlertLimits(), {})
    assert not memory.shown_all()
    memory.end_row(10, first)
    memory.end_row(200, first + 0.99)
    assert not memory.shown_all()
    memory.end_row(210, first + 1)
    assert memory.shown_all()
    assert memory.shown_all(210) and not memory.shown_all(21)  # one of ten steps
    memory.end_row(220, None)
    assert memory.shown_all()


def test_a_spike_in_the_second_epoch_is_told_before_a_hundred_losses():
    rng = np.random.default_rng(0)
    losses = [1 + 0.05 * rng.normal() for _ in range(90)]
    losses[60] = 3.0
    for length, expected in ((40, [60]), (200, [])):
        monitor = AlertMonitor(settings={"seed": 1})
        raised = [
            step
            for step, loss in enumerate(losses)
            for alert in monitor.observe(
                step, {"Training/Loss": loss, "Training/Epoch": (step + 1) / length}
            )
            if alert.name == "Loss_Spike"
        ]
        assert raised == expected


@pytest.mark.parametrize(("settings", "news"), [({"seed": 1}, [60]), ({}, [])])
def test_a_loss_of_another_tool_may_be_that_of_one_step(settings, news):
    """Ours is the mean of all steps since the one before, so that one epoch has shown every row."""
    losses = [1 + 0.05 * math.sin(7 * i) for i in range(90)]
    losses[60] = 3.0
    monitor = AlertMonitor(settings=settings)
    raised = [
        place
        for place, loss in enumerate(losses)
        for alert in monitor.observe(
            20 * place, {"Training/Loss": loss, "Training/Epoch": (place + 1) / 40}
        )
        if alert.name == "Loss_Spike"
    ]
    assert raised == news
