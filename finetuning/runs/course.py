"""How high a loss was in the parts of a run, each with what chance does to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from finetuning.common.formatting import four_digits
from finetuning.runs.before_after import Measured
from finetuning.runs.recorded import Points

FEWEST = 16  # logged points of which something is said
PARTS = 8
TRIFLE = 0.02  # of the first loss: what rises by less has not risen


@dataclass(frozen=True)
class Course:
    """Levels of a training loss, nats/token: means over logged points, with their intervals of 95%.

    The error of a mean of n points is s/sqrt(n). s² is half the mean square of the differences between
    neighbours (von Neumann 1941), to which a trend adds little; at least that of the last half, as a share
    of the level, since few points say little of their scatter.
    """

    first: Measured  # the first point: the run has hardly made an update
    early: Measured  # the first tenth
    third: Measured  # the third quarter
    end: Measured  # the last quarter
    parts: tuple[Measured, ...]  # `PARTS` of equal length

    @classmethod
    def of(cls, points: Points) -> "Course | None":
        """None for a run of few points, for one that ends without a number, and where a loss is below 0 or
        begins with it: of those no share can be taken."""
        values = [value for _, value in points if math.isfinite(value)]
        n, quarter = len(values), len(points) // 4
        lost = quarter - sum(math.isfinite(value) for _, value in points[len(points) - quarter :])
        if n < FEWEST or 2 * lost >= quarter or min(values) < 0 or values[0] <= 0:
            return None
        half = values[n // 2 :]
        share = _scatter(half) / fmean(half) if fmean(half) else 0.0
        cuts = [n * part // PARTS for part in range(PARTS + 1)]
        return cls(
            _level(values[:1], share),
            _level(values[: max(2, n // 10)], share),
            _level(values[n // 2 : 3 * n // 4], share),
            _level(values[3 * n // 4 :], share),
            tuple(_level(values[a:b], share) for a, b in pairwise(cuts)),
        )

    @property
    def lowest(self) -> Measured:
        """The lowest part before the last quarter."""
        return min(self.parts[: -PARTS // 4], key=lambda part: part.value)

    def is_above(self, before: Measured, share: float) -> bool:
        """Whether the end is above an earlier level, by a share of it at least and by more than chance."""
        least = max(share * before.value, TRIFLE * self.first.value)
        return self.end.value - before.value > least and self.end.differs_from(before)


def _level(values: Sequence[float], share: float) -> Measured:
    level = fmean(values)
    error = max(share * level, _scatter(values)) / math.sqrt(len(values))
    return Measured(level, level - 2 * error, level + 2 * error, four_digits(level))


def _scatter(values: Sequence[float]) -> float:
    """Standard deviation of single values around their trend; 0 of one."""
    steps = [(b - a) ** 2 for a, b in pairwise(values)]
    return math.sqrt(fmean(steps) / 2) if steps else 0.0
