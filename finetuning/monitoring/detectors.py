"""Detectors of trouble in a run, each from the metrics of logged steps."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median

WINDOW = 64  # logged values that the short memories keep
QUIET = 10  # logged steps that a trouble must be away before it is news again
LEAK_BINS = 64  # a memory series is squeezed into 32 to 64 bins, however long the run
PROBES = 4  # answers an evaluation's format rate is taken to be the mean of

_GPU = re.compile(r"GPU_(\d+)/(Temperature_C|Utilization_Percent)")
_WATCHED = re.compile(
    r"Training/(Loss|Gradient_Norm|Learning_Rate)|Eval/(Loss|Think_Length_Ratio|Format_Valid_Rate)"
    r"|Throughput/(?:Step_)?(?:Seconds[_/])?(?:Data|Forward_Backward|Optimizer|Logging)(?:_Seconds)?"
    r"|Forgetting/(General_Loss|KL_General)"
    r"|Throughput/Straggler_Percent|Monitoring/(NonFinite_Steps|Forecast_Final_Loss_High)"
    r"|Memory/(Host_RSS_MB|Host_Percent|GPU_(Allocated_MB|Peak_MB|Total_MB|Utilization_Percent))"
    rf"|{_GPU.pattern}"
)


@functools.lru_cache(maxsize=10_000)
def is_watched(tag: str) -> bool:
    """Whether a detector looks at the tag; of all others it need not be told."""
    return bool(_WATCHED.fullmatch(tag))


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
    forgotten: float = 0.02  # rise of the loss on general text above the base's, as a share
    straggler: float = 20.0  # %


class DetectorMemory:
    """What the detectors remember of earlier steps, bounded however long the run.

    series: last values by name; marks: single numbers by name; active: whether a trouble is present.
    """

    def __init__(self, limits: AlertLimits, state: Mapping) -> None:
        self.limits = limits
        self.series: dict[str, list] = state.get("series", {})
        self.marks: dict[str, float] = state.get("marks", {})
        self.active: dict[str, bool] = state.get("active", {})

    def remember(self, name: str, value: float, keep: int = WINDOW) -> list[float]:
        """Append to a bounded series and return it, the newest value last."""
        self.series[name] = [*self.series.get(name, []), float(value)][-keep:]
        return self.series[name]


# ----------------------------------------------------------------------------------- the detectors
# Each takes (memory, metrics) and returns a Finding while the trouble is present, None while it
# is not, KEEP where this step says nothing about it.

KEEP = object()


def _gradient_explosion(memory: DetectorMemory, metrics: Mapping):
    """Robust z-score of the log gradient norm: (log g - median) / (1.4826 MAD), MAD >= 0.1."""
    norm = metrics.get("Training/Gradient_Norm")
    if norm is None or not math.isfinite(norm):
        return KEEP
    before = memory.series.get("log_gradient", [])
    log = math.log(max(norm, 1e-12))
    memory.remember("log_gradient", log)
    if len(before) < 10:
        return None
    centre, limit = median(before), math.log(memory.limits.gradient_ratio)
    if log - centre <= limit:
        return None
    scale = 1.4826 * max(0.1, median(abs(x - centre) for x in before))
    limit = max(limit, memory.limits.gradient_z * scale)
    if log - centre <= limit:
        return None
    return Finding(norm, math.exp(centre + limit), {"usual norm": math.exp(centre)})


def _loss_spike(memory: DetectorMemory, metrics: Mapping):
    """One loss far above the losses just before it (see `is_spike`)."""
    loss = _loss(metrics, "Training/Loss")
    if loss is None:
        return KEEP
    before = memory.series.get("loss", [])[-31:]
    if len(before) < 8:
        return None
    z, ratio = memory.limits.spike_z, memory.limits.spike_ratio
    if not is_spike(loss, before, z, ratio):
        return None
    limit = max(ratio, math.exp(z * log_noise(before)))
    usual = median(before[-7:])
    return Finding(loss, usual * limit, {"usual loss": usual})


def is_spike(loss: float, before: list[float], z: float = 6.0, ratio: float = 1.25) -> bool:
    """Is `loss` far above the losses `before` it, more than noise and trend explain?

    True where log(loss) - median of the last seven logs exceeds both log(ratio) and z sigma.
    """
    height = _log(loss) - median(_log(x) for x in before[-7:])
    return height > math.log(ratio) and height > z * log_noise(before)


def log_noise(losses: Sequence[float]) -> float:
    """Sigma of the log loss from neighbours: 1.4826 median|difference| / sqrt(2), at least 0.01.

    Differences, so that a falling loss is not taken for a noisy one; the median, so that a spike
    does not hide itself (Hampel 1974).
    """
    logs = [_log(x) for x in losses]
    steps = [abs(b - a) for a, b in pairwise(logs)]
    return max(0.01, 1.4826 * median(steps) / math.sqrt(2))


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _finite(metrics: Mapping, name: str) -> float | None:
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def _loss(metrics: Mapping, name: str) -> float | None:
    """A loss to compare with others by ratio; a negative one, of another objective, is none."""
    value = _finite(metrics, name)
    return value if value is not None and value >= 0 else None


def _non_finite(memory: DetectorMemory, metrics: Mapping):
    """A loss or gradient norm that is no number, or a suppressed update since the last log."""
    for name in ("Training/Loss", "Training/Gradient_Norm"):
        value = metrics.get(name)
        if value is not None and not math.isfinite(value):
            return Finding(value, 0.0, {"metric": name})
    counted = metrics.get("Monitoring/NonFinite_Steps", 0.0)
    known = memory.marks.get("nonfinite", 0.0)
    memory.marks["nonfinite"] = counted
    if counted > known:
        return Finding(counted, known, {"metric": "Monitoring/NonFinite_Steps"})
    return None


def _follow_loss(memory: DetectorMemory, metrics: Mapping) -> bool:
    """Keep the smoothed loss, its start, its best and when it was reached. False without a loss.

    Smoothed: the median of the last 15 logged losses. It runs first among the detectors of the
    loss, `_loss_spike` excepted, which needs the losses before this one.
    """
    loss = _loss(metrics, "Training/Loss")
    if loss is None:
        return False
    marks = memory.marks
    level = median(memory.remember("loss", loss)[-15:])
    marks["count"] = count = marks.get("count", 0) + 1
    rate = _finite(metrics, "Training/Learning_Rate")
    if rate is not None:
        marks["rate"], marks["peak_rate"] = rate, max(rate, marks.get("peak_rate", 0.0))
    if count < 15:
        return False
    marks["level"] = level
    marks["start"] = max(level, marks.get("start", level)) if count <= 45 else marks["start"]
    if level < marks.get("best", math.inf) - 0.005 * marks["start"]:
        promised = _finite(metrics, "Monitoring/Forecast_Final_Loss_High")
        marks |= {"best": level, "best_at": count}
        if promised is not None:
            marks["promised"] = promised
    return True


def _divergence(memory: DetectorMemory, metrics: Mapping):
    """The smoothed loss has risen far above its best: a share of it, beyond noise, for good."""
    if not _follow_loss(memory, metrics):
        return KEEP
    marks, losses = memory.marks, memory.series["loss"]
    least = max(memory.limits.divergence * marks["best"], 0.02 * marks["start"])
    if marks["level"] <= marks["best"] + least:
        return None
    limit = marks["best"] + max(least, 2 * log_noise(losses[-31:]) * marks["level"])
    if marks["level"] <= limit:
        return None
    return Finding(marks["level"], limit, {"best smoothed loss": marks["best"]})


def _stagnation(memory: DetectorMemory, metrics: Mapping):
    """No progress while the learning rate could still give some; two forms.

    Stuck: the loss has hardly fallen from its start (limit `stuck`) after `patience` logged
    losses, or after 40 when a quarter of the learning rate is already spent. Stalled: no better
    loss for `patience` logged losses and half the run, well above what the forecast promised when
    the last progress was made, at a rate over a third of its peak. A flat loss at the forecast is
    convergence, and a flat loss at the end of the schedule is the end: neither is reported.
    """
    marks = memory.marks
    if _loss(metrics, "Training/Loss") is None or "level" not in marks:
        return KEEP
    count, rate = marks["count"], marks.get("rate", 1.0)
    spent = 1 - rate / (marks.get("peak_rate") or 1.0)
    fall = 1 - marks["best"] / marks["start"] if marks["start"] else 0.0
    patience = memory.limits.patience
    old_enough = count >= patience or (count >= 40 and spent >= 0.25)
    warm = rate >= marks.get("peak_rate", 0.0) or spent >= 0.02
    if old_enough and (warm or count >= 2 * patience) and fall < memory.limits.stuck:
        return Finding(fall, memory.limits.stuck, {"form": "stuck since the start"})
    since = count - marks["best_at"]
    promised = marks.get("promised", math.inf) + 0.01 * marks["start"]
    stalled = since >= max(patience, count / 2) and spent < 2 / 3 and marks["best"] > promised
    if not stalled:
        return None
    return Finding(marks["level"], promised, {"form": "stalled", "logged losses": int(since)})


def _memory_leak(memory: DetectorMemory, metrics: Mapping):
    """A memory that surely grows and does not slow down (see `_leak`)."""
    found, new = None, False
    for name in ("Memory/Host_RSS_MB", "Memory/GPU_Allocated_MB"):
        value = _finite(metrics, name)
        if value is not None and _add_to_bins(memory, name, value):
            new = True
            found = found or _leak(memory, name)
    return found if new else KEEP


def _add_to_bins(memory: DetectorMemory, name: str, value: float) -> bool:
    """Add to the bin means of a whole-run series; True when a bin was filled."""
    width = int(memory.marks.setdefault(f"width {name}", 2))
    parts = memory.remember(f"part {name}", value, keep=width)
    if len(parts) < width:
        return False
    memory.series[f"part {name}"] = []
    bins = memory.remember(f"bins {name}", fmean(parts), keep=LEAK_BINS)
    if len(bins) == LEAK_BINS:
        pairs = zip(bins[::2], bins[1::2], strict=True)
        memory.series[f"bins {name}"] = [fmean(pair) for pair in pairs]
        memory.marks[f"width {name}"] = 2 * width
    return True


def _leak(memory: DetectorMemory, name: str) -> Finding | None:
    """Growth over the last half of what was seen, by the lower 99% bound of the slope.

    Both quarters of that half must surely rise, the second at least 0.8 times as fast as the first:
    a cache that fills up slows down, a leak does not.
    """
    bins, width = memory.series[f"bins {name}"], memory.marks[f"width {name}"]
    if len(bins) * width < 100:
        return None
    bins = bins[len(bins) // 2 :]
    half = len(bins) // 2
    (early, early_low), (late, late_low) = (_slope(part) for part in (bins[:half], bins[half:]))
    if min(early_low, late_low) <= 0 or late < 0.8 * early:
        return None
    growth = _slope(bins)[1] * (len(bins) - 1)
    limit = max(memory.limits.leak_share * bins[0], memory.limits.leak_mb)
    if growth <= limit:
        return None
    per_log = growth / (len(bins) - 1) / width
    return Finding(growth, limit, {"memory": name, "MB per logged step": per_log})


def _slope(values: Sequence[float]) -> tuple[float, float]:
    """Theil-Sen slope per value and its lower bound at 99% confidence (Sen 1968)."""
    from scipy.stats import theilslopes

    result = theilslopes(values, alpha=0.99)
    return float(result.slope), float(result.low_slope)


def _gpu_overheat(memory: DetectorMemory, metrics: Mapping):
    """Hotter than the limit; the alarm ends only below the lower limit."""
    hot = _worst_gpu(metrics, "Temperature_C", max)
    if hot is None:
        return KEEP
    gpu, celsius = hot
    hot_before = memory.active.get("GPU_Overheat")
    limit = memory.limits.cooled_c if hot_before else memory.limits.overheat_c
    return Finding(celsius, limit, {"gpu": gpu}) if celsius > limit else None


def _worst_gpu(metrics: Mapping, quantity: str, worst) -> tuple[int, float] | None:
    """(index, value) of the GPU with the largest or smallest `quantity`."""
    values = []
    for name, value in metrics.items():
        match = _GPU.fullmatch(name)
        if match and match[2] == quantity and value is not None and math.isfinite(value):
            values.append((int(match[1]), float(value)))
    return worst(values, key=lambda pair: pair[1]) if values else None


PHASES = re.compile(
    r"Throughput/(?:Step_)?(?:Seconds[_/])?(Data|Forward_Backward|Optimizer|Logging)(?:_Seconds)?"
)


def phase_shares(metrics: Mapping) -> dict[str, float]:
    """Share of the step time per phase, {"data": 0.1, ...}; empty where it isn't measured."""
    seconds = {}
    for name, value in metrics.items():
        match = PHASES.fullmatch(name)
        if match and value is not None and math.isfinite(value):
            seconds[match[1].lower()] = float(value)
    total = sum(seconds.values())
    return {phase: s / total for phase, s in seconds.items()} if total > 0 else {}


