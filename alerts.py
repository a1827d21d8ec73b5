"""Looks at every logged step for what usually goes wrong, and says what to do about it.

One detector per trouble, each a short function of this step's metrics and a bounded memory. A metric
that is absent keeps its detector as it was. Nothing here acts: the loop logs, saves, stops, or
hands the alert to a command of the user's (`run_command`).
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean, median

from errors import UserError

WINDOW = 64  # logged values that the short memories keep
QUIET = 10  # logged steps that a trouble must be away before it is news again
LEAK_BINS = 64  # a memory series is squeezed into 32 to 64 bins, however long the run
PROBES = 4  # answers an evaluation's format rate is taken to be the mean of
SHOWN_STEPS = 400  # steps the table names for one kind of alert


@dataclass(frozen=True)
class Alert:
    """One trouble, at the step it was first seen. `value` broke `threshold`; both in one unit."""

    name: str
    step: int
    value: float
    threshold: float
    evidence: dict = field(default_factory=dict)
    advice: str = ""

    def record(self) -> dict:
        """As strict JSON: a value that isn't finite becomes its name, such as "nan"."""
        return {k: _strict(v) for k, v in asdict(self).items()}


def _strict(value):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


@dataclass(frozen=True)
class _Finding:
    """What a detector saw; the trouble is present where it returns one."""

    value: float
    threshold: float
    evidence: dict = field(default_factory=dict)


ADVICE = {
    "Gradient_Explosion": "Lower the learning rate or lengthen the warm-up, keep max_grad_norm at "
    "1.0 or less, and look at the samples of this step.",
    "Loss_Spike": "Look at the samples of this step for broken or foreign text. If spikes repeat, "
    "lower the learning rate or shuffle the data better.",
    "NonFinite": "Look at the samples of this step and at the precision: use bf16 or fp32, not "
    "fp16. If it goes on, lower the learning rate and resume from the last checkpoint.",
    "Stagnation": "Check that the targets are not masked away and that the adapter gets gradients. "
    "Then raise the learning rate or lora_r.",
    "Divergence": "Stop, resume from the checkpoint before the rise and lower the learning rate "
    "by a factor of 2 to 5.",
    "Memory_Leak": "Something keeps objects from step to step. Look for tensors kept with their "
    "graph (use .item() or .detach()) and for growing lists or caches in the data reader.",
    "GPU_Overheat": "Check fans, air flow and dust, or lower the power limit "
    "(nvidia-smi -pl WATTS).",
    "Low_GPU_Utilization": "The named phase holds the GPU up. data: tokenize beforehand or use "
    "more workers; logging: log less often; forward_backward: larger batches or packing.",
    "OOM_Risk": "Lower the tokens per micro-batch or max_seq_length, or turn on gradient "
    "checkpointing; raise the accumulation to keep the batch.",
    "Data_Starvation": "The GPU waits for data. Tokenize beforehand, use more workers or move "
    "the files to a faster disk.",
    "Thinking_Collapse": "The model stops thinking or closing its thought. Stop, go back to the "
    "checkpoint before, and check that the data holds full reasoning and </think>.",
    "Overfitting": "Stop here and keep the checkpoint with the lowest held-out loss. Fewer epochs, "
    "more data or dropout help.",
    "Slow_Rank": "One rank holds up all others. Compare temperature, clocks and other processes "
    "of its GPU, and its share of long samples.",
}
NAMES = tuple(ADVICE)
ONLY_FOR = {"slowest_rank": "Slow_Rank"}  # evidence that says nothing about other alerts


