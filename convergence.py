"""How far a run has converged, which way its loss is going and where it will end.

A loss curve is squeezed into at most 128 bins (bounded state, the same after an interruption), and a
small family of saturating curves is fitted to them. Every member is kept, weighted by its BIC, so one
posterior gives the score, the forecast and their intervals. The formulas stand in the docstrings and
in docs/convergence.md. By itself:

    uv run python convergence.py RUN_DIR|losses.csv|trainer_state.json [--upto 0.5] [--json]
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from alerts import AlertMonitor, is_spike
from errors import UserError

MAX_BINS = 128  # two neighbours are merged when full, so 64 to 128 bins describe any run
MIN_POINTS = 8  # fewer logged losses give no forecast
FULL_EVIDENCE = 20  # up to so many logged losses the score is held down
RECENT = 31  # logged losses that tell what a spike is
FLOOR_HORIZON = 10.0  # a power law never ends: its floor is its value at ten times the planned run
ANNEALING_GAIN = 0.05  # share of the fall that a full decay of the learning rate still gives
MODEL_ERROR = 0.03  # 1 sigma of the forecast that no fit knows of, as a share of the fall
UNSEEN_EPOCH = 0.04  # 1 sigma, as a share of the loss, for each kind of epoch not yet seen
Z80 = 1.2816  # an 80% interval of the normal distribution is mean +- 1.2816 sigma


class ConvergenceMonitor:
    """Follow one training loss; `scalars()` gives the Monitoring/... values of the moment.

    total_steps: the planned last step, None where unknown (then twice the steps seen).
    steps_per_epoch: where known, epochs with their staircases are used; else they are looked for.
    state: what `state_dict()` gave; the monitor goes on as if it had never been interrupted.
    """

    def __init__(
        self,
        total_steps: int | None,
        steps_per_epoch: float | None = None,
        state: Mapping | None = None,
    ):
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        state = state or {}
        self.count = state.get("count", 0)
        self.nonfinite = state.get("nonfinite", 0)
        self.width = state.get("width", 1)
        self.bins = [list(b) for b in state.get("bins", [])]  # [count, sum step, sum loss, sum lr]
        self.first = list(state.get("first", []))
        self.recent = [list(p) for p in state.get("recent", [])]  # [step, loss, lr]
        self.spikes = list(state.get("spikes", []))  # [index of the logged loss]
        self.in_spike = state.get("in_spike", False)
        self._fit: Fit | None = None

    def observe(self, step: int, loss: float, learning_rate: float | None = None) -> None:
        """Take one logged loss. A non-finite one is counted and never fitted."""
        if not math.isfinite(loss):
            self.nonfinite += 1
            return
        self._fit = None
        self.count += 1
        if len(self.first) < 5:
            self.first.append(float(loss))
        self._note_spike(loss)
        rate = float(learning_rate) if learning_rate is not None else None
        self.recent = [*self.recent, [int(step), float(loss), rate]][-RECENT:]
        if len(self.recent) >= 3:
            self._add_to_bins()

    def _note_spike(self, loss: float) -> None:
        """Remember sudden rises: far outside the noise and a quarter above the local median."""
        losses = [point[1] for point in self.recent]
        high = len(losses) >= 8 and is_spike(loss, losses)
        if high and not self.in_spike:
            self.spikes = [*self.spikes, self.count][-64:]
        self.in_spike = high

    def _add_to_bins(self) -> None:
        """Bin the median of three neighbours, so that a lone outlier never reaches the fit."""
        loss = median(p[1] for p in self.recent[-3:])
        step, _, rate = self.recent[-2]
        if self.bins and self.bins[-1][0] < self.width:
            last = self.bins[-1]
            known = rate is not None and last[3] is not None
            self.bins[-1] = [
                last[0] + 1,
                last[1] + step,
                last[2] + loss,
                last[3] + rate if known else None,
            ]
        else:
            self.bins.append([1, step, loss, rate])
        if len(self.bins) == MAX_BINS and self.bins[-1][0] == self.width:
            self.bins = [_merge(*self.bins[i : i + 2]) for i in range(0, MAX_BINS, 2)]
            self.width *= 2

    def fit(self) -> Fit | None:
        """The fit of the moment, None until there is enough evidence. Few milliseconds; cached."""
        if self._fit is None and self.count >= MIN_POINTS:
            self._fit = fit_curve(
                self.bins,
                start_loss=median(self.first),
                now=self.recent[-1][0],
                total=self.total_steps or 2 * self.recent[-1][0],
                steps_per_epoch=self.steps_per_epoch,
                calm=self.calm() * self.evidence(),
            )
        return self._fit

    def calm(self) -> float:
        """1 for a curve without sudden rises, 1/2 when three of them are fresh.

        calm = 1 / (1 + (n/3)^2), n = sum over the rises (see `is_spike`) of their place in the run,
        0 at its start to 1 now: an old rise counts less.
        """
        rises = sum(self.spikes) / max(1, self.count)
        return 1 / (1 + (rises / 3) ** 2)

    def evidence(self) -> float:
        """0 up to ten logged losses, 1 from twenty."""
        return min(1.0, max(0.0, (self.count - 10) / (FULL_EVIDENCE - 10)))

    def scalars(self) -> dict[str, float]:
        """Monitoring/... values; a value that cannot be known yet is absent (the score is 0)."""
        values = {"Monitoring/Convergence_Score": 0.0}
        if len(self.bins) >= 5:
            values["Monitoring/Loss_Trend"] = loss_trend(self.bins)
        fit = self.fit()
        if fit is None:
            return values
        values |= {
            "Monitoring/Convergence_Score": fit.score,
            "Monitoring/Convergence_Score_Low": fit.score_low,
            "Monitoring/Convergence_Score_High": fit.score_high,
            "Monitoring/Forecast_Final_Loss": fit.forecast,
            "Monitoring/Forecast_Final_Loss_Low": fit.forecast_low,
            "Monitoring/Forecast_Final_Loss_High": fit.forecast_high,
        }
        if fit.steps_to_99 is not None:
            values["Monitoring/Steps_To_99_Percent"] = fit.steps_to_99
        return values

    def state_dict(self) -> dict:
        """Everything seen so far, as strict JSON, at most about 15 kB however long the run."""
        names = ("count", "nonfinite", "width", "bins", "first", "recent", "spikes", "in_spike")
        return {name: getattr(self, name) for name in names}


def _merge(a: list, b: list) -> list:
    rate = None if a[3] is None or b[3] is None else a[3] + b[3]
    return [a[0] + b[0], a[1] + b[1], a[2] + b[2], rate]


def loss_trend(bins: list[list]) -> float:
    """Slope of the smoothed loss in loss per 100 steps; negative while the loss falls.

    Theil-Sen: the median of the slopes between all pairs of points (Theil 1950, Sen 1968), here
    over the bins of the last quarter of the run so far, at least eight bins.
    """
    from scipy.stats import theilslopes

    window = bins[-max(8, len(bins) // 4) :]
    steps = [b[1] / b[0] for b in window]
    return 100.0 * float(theilslopes([b[2] / b[0] for b in window], steps).slope)


# ---------------------------------------------------------------------------------------- the fit


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

    score = mean over the posterior of (L_start - L_now) / (L_start - floor), floor being L at ten
    times the planned run; times `calm` and times how certain the fall is (see `_fall_certainty`).
    """
    import numpy as np

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
    x, end, decay = _learning_coordinate(steps, rates, now, total)
    x, y, weight = x[begin:], unstepped[begin:], count[begin:] / count.max()
    if begin:  # after a restart the learning starts anew
        x, end = (x - x[0]) / (1 - x[0]), (end - x[0]) / (1 - x[0])
    keep = x > 0.03 if (x > 0.03).sum() >= 6 else x >= 0
    post = _posterior(x[keep], y[keep], weight[keep], end)
    return _summary(
        post, start_loss, noise / math.sqrt(5), losses, future, unseen, decay, calm, now
    )


