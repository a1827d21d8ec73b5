"""Detectors of trouble with the training loss and the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from statistics import fmean, median

from finetuning.monitoring.chances import (
    RARE,
    above_tail,
    in_a_row,
    least_sigmas,
    news_above,
    too_high,
)
from finetuning.monitoring.detector_memory import KEEP, DetectorMemory, Finding, Verdict, finite
from finetuning.monitoring.usual_rows import unusual

SMOOTH = 15  # logged losses of the smoothed one
LONG = 30  # of the one that tells whether a run has learned anything
AT_ONCE = 3  # logged losses in a row, all above whatever was usual, that are no spike any more
UNKNOWN = 1e6  # stands for how far a step lies above its like, where no such rows are known
ENOUGH = 16  # logged values before one can be called unusual
LEAST = 1e-12  # of a loss, which may be 0, so that it has a logarithm
CLIPPED = 50  # logged norms that say whether clipping is the rule


def gradient_explosion(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """A gradient norm far above the usual: robust z-score of its log, its ratio, its like, and any before.

    (log g - median) / (1.4826 MAD), MAD >= 0.1. Any before: `news_above`, with its rate of false alarms. A
    norm of exactly 0, where nothing was to be learned, is left aside.
    """
    norm = metrics.get("Training/Gradient_Norm")
    if norm is None or not math.isfinite(norm) or norm <= 0:
        return KEEP
    before = memory.series.get("log_gradient", [])
    rows = unusual(memory, metrics, "Training/Gradient_Norm", norm)
    log = math.log(norm)
    memory.remember("log_gradient", log)
    centre, least = median(before or [log]), math.log(memory.limits.gradient_ratio)
    all_seen = memory.shown_all(int(memory.marks.get("seen gradient", 0)))
    news = news_above(memory, "gradient", log, centre, least, all_seen=all_seen)
    limit = max(least, news - centre)
    if log - centre <= limit or rows <= least:
        return None  # nearly always, so what costs more comes later
    scale = 1.4826 * max(0.1, median(abs(x - centre) for x in before))
    limit = max(memory.limits.gradient_z * scale, limit)
    if log - centre <= limit:
        return None
    return Finding(norm, math.exp(centre + limit), {"usual norm": math.exp(centre)})


def clipping(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """Nearly every gradient is far longer than the limit that it is clipped to, over the last 50 norms.

    So the limit, and not the gradient, says how long a step is.
    """
    norm, most = finite(metrics, "Training/Gradient_Norm"), memory.settings.get("max_grad_norm")
    if norm is None or not most:
        return KEEP
    recent = memory.remember("norm", norm, keep=CLIPPED)
    share = sum(x > most for x in recent) / len(recent)
    times = median(recent) / most
    limit = memory.limits.clipped_times
    if len(recent) < CLIPPED or share < memory.limits.clipped_share or times <= limit:
        return None
    return Finding(times, limit, {"share of steps clipped": share, "max_grad_norm": most})


def loss_spike(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """One loss far above the losses just before it, above its like, and above any before.

    Far: six sigma above the losses before it (`is_spike`), or higher above steps with such rows than 99 of
    100 are; and by more than losses of few digits can differ. Any before: `news_above`, with its rate of
    false alarms.
    """
    loss = training_loss(memory, metrics)
    if loss is None:
        return KEEP
    losses = memory.series.get("loss", [])
    memory.marks["digit"] = min(memory.marks.get("digit", 1.0), last_digit(loss))
    rows = memory.marks["rows"] = min(unusual(memory, metrics, "Training/Loss", loss), UNKNOWN)
    before, z, ratio = losses[-31:], memory.limits.spike_z, memory.limits.spike_ratio
    usual = median(before[-7:] or [loss])
    low = sorted(before or [loss])[len(before) // 4]  # of easy rows, though up to 3 of 4 are hard
    height = math.log(ratio)
    # A loss of ours is the mean of all steps since the one before; of other tools it may be one step's.
    one_step = None if memory.settings else int(memory.marks.get("seen loss", 0))
    all_seen = memory.shown_all(one_step)
    news = news_above(memory, "loss", _log(loss), _log(low), height, all_seen=all_seen)
    least = math.exp(news)
    if loss <= least or rows <= height:
        return None  # nearly always, so what costs more comes later
    known = _known_rise(memory, height / 2)
    rise = max(height, known or 0.0)
    if rows <= rise:
        return None
    limit = usual * max(ratio, math.exp(z * log_noise(before)))
    if rows < UNKNOWN and known is not None:  # such rows are known, and their noise
        limit = min(limit, loss / math.exp(rows) * math.exp(rise))
    limit = max(limit, least, usual + 2 * memory.marks["digit"])
    return Finding(loss, limit, {"usual loss": usual}) if loss > limit else None


def _known_rise(memory: DetectorMemory, least: float) -> float | None:
    """How far steps lie above their like, of which 1 in 100 lie higher; None where few of 31 are known."""
    known = [rise for rise in memory.series.get("unusual", []) if rise < UNKNOWN]
    if len(known) < ENOUGH:
        return None
    return above_tail(known, max(0.0, math.log(RARE / (len(known) + 1))), least)


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
    steps = [abs(b - a) for a, b in pairwise(_log(x) for x in losses)]
    return max(0.01, 1.4826 * median(steps) / math.sqrt(2))


def noise(losses: Sequence[float]) -> float:
    """Sigma of the losses around their course: the root of half the mean square of all differences of
    neighbours (von Neumann 1941). Rare hard rows count in full, a rise or fall of the course hardly."""
    return math.sqrt(fmean((b - a) ** 2 for a, b in pairwise(losses)) / 2)


def last_digit(loss: float) -> float:
    """What the last digit of a loss is worth: 0.0001 of 0.1203, 1 of a whole number."""
    return 10.0 ** min(0, Decimal(repr(float(loss))).normalize().as_tuple().exponent)


def _log(value: float) -> float:
    return math.log(max(value, LEAST))


def training_loss(memory: DetectorMemory, metrics: Mapping) -> float | None:
    """A loss to compare with others by ratio. A run with a negative one has another objective, and none."""
    value = finite(metrics, "Training/Loss")
    if value is not None and value < 0:
        memory.marks["negative"] = 1.0
    return None if value is None or memory.marks.get("negative") else value


def non_finite(memory: DetectorMemory, metrics: Mapping) -> Verdict:
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

    Smoothed: the mean of the last 15 logged losses. It runs first among the detectors of the loss,
    `loss_spike` excepted, which needs the losses before this one.
    """
    loss = training_loss(memory, metrics)
    if loss is None:
        return False
    marks = memory.marks
    losses = memory.remember("loss", loss)
    level = middle(losses[-SMOOTH:])
    marks["count"] = count = marks.get("count", 0) + 1
    rate = finite(metrics, "Training/Learning_Rate")
    if rate is not None:
        rising = rate > marks.get("rate", math.inf)
        # logged losses since the rate has risen
        marks["warm"] = marks.get("warm", 0) + (not rising)
        marks["rate"], marks["peak_rate"] = rate, max(rate, marks.get("peak_rate", 0.0))
    else:
        marks["warm"] = marks.get("warm", 0) + 1
    if count <= 3:
        marks["began"] = min(median(losses), marks.get("base", math.inf))
    if count < SMOOTH:
        return True
    marks["level"] = level
    marks["start"] = marks.get("start", level)
    centre = median(losses[-SMOOTH:])
    marks["lowest_median"] = min(centre, marks.get("lowest_median", centre))
    if count >= LONG:
        calm = fmean(sorted(memory.series["loss"][-LONG:])[LONG // 10 : -(LONG // 10)])
        marks["calm"], marks["first"] = calm, marks.get("first", calm)
        marks["lowest"] = min(calm, marks.get("lowest", calm))
    if level < marks.get("best", math.inf) - 0.005 * marks["start"]:
        promised = finite(metrics, "Monitoring/Forecast_Final_Loss_High")
        marks |= {"best": level, "best_at": count}
        if promised is not None:
            marks["promised"] = promised
    return True


def middle(losses: Sequence[float]) -> float:
    """The mean without the highest and the lowest: of two kinds of rows it moves little by chance."""
    return fmean(sorted(losses)[1:-1]) if len(losses) > 2 else fmean(losses)


def divergence(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """The loss has risen for good, more than the noise of such rows explains: early, at once, or slowly.

    Early: `_early`, against a run's first losses. At once: `_sudden`, three losses in a row or more above any
    of the 61 before them; where their order is chance, 1% of false alarms each time that the length of a run
    doubles (each step has 16 in 100,000 while only 32 losses are known). Slowly: `_slow`. Between
    evaluations: `_held_out`.
    """
    marks = memory.marks
    if "Training/Loss" not in metrics and not marks.get("count"):
        base = finite(metrics, "Eval/Loss")
        marks |= {"base": base} if base and base > 0 else {}
    known = _follow_loss(memory, metrics)
    if not known and not metrics.get("Eval/Loss"):
        return KEEP
    if known:
        memory.remember("unusual", marks.get("rows", UNKNOWN), keep=31)
    found = (_early(memory) or _sudden(memory)) if known else None
    found = found or _held_out(memory, metrics)
    if found:
        marks["diverged"] = found.threshold
        return found
    if not known:
        return KEEP
    now = median(memory.series["loss"][-AT_ONCE:])
    if marks.get("diverged") and now > marks["diverged"]:
        return Finding(now, marks["diverged"], _best(memory))
    marks["diverged"] = 0.0
    return _slow(memory)


def _best(memory: DetectorMemory) -> dict[str, float]:
    best = memory.marks.get("best")
    return {} if best is None else {"best smoothed loss": best}


def _early(memory: DetectorMemory) -> Finding | None:
    """All losses but the first few lie above them by a share, and above the held-out loss at step 0.

    Few: 1 to 31; one only where that held-out loss is known. No chance: by `too_high`. Of one row a step, a
    share p of which is hard, chance does so by order in p^3 (1-p)^4 of the runs: 0.5% for p = 25%, 0.8% for
    the worst p; by height in 0.5%, but where two or three first losses stand for the held-out one, in
    p^4 (1-p)^2 (2-p): 0.4% for p = 25%, 3% for the worst p.
    """
    losses, marks = memory.series["loss"], memory.marks
    if not AT_ONCE < marks["count"] <= 3 * ENOUGH:
        return None
    base = marks.get("base", 0.0)
    for few in range(1 if base else 2, min(2 * ENOUGH, len(losses) - AT_ONCE + 1)):
        first = max(losses[:few])
        usual, after = max(first, base, LEAST), losses[few:]
        limit = (1 + memory.limits.divergence) * usual
        if min(after) > limit and too_high(few, after, usual):
            facts = {"first losses, the highest": first}
            facts |= {"held-out loss at step 0": base} if base else {}
            return Finding(min(after[-AT_ONCE:]), limit, facts)
    return None


def _sudden(memory: DetectorMemory) -> Finding | None:
    """Losses in a row above any before, and further above their like than 9 of 10 steps before them.

    How many: `in_a_row`, 3 in the first 601 logged losses, 4 in the first 9,166.
    """
    losses, rises = memory.series["loss"], memory.series["unusual"]
    share = memory.limits.divergence
    many = in_a_row(int(memory.marks["count"]))
    before = losses[:-many]
    if len(before) < 2 * ENOUGH:
        return None
    usual = median(before[-SMOOTH:])
    limit = max((1 + share) * usual, (1 + share / 3) * sorted(before)[-2])
    sudden = min(losses[-many:])
    if sudden <= limit:
        return None  # nearly always, so what costs more comes later
    least = math.log(1 + share / 3)
    known = sorted(rise for rise in rises[:-many] if rise < UNKNOWN)
    if len(known) >= ENOUGH:
        least = max(least, known[-1 - len(known) // 10])
    limit = max(limit, usual + 2 * memory.marks.get("digit", 0.0))
    found = sudden > limit and min(rises[-many:]) > least
    return Finding(sudden, limit, _best(memory)) if found else None


def _held_out(memory: DetectorMemory, metrics: Mapping) -> Finding | None:
    """The held-out loss and the training loss both lie above the held-out loss of step 0 by a share.

    The same held-out samples each time, so that there is no chance in it; and no overfitting, whose training
    loss is low.
    """
    base, held_out = memory.marks.get("base"), finite(metrics, "Eval/Loss")
    losses = memory.series.get("loss")
    if not base or held_out is None or not losses:
        return None
    limit = (1 + memory.limits.divergence) * base
    if min(held_out, median(losses[-SMOOTH:])) <= limit:
        return None
    return Finding(held_out, limit, {"held-out loss at step 0": base})


def _slow(memory: DetectorMemory) -> Finding | None:
    """Mean and median of 15 losses have both risen above their lowest by a share, and the mean beyond chance.

    Chance: `least_sigmas` standard errors of `noise`, which a rise is no part of; of the log median, 1.2533
    sigma / sqrt(15). The median: rare hard rows move the mean of 15 losses, but the median only where 8 of
    them are hard, which one row a step does by chance in 3 of 100,000 steps where 10% are hard. More
    frequent ones are in the standard error.
    """
    marks, losses, share = memory.marks, memory.series["loss"], memory.limits.divergence
    if "level" not in marks:
        return None
    best, centre = marks["best"], median(losses[-SMOOTH:])
    limit = best + max(share * best, 0.02 * marks["start"])
    if marks["level"] <= limit or centre <= (1 + share) * marks["lowest_median"]:
        return None  # nearly always, so what costs more comes later
    usual = losses[:-SMOOTH] if len(losses) >= 3 * SMOOTH else losses
    errors = least_sigmas(int(marks["count"])) / math.sqrt(SMOOTH)
    limit = max(limit, best + errors * noise(usual))
    if _log(centre) <= _log(marks["lowest_median"]) + 1.2533 * errors * log_noise(usual):
        return None
    return Finding(marks["level"], limit, _best(memory)) if marks["level"] > limit else None


def stagnation(memory: DetectorMemory, metrics: Mapping) -> Verdict:
    """No progress while the learning rate could still give some; two forms.

    Stuck: the loss has hardly fallen from its start (`_stuck`) after `patience` logged losses at a rate
    that no longer rises (three times as many while less than a tenth of it is spent), or after 40 when a
    quarter of it is spent. Stalled: no better loss for `patience` logged losses and half the run, well
    above what the forecast promised when the last progress was made, at a rate over a third of its
    peak. A flat loss at the forecast is convergence, a flat loss at the end of the schedule is the end, and
    a loss above where it began has risen: none of them is reported.
    """
    marks = memory.marks
    if training_loss(memory, metrics) is None or "level" not in marks:
        return KEEP
    if _risen(memory):
        return None
    count, rate, patience = marks["count"], marks.get("rate", 1.0), memory.limits.patience
    spent = 1 - rate / (marks.get("peak_rate") or 1.0)
    warm = marks["warm"]
    long = 0 < spent < 0.1  # it has just begun to fall: most of the run is to come
    old_enough = warm >= (3 if long else 1) * patience or (warm >= 40 and spent >= 0.25)
    old_enough |= count >= 5 * patience
    if old_enough and (stuck := _stuck(memory)):
        return stuck
    since = count - marks["best_at"]
    promised = marks.get("promised", math.inf) + 0.01 * marks["start"]
    stalled = since >= max(patience, count / 2) and spent < 2 / 3 and marks["best"] > promised
    if not stalled:
        return None
    return Finding(marks["level"], promised, {"form": "stalled", "logged losses": int(since)})


def _risen(memory: DetectorMemory) -> bool:
    """Is the level above where the run began, by three standard errors of its first three losses?

    A higher learning rate is no help against that.
    """
    marks = memory.marks
    noise = 3 * log_noise(memory.series["loss"]) / math.sqrt(3)
    return _log(marks["level"]) > _log(marks["began"]) + max(noise, memory.limits.stuck)


def _stuck(memory: DetectorMemory) -> Finding | None:
    """The mean of 30 losses lies within a share of the first one, or within its noise; it always did.

    Noise: 1.5 standard errors, three times the share at most. Always: the lowest of many means may be lower
    by half as much again, by chance.
    """
    marks = memory.marks
    if "first" not in marks:
        return None
    first = marks["first"]
    fall, most = ((1 - marks[name] / first if first else 0.0) for name in ("calm", "lowest"))
    if fall >= 3 * memory.limits.stuck:
        return None
    error = log_noise(memory.series["loss"]) / math.sqrt(LONG)
    limit = max(memory.limits.stuck, min(1.5 * error, 3 * memory.limits.stuck))
    stuck = fall < limit and most < 1.5 * limit
    return Finding(fall, limit, {"form": "stuck since the start"}) if stuck else None
