"""Parts recombine to the whole, and what had no token is absent.

uv run pytest tests/evaluation/test_loss_metrics.py
"""

import math

import numpy as np
import pytest

from finetuning.data.token_table import Segment
from finetuning.evaluation.loss_metrics import LossMetrics

LABELS = np.array([0, 1, 1, 2])


def truncation() -> LossMetrics:
    return LossMetrics({"By_Difficulty_": (("1", "2", "3"), LABELS)})


def sums(seed: int = 0, documents: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 50, (documents, 5))
    counts[:, Segment.PROMPT] = 0
    losses = counts * rng.uniform(0.5, 3, counts.shape)
    return np.stack([losses, counts // 2, counts], axis=2)


def test_segments_and_groups_recombine_to_the_loss():
    per_document = sums()
    book = truncation()
    metrics = book.training_metrics(book.vector(range(4), per_document))
    total = per_document.sum(axis=(0, 1))
    assert metrics["Training/Loss"] == pytest.approx(total[0] / total[2], rel=1e-12)
    by_segment = per_document.sum(axis=0)
    parts = {
        "Thinking/Loss": Segment.THINKING,
        "Boundary/Close_Loss": Segment.CLOSE,
        "Answer/Loss": Segment.ANSWER,
        "Boundary/EOS_Loss": Segment.END,
    }
    recombined = sum(metrics[tag] * by_segment[segment, 2] for tag, segment in parts.items())
    assert recombined / total[2] == pytest.approx(metrics["Training/Loss"], rel=1e-12)
    counts = [per_document[g == LABELS, :, 2].sum() for g in range(3)]
    groups = [metrics[f"Training/By_Difficulty_{g}"] for g in (1, 2, 3)]
    assert np.dot(counts, groups) / total[2] == pytest.approx(metrics["Training/Loss"], rel=1e-12)
    assert metrics["Training/Perplexity"] == pytest.approx(math.exp(metrics["Training/Loss"]))


def test_a_mean_over_two_batches_is_over_their_tokens_not_of_their_means():
    book, a, b = truncation(), sums(1), sums(2) * 10
    together = book.vector(range(4), a) + book.vector(range(4), b)
    both = np.concatenate([a, b]).sum(axis=(0, 1))
    assert book.loss(together) == pytest.approx(both[0] / both[2], rel=1e-12)
    means = [book.loss(book.vector(range(4), x)) for x in (a, b)]
    assert abs(book.loss(together) - np.mean(means)) > 1e-3, "the test could not tell them apart"


def test_what_had_no_token_is_absent_and_a_nan_is_shown():
    book = truncation()
    per_document = sums()
    per_document[:, Segment.THINKING] = 0
    per_document[0] = 0
    metrics = book.training_metrics(book.vector(range(4), per_document))
    assert "Thinking/Loss" not in metrics
    assert "Training/By_Difficulty_1" not in metrics
    assert "Thinking/Loss_By_Position_01" not in metrics
    per_document[1, Segment.ANSWER, 0] = math.nan
    metrics = book.training_metrics(book.vector(range(4), per_document))
    assert math.isnan(metrics["Training/Loss"])
    assert math.isnan(metrics["Answer/Loss"])
    assert not math.isnan(metrics["Boundary/EOS_Loss"])


def test_positions_and_premature_close_are_means_over_their_tokens():
    book = truncation()
    buckets = np.zeros((10, 2))
    buckets[0], buckets[9] = (6.0, 3.0), (1.0, 4.0)
    vector = book.vector(range(4), sums(), buckets, np.array([0.5, 5.0]))
    metrics = book.training_metrics(vector)
    assert metrics["Thinking/Loss_By_Position_01"] == 2.0
    assert metrics["Thinking/Loss_By_Position_10"] == 0.25
    assert "Thinking/Loss_By_Position_05" not in metrics
    assert metrics["Thinking/Premature_Close_Probability"] == pytest.approx(0.1)


def test_eval_metrics_have_their_own_tags():
    book = truncation()
    metrics = book.eval_metrics(book.vector(range(4), sums()))
    assert {"Eval/Loss", "Eval/Thinking_Loss", "Eval/Answer_Loss", "Eval/By_Difficulty_2"} <= set(
        metrics
    )
    assert all(tag.startswith("Eval/") for tag in metrics)
