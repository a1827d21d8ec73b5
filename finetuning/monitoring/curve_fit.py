"""A saturating curve through a loss history: where it will end and how much of the fall is done.

A small family of curves is fitted on a grid and every member is kept, weighted by its BIC, so that
one posterior gives the score, the forecast and their intervals; nothing can fail to converge. Plain
functions of plain arrays, without state; `convergence.py` keeps the history.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FLOOR_HORIZON = 10.0  # a power law never ends: at a constant rate its floor is at ten runs' length
ANNEALING_GAIN = 0.06  # share of the fall that a full decay of the learning rate still gives
MODEL_ERROR = 0.03  # 1 sigma that no fit knows of, as a share of the fall, per doubling of the run
UNSEEN_EPOCH = 0.04  # 1 sigma, as a share of the loss, for each kind of epoch not yet seen
NEAR = 0.02  # share of the learning so far, ahead, over which a forecast leaves the recent level
Z80 = 1.2816  # an 80% interval of the normal distribution is mean +- 1.2816 sigma


@dataclass(frozen=True)
class _Run:
    """What the family is not fitted to, but is judged by. Losses in nats."""

    start_loss: float
    noise: float  # standard deviation of one logged loss
    best: float  # lowest mean of three bins in a row
    decay: float  # the course's: how far the learning rate will still fall
    future: float  # the drops at epochs still to come, as a factor of the loss
    unseen: float  # kinds of epoch not yet seen
    unit: float  # steps of x = 1
    doublings: float  # of the steps so far, until the run's end


@dataclass(frozen=True)
class Fit:
    """What the fitted family says, now and about the run's last step. Losses in nats."""

    score: float
    score_low: float
    score_high: float
    forecast: float
    forecast_low: float
    forecast_high: float
    floor: float
    level: float
    steps_to_99: float | None


def fit_curve(
    bins: list[list],
    *,
    start_loss: float,
    now: float,
    total: float,
    steps_per_epoch: float | None = None,
    calm: float = 1.0,
) -> Fit:
    """Fit the family to the bins and read score and forecast off its posterior.

    bins: rows [count, sum of steps, sum of losses, sum of learning rates or None].

    Family: L(x) = c + a g(x), a >= 0, c >= 0, with g = 0 (constant), exp(-x/tau) or (1 + x/u)^-p
    on a grid of tau, p, u. x is the share of the learning seen so far: the sum of the learning
    rates (Tissue et al. 2024, arXiv:2408.11029), or of the steps where no rate is known.
    (c, a) by weighted least squares with Huber weights; recent bins weigh more (w = x).
    Posterior: exp(-BIC/2), BIC = n log(RSS/n) + k log n (Schwarz 1978), with n shortened for the
    autocorrelation rho of the residuals, n (1 - rho)/(1 + rho).

    score = mean over the posterior of (L_start - L_now) / (L_start - floor), floor being L where
    the learning ends (`_course`); times `calm` and how certain the fall is (`_fall_certainty`).
    """
    count = np.array([b[0] for b in bins], float)
    steps = np.array([b[1] for b in bins]) / count
    losses = np.array([b[2] for b in bins]) / count
    rates = None if any(b[3] is None for b in bins) else np.array([b[3] for b in bins]) / count
    total = max(float(total), float(now))
    noise = _noise(losses)
    begin = _segment_start(losses, noise)
    steps_per_epoch = steps_per_epoch or _find_epochs(steps, losses, now, total)
    drops = _epoch_drops(steps, losses, steps_per_epoch, now)
    unstepped, future, unseen = _remove_stairs(steps, losses, drops, steps_per_epoch, now, total)
    course = _course(steps, rates, now, total)
    x, y, weight = course.x[begin:], unstepped[begin:], count[begin:] / count.max()
    origin = x[0] if begin else 0.0  # after a restart the learning starts anew
    x, ends = ((v - origin) / (1 - origin) for v in (x, np.array([1.0, course.end, course.far])))
    keep = x > 0.03 if (x > 0.03).sum() >= 6 else x >= 0
    post = _posterior(x[keep], y[keep], weight[keep], ends)
    run = _Run(
        start_loss=start_loss,
        noise=noise * math.sqrt(np.median(count)),
        best=float(np.min(np.convolve(losses, np.ones(3) / 3, "valid"))),
        decay=course.decay,
        future=future,
        unseen=unseen,
        unit=now * (1 - origin),
        doublings=math.log2(total / now),
    )
    return _summary(post, run, calm)


