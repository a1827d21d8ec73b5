"""Detectors of trouble with the machine: memory, heat, idle GPUs, slow data, a slow rank."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean, median

from finetuning.monitoring.detector_memory import KEEP, DetectorMemory, Finding, Verdict, finite

LEAK_BINS = 64  # a memory series is squeezed into 32 to 64 bins, however long the run
PHASES = re.compile(
    r"Throughput/(?:Step_)?(?:Seconds[_/])?(Data|Forward_Backward|Optimizer|Logging)(?:_Seconds)?"
)


def memory_leak(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """A memory that surely grows and does not slow down (see `_leak`)."""
    found, new = None, False
    for name in ("Memory/Host_RSS_MB", "Memory/GPU_Allocated_MB"):
        value = finite(metrics, name)
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


def gpu_overheat(memory: DetectorMemory, metrics: Mapping) -> Verdict:
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
        if not name.startswith("GPU_"):
            continue
        match = re.fullmatch(rf"GPU_(\d+)/{quantity}", name)
        if match and value is not None and math.isfinite(value):
            values.append((int(match[1]), float(value)))
    return worst(values, key=lambda pair: pair[1]) if values else None


def phase_shares(metrics: Mapping) -> dict[str, float]:
    """Share of the step time per phase, {"data": 0.1, ...}; empty where it isn't measured."""
    seconds = {}
    for name, value in metrics.items():
        match = name.startswith("Throughput/") and PHASES.fullmatch(name)
        if match and value is not None and math.isfinite(value):
            seconds[match[1].lower()] = float(value)
    total = sum(seconds.values())
    return {phase: s / total for phase, s in seconds.items()} if total > 0 else {}


def data_starvation(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """Waiting for data takes too large a share of the step, over the last ten logged steps."""
    shares = phase_shares(metrics)
    if "data" not in shares:
        return KEEP
    recent = memory.remember("data_share", shares["data"], keep=10)
    share, limit = median(recent), memory.limits.starvation
    return Finding(share, limit, shares) if len(recent) >= 5 and share > limit else None


def low_gpu_utilization(memory: DetectorMemory, metrics: Mapping) -> Verdict:
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


def oom_risk(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """A memory is nearly full: the GPU's in use, the peak of a step on it, or the host's."""
    used = {
        "GPU memory in use": finite(metrics, "Memory/GPU_Utilization_Percent"),
        "host memory": finite(metrics, "Memory/Host_Percent"),
    }
    peak, total = (finite(metrics, f"Memory/GPU_{k}_MB") for k in ("Peak", "Total"))
    if peak is not None and total:
        used["peak of a step on the GPU"] = 100 * peak / total
    known = {k: v for k, v in used.items() if v is not None}
    if not known:
        return KEEP
    where = max(known, key=known.get)
    limit = memory.limits.oom - (3 if memory.active.get("OOM_Risk") else 0)
    return Finding(known[where], limit, {"memory": where}) if known[where] > limit else None


def slow_rank(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """The slowest rank is far behind the others over the last five logged steps."""
    percent = finite(metrics, "Throughput/Straggler_Percent")
    if percent is None:
        return KEEP
    recent = memory.remember("straggler", percent, keep=5)
    limit = memory.limits.straggler
    late = len(recent) == 5 and median(recent) > limit
    return Finding(median(recent), limit) if late else None
