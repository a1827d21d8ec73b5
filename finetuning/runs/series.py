"""The course of a tag over a run of any length, in little memory: metrics.jsonl comes in, curves go out."""

import statistics
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.common.bounds import CURVE_COLUMNS, CURVES
from finetuning.common.errors import UserError
from finetuning.events.reading import metric_records

VALUES_AT_ONCE = 50_000  # that wait to be put into their series
MEDIANS = (  # of all values, not of what is kept
    "Throughput/Tokens_Per_Second",
    "Throughput/MFU_Percent",
    "Throughput/Step_Seconds",
    "Throughput/Step_Seconds_Data",
)
# What reading and counting raise for a file of another kind.
_OTHERS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class Series(Sequence):
    """Points (step, value) of one tag; steps rise, a value that was not finite is NaN or infinite.

    A long one is kept in `CURVE_COLUMNS` columns of equal width: the lowest and the highest value of each,
    the first that was not finite, and the first and the last point of all. What comes for a step that is
    there, or for an earlier one, takes back everything from that step on, as a rewound run does.
    """

    def __init__(self, points: Sequence[tuple[int, float]] = ()) -> None:
        self._steps, self._values = np.empty(0, np.int64), np.empty(0)
        self.extend(points)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return list(zip(self._steps[place].tolist(), self._values[place].tolist(), strict=True))
        return int(self._steps[place]), float(self._values[place])

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return list(self) == other if isinstance(other, list) else self is other

    __hash__ = None

    def extend(self, points: Sequence[tuple[int, float | None]]) -> None:
        """Add points in the order in which they came; None is a value that was not finite."""
        if points:
            steps, values = zip(*points, strict=True)
            self.extend_by(np.array(steps, np.int64), np.array(values, np.float64))

    def extend_by(self, steps: np.ndarray, values: np.ndarray) -> None:
        """The same of two arrays, (n,) int64 and (n,) float64."""
        steps = np.concatenate([self._steps, steps])
        values = np.concatenate([self._values, values])
        lowest_after = np.minimum.accumulate(steps[::-1])[::-1][1:]
        stays = np.append(steps[:-1] < lowest_after, True)
        self._steps, self._values = steps[stays], values[stays]
        if len(self._steps) > 4 * CURVE_COLUMNS.limit:
            self._thin()

    def _thin(self) -> None:
        steps, values = self._steps, self._values
        width = 1
        while (int(steps[-1]) - int(steps[0])) // width >= CURVE_COLUMNS.limit:
            width *= 2
        columns = (steps - steps[0]) // width
        finite = np.flatnonzero(np.isfinite(values))
        order = finite[np.lexsort((values[finite], columns[finite]))]
        ends = np.flatnonzero(np.diff(columns[order])) if len(order) else np.empty(0, np.int64)
        lowest = order[np.append(0, ends + 1)] if len(order) else order
        highest = order[np.append(ends, len(order) - 1)] if len(order) else order
        broken = np.flatnonzero(~np.isfinite(values))
        _, first = np.unique(columns[broken], return_index=True)
        kept = np.unique(np.concatenate([[0, len(steps) - 1], lowest, highest, broken[first]]))
        self._steps, self._values = steps[kept], values[kept]


class RunSeries:
    """All series of a run, from its records one after the other.

    by_tag: the series. medians: of `MEDIANS`. left_out: tags that were too many to be read.
    seconds: of training, without the pauses between sessions.
    """

    def __init__(self, wanted: Callable[[str], bool] = lambda tag: True) -> None:
        self._wanted = wanted
        self.by_tag: dict[str, Series] = {}
        self.left_out: set[str] = set()
        self._records = 0
        # By their tags: (number of the record, step, values). Most records have the same tags.
        self._waiting: dict[tuple[str, ...], list[tuple[int, int, list]]] = {}
        self._all = {tag: array("d") for tag in MEDIANS}
        self._time = TrainingTime()

    @classmethod
    def read(cls, path: Path, wanted: Callable[[str], bool] = lambda tag: True) -> "RunSeries":
        """Those of a metrics.jsonl. wanted: tags to keep. Raises UserError for another kind of file."""
        found, count = cls(wanted), 0
        try:
            for record in metric_records(path):
                count += found._take(record)
                if count >= VALUES_AT_ONCE:
                    count = found._settle()
            found._settle()
        except (*_OTHERS, OSError) as error:
            raise UserError(
                f"{path}: not a metrics file of this program ({error!r:.120})"
            ) from error
        return found

    @property
    def seconds(self) -> float:
        """Of training in all sessions."""
        return self._time.seconds

    @property
    def medians(self) -> dict[str, float]:
        """The medians of the finite values of `MEDIANS`."""
        return {tag: statistics.median(values) for tag, values in self._all.items() if values}

    def _take(self, record: Mapping[str, Any]) -> int:
        """Returns how many numbers the record holds."""
        step, metrics = int(record["step"]), record["metrics"]
        self._time.take(float(record["time"]), metrics)
        alike = self._waiting.setdefault(tuple(metrics), [])
        alike.append((self._records, step, list(metrics.values())))
        self._records += 1
        return len(metrics)

    def _settle(self) -> int:
        """Put what waits into its series; 0, which is how many wait now."""
        parts: dict[str, list[tuple[np.ndarray, ...]]] = {}
        for tags, alike in self._waiting.items():
            places, steps, rows = zip(*alike, strict=True)
            places, steps = np.array(places), np.array(steps, np.int64)
            table = np.array(rows, np.float64).reshape(len(rows), len(tags))
            for column, tag in enumerate(tags):
                if self._wanted(tag):
                    parts.setdefault(tag, []).append((places, steps, table[:, column]))
        self._waiting.clear()
        for tag, pieces in parts.items():
            places, steps, values = map(np.concatenate, zip(*pieces, strict=True))
            order = np.argsort(places)
            self._keep(tag, steps[order], values[order])
        return 0

    def _keep(self, tag: str, steps: np.ndarray, values: np.ndarray) -> None:
        if tag not in self.by_tag and len(self.by_tag) >= CURVES.limit:
            if len(self.left_out) < CURVES.limit:
                self.left_out.add(tag)
            return
        self.by_tag.setdefault(tag, Series()).extend_by(steps, values)
        if tag in self._all:
            self._all[tag].extend(values[np.isfinite(values)].tolist())


class TrainingTime:
    """Seconds of training: whole epochs as the run itself has measured them; after them from record to
    record, without the longest gap where the count of resumes rises."""

    def __init__(self) -> None:
        self._epochs, self._since = 0.0, 0.0  # of whole epochs, and after the last of them
        self._before: float | None = None  # time of the record before
        self._resumes = 0.0
        # Since the count of resumes was last told: the longest gap, and whether no epoch ended after it.
        self._longest, self._counts = 0.0, False

    def take(self, time: float, metrics: Mapping[str, Any]) -> None:
        """The next record: its time in seconds, and its numbers."""
        gap = 0.0 if self._before is None else time - self._before
        self._before = time
        self._since += gap
        if gap > self._longest:
            self._longest, self._counts = gap, True
        if "Monitoring/Resume_Count" in metrics:
            if metrics["Monitoring/Resume_Count"] != self._resumes and self._counts:
                self._since -= self._longest
            self._resumes = metrics["Monitoring/Resume_Count"]
            self._longest, self._counts = 0.0, False
        if "Epoch/Duration_Seconds" in metrics:
            self._epochs += float(metrics["Epoch/Duration_Seconds"])
            self._since, self._counts = 0.0, False

    @property
    def seconds(self) -> float:
        """Up to the last record."""
        return self._epochs + self._since