class AlertMonitor:
    """All detectors over one run. Deterministic; the state goes into the checkpoint.

    gradient_z: robust z-score of the log gradient norm, and gradient_ratio: times its median;
    spike_z, spike_ratio: the same for the loss; divergence: rise of the smoothed loss above its
    best, as a share; stuck: fall, as a share of the start, below which a run has learned nothing;
    patience: logged losses without progress that are a stagnation; leak_share: growth that counts
    as a leak, as a share of the level, and at least leak_mb; overheat_c/cooled_c: °C where the
    alarm begins/ends; low_utilization: % GPU; starvation: data's share of the step; oom: % of a
    memory in use; collapse: share of the thinking length, format_drop: fall of the format
    rate; overfit: rise of the held-out loss above its best, as a share; straggler: %.
    """

    def __init__(
        self,
        state: Mapping | None = None,
        *,
        gradient_z: float = 6.0,
        gradient_ratio: float = 5.0,
        spike_z: float = 6.0,
        spike_ratio: float = 1.25,
        divergence: float = 0.3,
        stuck: float = 0.01,
        patience: int = 200,
        leak_share: float = 0.03,
        leak_mb: float = 50.0,
        overheat_c: float = 85.0,
        cooled_c: float = 80.0,
        low_utilization: float = 80.0,
        starvation: float = 0.3,
        oom: float = 95.0,
        collapse: float = 0.6,
        format_drop: float = 0.25,
        overfit: float = 0.02,
        straggler: float = 20.0,
    ):
        limits = dict(locals())
        self.limit = {k: v for k, v in limits.items() if k not in ("self", "state", "__class__")}
        state = (
            json.loads(json.dumps(state)) if state else {}
        )  # never share lists with a checkpoint
        self.series: dict[str, list] = state.get("series", {})
        self.marks: dict[str, float] = state.get("marks", {})
        self.active: dict[str, bool] = state.get("active", {})
        self.quiet: dict[str, int] = state.get("quiet", {})
        self.rows: dict[str, dict] = state.get("rows", {})

    def observe(
        self, step: int, metrics: Mapping[str, float], evidence: Mapping | None = None
    ) -> list[Alert]:
        """Take one logged step; return the alerts that are news.

        metrics: {tag: value} under the names of the metric table. evidence: what the loop knows of
        this step (sample ids, module, ...); it is passed on with the alert.
        """
        raised = []
        for name, detector in DETECTORS.items():
            finding = detector(self, metrics)
            if finding is KEEP:
                if self.active.get(name):
                    continue
                finding = None  # it was quiet, and nothing says otherwise
            if finding and self.quiet.get(name, QUIET) >= QUIET and not self.active.get(name):
                raised.append(self._alert(name, step, finding, evidence or {}))
            self.active[name] = finding is not None
            self.quiet[name] = 0 if finding else min(QUIET, self.quiet.get(name, QUIET) + 1)
        return raised

    def _alert(self, name: str, step: int, finding: _Finding, evidence: Mapping) -> Alert:
        known = {k: v for k, v in evidence.items() if ONLY_FOR.get(k, name) == name}
        facts = {**finding.evidence, **known}
        alert = Alert(
            name, int(step), float(finding.value), float(finding.threshold), facts, ADVICE[name]
        )
        record = alert.record()
        row = self.rows.setdefault(name, {"times": 0, "steps": [], **record})
        row["times"] += 1
        row["steps"] = [*row["steps"], int(step)][-SHOWN_STEPS:]
        row.update(value=record["value"], evidence=record["evidence"])
        return alert

    def scalars(self) -> dict[str, float]:
        """Alerts/<Name>: 1.0 while the trouble is present, else 0.0; every name, every time."""
        return {f"Alerts/{name}": float(self.active.get(name, False)) for name in NAMES}

    def table(self) -> str:
        """All alerts of the run as one Markdown table: a row per kind, with every step of it."""
        if not self.rows:
            return "No alerts."
        lines = [
            "| alert | times | steps | last value | limit | evidence | what to do |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in sorted(self.rows.items(), key=lambda item: item[1]["step"]):
            cells = (
                name,
                str(row["times"]),
                _step_list(row["steps"], row["times"]),
                _number(row["value"]),
                _number(row["threshold"]),
                _facts(row["evidence"]),
                row["advice"],
            )
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def state_dict(self) -> dict:
        """Everything remembered, as strict JSON, bounded however long the run."""
        names = ("series", "marks", "active", "quiet", "rows")
        return json.loads(json.dumps({name: getattr(self, name) for name in names}))

    def remember(self, name: str, value: float, keep: int = WINDOW) -> list[float]:
        """Append to a bounded series and return it, the newest value last."""
        self.series[name] = [*self.series.get(name, []), float(value)][-keep:]
        return self.series[name]


def _step_list(steps: Sequence[int], times: int) -> str:
    text = ", ".join(map(str, steps))
    return text if times == len(steps) else f"… {text}"


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def _facts(evidence: Mapping) -> str:
    """Evidence in one table cell: nothing of it may break the table or pass for markup."""
    text = "; ".join(f"{key}: {_cell(value)}" for key, value in evidence.items())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _cell(value) -> str:
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - 8} more" if len(value) > 8 else ""
        return ", ".join(_cell(v) for v in value[:8]) + more
    text = _number(value) if isinstance(value, float) else str(value)
    return " ".join(text.split())[:200]


