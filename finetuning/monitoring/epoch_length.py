"""How many steps an epoch has, by the epoch column of a log."""

from __future__ import annotations

import math

import numpy as np

OFF = 0.1  # epochs by which a column may leave a straight line, and that line the run's start


def steps_per_epoch(steps: np.ndarray, epochs: np.ndarray, total: int) -> float | None:
    """From the steps (n,) and epochs (n,) of the rows that tell one; None where they do not say it.

    An epoch may be a share, 0.25 after a quarter, or a whole number that stays until the next one begins,
    counted from 0 or from 1. total: the last step, which ends an epoch in most runs.
    """
    sound = np.isfinite(epochs) & (epochs >= 0)
    steps, epochs = steps[sound], epochs[sound]
    if (epochs == np.floor(epochs)).all() and len(np.unique(epochs)) < len(epochs):
        return _of_whole_numbers(steps, epochs, total)
    steps, epochs = steps[epochs > 0], epochs[epochs > 0]
    if len(steps) < 2:
        return None
    passed, done = float(steps[-1] - steps[0]), float(epochs[-1] - epochs[0])
    if not (done > 0 and passed > 0 and math.isfinite(passed / done)):
        return None
    length = passed / done
    ahead = epochs - steps / length
    straight = np.abs(ahead - ahead[0]).max() <= OFF
    return length if straight and abs(ahead[0] - round(ahead[0])) <= OFF else None


def _of_whole_numbers(steps: np.ndarray, epochs: np.ndarray, total: int) -> float | None:
    """The length with which each step lies in its epoch; where many do, one that divides the run.

    None where the epochs, counted from 0 or from 1, leave it open.
    """
    found = []
    for first in (0, 1):
        begun = epochs - first
        # Whether a step at the edge of two epochs belongs to the one or the other is not known.
        low = float((steps / np.maximum(begun + 1, 1e-9)).max())
        later = begun > 0
        high = float((steps[later] / begun[later]).min()) if later.any() else math.inf
        if 0 < low <= high < math.inf:
            number = round(2 * total / (low + high))
            even = total / number if number else 0.0
            found.append(even if low <= even <= high else (low + high) / 2)
    return found[0] if len(found) == 1 else None