def _noise(losses) -> float:
    """Standard deviation of the binned losses around their course, from second differences."""
    import numpy as np

    second = losses[2:] - 2 * losses[1:-1] + losses[:-2]
    return float(1.4826 * np.median(np.abs(second)) / math.sqrt(6)) + 1e-12


def _segment_start(losses, noise: float) -> int:
    """First bin after the last lasting upward jump (a restart, a crash); 0 without one."""
    import numpy as np

    for i in range(len(losses) - 4, 2, -1):
        before, after = np.median(losses[max(0, i - 3) : i]), np.median(losses[i : i + 3])
        if after > 1.2 * before and after - before > 6 * noise:
            return min(int(i + np.argmax(losses[i : i + 4])), len(losses) - 6)
    return 0


def _step_change(steps, losses, boundary: float, reach: float) -> tuple[float, float, int]:
    """Change of the log loss at `boundary` beside a common slope: (change, its error, bins used)."""
    import numpy as np

    near = (np.abs(steps - boundary) <= reach) & (np.abs(steps - boundary) > steps[0] * 0)
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
    """Steps per epoch when the curve shows a staircase whose period divides the run, else None."""
    best = (5.0, None)
    for epochs in range(2, 11):
        period = total / epochs
        changes = [
            _step_change(steps, losses, k * period, 0.4 * period)
            for k in range(1, epochs)
            if k * period < now
        ]
        changes = [c for c in changes if math.isfinite(c[1])]
        if not changes or max(c[0] for c in changes) > -0.04:
            continue
        z = min(-c[0] / c[1] for c in changes)
        if z > best[0]:
            best = (z, period)
    return best[1]


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
    import numpy as np

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


