"""Detectors of what the model learns and forgets: answers, held-out losses, sources, adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from statistics import fmean, median

from finetuning.monitoring.chances import least_sigmas
from finetuning.monitoring.detector_memory import KEEP, DetectorMemory, Finding, Verdict, finite
from finetuning.monitoring.loss_detectors import LEAST, training_loss

PROBES = 4  # answers an evaluation's format rate is taken to be the mean of
SATURATED = 10  # logged accuracies that must all be at the limit
SOURCES = ("Training/By_Source/", "Eval/By_Source/")
MOST_SOURCES = 24
LEVEL = {"Training/By_Source/": 10, "Eval/By_Source/": 2}  # values of a source's level
ADAPTER = re.compile(r"LoRA/([^/]+)/Update_Ratio")


def overfitting(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """Two held-out losses in a row above the best one, while the training loss fell since then."""
    marks = memory.marks
    level = marks.get("level", training_loss(memory, metrics))
    if marks.get("eval_best_train") is None:  # no training loss is known at step 0 yet
        marks["eval_best_train"] = level
    held_out = finite(metrics, "Eval/Loss")
    if held_out is None or held_out < 0:
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


def saturation(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """Every training token is predicted, ten logged steps in a row: these data teach nothing more."""
    accuracy = finite(metrics, "Training/Token_Accuracy")
    if accuracy is None:
        return KEEP
    recent = memory.remember("accuracy", accuracy, keep=SATURATED)
    limit = memory.limits.saturated
    if len(recent) < SATURATED or min(recent) < limit:
        return None
    return Finding(min(recent), limit, {"training loss": metrics.get("Training/Loss", math.nan)})


def forgetting(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """The loss on general text is above what it was before the first step."""
    loss = finite(metrics, "Forgetting/General_Loss")
    if loss is None:
        return KEEP
    base = memory.marks.setdefault("general_first", loss)
    limit = base * (1 + memory.limits.forgotten)
    if loss <= limit:
        return None
    distance = finite(metrics, "Forgetting/KL_General")
    known = {} if distance is None else {"KL to the base": distance}
    return Finding(loss, limit, {"loss of the base": base} | known)


def source_regression(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """One source gets worse while the others get better: training losses, or two held-out ones in a row.

    A source's level is the mean log of its last ten training losses (of two held-out ones); it is worse where
    that lies above its lowest by a share and beyond chance. Chance, of training losses: `least_sigmas` of a
    mean of ten, with sigma^2 half the mean square of all differences of neighbours (von Neumann 1941).
    The others: the median of their rises. A held-out loss is of the same samples each time.
    """
    found, new = None, False
    for family in SOURCES:
        losses = {t: finite(metrics, t) for t in metrics if t.startswith(family)}
        for tag, loss in losses.items():
            if loss is not None and loss >= 0:
                new |= _follow_source(memory, tag, loss, LEVEL[family])
        found = found or _worse_source(memory, family, LEVEL[family])
    return found if new or found else KEEP


def _follow_source(memory: DetectorMemory, tag: str, loss: float, size: int) -> bool:
    name, marks = f"source {tag}", memory.marks
    others = () if name in memory.series else memory.series
    if sum(other.startswith("source ") for other in others) >= MOST_SOURCES:
        return False
    values = memory.remember(name, math.log(max(loss, LEAST)), keep=2 * size)
    marks[f"count {name}"] = marks.get(f"count {name}", 0) + 1
    if len(values) > 1:
        squares = marks.get(f"squares {name}", 0.0) + (values[-1] - values[-2]) ** 2
        marks[f"squares {name}"] = squares
    if len(values) >= size:
        level = fmean(values[-size:])
        marks[f"lowest {name}"] = min(level, marks.get(f"lowest {name}", math.inf))
    return True


def _worse_source(memory: DetectorMemory, family: str, size: int) -> Finding | None:
    rises, own, marks = {}, f"source {family}", memory.marks
    for name, values in memory.series.items():
        if name.startswith(own) and len(values) >= 2 * size:
            rises[name] = fmean(values[-size:]) - marks[f"lowest {name}"]
    if len(rises) < 2:
        return None
    worst = max(rises, key=rises.get)
    others = median(rise for name, rise in rises.items() if name != worst)
    limit = math.log1p(memory.limits.source_worse * (1 if size > 2 else 0.5))
    if rises[worst] <= max(limit, 2 * others):
        return None  # nearly always, so what costs more comes later
    if size > 2:
        count = int(marks[f"count {worst}"])
        sigma = math.sqrt(marks[f"squares {worst}"] / (count - 1) / 2)
        limit = max(limit, least_sigmas(count, len(rises)) * sigma / math.sqrt(size))
    if rises[worst] <= max(limit, 2 * others):
        return None
    facts = {"source": worst.removeprefix(own), "the others, median": math.expm1(others)}
    facts["losses"] = "training" if family.startswith("Training") else "held-out"
    return Finding(math.expm1(rises[worst]), math.expm1(max(limit, 2 * others)), facts)


def dead_adapter(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """A group of adapters is still at zero at the second evaluation after others have moved."""
    ratios = {m[1]: finite(metrics, tag) for tag in metrics if (m := ADAPTER.fullmatch(tag))}
    ratios = {group: ratio for group, ratio in ratios.items() if ratio is not None}
    if not ratios:
        return KEEP
    highest = max(ratios.values())
    if highest <= 0:
        return None
    limit = memory.limits.dead_adapter * highest
    dead = sorted(group for group, ratio in ratios.items() if ratio <= limit)
    times = memory.marks["dead"] = memory.marks.get("dead", 0) + 1 if dead else 0
    return Finding(ratios[dead[0]], limit, {"adapters": dead}) if times >= 2 else None


def thinking_collapse(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """Generated thinking gets short, or its form breaks, against the first three evaluations."""
    length = finite(metrics, "Eval/Think_Length_Ratio")
    form = finite(metrics, "Eval/Format_Valid_Rate")
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
