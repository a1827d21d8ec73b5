"""How far a run has converged, which way its loss is going and where it will end.

A loss curve is squeezed into at most 128 bins (bounded state, the same after an interruption), and
`curve_fit.py` reads score and forecast off them. The formulas stand in the docstrings and in
docs/convergence.md.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any, TypedDict

import numpy as np

from finetuning.common.errors import UserError
from finetuning.monitoring.alerts import AlertMonitor
from finetuning.monitoring.curve_fit import Fit, fit_curve, merged
from finetuning.monitoring.foreign_table import LARGEST
from finetuning.monitoring.loss_curves import Curve
from finetuning.monitoring.loss_detectors import is_spike, last_digit, log_noise
from finetuning.monitoring.saved_memory import check_memory, tried

MAX_BINS = 128  # two neighbours are merged when full, so 64 to 128 bins describe any run
MIN_POINTS = 8  # fewer logged losses give no forecast
FULL_EVIDENCE = 20  # up to so many logged losses the score is held down
RECENT = 31  # logged losses that tell what a spike is
SLACK = 0.04  # by which the score may fall while the loss does not rise
RISE = (
    0.02,
    1.0,
)  # of the smoothed loss that is a rise: as a share of its fall, and in sigma of one loss


class ConvergenceMemory(TypedDict, total=False):
    """What `ConvergenceMonitor.state_dict` gives; empty before the first logged step."""

    count: int
    nonfinite: int
    width: int
    bins: list[tuple[int, int, float, float | None]]
    first: list[float]
    recent: list[tuple[int, float, float | None]]
    spikes: list[int]
    in_spike: bool
    held: tuple[float, float]
    fitted: int  # this and `fit` are of earlier versions; nothing reads them
    fit: dict[str, Any] | None


class ConvergenceMonitor:
    """Follow one training loss; `scalars()` gives the Monitoring/... values of the moment.

    total_steps: the planned last step, None where unknown (then twice the steps seen).
    steps_per_epoch: where known, epochs with their staircases are used; else they are looked for.
    state: what `state_dict()` gave; the monitor goes on as if it had never been interrupted. Raises
    UserError where it can't.
    """

    def __init__(
        self,
        total_steps: int | None,
        steps_per_epoch: float | None = None,
        state: Mapping | None = None,
    ):
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        check_memory(state or {}, ConvergenceMemory, "forecasts")
        state = copy.deepcopy(dict(state or {}))
        self.count = state.get("count", 0)
        self.nonfinite = state.get("nonfinite", 0)
        self.width = state.get("width", 1)
        self.bins = state.get("bins", [])  # [count, sum step, sum loss, sum lr]
        self.first = state.get("first", [])
        self.recent = state.get("recent", [])  # [step, loss, lr]
        self.spikes = state.get("spikes", [])  # [index of the logged loss]
        self.in_spike = state.get("in_spike", False)
        self.held = state.get("held", [0.0, math.inf])  # the highest score, and the level it was at
        if state:
            tried(self._rehearse, "forecasts")

    def _rehearse(self) -> None:
        """Go on, on copies, with a loss that falls, stays and rises."""
        step, loss, _ = self.recent[-1] if self.recent else (0, 1.0, None)
        for factor in (0.5, 1.0, 2.0):
            twin = copy.deepcopy(self)
            for later in range(1, MIN_POINTS + 1):
                twin.observe(step + later, factor * loss, 0.0)
                if later in (1, MIN_POINTS):
                    twin.scalars()
                    twin.state_dict()

    def observe(self, step: int, loss: float, learning_rate: float | None = None) -> None:
        """Take one logged loss. One that is not finite in float32 is counted and never fitted."""
        if not abs(loss) <= LARGEST:
            self.nonfinite += 1
            return
        self.count += 1
        if len(self.first) < 3:
            self.first.append(float(loss))
        self._note_spike(loss)
        told = learning_rate is not None and 0 <= learning_rate <= LARGEST
        rate = float(learning_rate) if told else None
        self.recent = [*self.recent, [int(step), float(loss), rate]][-RECENT:]
        if len(self.recent) >= 3:
            self._add_to_bins()

    def _note_spike(self, loss: float) -> None:
        """Remember sudden rises: beyond noise and digits, and a quarter above the local median."""
        losses = [point[1] for point in self.recent]
        high = len(losses) >= 8 and bool(is_spike(loss, losses))
        if high:
            high = loss - median(losses[-7:]) > 2 * min(map(last_digit, [*losses, loss]))
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
            self.bins = [merged(*self.bins[i : i + 2]) for i in range(0, MAX_BINS, 2)]
            self.width *= 2

    def is_due(self) -> bool:
        """Whether there is more to be fitted than before: a bin is full, or the run has come to its end.

        The first 128 logged losses have a bin each; from there on each forecast costs a smaller share.
        """
        at_end = bool(self.recent) and self.recent[-1][0] >= (self.total_steps or math.inf)
        return at_end or not self.bins or self.bins[-1][0] == self.width

    def fit(self) -> Fit | None:
        """The fit of the moment, made anew in 2 ms; None while there is too little evidence."""
        if self.count < MIN_POINTS or not self._is_loss():
            return None
        return self._steady(
            fit_curve(
                self.bins,
                start_loss=median(self.first),
                now=self.recent[-1][0],
                total=self.total_steps or 2 * self.recent[-1][0],
                steps_per_epoch=self.steps_per_epoch,
                calm=self.calm() * self.evidence(),
            )
        )

    def _steady(self, fit: Fit) -> Fit:
        """The fit, its score at most `SLACK` below the highest one since the loss last rose.

        More data may show that more is to be gained; what has been gained is not lost by that.
        """
        score, level = self.held
        noise = fit.level * log_noise([point[1] for point in self.recent])
        rise = max(RISE[0] * (median(self.first) - fit.level), RISE[1] * noise)
        if fit.score >= score or fit.level > level + rise:
            self.held = [fit.score, fit.level]
            return fit
        self.held[1] = min(level, fit.level)
        lowest = (score - SLACK) * min(1.0, self.calm() * self.evidence() or 1.0)
        return replace(fit, score=max(fit.score, lowest), score_high=max(fit.score_high, lowest))

    def _is_loss(self) -> bool:
        """No negative values, as a cross-entropy has none: the family's floor is at zero or above."""
        return min((b[2] for b in self.bins), default=0) >= 0

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
        """Monitoring/... values of the moment, from a fit of their own: a run asks where one `is_due`.

        A value that cannot be known yet is absent. Without evidence the score is 0 by its formula, and has
        no interval.
        """
        values = {} if self.evidence() else {"Monitoring/Convergence_Score": 0.0}
        if len(self.bins) >= 5:
            values["Monitoring/Loss_Trend"] = loss_trend(self.bins)
        fit = self.fit()
        if fit is None:
            return values
        if self.evidence():
            values |= {
                "Monitoring/Convergence_Score": fit.score,
                "Monitoring/Convergence_Score_Low": fit.score_low,
                "Monitoring/Convergence_Score_High": fit.score_high,
            }
        values |= {
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
        state = {name: getattr(self, name) for name in (*names, "held")}
        state["held"] = self.held if math.isfinite(self.held[1]) else [0.0, sys.float_info.max]
        return copy.deepcopy(state)


def loss_trend(bins: list[list]) -> float:
    """Slope of the smoothed loss in loss per 100 steps; negative while the loss falls.

    Theil-Sen: the median of the slopes between all pairs of points (Theil 1950, Sen 1968), here
    over the bins of the last quarter of the run so far, at least eight bins.
    """
    window = bins[-max(8, len(bins) // 4) :]
    steps, losses = (np.array([b[k] / b[0] for b in window]) for k in (1, 2))
    first, second = np.triu_indices(len(window), 1)
    slopes = (losses[second] - losses[first]) / (steps[second] - steps[first])
    return 100.0 * float(np.median(slopes))


# --------------------------------------------------------------------------------------- the tool


def describe(curve: Curve, upto: float = 1.0) -> dict:
    """Score, trend, forecast for the last step and the alerts of the first `upto` of a run."""
    monitor = ConvergenceMonitor(curve.total_steps, curve.steps_per_epoch)
    alerts, spoken, used = AlertMonitor(), [], 0
    for row in curve.points:
        if row["step"] > upto * curve.total_steps:
            break
        forecast = {}
        if "Training/Loss" in row:
            used += 1
            monitor.observe(row["step"], row["Training/Loss"], row.get("Training/Learning_Rate"))
            forecast = monitor.scalars() if monitor.is_due() else {}
        spoken += alerts.observe(int(row["step"]), row | forecast, {})
    if not used:
        raise UserError(f"--upto {upto:g} leaves no logged loss; raise it")
    values = monitor.scalars()
    result = {
        "score": values.get("Monitoring/Convergence_Score") if monitor.evidence() else None,
        "score_low": values.get("Monitoring/Convergence_Score_Low"),
        "score_high": values.get("Monitoring/Convergence_Score_High"),
        "trend": values.get("Monitoring/Loss_Trend"),
        "forecast": values.get("Monitoring/Forecast_Final_Loss"),
        "forecast_low": values.get("Monitoring/Forecast_Final_Loss_Low"),
        "forecast_high": values.get("Monitoring/Forecast_Final_Loss_High"),
        "steps_to_99_percent": values.get("Monitoring/Steps_To_99_Percent"),
        "step": monitor.recent[-1][0] if monitor.recent else None,
        "total_steps": curve.total_steps,
        "steps_counted": curve.counted,
        "logged_losses": used,
        "nonfinite": monitor.nonfinite,
        "alerts": sorted({alert.name for alert in spoken}),
    }
    return result