# ----------------------------------------------------------------------------------- the detectors
# Each takes (monitor, metrics) and returns a _Finding while the trouble is present, None while it
# is not, KEEP where this step says nothing about it.

KEEP = object()


def _gradient_explosion(monitor: AlertMonitor, metrics: Mapping):
    """Robust z-score of the log gradient norm: (log g - median) / (1.4826 MAD), MAD >= 0.1."""
    norm = metrics.get("Training/Gradient_Norm")
    if norm is None or not math.isfinite(norm):
        return KEEP
    before = monitor.series.get("log_gradient", [])
    log = math.log(max(norm, 1e-12))
    monitor.remember("log_gradient", log)
    if len(before) < 10:
        return None
    centre = median(before)
    scale = 1.4826 * max(0.1, median(abs(x - centre) for x in before))
    limit = max(
        monitor.limit["gradient_z"] * scale,
        math.log(monitor.limit["gradient_ratio"]),
    )
    if log - centre <= limit:
        return None
    return _Finding(norm, math.exp(centre + limit), {"usual norm": math.exp(centre)})


def _loss_spike(monitor: AlertMonitor, metrics: Mapping):
    """One loss far above the losses just before it (see `is_spike`)."""
    loss = _loss(metrics, "Training/Loss")
    if loss is None:
        return KEEP
    before = monitor.series.get("loss", [])[-31:]
    if len(before) < 8:
        return None
    z, ratio = monitor.limit["spike_z"], monitor.limit["spike_ratio"]
    if not is_spike(loss, before, z, ratio):
        return None
    limit = max(ratio, math.exp(z * log_noise(before)))
    usual = median(before[-7:])
    return _Finding(loss, usual * limit, {"usual loss": usual})


def is_spike(loss: float, before: list[float], z: float = 6.0, ratio: float = 1.25) -> bool:
    """Is `loss` far above the losses `before` it, more than noise and trend explain?

    True where log(loss) - median of the last seven logs exceeds both log(ratio) and z sigma.
    """
    height = _log(loss) - median(_log(x) for x in before[-7:])
    return height > max(z * log_noise(before), math.log(ratio))


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


def _non_finite(monitor: AlertMonitor, metrics: Mapping):
    """A loss or gradient norm that is no number, or a suppressed update since the last log."""
    for name in ("Training/Loss", "Training/Gradient_Norm"):
        value = metrics.get(name)
        if value is not None and not math.isfinite(value):
            return _Finding(value, 0.0, {"metric": name})
    counted = metrics.get("Monitoring/NonFinite_Steps", 0.0)
    known = monitor.marks.get("nonfinite", 0.0)
    monitor.marks["nonfinite"] = counted
    if counted > known:
        return _Finding(counted, known, {"metric": "Monitoring/NonFinite_Steps"})
    return None


def _follow_loss(monitor: AlertMonitor, metrics: Mapping) -> bool:
    """Keep the smoothed loss, its start, its best and when it was reached. False without a loss.

    Smoothed: the median of the last 15 logged losses. It runs first among the detectors of the
    loss, `_loss_spike` excepted, which needs the losses before this one.
    """
    loss = _loss(metrics, "Training/Loss")
    if loss is None:
        return False
    marks = monitor.marks
    level = median(monitor.remember("loss", loss)[-15:])
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