def _data_starvation(memory: DetectorMemory, metrics: Mapping):
    """Waiting for data takes too large a share of the step, over the last ten logged steps."""
    shares = phase_shares(metrics)
    if "data" not in shares:
        return KEEP
    recent = memory.remember("data_share", shares["data"], keep=10)
    share, limit = median(recent), memory.limits.starvation
    return Finding(share, limit, shares) if len(recent) >= 5 and share > limit else None


def _low_gpu_utilization(memory: DetectorMemory, metrics: Mapping):
    """A GPU is idle too often, over ten logged steps; names the phase that most likely holds it up.

    That is the largest phase beside forward/backward when it takes over a tenth of the step.
    Where `Data_Starvation` is already active it explains the idleness, and this stays silent.
    """
    idle = _worst_gpu(metrics, "Utilization_Percent", min)
    if idle is None:
        return KEEP
    gpu, percent = idle
    recent = memory.remember("utilization", percent, keep=10)
    mean, limit = fmean(recent), memory.limits.low_utilization
    if len(recent) < 10 or mean >= limit or memory.active.get("Data_Starvation"):
        return None
    shares = phase_shares(metrics)
    evidence = {"gpu": gpu, "phase": _guilty_phase(shares), **shares}
    return Finding(mean, limit, evidence)