def _noise(losses) -> float:
    """Standard deviation of the binned losses around their course, from second differences."""
    second = losses[2:] - 2 * losses[1:-1] + losses[:-2]
    return float(1.4826 * np.median(np.abs(second)) / math.sqrt(6)) + 1e-12


def _segment_start(losses, noise: float) -> int:
    """First bin after the last lasting upward jump (a restart, a crash); 0 without one."""
    level = np.median(np.lib.stride_tricks.sliding_window_view(losses, 3), axis=1)
    before, after = level[:-4], level[3:-1]  # around bins 3 to n - 4
    jumps = np.flatnonzero((after > 1.2 * before) & (after - before > 6 * noise))
    if len(jumps) == 0:
        return 0
    last = int(jumps[-1]) + 3
    return min(last + int(np.argmax(losses[last : last + 4])), len(losses) - 6)


def _step_change(steps, losses, boundary: float, reach: float) -> tuple[float, float, int]:
    """Change of the log loss at `boundary` beside a common slope: (change, its error, bins used)."""
    near = np.abs(steps - boundary) <= reach
    after = steps[near] > boundary
    n_after, n_before = int(after.sum()), int((~after).sum())
    if min(n_after, n_before) < 3:
        return 0.0, math.inf, min(n_after, n_before)
    t = (steps[near] - boundary) / reach
    design = np.stack([np.ones(len(t)), t, after.astype(float)], 1)
    y = np.log(np.maximum(losses[near], 1e-12))
    coef, *_ = np.linalg.lstsq(design, y, rcond=None)
    variance = ((y - design @ coef) ** 2).sum() / max(1, len(y) - 3)
    cov = np.linalg.inv(design.T @ design) * variance
    return float(coef[2]), float(math.sqrt(cov[2, 2]) + 1e-9), min(n_after, n_before)


def _find_epochs(steps, losses, now: float, total: float) -> float | None:
    """Steps per epoch when the curve shows a staircase whose period divides the run, else None.

    Every boundary seen must drop by over 4% and 5 sigma; of two to ten epochs the surest wins.
    """
    surest, found = 5.0, None
    for epochs in range(2, 11):
        period = total / epochs
        sureness = _staircase_sureness(steps, losses, period, now)
        if sureness > surest:
            surest, found = sureness, period
    return found


def _staircase_sureness(steps, losses, period: float, now: float) -> float:
    """Smallest drop at a multiple of `period` seen so far, in sigma; 0 where one does not drop."""
    sureness = math.inf
    for boundary in np.arange(period, now, period):
        change, error, used = _step_change(steps, losses, boundary, 0.4 * period)
        if used < 3:
            continue
        if change > -0.04:
            return 0.0
        sureness = min(sureness, -change / error)
    return sureness if math.isfinite(sureness) else 0.0


def _epoch_drops(steps, losses, period: float | None, now: float) -> dict[float, float]:
    """Ratio by which the loss drops at each epoch boundary seen, {boundary: ratio <= 1}."""
    drops = {}
    if not period:
        return drops
    for k in range(max(1, int(now / period) - 20), int(now / period) + 1):
        change, error, used = _step_change(steps, losses, k * period, 0.4 * period)
        if used >= 3:
            drops[k * period] = math.exp(change) if change < -3 * error and change < -0.02 else 1.0
    return drops


def _remove_stairs(steps, losses, drops, period, now, total):
    """Scale the older epochs to the present one; the ratio that epochs to come will still bring.

    Returns (losses without stairs, ratio <= 1 of the future drops, number of epochs unknown).
    """
    flat = losses.copy()
    for boundary, ratio in drops.items():
        flat[steps <= boundary] *= ratio
    if not period:
        return flat, 1.0, 0
    seen = max(drops, default=0.0)
    ahead = [
        k for k in range(1, math.ceil(total / period)) if seen < k * period < total - 0.03 * period
    ]
    if not drops:
        return flat, 1.0, len(ahead)
    typical = float(np.exp(np.mean(np.log(list(drops.values())[-3:]))))
    return flat, typical ** len(ahead), 0