def _learning_coordinate(steps, rates, now: float, total: float):
    """x of each bin (1 = now), x of the last step, and the decay of the rate still to come.

    Without rates x is the step. With them it is the sum of the learning rates; those to come follow
    the schedule seen since the peak: m + b cos-shape or m + b (1 - t), whichever fits better.
    """
    import numpy as np

    if rates is None or rates.max() <= 0:
        return steps / now, total / now, 0.0
    area = np.cumsum(rates * np.gradient(steps))
    last, to_come = rates[-1], _rates_to_come(steps, rates, now, total)
    if area[-1] <= 0 or to_come is None:
        return steps / now, total / now, 0.0
    end = 1 + to_come.mean() * (total - now) / area[-1]
    return area / area[-1], float(end), float(max(0.0, last - to_come[-1]) / rates.max())


def _rates_to_come(steps, rates, now: float, total: float):
    """The learning rate at 65 even points from now to the end, None where it follows no shape."""
    import numpy as np

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

    weight: object
    now: object
    end: object
    floor: object
    sigma: object
    x99: object  # function: target loss (m,) -> x at which each member reaches it


def _family(x, ends):
    """g at x: (m, n), at each of `ends`: (m, len(ends)); and the inverse of g: (m,) -> (m,)."""
    import numpy as np

    at = np.concatenate([x, ends])[None, :]
    tau = np.geomspace(0.05, 1.5, 12)[:, None]
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


def _posterior(x, y, weight, end: float) -> _Posterior:
    """Weighted least squares of every member, with BIC weights (see `fit_curve`)."""
    import numpy as np

    g, at, inverse = _family(x, np.array([1.0, end, FLOOR_HORIZON * max(end, 1.0)]))
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
    error = np.sqrt(rss / n / independent)

    def x99(target):
        return np.append(inverse((target[:-1] - shift[:-1] - c) / np.maximum(a, 1e-12)), 0.0)

    return _Posterior(p / p.sum(), *np.maximum(values, 0).T, error, x99)


def _least_squares(g, y, w):
    """c, a >= 0 of y ~ c + a g for every row of g (m, n): (c (m,), a (m,), residuals (m, n))."""
    import numpy as np

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


def _summary(post, start, start_error, losses, future, unseen, decay, calm, now) -> Fit:
    import numpy as np

    best_seen = float(np.min(np.convolve(losses, np.ones(3) / 3, "valid")))
    level = float(post.weight @ post.now)
    fall = max(start - level, 0.0)
    gain = ANNEALING_GAIN * decay * fall
    end = np.maximum(post.end * future - gain, 0)
    floor = np.minimum(np.maximum(post.floor * future - gain, 0), best_seen)
    trust = calm * _fall_certainty(start, level, start_error)
    share = np.clip((start - post.now) / np.maximum(start - floor, 1e-12), 0, 1) * trust
    forecast = float(post.weight @ end)
    spread = math.sqrt(
        float(post.weight @ ((end - forecast) ** 2 + post.sigma**2))
        + (MODEL_ERROR * fall) ** 2
        + gain**2
        + unseen * (UNSEEN_EPOCH * level) ** 2
        + (0.3 * level * (1 - future)) ** 2
    )
    left = (post.x99(start - 0.99 * (start - floor)) - 1) * now if trust > 0 else None
    return Fit(
        score=float(post.weight @ share),
        score_low=_quantile(share, post.weight, 0.1),
        score_high=_quantile(share, post.weight, 0.9),
        forecast=forecast,
        forecast_low=max(0.0, forecast - Z80 * spread),
        forecast_high=forecast + Z80 * spread,
        floor=float(post.weight @ floor),
        level=level,
        steps_to_99=None if left is None else max(0.0, _quantile(left, post.weight, 0.5)),
    )