def _guilty_phase(shares: Mapping[str, float]) -> str:
    if not shares:
        return "not measured"
    others = {phase: s for phase, s in shares.items() if phase != "forward_backward"}
    phase = max(others, key=others.get, default="forward_backward")
    return phase if others.get(phase, 0) > 0.1 else "forward_backward"


def _oom_risk(memory: DetectorMemory, metrics: Mapping):
    """A memory is nearly full: the GPU's in use, the peak of a step on it, or the host's."""
    used = {
        "GPU memory in use": _finite(metrics, "Memory/GPU_Utilization_Percent"),
        "host memory": _finite(metrics, "Memory/Host_Percent"),
    }
    peak, total = (_finite(metrics, f"Memory/GPU_{k}_MB") for k in ("Peak", "Total"))
    if peak is not None and total:
        used["peak of a step on the GPU"] = 100 * peak / total
    known = {k: v for k, v in used.items() if v is not None}
    if not known:
        return KEEP
    where = max(known, key=known.get)
    limit = memory.limits.oom - (3 if memory.active.get("OOM_Risk") else 0)
    return Finding(known[where], limit, {"memory": where}) if known[where] > limit else None


def _thinking_collapse(memory: DetectorMemory, metrics: Mapping):
    """Generated thinking gets short, or its form breaks, against the first three evaluations."""
    length = _finite(metrics, "Eval/Think_Length_Ratio")
    form = _finite(metrics, "Eval/Format_Valid_Rate")
    if length is None and form is None:
        return KEEP
    short = None if length is None else _short_thinking(memory, length)
    broken = None if form is None else _broken_form(memory, form)
    return short or broken


