"""What detectors of trouble share: what they say, their limits, and what they remember of earlier steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW = 64  # logged values that the short memories keep
KEEP = object()  # this step says nothing about the trouble


@dataclass(frozen=True)
class Finding:
    """What a detector saw; the trouble is present where it returns one."""

    value: float
    threshold: float
    evidence: dict = field(default_factory=dict)


@dataclass(frozen=True)
class AlertLimits:
    """Where the detectors see trouble."""

    gradient_z: float = 6.0  # robust z-score of the log gradient norm,
    gradient_ratio: float = 5.0  # and times its median
    spike_z: float = 6.0  # the same for the loss
    spike_ratio: float = 1.25
    divergence: float = 0.3  # rise of the smoothed loss above its best, as a share
    stuck: float = 0.01  # fall, as a share of the start, below which a run has learned nothing
    patience: int = 200  # logged losses without progress that are a stagnation
    leak_share: float = 0.03  # growth that counts as a leak, as a share of the level,
    leak_mb: float = 50.0  # and at least so much
    overheat_c: float = 85.0  # °C where the alarm begins
    cooled_c: float = 80.0  # °C where it ends
    low_utilization: float = 80.0  # % GPU
    starvation: float = 0.3  # data's share of the step
    oom: float = 95.0  # % of a memory in use
    collapse: float = 0.6  # share of the thinking length
    format_drop: float = 0.25  # fall of the format rate
    overfit: float = 0.02  # rise of the held-out loss above its best, as a share
    straggler: float = 20.0  # %
    saturated: float = 0.995  # share of training tokens predicted
    forgotten: float = 0.02  # rise of the loss on general text above the base's, as a share
    source_worse: float = (
        0.2  # rise of a source's training loss above its best; half of it held out
    )
    dead_adapter: float = 1e-6  # update of a group of adapters, as a share of the largest
    clipped_share: float = 0.95  # of the gradients that are clipped,
    clipped_times: float = 5.0  # and how many times their limit is the usual one


class DetectorMemory:
    """What the detectors remember of earlier steps, bounded however long the run.

    series: last values by name; marks: single numbers by name; active: whether a trouble is present.
    settings: of the run, as far as they are known.
    """

    def __init__(
        self, limits: AlertLimits, state: Mapping, settings: Mapping | None = None
    ) -> None:
        self.limits, self.settings = limits, dict(settings or {})
        self.series: dict[str, list] = state.get("series", {})
        self.marks: dict[str, float] = state.get("marks", {})
        self.active: dict[str, bool] = state.get("active", {})

    def remember(self, name: str, value: float, keep: int = WINDOW) -> list[float]:
        """Append to a bounded series and return it, the newest value last."""
        self.series[name] = [*self.series.get(name, []), float(value)][-keep:]
        return self.series[name]

    def end_row(self, step: int, epoch: float | None) -> None:
        """Remember how far the run is with this logged step: passes over the data, None where unknown."""
        if epoch is not None:
            self.marks |= {"first_epoch": self.marks.get("first_epoch", max(epoch, 0.0))}
            self.marks |= {"epoch": epoch, "step": float(step)}

    def shown_all(self, values: int | None = None) -> bool:
        """Have the logged steps before this one shown every row of the data?

        One pass after the first logged step they have, wherever a log begins and its epochs count from.
        values: how many there are, where each is of one step alone and tells nothing of those between.
        """
        passes = self.marks.get("epoch", 0.0) - self.marks.get("first_epoch", 0.0)
        if values is not None:
            passes *= min(1.0, values / max(self.marks.get("step", 1.0), 1.0))
        return passes >= 1


Verdict = (
    Finding | None | object
)  # a Finding while the trouble is present, None while it is not, or KEEP


def finite(metrics: Mapping, name: str) -> float | None:
    """The value of a tag, None where it is absent or no finite number."""
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None
