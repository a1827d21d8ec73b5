"""How much learning a run has done and has yet to come: its clock, and how far the rate has been annealed.

Learning is counted in the sum of the learning rates (Tissue et al. 2024, arXiv:2408.11029), in steps where
no rate is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AHEAD = 65  # points between now and the run's end


@dataclass(frozen=True)
class Course:
    """Clocks and annealing at each bin, and behind them now, where the end is measured, and at the last step.

    clock: (bins + 3,), 1 at the last step.
    annealed: (bins + 3,) share of the peak rate by which the rate has been lowered, and the loss felt it.
    last_rate: the rate at the run's end, as a share of its peak; 1 where it is not known.
    """

    clock: np.ndarray
    annealed: np.ndarray
    last_rate: float


def course(
    steps: np.ndarray, rates: np.ndarray | None, times: tuple[float, float, float], lag: float
) -> Course:
    """The course of a run with bins at `steps` (n,) and learning rates (n,), None where unknown.

    times: the last step so far, the step where the end is measured, and the planned last step.

    Annealing is a convolution over the schedule, that to come included: each lowering of the rate counts
    with 1 - exp(-d/lag), d being the learning (sum of rates, of the run's whole) since then.
    """
    at, (now, _, total) = np.append(steps, times), times
    to_come = (
        None if rates is None or rates.max() <= 0 else _rates_to_come(steps, rates, now, total)
    )
    if to_come is None:
        return Course(at / total, np.zeros(len(at)), 1.0)
    places = np.concatenate([steps, np.linspace(now, total, AHEAD)])
    rate = np.concatenate([rates, to_come])
    done = np.cumsum(rate * np.diff(places, prepend=0.0))
    done /= done[-1]
    peak = int(np.argmax(rate))
    lowered = np.maximum(-np.diff(rate, prepend=rate[0]), 0) / rate[peak]
    lowered[: peak + 1] = 0
    fading = np.exp(-np.diff(done, prepend=done[0]) / lag)
    waiting, pending = np.empty(len(done)), 0.0  # what the loss has not yet felt
    for i in range(len(done)):
        pending = pending * fading[i] + lowered[i]
        waiting[i] = pending
    annealed = np.cumsum(lowered) - waiting
    clock, felt = (np.interp(at, places, values) for values in (done, annealed))
    return Course(clock, felt, float(to_come[-1] / rate[peak]))


def _rates_to_come(
    steps: np.ndarray, rates: np.ndarray, now: float, total: float
) -> np.ndarray | None:
    """The learning rate at even points from now to the end, None where it follows no known shape.

    It continues what was seen since the peak, straight or as a cosine.
    """
    peak = int(np.argmax(rates))
    t, r = steps[peak:], rates[peak:]
    if len(t) < 5:
        return None
    ahead = np.linspace(now, total, AHEAD)
    span = max(total - t[0], 1.0)
    shapes = (lambda s: (s - t[0]) / span, lambda s: np.cos(np.pi * (s - t[0]) / span))
    fits = []
    for shape in shapes:
        design = np.stack([np.ones(len(t)), shape(t)], 1)
        coef, *_ = np.linalg.lstsq(design, r, rcond=None)
        error = float(np.abs(design @ coef - r).max())
        fits.append((error, coef[0] + coef[1] * shape(ahead)))
    error, future = min(fits, key=lambda f: f[0])
    return np.clip(future, 0, rates.max()) if error < 0.1 * rates.max() else None