def _divergence(monitor: AlertMonitor, metrics: Mapping):
    """The smoothed loss has risen far above its best: a share of it, beyond noise, for good."""
    if not _follow_loss(monitor, metrics):
        return KEEP
    marks, losses = monitor.marks, monitor.series["loss"]
    noise = log_noise(losses[-31:]) * marks["level"]
    limit = marks["best"] + max(
        monitor.limit["divergence"] * marks["best"], 2 * noise, 0.02 * marks["start"]
    )
    if marks["level"] <= limit:
        return None
    return _Finding(marks["level"], limit, {"best smoothed loss": marks["best"]})


def _stagnation(monitor: AlertMonitor, metrics: Mapping):
    """No progress while the learning rate could still give some; two forms.

    Stuck: the loss has hardly fallen from its start (limit `stuck`) after `patience` logged
    losses, or after 40 when a quarter of the learning rate is already spent. Stalled: no better
    loss for `patience` logged losses and half the run, well above what the forecast promised when
    the last progress was made, at a rate over a third of its peak. A flat loss at the forecast is
    convergence, and a flat loss at the end of the schedule is the end: neither is reported.
    """
    marks = monitor.marks
    if _loss(metrics, "Training/Loss") is None or "level" not in marks:
        return KEEP
    count, rate = marks["count"], marks.get("rate", 1.0)
    spent = 1 - rate / (marks.get("peak_rate") or 1.0)
    fall = 1 - marks["best"] / marks["start"] if marks["start"] else 0.0
    patience = monitor.limit["patience"]
    old_enough = count >= patience or (count >= 40 and spent >= 0.25)
    warm = rate >= marks.get("peak_rate", 0.0) or spent >= 0.02
    if old_enough and (warm or count >= 2 * patience) and fall < monitor.limit["stuck"]:
        return _Finding(fall, monitor.limit["stuck"], {"form": "stuck since the start"})
    since = count - marks["best_at"]
    promised = marks.get("promised", math.inf) + 0.01 * marks["start"]
    stalled = since >= max(patience, count / 2) and spent < 2 / 3 and marks["best"] > promised
    if not stalled:
        return None
    return _Finding(marks["level"], promised, {"form": "stalled", "logged losses": int(since)})


def _memory_leak(monitor: AlertMonitor, metrics: Mapping):
    """A memory that surely grows and does not slow down (see `_leak`)."""
    found, new = None, False
    for name in ("Memory/Host_RSS_MB", "Memory/GPU_Allocated_MB"):
        value = _finite(metrics, name)
        if value is not None and _add_to_bins(monitor, name, value):
            new = True
            found = found or _leak(monitor, name)
    return found if new else KEEP


def _add_to_bins(monitor: AlertMonitor, name: str, value: float) -> bool:
    """Add to the bin means of a whole-run series; True when a bin was filled."""
    width = int(monitor.marks.setdefault(f"width {name}", 2))
    parts = monitor.remember(f"part {name}", value, keep=width)
    if len(parts) < width:
        return False
    monitor.series[f"part {name}"] = []
    bins = monitor.remember(f"bins {name}", fmean(parts), keep=LEAK_BINS)
    if len(bins) == LEAK_BINS:
        pairs = zip(bins[::2], bins[1::2], strict=True)
        monitor.series[f"bins {name}"] = [fmean(pair) for pair in pairs]
        monitor.marks[f"width {name}"] = 2 * width
    return True