def _quantile(values, weight, q: float) -> float:
    import numpy as np

    order = np.argsort(values, kind="stable")
    mass = np.cumsum(weight[order])
    return float(values[order][min(int(np.searchsorted(mass, q * mass[-1])), len(order) - 1)])


# --------------------------------------------------------------------------------------- the tool


@dataclass(frozen=True)
class Curve:
    """A recorded run: one dict per logged step with "step", "Training/Loss" and what else it has."""

    points: tuple[dict[str, float], ...]
    total_steps: int
    steps_per_epoch: float | None


def read_curve(path: str | Path) -> Curve:
    """Read a run directory of ours, a metrics.jsonl, a csv or an HF trainer_state.json.

    Raises UserError where there is no such file, no loss in it, or a broken line.
    """
    path = _curve_file(Path(path))
    readers = {".csv": _read_csv, ".json": _read_trainer_state, ".jsonl": _read_metrics}
    if path.suffix not in readers:
        raise UserError(f"{path}: give a run directory, a .csv, .jsonl or trainer_state.json")
    try:
        rows = list(readers[path.suffix](path))
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as {path.suffix[1:]} ({error})") from error
    points = tuple(sorted(_latest(rows).values(), key=lambda row: row["step"]))
    if not any("Training/Loss" in row for row in points):
        raise UserError(f"{path}: holds no loss; a step and a loss per row are needed")
    total = max(row.pop("total_steps", 0) or row["step"] for row in points)
    return Curve(points, int(total), _steps_per_epoch(points))