@dataclass(frozen=True)
class _Course:
    """The learning done and to come, in units of the learning so far."""

    x: np.ndarray  # of each bin
    end: float  # of the run's last step
    far: float  # where the floor is read
    decay: float  # of the learning rate from now to the end, as a share of its peak


def _course(steps, rates, now: float, total: float) -> _Course:
    """Without rates x is the step. With them it is the sum of the learning rates.

    Those to come follow the schedule seen since the peak (`_rates_to_come`). The floor lies at the
    end of a schedule that anneals to zero, for nothing can follow it; at ten times the run where
    the rate stays at its peak; in between in proportion to the last rate.
    """
    to_come = (
        None if rates is None or rates.max() <= 0 else _rates_to_come(steps, rates, now, total)
    )
    area = steps * 0 if to_come is None else np.cumsum(rates * np.gradient(steps))
    if area[-1] <= 0:
        return _Course(steps / now, total / now, FLOOR_HORIZON * total / now, 0.0)
    end = 1 + float(to_come.mean()) * (total - now) / area[-1]
    last = float(to_come[-1] / rates.max())
    far = end * (1 + (FLOOR_HORIZON - 1) * last)
    return _Course(area / area[-1], end, far, max(0.0, float(rates[-1] / rates.max()) - last))


def _rates_to_come(steps, rates, now: float, total: float):
    """The learning rate at 65 even points from now to the end, None where it follows no shape."""
    peak = int(np.argmax(rates))
    t, r = steps[peak:], rates[peak:]
    if len(t) < 5:
        return None
    ahead = np.linspace(now, total, 65)
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


@dataclass(frozen=True)
class _Posterior:
    """Members of the family as arrays (m,): weight, and L now, at the end and at the floor."""

    weight: np.ndarray
    now: np.ndarray
    end: np.ndarray
    floor: np.ndarray
    sigma: np.ndarray
    reached: Callable[[np.ndarray], np.ndarray]  # target losses (m,) -> x of each member there


def _family(x, ends):
    """g at x: (m, n), at each of `ends`: (m, len(ends)); and the inverse of g: (m,) -> (m,)."""
    at = np.concatenate([x, ends])[None, :]
    tau = np.geomspace(0.05, 6.0, 16)[:, None]
    p, u = (
        v.reshape(-1, 1) for v in np.meshgrid([0.15, 0.3, 0.5, 0.75, 1.0, 1.5], [0.005, 0.03, 0.15])
    )
    g = np.concatenate([np.exp(-at / tau), (1 + at / u) ** -p])

    def inverse(value):
        value = np.clip(value, 1e-12, 1.0)
        return np.concatenate(
            [
                -tau[:, 0] * np.log(value[: len(tau)]),
                u[:, 0] * (value[len(tau) :] ** (-1 / p[:, 0]) - 1),
            ]
        )

    return g[:, : len(x)], g[:, len(x) :], inverse


