"""Counters, sums and clocks of a run that stopped, died or went back are those of one that did not.

What they should be is computed by the plain reference (`tests/helpers/reference.py`), which knows no resume,
and from the samples of each step; not by an uninterrupted run of the same program.

uv run pytest -m "not long" tests/runs/test_counters.py
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from finetuning.config import DirectTrainingConfig
from finetuning.monitoring.convergence import ConvergenceMonitor
from tests.helpers.ranks import results_of
from tests.helpers.reference import PlainTraining, Reference, Sums
from tests.helpers.sessions import (
    Run,
    Session,
    assert_curve,
    assert_epochs_and_counters,
    assert_hardest,
    assert_same_adapter,
    by_step,
    do_on_ranks,
    kill_at,
    settings,
    spoil_at,
    stop_at,
    train,
    train_on_ranks,
)

pytestmark = pytest.mark.slow

PAUSE, TICK = 0.3, 10.0  # seconds of a slow update; of every update of a clock that is set


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("counters")


@pytest.fixture(scope="module")
def config(folder: Path, tiny_model: Path, cache_dir: Path) -> DirectTrainingConfig:
    """Two epochs of five steps."""
    return settings(folder, tiny_model, cache_dir, save_steps=0)


@pytest.fixture(scope="module")
def reference_of(config: DirectTrainingConfig, folder: Path) -> Callable[..., Reference]:
    """The reference for a run's steps: with updates that are left out, with more evaluations."""

    @cache
    def reference(steps: tuple, left_out: tuple, eval_steps: int) -> Reference:
        training = PlainTraining(config, folder)
        return training.train(steps, left_out=left_out, eval_steps=eval_steps)

    def of(run: Run, left_out: tuple = (), eval_steps: int = config.eval_steps) -> Reference:
        return reference(tuple(map(tuple, run.steps())), left_out, eval_steps)

    return of


# -----------------------------------------------------------------------------
# Killed


def test_an_interval_goes_on_after_a_kill(config, folder, reference_of):
    """A point every third step, a checkpoint every second one, killed in both epochs: each point is the mean
    over its own steps, though no session has made all of them."""
    config = replace(config, output_dir="killed", save_steps=2, logging_steps=3)
    for at, resume in ((5, ""), (4, "latest")):
        (ended,) = train_on_ranks(0, config, folder, before_update=kill_at(at), resume=resume)
        assert ended.exit_code == -9, ended.stderr
    run, (session,) = do_on_ranks(0, config, folder, resume="latest")
    assert len(session.updates) == 4, "from checkpoint 6"
    reference = reference_of(run)
    points = {3: range(1, 4), 6: range(4, 7), 9: range(7, 10), 10: range(10, 11)}
    sums = {n: sum((reference.steps[m - 1] for m in of), Sums()) for n, of in points.items()}
    assert_curve(run, "Training/Loss", {n: s.mean() for n, s in sums.items()})
    assert_curve(run, "Thinking/Loss", {n: s.mean("thinking") for n, s in sums.items()})
    highest = {n: max(reference.norms[m - 1] for m in of) for n, of in points.items()}
    assert_curve(run, "Training/Gradient_Norm_Max", highest, rel=1e-4)
    assert run.points["Monitoring/Resume_Count"] == {3: 0, 6: 1, 9: 2, 10: 2}
    tokens = reference.tokens_seen()
    assert run.points["Throughput/Tokens_Seen"] == {n: tokens[n - 1] for n in points}
    assert run.statistics["training"]["resume_count"] == 2
    assert_epochs(run, reference)
    assert_hardest(run, reference)
    assert_same_adapter(run, reference)


def assert_epochs(run: Run, reference: Reference, without: tuple[int, ...] = ()) -> None:
    """The mean over an epoch's steps, but for those without a finite gradient; and what was counted."""
    size = run.plan.steps_per_epoch
    for end in (size, 2 * size):
        steps = [n for n in range(end - size + 1, end + 1) if n not in without]
        mean = sum((reference.steps[n - 1] for n in steps), Sums()).mean()
        assert run.points["Epoch/Average_Loss"][end] == pytest.approx(mean, rel=2e-5)
    throughput = run.statistics["throughput"]
    assert throughput["tokens"] == reference.tokens_seen()[-1]
    assert throughput["samples"] == reference.samples_seen()[-1]


def assert_monitors(run: Run, reference: Reference) -> None:
    """What a monitor says at the end that has seen each loss once."""
    monitor = ConvergenceMonitor(run.plan.num_steps, run.plan.steps_per_epoch)
    for step, of in enumerate(reference.training, start=1):
        monitor.observe(step, of.sums.mean(), of.rate)
    last = run.plan.num_steps
    shown = {tag: run.points[tag][last] for tag in monitor.scalars()}
    assert len(shown) > 3 and shown == pytest.approx(monitor.scalars(), rel=1e-3, abs=1e-4)


# -----------------------------------------------------------------------------
# Rolled back


