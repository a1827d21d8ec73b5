"""Where a loss curve will end and how much of its fall is done: a mixture of models, in closed form.

Each model is a Gaussian process over the binned losses: a saturating curve or a constant, an effect of the
annealed learning rate, drops between epochs with a common size, and a random walk. Plain functions of
plain arrays, without state; nothing can fail to converge. `convergence.py` keeps the history.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.linalg import solve_triangular

from finetuning.monitoring.learning_clock import Course, course
from finetuning.monitoring.staircase import boundaries_passed, find_epochs

FLOOR_HORIZON = 10.0  # a power law never ends: at a constant rate its floor is at ten runs' length
SCORE_ERROR = 0.03  # 1 sigma of the score that no fit knows of, as a share
END = 0.05  # the loss at the end is that of this last share of the run
Z80 = 1.2816  # an 80% interval of the normal distribution is mean +- 1.2816 sigma
OFFSET_SD = 3.0  # of the level, in falls: as good as free
PAST = (0.4, 0.5, 0.6, 0.7, 0.8)  # shares of the steps so far from which the present is forecast
STILL = 1e-9  # of 1: a shape that falls by less is as good as flat
TAU = np.geomspace(0.02, 4, 12)[:, None]  # of exp(-x / tau)
POWER = np.array([(p, u) for p in (0.15, 0.3, 0.5, 0.75, 1.0, 1.5) for u in (0.003, 0.02, 0.1)])


@dataclass(frozen=True)
class Beliefs:
    """What is believed before a curve is seen; (mean, sigma) in shares of the fall so far where not said.

    Chosen on 68 recorded runs; docs/forecast_quality.md says which and how they do on 100 others.
    """

    annealing: tuple[float, float] = (
        0.1,
        0.06,
    )  # gain of a full decay of the rate; at most of the level
    lag: float = 0.03  # of the run's learning, after which most of it has come
    stairs: tuple[tuple[float, float, float, float], ...] = (
        (0.2, 0.03, 0.1, 0.06),  # (probability, common drop: mean, sigma, sigma of each beside it)
        (0.05, 0.2, 0.3, 0.2),  # of the fall, at most of the level
    )
    wander: tuple[float, ...] = (0.01, 0.04)  # sigma of the walk per doubling of the run
    flat: float = 0.5  # probability of a constant
    slope_sd: float = 1.0
    skip: float = 0.04  # first share of the run so far that no model explains
    recency: float = 1.5  # the noise of a bin counts as if it grew with its age to half this power
    trust: tuple[float, float] = (1.0, 0.3)  # share of a forecast change that comes
    trust_noise: float = 0.1  # with which the past tells it
    unknown: float = 0.025  # 1 sigma that no model knows of while anything is to come


BELIEFS = Beliefs()


@dataclass(frozen=True)
class Fit:
    """What the mixture says, now and about the run's last step. Losses in nats."""

    score: float
    score_low: float
    score_high: float
    forecast: float
    forecast_low: float
    forecast_high: float
    floor: float
    level: float
    steps_to_99: float | None


@dataclass(frozen=True)
class _Data:
    """The bins that are explained, scaled, and three places behind them: now, the run's end, the floor.

    z (m,): losses as falls above the level; noise (m,); at (m + 3,) steps; clock and annealed (m + 3,);
    passed: boundaries (m + 3, k) or None.
    """

    z: np.ndarray
    noise: np.ndarray
    at: np.ndarray
    clock: np.ndarray
    annealed: np.ndarray
    passed: np.ndarray | None
    level: float
    fall: float
    end_noise: float  # of one bin at the end, in falls

    @property
    def seen(self) -> int:
        return len(self.z)


