"""How far chance alone takes a run of which nothing is wrong: bounds that name their rate of false alarms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, median

from finetuning.monitoring.detector_memory import DetectorMemory

FALSE_ALARMS = 0.01  # of the runs of which nothing is wrong, each time their length doubles
HIGHEST = 64  # orders of so many that one is taken for no chance
BET = 200.0  # times the stake: one in 200 runs wins as much by chance
STANDS_OUT = math.log(1.25)  # how far a step lies above the usual to be one of the peaks
PEAKS = 8  # the highest steps that a tail is measured by
RARE = 100  # steps among which a kind of rows is expected to be seen, so that it is known
FEWEST = 31  # logged values, where all rows are known, that say how high a step may be


def least_sigmas(values: int, series: int = 1) -> float:
    """Sigma that a level must lie above the lowest one, of all of `series` series, to be more than chance.

    z = -Q(0.01 / (series values^2)) sqrt(2), Q the normal quantile: the difference of two means has sqrt(2)
    times the error of one, and there are series * values^2 / 2 pairs of a low and a later high place (the
    union bound). With normal noise at most 1% of the runs raise a false alarm each time that their length
    doubles.
    """
    pairs = series * max(values, 2) ** 2
    return -NormalDist().inv_cdf(FALSE_ALARMS / pairs) * math.sqrt(2)


def too_high(before: int, after: Sequence[float], usual: float) -> bool:
    """Are the losses `after` a run's first ones (`before` many), all of them higher, no chance?

    Either by their order: of n + r losses in any order, the last r are the highest in one of C(n + r, r)
    cases. Or by their height, where r >= 3: bets on losses above `usual`, each of whose expected gains is
    nothing while the mean loss is at most that, win prod(loss / usual) >= 200 in one of 200 runs at most
    (Ville 1939).
    """
    many = len(after)
    ordered = many >= 4 and math.comb(before + many, many) >= HIGHEST
    return ordered or (many >= 3 and math.prod(x / usual for x in after) >= BET)


def in_a_row(values: int, known: int = 64) -> int:
    """How many losses in a row, all above the others of `known`, are no chance in a run of so many values.

    Of losses in any order the newest r are the highest in one of C(known, r) cases; 1% of the runs may have
    such a place each time that their length doubles: C(known, r) >= values / (0.01 / ln 2). At least 3.
    """
    cases = values * math.log(2) / FALSE_ALARMS
    return next(many for many in range(3, known) if math.comb(known, many) >= cases)


def news_above(
    memory: DetectorMemory,
    name: str,
    log: float,
    level: float,
    least: float,
    *,
    all_seen: bool = False,
) -> float:
    """The log that a step must exceed to be higher than rare rows have made a step; takes the step in.

    `level`: the log of what is usual; `least`: how far above it a step may be news; `all_seen`: whether the
    steps before this one have shown every row (`shown_all`). Steps half as far, and a quarter, above it are
    known by their logs and by how far they rose above the level of their time. A step is no news unless it
    lies above both tails (`above_tail`): 1% of false alarms each time that the length of a run doubles.

    By the rule of succession (Laplace 1774) a step as high as k of n earlier ones has the chance
    (k + 1) / (n + 2): it must be under 1 in 100, so that none may be as high until n = 198, and one from then
    on. inf before n = 98; where all rows are seen, before n = 31, as none is of an unknown kind then. In a
    first epoch that goes on, of one row a step, rows with a share p are taken for news by chance in
    (1-p)^98 + (1-p)^197 (1 + 196 p) of the runs: 0.7% for p = 5%, under 0.01% for 10%, but 18% for 2%: what
    is so rare is told once or twice.
    """
    marks, rise = memory.marks, log - level
    count = marks[f"seen {name}"] = marks.get(f"seen {name}", 0) + 1
    logs, rises = (memory.series.get(f"{what} {name}", []) for what in ("logs", "rises"))
    if rise > max(least / 2, STANDS_OUT):
        for what, known, value in (("logs", logs, log), ("rises", rises, rise)):
            memory.series[f"{what} {name}"] = sorted([*known, value], reverse=True)[:PEAKS]
    if count < (FEWEST if all_seen else RARE - 1):
        return math.inf
    place = 0 if count < 2 * RARE - 1 else 1
    if len(logs) <= place:
        return level + least
    scales = math.log(math.log(2) / FALSE_ALARMS)
    tails = (above_tail(known, scales, least / 2, place) for known in (logs, rises))
    return max(level + least, next(tails), level + next(tails))


def above_tail(values: Sequence[float], scales: float, least: float, place: int = 0) -> float:
    """The highest value, or the one at `place`, and so many scales of the tail above it, at least `least`.

    An exponential tail (of logs: Hill 1975), its scale the median height of the 8 highest above the lowest
    of them, over ln 2. A new record exceeds the old one by c scales in e^-c of the cases, and there are ln 2
    records for each time that the length of a run doubles.
    """
    peaks = sorted(values, reverse=True)[:PEAKS]
    heights = [peak - peaks[-1] for peak in peaks[:-1]]
    scale = median(heights) / math.log(2) if heights else 0.0
    return peaks[place] + max(least, scale * scales)
