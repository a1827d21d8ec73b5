"""The columns of another tool's records: how many numbers each has, and which of its NaNs are empty cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from finetuning.monitoring.column_names import RATE, unpaired

LARGEST = 3.4028235e38  # of float32, in which losses are computed: beyond it they have overflowed
MISSING = {"", "null", "none", "na", "n/a", "<na>"}  # in a table's cell
# (where it stands, record), from the start at each call.
Records = Callable[[], Iterable[tuple[object, Mapping]]]


def _number(value: object) -> float | None:
    """None where nothing is told. Raises ValueError for text that is no number."""
    if value is None or isinstance(value, (bool, list, dict)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        if str(value).strip().lower() in MISSING:
            return None
        raise
    return math.copysign(math.inf, found) if abs(found) > LARGEST else found


def numbers(record: Mapping) -> dict[str, float]:
    """Those of its fields that are numbers; the record is `unpaired`."""
    found = {}
    for name, value in record.items():
        try:
            told = _number(value)
        except ValueError:
            continue
        if told is not None:
            found[str(name)] = told
    return found


@dataclass(frozen=True)
class Columns:
    """All names of a table in their order; how many finite numbers, how many values of any kind."""

    names: list[str]
    finite: Counter
    told: Counter

    @classmethod
    def of(cls, records: Records) -> Columns:
        """What stands in the last record of HF's Trainer, a summary of its run, counts for nothing."""
        names: dict[str, None] = {}
        finite, told = Counter(), Counter()
        for _, record in records():
            fields = unpaired(record)
            names |= dict.fromkeys(fields)
            row = numbers(fields)
            sound = _finite(row)
            if not any(name.endswith("train_runtime") for name in sound):
                told.update(row.keys())
                told.update(name for name in fields if name not in row and is_text(fields[name]))
                finite.update(sound)
        return cls([str(name) for name in names if name], finite, told)

    def values(self, losses: Iterable[str]) -> Mapping[str, int]:
        """How many numbers each name has; where no loss has one, how many values."""
        return self.finite if any(self.finite[name] for name in losses) else self.told

    def have_nan(self, names: Iterable[str]) -> bool:
        return any(self.told[name] > self.finite[name] for name in names)


@dataclass(frozen=True)
class Gaps:
    """Which NaNs are empty cells, as in a table of pandas, whose rows of an evaluation have one for the loss.

    A NaN is an empty cell if its row holds a number in a column that never has one beside a number of this
    column, or lacks the learning rate, which always stands beside them. beside: name -> names with numbers in
    its rows; rated: names whose numbers always have a rate beside them.
    """

    beside: Mapping[str, set[str]]
    rated: set[str]

    @classmethod
    def of(cls, records: Records, names: Mapping[str, str]) -> Gaps:
        """names: those of the table that mean something -> ours."""
        beside: dict[str, set[str]] = {name: set() for name in names}
        rates = {name for name, ours in names.items() if ours == RATE}
        unrated = set()
        for _, record in records():
            row = _finite(numbers(unpaired(record)))
            for name in row & beside.keys():
                beside[name] |= row
                if not row & rates:
                    unrated.add(name)
        return cls({n: others for n, others in beside.items() if others}, beside.keys() - unrated)

    def filled(self, row: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
        """The row without its empty cells; with the table's own names."""
        told = _finite(row)
        rated = any(names.get(name) == RATE for name in told)

        def is_gap(name: str) -> bool:
            known = math.isnan(row[name]) and name in self.beside
            return known and (not told <= self.beside[name] or (name in self.rated and not rated))

        return {name: value for name, value in row.items() if not is_gap(name)}


def is_text(value: object) -> bool:
    """Does a cell hold text that is no empty one?"""
    return isinstance(value, str) and value.strip().lower() not in MISSING


def _finite(row: Mapping[str, float]) -> set[str]:
    return {name for name, value in row.items() if math.isfinite(value)}