def fit_curve(
    bins: list[list],
    *,
    start_loss: float,
    now: float,
    total: float,
    steps_per_epoch: float | None = None,
    calm: float = 1.0,
    beliefs: Beliefs = BELIEFS,
) -> Fit:
    """Weigh all models by their evidence and read score and forecast off them.

    bins: rows [count, sum of steps, sum of losses, sum of learning rates or None].

    Model: L(x) = c + a g(x) - k A(x) - sum of drops + walk + noise, L >= 0 at its floor, with g one of
    exp(-x/tau) and (1 + x/u)^-p on a grid, or 0; x is the clock and A the annealing (`learning_clock.py`).
    The drops share a size that is learned with them; the walk is Brownian in log2 of the step. c and a are
    solved for, the others are parts of the covariance (Rasmussen & Williams 2006, chapter 2). Weight: the
    evidence, which is the product of all one-step-ahead forecasts (Dawid 1984).

    The mixture's own past forecasts of the present, from 40 to 80% of the steps so far, tell how much of a
    change that it forecasts comes; so it holds the level where holding has been better.

    score = mean over the models of (L_start - L_now) / (L_start - floor), floor being L where the
    learning ends; times `calm` and how certain the fall is (`_fall_certainty`).
    """
    total = max(float(total), float(now))
    bins = _at_most_64(bins)
    count = np.array([b[0] for b in bins], float)
    steps = np.array([b[1] for b in bins], float) / count
    losses = np.array([b[2] for b in bins]) / count
    rates = None if any(b[3] is None for b in bins) else np.array([b[3] for b in bins]) / count
    period = steps_per_epoch or find_epochs(steps, losses, now, total)
    begin = _segment_start(losses, _noise(losses))
    times = now, max((1 - END / 2) * total, float(steps[begin])), total
    whole = course(steps, rates, times, beliefs.lag)
    data = _scaled(steps, losses, whole, (begin, *times, period), beliefs)
    members = _members(data, beliefs)
    best = float(np.min(np.convolve(losses, np.ones(3) / 3, "valid")))
    end = _End(
        start_loss, best, now < times[1], now - (data.at[0] if data.at[0] > steps[0] else 0.0)
    )
    return _summary(members, data, end, calm, beliefs)


def _at_most_64(bins: list[list]) -> list[list]:
    while len(bins) > 64:
        bins = [
            merged(*bins[i : i + 2]) if i + 1 < len(bins) else bins[i]
            for i in range(0, len(bins), 2)
        ]
    return bins


def merged(a: list, b: list) -> list:
    """Two neighbouring bins as one."""
    rate = None if a[3] is None or b[3] is None else a[3] + b[3]
    return [a[0] + b[0], a[1] + b[1], a[2] + b[2], rate]