def _curve_file(path: Path) -> Path:
    """The file that holds the curve of `path`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory")
    log = Path("training_logs") / path.name / "metrics.jsonl"
    places = [path / "metrics.jsonl", *(p / log for p in path.resolve().parents[:2])]
    places += [path / "trainer_state.json"]
    newest = sorted(path.glob("training_logs/*/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
    newest += sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    for place in [*places, *reversed(newest)]:
        if place.is_file():
            return place
    raise UserError(f"{path}: neither a metrics.jsonl nor a trainer_state.json belongs to it")


FOREIGN_NAMES = {
    "loss": "Training/Loss",
    "train_loss": "Training/Loss",
    "learning_rate": "Training/Learning_Rate",
    "lr": "Training/Learning_Rate",
    "grad_norm": "Training/Gradient_Norm",
    "epoch": "Training/Epoch",
    "eval_loss": "Eval/Loss",
}


def _latest(rows: Iterable[dict]) -> dict[float, dict]:
    """Rows by step; a later row of the same step (after a resume) replaces its values."""
    merged: dict[float, dict] = {}
    for row in rows:
        merged[row["step"]] = merged.get(row["step"], {}) | row
    return merged


def _numbers(record: Mapping, place: str) -> dict[str, float] | None:
    """The numeric fields of a record under our names; None where it has no step."""
    if record.get("step") in (None, ""):
        return None
    row = {}
    for name, value in record.items():
        if name is None or value in (None, "") or isinstance(value, (bool, list, dict)):
            continue
        try:
            row[FOREIGN_NAMES.get(name.strip(), name.strip())] = float(value)
        except ValueError:
            if name.strip() in ("step", "loss"):
                raise UserError(f"{place}: {name} is no number: {value!r:.40}") from None
    if not math.isfinite(row["step"]):
        raise UserError(f"{place}: step is not finite")
    return row


def _read_csv(path: Path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"step", "loss"} <= {(n or "").strip() for n in reader.fieldnames or ()}:
            raise UserError(f"{path}:1: the first line must name the columns step and loss")
        reader.fieldnames = [name.strip() for name in reader.fieldnames]
        for record in reader:
            row = _numbers(record, f"{path}:{reader.line_num}")
            if row:
                yield row


def _read_metrics(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # a crash may cut the last line
                return
            raise UserError(f"{path}:{number}: broken JSON ({error.msg})") from error
        row = _numbers(record, f"{path}:{number}") if isinstance(record, dict) else None
        if row:
            # JSON has no NaN: a null loss is a loss that was not finite
            if "Training/Loss" in record and record["Training/Loss"] is None:
                row["Training/Loss"] = math.nan
            yield row


def _read_trainer_state(path: Path):
    state = json.loads(path.read_text(encoding="utf-8"))
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise UserError(f"{path}: no log_history; is it the trainer_state.json of a Trainer run?")
    for number, record in enumerate(history):
        row = _numbers(record, f"{path}: log_history[{number}]")
        if row:
            yield row


def _steps_per_epoch(points) -> float | None:
    """From the epoch column, where there is one."""
    known = [p for p in points if p.get("Training/Epoch", 0) > 0]
    if len(known) < 2:
        return None
    steps = known[-1]["step"] - known[0]["step"]
    epochs = known[-1]["Training/Epoch"] - known[0]["Training/Epoch"]
    return steps / epochs if epochs > 0 and steps > 0 else None


def describe(curve: Curve, upto: float = 1.0) -> dict:
    """Score, trend, forecast for the last step and the alerts of the first `upto` of a run."""
    monitor = ConvergenceMonitor(curve.total_steps, curve.steps_per_epoch)
    alerts, spoken, used = AlertMonitor(), [], 0
    for row in curve.points:
        if row["step"] > upto * curve.total_steps:
            break
        used += "Training/Loss" in row
        if "Training/Loss" in row:
            monitor.observe(row["step"], row["Training/Loss"], row.get("Training/Learning_Rate"))
        spoken += alerts.observe(int(row["step"]), row | monitor.scalars(), {})
    if not used:
        raise UserError(f"--upto {upto:g} leaves no logged loss; raise it")
    values = monitor.scalars()
    result = {
        "score": values["Monitoring/Convergence_Score"],
        "score_low": values.get("Monitoring/Convergence_Score_Low"),
        "score_high": values.get("Monitoring/Convergence_Score_High"),
        "trend": values.get("Monitoring/Loss_Trend"),
        "forecast": values.get("Monitoring/Forecast_Final_Loss"),
        "forecast_low": values.get("Monitoring/Forecast_Final_Loss_Low"),
        "forecast_high": values.get("Monitoring/Forecast_Final_Loss_High"),
        "steps_to_99_percent": values.get("Monitoring/Steps_To_99_Percent"),
        "step": monitor.recent[-1][0] if monitor.recent else None,
        "total_steps": curve.total_steps,
        "logged_losses": used,
        "nonfinite": monitor.nonfinite,
        "alerts": sorted({alert.name for alert in spoken}),
    }
    return result


def _print_description(result: dict) -> None:
    def shown(value) -> str:
        return "not known yet" if value is None else f"{value:.4g}"

    print(f"step                {shown(result['step'])} of {result['total_steps']}")
    print(f"convergence score   {shown(result['score'])}", end="")
    print(f"  ({shown(result['score_low'])} to {shown(result['score_high'])})")
    print(f"loss trend          {shown(result['trend'])} per 100 steps")
    print(f"forecast final loss {shown(result['forecast'])}", end="")
    print(f"  (80%: {shown(result['forecast_low'])} to {shown(result['forecast_high'])})")
    print(f"steps to 99% gain   {shown(result['steps_to_99_percent'])}")
    print(f"alerts              {', '.join(result['alerts']) or 'none'}")


@dataclass(frozen=True)
class Options:
    """Score, trend and forecast of a recorded run."""

    run: tyro.conf.Positional[str]
    """Run directory of ours, metrics.jsonl, csv (columns step, loss, ...) or trainer_state.json."""
    upto: float = 1.0
    """Use only this first share of the run; the forecast stays one for its last step."""
    json: bool = False
    """Print one JSON object."""


def main(arguments: list[str] | None = None) -> int:
    """The tool. Exit code 2 and one line on stderr where the input is bad."""
    options = tyro.cli(Options, args=arguments)
    try:
        if not 0 < options.upto <= 1:
            raise UserError(f"--upto {options.upto:g}: give a share of the run, over 0 and up to 1")
        result = describe(read_curve(options.run), options.upto)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result, allow_nan=False))
    else:
        _print_description(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