def _leak(monitor: AlertMonitor, name: str) -> _Finding | None:
    """Growth over the last half of what was seen, by the lower 99% bound of the slope.

    Both quarters of that half must surely rise, the second at least 0.8 times as fast as the first:
    a cache that fills up slows down, a leak does not.
    """
    bins, width = monitor.series[f"bins {name}"], monitor.marks[f"width {name}"]
    if len(bins) * width < 100:
        return None
    bins = bins[len(bins) // 2 :]
    half = len(bins) // 2
    (early, early_low), (late, late_low) = (_slope(part) for part in (bins[:half], bins[half:]))
    if min(early_low, late_low) <= 0 or late < 0.8 * early:
        return None
    growth = _slope(bins)[1] * (len(bins) - 1)
    limit = max(monitor.limit["leak_share"] * bins[0], monitor.limit["leak_mb"])
    if growth <= limit:
        return None
    per_log = growth / (len(bins) - 1) / width
    return _Finding(growth, limit, {"memory": name, "MB per logged step": per_log})


def _slope(values: Sequence[float]) -> tuple[float, float]:
    """Theil-Sen slope per value and its lower bound at 99% confidence (Sen 1968)."""
    from scipy.stats import theilslopes

    result = theilslopes(values, alpha=0.99)
    return float(result.slope), float(result.low_slope)


def _gpu_overheat(monitor: AlertMonitor, metrics: Mapping):
    """Hotter than the limit; the alarm ends only below the lower limit."""
    hot = _worst_gpu(metrics, "Temperature_C", max)
    if hot is None:
        return KEEP
    gpu, celsius = hot
    limit = monitor.limit["cooled_c" if monitor.active.get("GPU_Overheat") else "overheat_c"]
    return _Finding(celsius, limit, {"gpu": gpu}) if celsius > limit else None


def _worst_gpu(metrics: Mapping, quantity: str, worst) -> tuple[int, float] | None:
    """(index, value) of the GPU with the largest or smallest `quantity`."""
    values = []
    for name, value in metrics.items():
        match = re.fullmatch(rf"GPU_(\d+)/{quantity}", name)
        if match and value is not None and math.isfinite(value):
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


def _data_starvation(monitor: AlertMonitor, metrics: Mapping):
    """Waiting for data takes too large a share of the step, over the last ten logged steps."""
    shares = phase_shares(metrics)
    if "data" not in shares:
        return KEEP
    recent = monitor.remember("data_share", shares["data"], keep=10)
    share, limit = median(recent), monitor.limit["starvation"]
    return _Finding(share, limit, shares) if len(recent) >= 5 and share > limit else None


def _low_gpu_utilization(monitor: AlertMonitor, metrics: Mapping):
    """A GPU is idle too often, over ten logged steps; names the phase that most likely holds it up.

    That is the largest phase beside forward/backward when it takes over a tenth of the step.
    Where `Data_Starvation` is already active it explains the idleness, and this stays silent.
    """
    idle = _worst_gpu(metrics, "Utilization_Percent", min)
    if idle is None:
        return KEEP
    gpu, percent = idle
    recent = monitor.remember("utilization", percent, keep=10)
    mean, limit = fmean(recent), monitor.limit["low_utilization"]
    if len(recent) < 10 or mean >= limit or monitor.active.get("Data_Starvation"):
        return None
    shares = phase_shares(metrics)
    evidence = {"gpu": gpu, "phase": _guilty_phase(shares), **shares}
    return _Finding(mean, limit, evidence)


def _guilty_phase(shares: Mapping[str, float]) -> str:
    if not shares:
        return "not measured"
    others = {phase: s for phase, s in shares.items() if phase != "forward_backward"}
    phase = max(others, key=others.get, default="forward_backward")
    return phase if others.get(phase, 0) > 0.1 else "forward_backward"


def _oom_risk(monitor: AlertMonitor, metrics: Mapping):
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
    limit = monitor.limit["oom"] - (3 if monitor.active.get("OOM_Risk") else 0)
    return _Finding(known[where], limit, {"memory": where}) if known[where] > limit else None


def _thinking_collapse(monitor: AlertMonitor, metrics: Mapping):
    """Generated thinking gets short, or its form breaks, against the first three evaluations."""
    length = _finite(metrics, "Eval/Think_Length_Ratio")
    form = _finite(metrics, "Eval/Format_Valid_Rate")
    if length is None and form is None:
        return KEEP
    short = None if length is None else _short_thinking(monitor, length)
    broken = None if form is None else _broken_form(monitor, form)
    return short or broken


def _short_thinking(monitor: AlertMonitor, ratio: float) -> _Finding | None:
    """Too small a share of the length at first, but of the reference's, a ratio of 1, at most.

    So a model that rambled at first may learn to be as brief as its reference.
    """
    name = "Eval/Think_Length_Ratio"
    first = monitor.series.get(f"first {name}", [])
    if len(first) < 3:
        first = monitor.remember(f"first {name}", ratio)
    limit = monitor.limit["collapse"] * min(1.0, median(first))
    if ratio >= limit:
        return None
    return _Finding(ratio, limit, {"metric": name, "at first": median(first)})


def _broken_form(monitor: AlertMonitor, rate: float) -> _Finding | None:
    """The last three evaluations have a lower rate than the first three, beyond what chance does.

    Chance: three sigma of the difference of two binomial shares, `PROBES` answers to an evaluation.
    """
    name = "Eval/Format_Valid_Rate"
    first = monitor.series.get(f"first {name}", [])
    if len(first) < 3:
        monitor.remember(f"first {name}", rate)
        return None
    last = monitor.remember(f"last {name}", rate, keep=3)
    usual, now = fmean(first), fmean(last)
    share = fmean([*first, *last])
    sigma = math.sqrt(share * (1 - share) / PROBES * (1 / len(first) + 1 / len(last)))
    limit = usual - max(monitor.limit["format_drop"], 3 * sigma)
    return _Finding(now, limit, {"metric": name, "at first": usual}) if now < limit else None


def _overfitting(monitor: AlertMonitor, metrics: Mapping):
    """Two held-out losses in a row above the best one, while the training loss fell since then."""
    marks = monitor.marks
    level = marks.get("level", _loss(metrics, "Training/Loss"))
    if marks.get("eval_best_train") is None:  # no training loss is known at step 0 yet
        marks["eval_best_train"] = level
    held_out = _loss(metrics, "Eval/Loss")
    if held_out is None:
        return KEEP
    if held_out <= marks.get("eval_best", math.inf):
        marks |= {"eval_best": held_out, "eval_worse": 0, "eval_best_train": level}
        return None
    limit = marks["eval_best"] * (1 + monitor.limit["overfit"])
    marks["eval_worse"] = marks["eval_worse"] + 1 if held_out > limit else 0
    fell = level is not None and level < marks["eval_best_train"]
    if marks["eval_worse"] < 2 or not fell:
        return None
    return _Finding(held_out, limit, {"best held-out loss": marks["eval_best"]})


def _slow_rank(monitor: AlertMonitor, metrics: Mapping):
    """The slowest rank is far behind the others over the last five logged steps."""
    percent = _finite(metrics, "Throughput/Straggler_Percent")
    if percent is None:
        return KEEP
    recent = monitor.remember("straggler", percent, keep=5)
    limit = monitor.limit["straggler"]
    late = len(recent) == 5 and median(recent) > limit
    return _Finding(median(recent), limit) if late else None


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
    "Slow_Rank": _slow_rank,
}