def _posterior(x, y, weight, ends) -> _Posterior:
    """Weighted least squares of every member, with BIC weights (see `fit_curve`).

    Of what the recent losses differ from a member, half stays for good, and all of it where the
    end is now: a loss that is known need not be forecast.
    """
    g, at, inverse = _family(x, ends)
    n, base = len(x), weight * np.maximum(x, 0.02)
    w = base / base.mean()
    for _ in range(3):
        c, a, residual = _least_squares(g, y, w)
        best = residual[np.argmin((w * residual**2).sum(1))]
        scale = 1.4826 * np.median(np.abs(best)) + 1e-12
        w = base * np.minimum(1, 2 * scale / np.maximum(np.abs(best), 1e-300))
        w = w / w.mean()
    c, a, residual = _least_squares(g, y, w)
    constant = float((w * y).sum() / n)
    residual = np.vstack([residual, y - constant])
    rss = (w * residual**2).sum(1) + 1e-18
    best = residual[np.argmin(rss)]
    rho = float(np.clip((best[1:] * best[:-1]).sum() / max((best**2).sum(), 1e-300), 0, 0.9))
    independent = max(4.0, n * (1 - rho) / (1 + rho))
    k = np.append(np.full(len(a), 3.0), 1.0)
    bic = independent * np.log(rss / n) + k * np.log(independent)
    # all members together are one hypothesis against the constant, and spread over a grid
    prior = np.append(np.full(len(a), 3.0 / len(a)), 1.0)
    p = prior * np.exp(-0.5 * (bic - bic.min()))
    recent = max(3, n // 12)
    shift = 0.5 * (w[-recent:] * residual[:, -recent:]).sum(1) / w[-recent:].sum()
    values = np.vstack([c[:, None] + a[:, None] * at, np.full((1, 3), constant)]) + shift[:, None]
    values[:, 1] += shift * math.exp((1 - ends[1]) / NEAR)
    error = np.sqrt(rss / n / independent)

    def reached(target):
        return np.append(inverse((target[:-1] - shift[:-1] - c) / np.maximum(a, 1e-12)), 0.0)

    return _Posterior(p / p.sum(), *np.maximum(values, 0).T, error, reached)


def _least_squares(g, y, w):
    """c, a >= 0 of y ~ c + a g for every row of g (m, n): (c (m,), a (m,), residuals (m, n))."""
    mean_g, mean_y = (g * w).sum(1) / w.sum(), (y * w).sum() / w.sum()
    centred = g - mean_g[:, None]
    a = (centred * w * (y - mean_y)).sum(1) / np.maximum((centred**2 * w).sum(1), 1e-300)
    a = np.maximum(a, 0)
    c = mean_y - a * mean_g
    through_zero = (g * w * y).sum(1) / np.maximum((g**2 * w).sum(1), 1e-300)
    a, c = np.where(c < 0, through_zero, a), np.maximum(c, 0)
    return c, a, y - c[:, None] - a[:, None] * g


def _fall_certainty(start: float, level: float, error: float) -> float:
    """0 for a fall under 1% of the start or under 2 sigma, 1 above 3% and 4 sigma, ramps between."""
    fall = start - level
    relative = (fall / max(abs(start), 1e-12) - 0.01) / 0.02
    sure = (fall / max(error, 1e-12) - 2) / 2
    return float(min(1, max(0, relative)) * min(1, max(0, sure)))


def _summary(post: _Posterior, run: _Run, calm: float) -> Fit:
    """Score, forecast and intervals of the posterior."""
    start = run.start_loss
    level = float(post.weight @ post.now)
    fall = max(start - level, 0.0)
    gain = ANNEALING_GAIN * run.decay * fall
    end = np.maximum(post.end * run.future - gain, 0)
    floor = np.minimum(np.maximum(post.floor * run.future - gain, 0), run.best)
    trust = calm * _fall_certainty(start, level, run.noise / math.sqrt(3))
    share = np.clip((start - post.now) / np.maximum(start - floor, 1e-12), 0, 1) * trust
    forecast = float(post.weight @ end)
    spread = math.sqrt(
        float(post.weight @ ((end - forecast) ** 2 + post.sigma**2))
        + (MODEL_ERROR * fall * max(1.0, run.doublings)) ** 2
        + gain**2
        + run.unseen * (UNSEEN_EPOCH * level) ** 2
        + (0.3 * level * (1 - run.future)) ** 2
    )
    left = (post.reached(start - 0.99 * (start - floor)) - 1) * run.unit if trust > 0 else None
    return Fit(
        score=float(post.weight @ share),
        score_low=_quantile(share, post.weight, 0.1) * (1 - Z80 * MODEL_ERROR),
        score_high=min(1.0, _quantile(share, post.weight, 0.9) * (1 + Z80 * MODEL_ERROR)),
        forecast=forecast,
        forecast_low=max(0.0, forecast - Z80 * spread),
        forecast_high=forecast + Z80 * spread,
        floor=float(post.weight @ floor),
        level=level,
        steps_to_99=None if left is None else max(0.0, _quantile(left, post.weight, 0.5)),
    )


def _quantile(values, weight, q: float) -> float:
    order = np.argsort(values, kind="stable")
    mass = np.cumsum(weight[order])
    return float(values[order][min(int(np.searchsorted(mass, q * mass[-1])), len(order) - 1)])