def _short_thinking(memory: DetectorMemory, ratio: float) -> Finding | None:
    """Too small a share of the length at first, but of the reference's, a ratio of 1, at most.

    So a model that rambled at first may learn to be as brief as its reference.
    """
    name = "Eval/Think_Length_Ratio"
    first = memory.series.get(f"first {name}", [])
    if len(first) < 3:
        first = memory.remember(f"first {name}", ratio)
    limit = memory.limits.collapse * min(1.0, median(first))
    if ratio >= limit:
        return None
    return Finding(ratio, limit, {"metric": name, "at first": median(first)})


def _broken_form(memory: DetectorMemory, rate: float) -> Finding | None:
    """The last three evaluations have a lower rate than the first three, beyond what chance does.

    Chance: three sigma of the difference of two binomial shares, `PROBES` answers to an evaluation.
    """
    name = "Eval/Format_Valid_Rate"
    first = memory.series.get(f"first {name}", [])
    if len(first) < 3:
        memory.remember(f"first {name}", rate)
        return None
    last = memory.remember(f"last {name}", rate, keep=3)
    usual, now = fmean(first), fmean(last)
    share = fmean([*first, *last])
    sigma = math.sqrt(share * (1 - share) / PROBES * (1 / len(first) + 1 / len(last)))
    limit = usual - max(memory.limits.format_drop, 3 * sigma)
    return Finding(now, limit, {"metric": name, "at first": usual}) if now < limit else None


