"""Where the loss drops because an epoch ends: epochs that are known, or found in the curve."""

from __future__ import annotations

import math

import numpy as np

MOST_EPOCHS = 1000  # a plan of more says nothing about drops to come


def find_epochs(steps: np.ndarray, losses: np.ndarray, now: float, total: float) -> float | None:
    """Steps per epoch when the curve shows a staircase whose period divides the run, else None.

    Every boundary seen must drop by over 4% and 5 sigma; of two to ten epochs the surest wins.
    """
    surest, found = 5.0, None
    for epochs in range(2, 11):
        period = total / epochs
        sureness = _sureness(steps, losses, period, now)
        if sureness > surest:
            surest, found = sureness, period
    return found


def _sureness(steps: np.ndarray, losses: np.ndarray, period: float, now: float) -> float:
    """Smallest drop at a multiple of `period` seen so far, in sigma; 0 where one does not drop."""
    sureness = math.inf
    for boundary in np.arange(period, now, period):
        change, error = _change(steps, losses, boundary, 0.4 * period)
        if not math.isfinite(error):
            continue
        if change > -0.04:
            return 0.0
        sureness = min(sureness, -change / error)
    return sureness if math.isfinite(sureness) else 0.0


def _change(
    steps: np.ndarray, losses: np.ndarray, boundary: float, reach: float
) -> tuple[float, float]:
    """Change of the log loss at `boundary` beside a common slope, and its error (inf: too few bins)."""
    near = np.abs(steps - boundary) <= reach
    after = steps[near] > boundary
    if min(int(after.sum()), int((~after).sum())) < 3:
        return 0.0, math.inf
    t = (steps[near] - boundary) / reach
    design = np.stack([np.ones(len(t)), t, after.astype(float)], 1)
    y = np.log(np.maximum(losses[near], 1e-12))
    coef, *_ = np.linalg.lstsq(design, y, rcond=None)
    variance = ((y - design @ coef) ** 2).sum() / max(1, len(y) - 3)
    cov = np.linalg.inv(design.T @ design) * variance
    return float(coef[2]), float(math.sqrt(cov[2, 2]) + 1e-9)


def boundaries_passed(
    at: np.ndarray, period: float | None, width: float, total: float
) -> np.ndarray | None:
    """Which epoch boundary lies before each place: 0 or 1, (places, boundaries).

    None where there is no staircase to see: no epochs, one epoch, more than `MOST_EPOCHS`, or epochs under
    four bins of `width`. A boundary in the last 3% of an epoch counts as the run's end.
    """
    if not period or period < 4 * width or not period < total <= MOST_EPOCHS * period:
        return None
    boundaries = np.arange(1, math.ceil(total / period - 0.03)) * period
    return (at[:, None] > boundaries[None, :]).astype(float)