@pytest.mark.parametrize(("ranks", "again"), [(0, False), (0, True), (2, True)])
def test_a_rollback_in_a_resumed_epoch(config, folder, reference_of, ranks, again):
    """Stopped after step 6. Then step 9 has no finite gradient: back to step 6, and step 9 without an update,
    its gradient finite now, or not `again`. Two steps were logged, and one evaluated, that are done again."""
    accumulation = 1 if ranks else 3
    changes = {"nonfinite": "rollback", "gradient_accumulation_steps": accumulation}
    config = replace(config, output_dir=f"back-{ranks}-{again}", **changes)
    results_of(train_on_ranks(ranks, config, folder, before_update=stop_at(5), tick=TICK))
    spoil = spoil_at(*((3, 6) if again else (3,)))
    run, sessions = do_on_ranks(
        ranks, config, folder, after_backward=spoil, resume="latest", tick=TICK
    )
    last = run.plan.num_steps
    assert [len(s.updates) for s in sessions] == [last - 6 + 3] * max(ranks, 1)
    reference, spoilt = reference_of(run, (9,)), (9,) if again else ()
    known = {n: norm for n, norm in by_step(reference.norms).items() if n not in spoilt}
    assert_curve(run, "Training/Loss", by_step([sums.mean() for sums in reference.steps]))
    assert_curve(run, "Training/Gradient_Norm_Max", known, rel=1e-4)
    assert_curve(run, "Training/Learning_Rate", by_step(reference.rates), rel=1e-9)
    steps = range(1, last + 1)
    assert run.points["Monitoring/NonFinite_Steps"] == {n: int(n >= 9) for n in steps}
    assert run.points["Monitoring/Resume_Count"] == {n: int(n > 6) for n in steps}
    assert run.points["Throughput/Tokens_Seen"] == by_step(reference.tokens_seen())
    assert run.statistics["training"]["nonfinite_steps"] == [9]
    assert run.statistics["training"]["resume_count"] == 1
    assert_curve(run, "Eval/Loss", {n: s.mean() for n, s in reference.held_out.items()})
    assert_epochs(run, reference, without=spoilt)
    assert_hardest(run, reference, spoilt=spoilt)
    assert_same_adapter(run, reference)
    assert_monitors(run, reference)
    # The lost updates of steps 7 to 9 belong to the epoch of step 6.
    size, total = run.plan.steps_per_epoch, TICK * (last + 3)
    lost = 3 * TICK if size > 6 else 0
    epochs = {size: TICK * size + lost, 2 * size: total - TICK * size - lost}
    assert run.points["Epoch/Duration_Seconds"] == epochs
    assert run.statistics["throughput"]["training_seconds"] == total


# -----------------------------------------------------------------------------
# Patience


def test_patience_is_counted_over_a_resume(config, folder, reference_of):
    """From step 5 on no update happens: an equal held-out loss is no gain, whichever session measures it."""
    changes = {"nonfinite": "skip", "eval_steps": 1, "early_stopping_patience": 3}
    config = replace(config, output_dir="patient", save_steps=5, **changes)
    kill, spoil = kill_at(6), spoil_at(5, 6)
    (ended,) = train_on_ranks(0, config, folder, before_update=kill, after_backward=spoil)
    assert ended.exit_code == -9, ended.stderr
    spoil = spoil_at(1, 2, 3, 4)
    run, (session,) = do_on_ranks(0, config, folder, after_backward=spoil, resume="latest")
    reference = reference_of(run, tuple(range(5, 11)), 1)
    step, best, without_gain = reference.best()[7]
    assert (step, without_gain) == (4, 3), "nothing to see"
    assert len(session.updates) == 2, "steps 6 and 7"
    training = run.statistics["training"]
    assert (training["steps"], training["best_step"]) == (7, 4)
    assert training["best_eval_loss"] == pytest.approx(best, rel=2e-5)
    assert training["first_eval_loss"] == pytest.approx(reference.held_out[0].mean(), rel=2e-5)
    assert training["nonfinite_steps"] == [5, 6, 7]
    held_out = {n: s.mean() for n, s in reference.held_out.items() if n <= 7}
    assert_curve(run, "Eval/Loss", held_out)
    bad = {n: max(0, n - 4) for n in range(1, 8)}
    assert run.points["Monitoring/NonFinite_Steps"] == bad


# -----------------------------------------------------------------------------
# Clocks and monitors


def pause_and_stop(at: int, update: int) -> None:
    """The first update of a session is slow."""
    if update == 1:
        time.sleep(PAUSE)
    stop_at(at)(update)


def spans(session: Session, first: int, last: int) -> float:
    """Seconds between two updates of a session."""
    return session.updates[last - 1].seconds - session.updates[first - 1].seconds


def test_times_and_monitors_of_three_sessions(config, folder, reference_of):
    config = replace(config, output_dir="timed")
    one = train(config, folder, before_update=partial(pause_and_stop, 2))
    two = train(config, folder, before_update=partial(pause_and_stop, 3), resume="latest")
    run, (three,) = do_on_ranks(0, config, folder, resume="latest")
    assert [len(s.updates) for s in (one, two, three)] == [3, 4, 3]
    reference = reference_of(run)
    assert_epochs_and_counters(run, reference)
    epochs = run.points["Epoch/Duration_Seconds"]
    # The time before a session's first update is not seen from here, but for the pause.
    least = {5: PAUSE + spans(one, 1, 3) + PAUSE + spans(two, 1, 2), 10: spans(two, 3, 4)}
    least[10] += spans(three, 1, 3)
    for step, seconds in least.items():
        assert epochs[step] >= seconds, (epochs, least)
        speed = run.points["Epoch/Steps_Per_Second"][step]
        assert speed == pytest.approx(5 / epochs[step], rel=1e-5)
    total = run.statistics["throughput"]["training_seconds"]
    sessions = sum(session.seconds for session in (one, two, three))
    assert sum(least.values()) <= sum(epochs.values()) <= total <= sessions
    speed = run.statistics["throughput"]["tokens_per_second"]
    assert speed == pytest.approx(reference.tokens_seen()[-1] / total)
    assert_monitors(run, reference)