def _overfitting(memory: DetectorMemory, metrics: Mapping):
    """Two held-out losses in a row above the best one, while the training loss fell since then."""
    marks = memory.marks
    level = marks.get("level", _loss(metrics, "Training/Loss"))
    if marks.get("eval_best_train") is None:  # no training loss is known at step 0 yet
        marks["eval_best_train"] = level
    held_out = _loss(metrics, "Eval/Loss")
    if held_out is None:
        return KEEP
    if held_out <= marks.get("eval_best", math.inf):
        marks |= {"eval_best": held_out, "eval_worse": 0, "eval_best_train": level}
        return None
    limit = marks["eval_best"] * (1 + memory.limits.overfit)
    marks["eval_worse"] = marks["eval_worse"] + 1 if held_out > limit else 0
    fell = level is not None and level < marks["eval_best_train"]
    if marks["eval_worse"] < 2 or not fell:
        return None
    return Finding(held_out, limit, {"best held-out loss": marks["eval_best"]})


def _forgetting(memory: DetectorMemory, metrics: Mapping):
    """The loss on general text is above what it was before the first step."""
    loss = _loss(metrics, "Forgetting/General_Loss")
    if loss is None:
        return KEEP
    limit = memory.marks.setdefault("general_first", loss) * (1 + memory.limits.forgotten)
    if loss <= limit:
        return None
    distance = _finite(metrics, "Forgetting/KL_General")
    evidence = {"loss of the base": memory.marks["general_first"]}
    return Finding(loss, limit, evidence | ({"KL to the base": distance} if distance else {}))


def _slow_rank(memory: DetectorMemory, metrics: Mapping):
    """The slowest rank is far behind the others over the last five logged steps."""
    percent = _finite(metrics, "Throughput/Straggler_Percent")
    if percent is None:
        return KEEP
    recent = memory.remember("straggler", percent, keep=5)
    limit = memory.limits.straggler
    late = len(recent) == 5 and median(recent) > limit
    return Finding(median(recent), limit) if late else None


DETECTORS = {  # in this order: _loss_spike needs the losses before, _divergence takes the new one
    "Gradient_Explosion": _gradient_explosion,
    "Loss_Spike": _loss_spike,
    "NonFinite": _non_finite,
    "Divergence": _divergence,
    "Stagnation": _stagnation,
    "Memory_Leak": _memory_leak,
    "GPU_Overheat": _gpu_overheat,
    "Data_Starvation": _data_starvation,
    "Low_GPU_Utilization": _low_gpu_utilization,
    "OOM_Risk": _oom_risk,
    "Thinking_Collapse": _thinking_collapse,
    "Overfitting": _overfitting,
    "Forgetting": _forgetting,
    "Slow_Rank": _slow_rank,
}
