"""Per-document loss sums to the numbers that are shown: by segment, position, difficulty, source.

One step is one flat vector of sums and counts. Vectors add up over micro-batches, ranks and steps, and
are divided only when they are shown, so every mean is over the tokens it claims and the parts recombine
to the whole.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from finetuning.data.token_table import NUM_SEGMENTS, NUM_THINKING_BUCKETS, Segment

_SEGMENT_END = NUM_SEGMENTS * 3  # (segment, [loss, correct, count])
_BUCKET_END = _SEGMENT_END + NUM_THINKING_BUCKETS * 2  # (tenth, [loss, count])
_CLOSE_END = _BUCKET_END + 2  # [sum of p(</think>), count]


class LossMetrics:
    """The layout of a step's vector, and its translation into metrics.

    Args:
        groups: tag stem -> (group names, (n,) group of each document); a document is in one group per
            stem, so the groups of a stem recombine to the whole. Tag: `<prefix>/<stem><name>`.
    """

    def __init__(self, groups: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> None:
        self._groups = dict(groups)
        self.size = _CLOSE_END + sum(2 * len(names) for names, _ in groups.values())

    def zeros(self) -> np.ndarray:
        """A vector of nothing seen."""
        return np.zeros(self.size)

    def vector(
        self,
        documents: Sequence[int],
        per_document: np.ndarray,
        thinking_buckets: np.ndarray | None = None,
        premature_close: np.ndarray | None = None,
    ) -> np.ndarray:
        """(size,) float64 of one micro-batch.

        Args:
            documents: D document indices.
            per_document: (D, segments, 3) loss sum, correct count, token count.
            thinking_buckets: (10, 2) loss sum and count by tenth of the chain of thought.
            premature_close: (2,) sum of p(</think>) over thinking tokens, and their count.
        """
        vector = self.zeros()
        per_document = np.asarray(per_document, dtype=np.float64)
        vector[:_SEGMENT_END] = per_document.sum(axis=0).ravel()
        if thinking_buckets is not None:
            vector[_SEGMENT_END:_BUCKET_END] = np.asarray(thinking_buckets).ravel()
        if premature_close is not None:
            vector[_BUCKET_END:_CLOSE_END] = np.asarray(premature_close)
        totals = per_document[:, :, [0, 2]].sum(axis=1)  # (D, [loss, count])
        start = _CLOSE_END
        for names, labels in self._groups.values():
            block = vector[start : start + 2 * len(names)].reshape(-1, 2)
            np.add.at(block, labels[np.asarray(documents)], totals)
            start += block.size
        return vector

    def loss(self, vector: np.ndarray) -> float:
        """Mean loss over all supervised tokens, nats; NaN when there are none."""
        total = self._segments(vector).sum(axis=0)
        return float(total[0] / total[2]) if total[2] else math.nan

    def num_targets(self, vector: np.ndarray) -> int:
        """Supervised tokens in the vector."""
        return int(self._segments(vector)[:, 2].sum())

    def training_metrics(self, vector: np.ndarray) -> dict[str, float]:
        """Training/, Thinking/, Answer/ and Boundary/ tags; what had no token is absent."""
        segments = self._segments(vector)
        total, thinking, answer = (
            segments.sum(axis=0),
            *segments[[Segment.THINKING, Segment.ANSWER]],
        )
        buckets = vector[_SEGMENT_END:_BUCKET_END].reshape(-1, 2)
        ratios = {
            "Training/Loss": (total[0], total[2]),
            "Training/Token_Accuracy": (total[1], total[2]),
            "Thinking/Loss": (thinking[0], thinking[2]),
            "Thinking/Accuracy": (thinking[1], thinking[2]),
            "Thinking/Tokens_Percent": (100 * thinking[2], total[2]),
            "Thinking/Premature_Close_Probability": vector[_BUCKET_END:_CLOSE_END],
            "Answer/Loss": (answer[0], answer[2]),
            "Answer/Accuracy": (answer[1], answer[2]),
            "Answer/Tokens_Percent": (100 * answer[2], total[2]),
            "Boundary/Close_Loss": segments[Segment.CLOSE, [0, 2]],
            "Boundary/EOS_Loss": segments[Segment.END, [0, 2]],
            **{f"Thinking/Loss_By_Position_{i:02d}": b for i, b in enumerate(buckets, start=1)},
            **self._group_ratios("Training", vector),
        }
        return _with_perplexity(_divided(ratios), "Training")

    def eval_metrics(self, vector: np.ndarray) -> dict[str, float]:
        """Eval/ tags of held-out data; what had no token is absent."""
        segments = self._segments(vector)
        total = segments.sum(axis=0)
        ratios = {
            "Eval/Loss": (total[0], total[2]),
            "Eval/Token_Accuracy": (total[1], total[2]),
            "Eval/Thinking_Loss": segments[Segment.THINKING, [0, 2]],
            "Eval/Answer_Loss": segments[Segment.ANSWER, [0, 2]],
            "Eval/Close_Loss": segments[Segment.CLOSE, [0, 2]],
            "Eval/EOS_Loss": segments[Segment.END, [0, 2]],
            **self._group_ratios("Eval", vector),
        }
        return _with_perplexity(_divided(ratios), "Eval")

    def _segments(self, vector: np.ndarray) -> np.ndarray:
        return vector[:_SEGMENT_END].reshape(NUM_SEGMENTS, 3)

    def _group_ratios(self, prefix: str, vector: np.ndarray) -> dict[str, np.ndarray]:
        ratios, start = {}, _CLOSE_END
        for stem, (names, _) in self._groups.items():
            block = vector[start : start + 2 * len(names)].reshape(-1, 2)
            ratios.update({f"{prefix}/{stem}{n}": b for n, b in zip(names, block, strict=True)})
            start += block.size
        return ratios


def eval_errors(per_document: np.ndarray) -> dict[str, float]:
    """Standard errors of the Eval/ tags of (D, segments, 3) sums, as `standard_errors` says."""
    whole = per_document.sum(axis=1)
    return standard_errors(
        {
            "Eval/Loss": whole[:, [0, 2]],
            "Eval/Token_Accuracy": whole[:, [1, 2]],
            "Eval/Thinking_Loss": per_document[:, Segment.THINKING, [0, 2]],
            "Eval/Answer_Loss": per_document[:, Segment.ANSWER, [0, 2]],
        }
    )


def standard_errors(ratios: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`<tag>_Error` of a mean per token, as other documents would give another: (D, 2) sums and tokens.

    That of a ratio of sums over documents (Cochran 1977, §6.4); absent for fewer than two with a token.
    """
    found = {f"{tag}_Error": _standard_error(*totals.T) for tag, totals in ratios.items()}
    return {tag: error for tag, error in found.items() if not math.isnan(error)}


def _standard_error(total: np.ndarray, count: np.ndarray) -> float:
    total, count = total[count > 0], count[count > 0]
    number = len(count)
    if number < 2:
        return math.nan
    spread = ((total - total.sum() / count.sum() * count) ** 2).sum()
    return float(math.sqrt(spread * number / (number - 1)) / count.sum())


def _divided(ratios: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Sum over count. Without a count the tag is absent; a NaN sum is a NaN that is shown."""
    return {tag: float(total / count) for tag, (total, count) in ratios.items() if count}


def _with_perplexity(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    loss = metrics.get(f"{prefix}/Loss")
    if loss is not None:
        metrics[f"{prefix}/Perplexity"] = math.exp(loss) if not loss > 700 else math.inf
    return metrics
