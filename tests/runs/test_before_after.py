"""What is called better and worse, and what the base is.

uv run pytest tests/runs/test_before_after.py
"""

import math

import numpy as np
import pytest

from finetuning.evaluation.exactness import with_interval
from finetuning.runs.before_after import Measured, changes, start_name

LOSS, VALID, TERMS, KL = (
    "Eval/Loss",
    "Eval/Format_Valid_Rate",
    "Eval/Term_Recall",
    "Forgetting/KL_General",
)


def series(*evaluations: tuple[int, dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in evaluations:
        for tag, value in metrics.items():
            found.setdefault(tag, []).append((step, value))
    return found


def verdict(before: dict[str, float], after: dict[str, float]) -> str:
    (row,) = changes(series((0, before), (10, after)))
    return row.verdict


def loss(value: float, error: float = 0.1) -> dict[str, float]:
    return {LOSS: value, f"{LOSS}_Error": error}


def rate(good: int, count: int) -> dict[str, float]:
    return with_interval(VALID, [1.0] * good + [0.0] * (count - good))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (loss(2.0), loss(1.7), "better"),  # 0.3 > 2 · √(0.1² + 0.1²) = 0.28
        (loss(2.0), loss(1.75), ""),
        (loss(2.0), loss(2.25), ""),
        (loss(2.0), loss(2.3), "worse"),
        (loss(2.0), loss(math.nan, math.nan), ""),
        (loss(math.nan, math.nan), loss(2.0), ""),
        ({LOSS: 2.0}, {LOSS: 1.0}, ""),  # of one sample nobody knows how sure it is
        (loss(2.0), {LOSS: 1.0}, ""),
        (rate(8, 16), rate(10, 16), ""),
        (rate(2, 16), rate(12, 16), "better"),
        (rate(16, 16), rate(3, 16), "worse"),
        (rate(0, 1), rate(1, 1), ""),
        ({KL: 0.0}, {KL: 3.0}, ""),
    ],
)
def test_better_and_worse_are_beyond_chance(before, after, said):
    assert verdict(before, after) == said


def test_two_models_that_are_alike_are_rarely_told_apart():
    """Rates of 16 and losses of 22 samples, of the same distribution: at most about one in twenty."""
    random = np.random.default_rng(0)
    told = 0
    for _ in range(1000):
        some = [rate(int(n), 16) for n in random.binomial(16, 0.4, 2)]
        told += bool(verdict(*some))
        samples = random.normal(2, 0.5, (2, 22))
        means, errors = samples.mean(1), samples.std(1, ddof=1) / math.sqrt(22)
        told += bool(verdict(*map(loss, means.tolist(), errors.tolist())))
    assert 20 < told < 140, "of 2,000"


def test_only_what_was_measured_before_the_first_step_is_of_the_base():
    first = (0, loss(2.0))
    later = [(10, loss(1.0) | {TERMS: 0.5}), (20, loss(1.5) | {TERMS: 0.9})]
    (row,) = changes(series(first, *later))
    assert (row.tag, row.texts) == (LOSS, ("2 ± 0.2", "1.5 ± 0.2"))
    (row,) = changes(series(first, *later), 10)
    assert row.after.value == 1.0
    assert not changes(series(*later)) and not changes(series(first))
    assert not changes(series(first, *later), 15)


def test_an_error_is_that_of_the_same_evaluation():
    found = Measured.of(series((0, loss(2.0)), (10, {LOSS: 1.0})), LOSS, 10)
    assert found.text == "1" and found.high == math.inf


def test_a_run_that_goes_on_from_an_adapter_is_not_compared_with_the_base():
    assert start_name({"config": {"init_adapter": "out/final_model"}}) == "first adapter"
    assert start_name({"config": {"init_adapter": ""}}) == start_name({}) == "base"