def _scaled(steps, losses, whole: Course, times, beliefs: Beliefs) -> _Data:
    begin, now, end, total, period = times
    keep = np.arange(begin, len(steps))
    if begin == 0:
        late = np.flatnonzero(steps > beliefs.skip * steps[-1])
        keep = late if len(late) >= 8 else keep
    y = losses[keep]
    level = float(np.median(y[-max(3, len(y) // 20) :]))
    first = float(np.median(losses[begin : begin + 2]))
    fall = max(first - level, 4 * _noise(losses), 1e-9)
    # After a restart the learning starts anew, half a bin before the first one.
    origin = steps[begin] - 0.5 * (steps[1] - steps[0]) if begin else 0.0
    far = 1 + (FLOOR_HORIZON - 1) * whole.last_rate
    pick = np.append(keep, len(steps) + np.arange(3))
    at = np.append(steps, [now, end, total])[pick]
    clock = whole.clock
    x = clock[pick] - (clock[begin] - (clock[1] - clock[0]) if begin else 0.0)
    x /= x[-1]
    x[-1] = far
    z = (y - level) / fall
    noise = _local_noise(z)
    age = np.maximum((at - origin)[: len(z)] / (at[-3] - origin), 1e-3)
    return _Data(
        z=z,
        noise=noise * age ** (-0.5 * beliefs.recency),
        at=at - origin,
        clock=x,
        annealed=whole.annealed[pick],
        passed=_seen(boundaries_passed(at, period, float(np.median(np.diff(steps))), total)),
        level=level,
        fall=fall,
        end_noise=float(noise[-1]),
    )


def _seen(passed: np.ndarray | None) -> np.ndarray | None:
    """With the present behind the boundaries of the last bin: a drop that no loss has shown is to come."""
    if passed is not None:
        passed[-3] = passed[-4]
    return passed


def _noise(losses) -> float:
    """Standard deviation of the binned losses around their course, from second differences."""
    second = losses[2:] - 2 * losses[1:-1] + losses[:-2]
    return float(1.4826 * np.median(np.abs(second)) / math.sqrt(6)) + 1e-12


def _local_noise(z):
    """The same in up to eight parts of the run, straight in between."""
    second = np.abs(z[2:] - 2 * z[1:-1] + z[:-2]) * (1.4826 / math.sqrt(6))
    parts = [np.median(p) for p in np.array_split(second, min(8, max(1, len(second) // 6)))]
    places = (np.arange(len(parts)) + 0.5) / len(parts) * len(z)
    local = np.interp(np.arange(len(z)), places, parts)
    return np.maximum(local, 0.3 * np.median(second)) + 1e-4


def _segment_start(losses, noise: float) -> int:
    """First bin after the last lasting upward jump (a restart, a crash); 0 without one."""
    level = np.median(np.lib.stride_tricks.sliding_window_view(losses, 3), axis=1)
    before, after = level[:-4], level[3:-1]  # around bins 3 to n - 4
    jumps = np.flatnonzero((after > 1.2 * before) & (after - before > 6 * noise))
    if len(jumps) == 0:
        return 0
    last = int(jumps[-1]) + 3
    return min(last + int(np.argmax(losses[last : last + 4])), len(losses) - 6)


# ------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class _Shapes:
    """g of every model at every place, scaled to 1 at the first bin and 0 now.

    g (models, m + 3); floor (models,): its value where x is infinite; prior (models + 1,), the constant last.
    """

    g: np.ndarray
    floor: np.ndarray
    prior: np.ndarray
    unscaled: tuple[np.ndarray, np.ndarray]  # (models,): raw g at the first bin and now


def _shapes(data: _Data, beliefs: Beliefs) -> _Shapes:
    x = data.clock[None]
    g = np.concatenate([np.exp(-x / TAU), (1 + x / POWER[:, 1:]) ** -POWER[:, :1]])
    prior = np.full(len(g), (1 - beliefs.flat) / len(g))
    first, now = g[:, 0], g[:, data.seen]
    # One that does not move between the first bin and now is a constant, as at the start of a long run.
    scale = np.where(first - now > STILL, first - now, np.inf)
    return _Shapes(
        g=(g - now[:, None]) / scale[:, None],
        floor=-now / scale,
        prior=np.append(prior, beliefs.flat),
        unscaled=(first, now),
    )


@dataclass(frozen=True)
class _Members:
    """All models: weight (M,), mean and variance (M, 3) now, at the end and at the floor, in falls.

    past: (log weight (k, M), forecasts (k, M) of the present) from k earlier places.
    """

    weight: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    slope: np.ndarray
    past: tuple[np.ndarray, np.ndarray]
    origins: list[int]
    shapes: _Shapes


def _members(data: _Data, beliefs: Beliefs) -> _Members:
    """Every shape under every hypothesis of walk and staircase."""
    shapes = _shapes(data, beliefs)
    m = data.seen
    ends = [int((data.at[:m] <= share * data.at[m]).sum()) for share in PAST]
    origins = [end - 1 for end in ends if end >= 8]
    doublings = np.log2(data.at / data.at[0])
    walk = np.minimum(doublings[:, None], doublings[None, :])
    rows = []
    for sigma, (prior, mean, covariance) in product(beliefs.wander, _drops(data, beliefs)):
        process = mean, covariance + sigma**2 * walk
        weight, means, variances, slope, then, past = _solve(
            data, shapes, process, origins, beliefs
        )
        log = math.log(prior)
        rows.append((weight + log, means, variances, slope, (then + log).T, past.T))
    joined = [np.concatenate(part) for part in zip(*rows, strict=True)]
    return _Members(_normal(joined[0]), *joined[1:4], (joined[4].T, joined[5].T), origins, shapes)


def _normal(log_weight):
    weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def _drops(data: _Data, beliefs: Beliefs) -> list[tuple]:
    """(probability, mean (m + 3,), covariance) of annealing and drops together, per hypothesis."""
    unit = min(data.level / data.fall, 1.0)
    gain, sigma = (unit * share for share in beliefs.annealing)
    mean, covariance = -gain * data.annealed, sigma**2 * np.outer(data.annealed, data.annealed)
    if data.passed is None:
        return [(1.0, mean, covariance)]
    found = [(1 - sum(s[0] for s in beliefs.stairs), mean, covariance)]
    number = data.passed.sum(1)
    for probability, drop, common, each in beliefs.stairs:
        shared = (common * unit) ** 2 * np.outer(number, number)
        own = (each * unit) ** 2 * data.passed @ data.passed.T
        found.append((probability, mean - drop * unit * number, covariance + shared + own))
    return found


def _solve(data: _Data, shapes: _Shapes, process, origins, beliefs: Beliefs):
    """All shapes under one Gaussian process (mean (m + 3,), covariance), by one Cholesky factor.

    Returns (log weight, mean (M, 3), variance (M, 3), slope (M,)) and, from the leading parts of the same
    factor, (log weight (k, M), forecast of the present (k, M)) from each of the k origins.
    """
    mean, covariance = process
    m = data.seen
    factor = np.linalg.cholesky(covariance[:m, :m] + np.diag(data.noise**2))
    columns = np.column_stack(
        [data.z - mean[:m], np.ones(m), covariance[:m, m:], shapes.g[:, :m].T]
    )
    white = solve_triangular(factor, columns, lower=True, check_finite=False)
    y, one, ahead, g = white[:, 0], white[:, 1], white[:, 2:5], white[:, 5:]
    log_det = 2 * np.cumsum(np.log(np.diag(factor)))
    y, one = y[:, None], one[:, None]
    products = (one * one, one * g, g * g, one * y, y * g, y * y)  # (m, 1) or (m, M)
    now = _Regression([p.sum(0) for p in products], log_det[-1], beliefs)
    level = (ahead.T @ y)[:, 0] + mean[m:]
    h_one, h_g = 1 - (one.T @ ahead)[0], shapes.g[:, m:] - g.T @ ahead
    means = level + now.c[:, None] * h_one + now.a[:, None] * h_g
    known = np.diag(covariance)[m:] - (ahead * ahead).sum(0)
    variances = known + now.variance(h_one, h_g)
    flat = now.constant
    means = np.vstack([means, level + flat * h_one])
    variances = np.vstack([variances, known + h_one**2 / now.of_one])
    bottom = data.level / data.fall + now.c + now.a * shapes.floor
    impossible = np.where(bottom < 0, (bottom / (0.1 * data.level / data.fall + 1e-9)) ** 2, 0.0)
    weight = np.append(now.evidence - impossible, now.flat_evidence)
    prior = np.log(shapes.prior)
    then = _Regression(
        [np.cumsum(p, 0)[origins] for p in products],
        log_det[origins][:, None],
        beliefs,
    )
    parts = [np.cumsum(ahead[:, :1] * p, 0)[origins] for p in (y, one, g)]
    past = mean[m] + parts[0] + then.c * (1 - parts[1]) + then.a * (shapes.g[:, m] - parts[2])
    then_weight = then.evidence + prior[:-1]
    return weight + prior, means, variances, np.append(now.a, 0.0), then_weight, past


class _Regression:
    """c and a >= 0 of y ~ c + a g for all shapes, from sums of products; priors N(0, 3^2) and N(1, sd^2).

    products: sums of 1*1, 1*g, g*g, 1*y, y*g, y*y over whitened rows; (1,) and (M,), or with a leading axis.
    """

    def __init__(self, products, log_det, beliefs: Beliefs) -> None:
        one_one, one_g, g_g, one_y, y_g, y_y = products
        tight = 1 / beliefs.slope_sd**2
        self.of_one, self.cross, self.of_g = one_one + 1 / OFFSET_SD**2, one_g, g_g + tight
        right = y_g + tight
        self.det = self.of_one * self.of_g - self.cross**2
        a = (self.of_one * right - self.cross * one_y) / self.det
        self.constant = one_y / self.of_one
        self.a = np.maximum(a, 0)
        self.c = np.where(a < 0, self.constant, (self.of_g * one_y - self.cross * right) / self.det)
        explained = self.c * one_y + self.a * right
        volume = np.log(self.det * OFFSET_SD**2 / tight)
        self.evidence = -0.5 * (y_y + tight - explained + log_det + volume)
        flat = y_y - self.constant * one_y + log_det + np.log(self.of_one * OFFSET_SD**2)
        self.flat_evidence = -0.5 * flat

    def variance(self, h_one, h_g):
        """Of c h_one + a h_g: h_one (3,), h_g (M, 3)."""
        square = h_one**2 * self.of_g[:, None] - 2 * h_one * h_g * self.cross[:, None]
        return (square + h_g**2 * self.of_one) / self.det[:, None]


# ------------------------------------------------------------------------------------ the summary


@dataclass(frozen=True)
class _End:
    """What is known beside the models."""

    start_loss: float
    best: float  # lowest mean of three bins in a row
    ahead: bool  # is the end still to come?
    learned: float  # steps since the start, or since the last restart


def _trust(members: _Members, data: _Data, beliefs: Beliefs) -> tuple[float, float]:
    """The share of a forecast change that comes, 0 to 1, by past forecasts of the present; its sigma.

    A ridge regression of what came on what was forecast, both as changes of the level held.
    """
    mean, sigma = beliefs.trust
    if not members.origins:
        return 1.0, 0.0
    forecasts = (_normal(members.past[0]) * members.past[1]).sum(1)
    held = np.array(
        [np.median(data.z[max(0, k + 1 - max(3, (k + 1) // 20)) : k + 1]) for k in members.origins]
    )
    change, came = forecasts - held, -held
    sure = 1 / (beliefs.trust_noise**2 + data.end_noise**2) / max(1.0, len(held) / 2)
    precision = 1 / sigma**2 + sure * change @ change
    share = (mean / sigma**2 + sure * change @ came) / precision
    return float(min(max(share, 0.0), 1.0)), float(precision**-0.5)


def _summary(members: _Members, data: _Data, end: _End, calm: float, beliefs: Beliefs) -> Fit:
    """Score, forecast and intervals of the mixture."""
    losses = np.maximum(data.level + data.fall * members.mean, 0)
    trust, unsure = _trust(members, data, beliefs)
    level, there, _ = members.weight @ losses
    forecast = level + trust * (there - level)
    variance = members.weight @ (
        (losses[:, 1] - there) ** 2 + data.fall**2 * np.maximum(members.variance[:, 1], 0)
    )
    # Where the end is reached the level is known but for its noise and what it falls within the end.
    error = (unsure if end.ahead else 1.0) * (there - level)
    unknown = end.ahead * beliefs.unknown * data.fall
    measured = data.end_noise * data.fall / math.sqrt(3)
    spread = math.sqrt(variance + error**2 + unknown**2 + measured**2)
    now, floor = losses[:, 0], losses[:, 0] + trust * (losses[:, 2] - losses[:, 0])
    floor = np.minimum(floor, end.best)
    start = end.start_loss
    certain = calm * _fall_certainty(start, float(level), data.end_noise * data.fall / math.sqrt(3))
    share = np.clip((start - now) / np.maximum(start - floor, 1e-12), 0, 1) * certain
    left = _steps_to(start - 0.99 * (start - floor), members, data, end) if certain > 0 else None
    score = min(1.0, float(members.weight @ share))
    low, high = (_quantile(share, members.weight, q) for q in (0.1, 0.9))
    return Fit(
        score=score,
        score_low=min(score, low * (1 - Z80 * SCORE_ERROR)),
        score_high=min(1.0, max(score, high * (1 + Z80 * SCORE_ERROR))),
        forecast=float(forecast),
        forecast_low=max(0.0, float(forecast) - Z80 * spread),
        forecast_high=float(forecast) + Z80 * spread,
        floor=float(members.weight @ floor),
        level=float(level),
        steps_to_99=None if left is None else max(0.0, _quantile(left, members.weight, 0.5)),
    )


def _fall_certainty(start: float, level: float, error: float) -> float:
    """0 for a fall under 1% of the start or under 2 sigma, 1 above 3% and 4 sigma, ramps between."""
    fall = start - level
    relative = (fall / max(abs(start), 1e-12) - 0.01) / 0.02
    sure = (fall / max(error, 1e-12) - 2) / 2
    return float(min(1, max(0, relative)) * min(1, max(0, sure)))


def _steps_to(target, members: _Members, data: _Data, end: _End):
    """Steps (M,) until each model's curve reaches its target loss, at the mean learning so far."""
    first, now = members.shapes.unscaled
    hypotheses = len(members.weight) // (len(first) + 1)
    drop = (target / data.fall - data.level / data.fall - members.mean[:, 0]).reshape(
        hypotheses, -1
    )
    slope = members.slope.reshape(hypotheses, -1)[:, :-1]
    value = now + drop[:, :-1] / np.maximum(slope, 1e-12) * (first - now)
    value = np.clip(value, 1e-12, 1.0)
    curves = len(TAU)
    x = np.concatenate(
        [
            -TAU[:, 0] * np.log(value[:, :curves]),
            POWER[:, 1] * (value[:, curves:] ** (-1 / POWER[:, 0]) - 1),
        ],
        axis=1,
    )
    steps = (np.minimum(x, data.clock[-1]) / data.clock[data.seen] - 1) * end.learned
    return np.column_stack([steps, np.zeros(hypotheses)]).ravel()


def _quantile(values, weight, q: float) -> float:
    order = np.argsort(values, kind="stable")
    mass = np.cumsum(weight[order])
    return float(values[order][min(int(np.searchsorted(mass, q * mass[-1])), len(order) - 1)])
