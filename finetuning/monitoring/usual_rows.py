"""What is usual for such rows: a step beside those of its sources, difficulties, categories, length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from finetuning.monitoring.detector_memory import DetectorMemory, finite

FAMILIES = ("Training/By_Source/", "Training/By_Difficulty_", "Training/By_Category/")
MOST_GROUPS = 24  # of a family; rows of others are compared with all rows
OWN = 15  # values that are kept of a group
FEWEST = 5  # of its own values that say what is usual for it
PAIRS = 63  # earlier steps among which those of the same length are looked for
NEAREST = 7


def unusual(memory: DetectorMemory, metrics: Mapping, name: str, value: float) -> float:
    """How far log(value) lies above what is usual for such rows; the smallest of several comparisons.

    Compared are, as far as the step says them and enough is known: the medians of each family's groups of
    rows (the group that rose most counts), and the seven earlier steps nearest in tokens. A step that any of
    them explains is as usual as that. Takes the step into the memory. inf where nothing can be compared.
    """
    rises = [_rise_by_length(memory, metrics, name, value)]
    if name == "Training/Loss":
        rises += [_rise_of_groups(memory, metrics, family) for family in FAMILIES]
    return min((rise for rise in rises if rise is not None), default=math.inf)


def _rise_of_groups(memory: DetectorMemory, metrics: Mapping, family: str) -> float | None:
    found = []
    own = [tag for tag in metrics if tag.startswith(family)]
    known = memory.series.keys() >= set(own)
    room = known or sum(name.startswith(family) for name in memory.series) < MOST_GROUPS
    for tag in own:
        loss = metrics[tag]
        if loss is None or not math.isfinite(loss) or loss < 0:
            continue
        before = memory.series.get(tag, [])
        if before or room:
            memory.remember(tag, loss, keep=OWN)
        if len(before) >= FEWEST:
            found.append(_log(loss) - _median_log(before[-NEAREST:]))
        else:
            return None  # a group that nothing is known of may be the reason
    return max(found, default=None)


def _rise_by_length(
    memory: DetectorMemory, metrics: Mapping, name: str, value: float
) -> float | None:
    """Against earlier steps of about as many tokens; None without counts, or where all are alike."""
    seen = finite(metrics, "Throughput/Tokens_Seen")
    if seen is None:
        return None
    before = memory.marks.get(f"tokens {name}", 0.0)
    memory.marks[f"tokens {name}"] = seen
    if seen <= before:
        return None
    tokens = _log(seen - before)
    pairs = memory.series.get(f"by length {name}", [])
    memory.series[f"by length {name}"] = [*pairs, [tokens, _log(value)]][-PAIRS:]
    if len(pairs) < 3 * NEAREST:
        return None
    nearest = sorted(pairs, key=lambda pair: abs(pair[0] - tokens))[:NEAREST]
    return _log(value) - median(pair[1] for pair in nearest)


def _median_log(values: list[float]) -> float:
    """The median of the logs; of an odd number of values it is the log of their median."""
    return _log(median(values)) if len(values) % 2 else median(map(_log, values))


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))