# --------------------------------------------------------------------------- a command of the user's


def run_command(
    command: str | Sequence[str], alert: Alert, timeout_s: float = 60.0
) -> threading.Thread:
    """Start the user's command with the alert as JSON on its stdin; return the thread at once.

    The command is split as a shell would and run without a shell, so nothing in the alert is ever
    interpreted. What it prints is dropped; a failure is one line on stderr. After `timeout_s`
    seconds it is ended. Raises UserError for an empty command or one with an open quote.
    """
    words = _words(command)
    payload = (json.dumps(alert.record(), ensure_ascii=True, allow_nan=False) + "\n").encode()
    thread = threading.Thread(target=_feed, args=(words, payload, timeout_s), daemon=True)
    thread.start()
    return thread


def _words(command: str | Sequence[str]) -> list[str]:
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError as error:
        raise UserError(f"alert command {command!r}: {error}; check its quotes") from error
    if not words:
        raise UserError("the alert command is empty; name a program or leave the option out")
    return words


def _feed(words: list[str], payload: bytes, timeout_s: float) -> None:
    try:
        done = subprocess.run(
            words,
            input=payload,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"alert command {words[0]!r} failed: {error}", file=sys.stderr)
        return
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())[-200:]
        print(f"alert command {words[0]!r} exited {done.returncode}: {reason}", file=sys.stderr)
