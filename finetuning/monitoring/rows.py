"""Rows of numbers in columns: a recorded run of any length in little memory."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

ROWS_AT_ONCE = 1000  # that are dicts at a time


class Rows(Sequence):
    """Rows of numbers by name, in columns: a tenth of what as many dicts take.

    steps: (n,), rising. columns: name -> values (n,) and which of the rows have one (n,).
    """

    def __init__(
        self, steps: np.ndarray, columns: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        self.steps, self.columns = steps, columns

    @classmethod
    def of(
        cls, rows: Iterable[Mapping[str, float]], needed: Callable[[str], bool], curve: str
    ) -> "Rows":
        """The needed columns, by step. Where the column `curve` goes back the run was resumed there.

        A later row of a step replaces its values, and what was behind the place of a resume is gone.
        """
        steps, found = array("d"), {}
        for number, row in enumerate(rows):
            steps.append(row["step"])
            for name, value in row.items():
                if name == "step" or not needed(name):
                    continue
                places, values = found.setdefault(name, (array("q"), array("d")))
                places.append(number)
                values.append(value)
        in_file = np.asarray(steps)
        alive = _alive(in_file, np.asarray(found.get(curve, ([], []))[0], dtype=int))
        ordered = np.unique(in_file[alive])
        columns = {}
        for name, (places, values) in found.items():
            rows_here = np.asarray(places)
            stays = alive[rows_here]
            here = np.searchsorted(ordered, in_file[rows_here[stays]])
            column, known = np.zeros(len(ordered)), np.zeros(len(ordered), bool)
            # In the order of the file, so that the last one stays.
            column[here], known[here] = np.asarray(values)[stays], True
            columns[name] = column, known
        return cls(ordered, columns)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: int) -> dict[str, float]:
        row = {"step": float(self.steps[place])}
        for name, (values, known) in self.columns.items():
            if known[place]:
                row[name] = float(values[place])
        return row

    def __iter__(self) -> Iterator[dict[str, float]]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            rows = [{"step": step} for step in self.steps[some].tolist()]
            for name, (values, known) in self.columns.items():
                for row, value, here in zip(
                    rows, values[some].tolist(), known[some].tolist(), strict=True
                ):
                    if here:
                        row[name] = value
            yield from rows

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the rows that have this number."""
        if name not in self.columns:
            return np.empty(0), np.empty(0)
        values, known = self.columns[name]
        return self.steps[known], values[known]


def _alive(steps: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Which rows (n,) no resume has replaced; curve: numbers of the rows that hold the curve.

    Of a table that is not in the order of time, as one sorted from its end, all rows are: its steps go back
    about as often as they rise, to steps that it has not had before.
    """
    moves = np.diff(steps[curve])
    backward = np.flatnonzero(moves < 0) + 1
    back = curve[backward]
    values, first = np.unique(steps[curve], return_index=True)
    again = first[np.searchsorted(values, steps[back])] < backward
    alive = np.ones(len(steps), bool)
    if len(back) and (2 * len(back) <= (moves > 0).sum() or again.all()):
        resumed = np.full(len(steps) + 1, np.inf)
        resumed[back] = steps[back]
        lowest = np.minimum.accumulate(resumed[::-1])[
            ::-1
        ]  # step that a resume from here on goes back to
        alive = steps < lowest[1:]
    return alive
