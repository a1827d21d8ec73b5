"""What a run wrote beside what it must have written, and a ledger of the tags that were compared.

A row of the metric table is in the ledger only after a value of its tag, read from event files, was compared
with an expected one.
"""

import contextlib
import html
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetuning.events import event_values
from finetuning.events.event_file import event_files, surviving_events
from finetuning.events.metric_table import METRICS, find_metric, is_detail, is_quiet
from finetuning.events.reading import read_metrics

KINDS = {"simple_value": "scalar", "tensor": "text", "histo": "histogram", "image": "image"}
Found = dict[int, Any]  # step -> what an event holds


@dataclass
class Ledger:
    """(kind, tag of the row) of all that was compared, over several runs."""

    rows: set[tuple[str, str]] = field(default_factory=set)

    def missing(self) -> list[str]:
        """Rows of the metric table without a value that was compared."""
        return [f"{m.kind} {m.tag}" for m in METRICS if (m.kind, m.tag) not in self.rows]


class Values:
    """The values in the event files of one run; each check notes its tag."""

    def __init__(self, ledger: Ledger, run_dir: Path) -> None:
        self._ledger = ledger
        self._found: dict[tuple[str, str], Found] = {}
        self._checked: set[tuple[str, str]] = set()
        for event in surviving_events(event_files(run_dir)):
            for value in event.summary.value:
                kind = KINDS[value.WhichOneof("value")]
                if kind == "text" and value.metadata.plugin_data.plugin_name != "text":
                    continue  # what the run says of itself to HPARAMS and CUSTOM SCALARS
                points = self._found.setdefault((kind, value.tag), {})
                assert event.step not in points, f"{value.tag} has step {event.step} twice"
                points[event.step] = _content(kind, value)
        lines = run_dir.parents[1] / "training_logs" / run_dir.name / "metrics.jsonl"
        for record in read_metrics(lines) if lines.is_file() else ():
            for tag, value in record["metrics"].items():
                if is_detail(tag):
                    number = value if value is not None else float(record["nonfinite"][tag])
                    self._found.setdefault(("detail", tag), {})[record["step"]] = number

    def scalars(self, tag: str, expected: Mapping[int, float], **tolerance: float) -> None:
        """A tag at all its steps, a quiet one from its first value above 0 on; float32 holds seven digits."""
        kind = _kind(tag)
        if is_quiet(tag):
            told = begun(expected)
            assert told or (kind, tag) not in self._found, f"{tag} was never above 0"
            if not told:
                return
            expected = told
        self._compare(kind, tag, self._points(kind, tag), expected, _close(tolerance))

    def scalars_at(self, tag: str, expected: Mapping[int, float], **tolerance: float) -> None:
        """A tag at some of its steps, where what it must be is known only there."""
        points = self._points(kind := _kind(tag), tag)
        assert points.keys() >= expected.keys(), (tag, points.keys())
        some = {step: points[step] for step in expected}
        self._compare(kind, tag, some, expected, _close(tolerance))

    def texts(
        self,
        tag: str,
        expected: Mapping[int, Any],
        read: Callable[[str], Any] = str,
        close: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        """A text at all its steps, as it stands or as `read` takes it apart."""
        found = {step: read(text) for step, text in self._points("text", tag).items()}
        self._compare("text", tag, found, expected, close)

    def histograms(self, tag: str, expected: Mapping[int, Sequence[float]], slack: int = 0) -> None:
        """The values (n,) behind a histogram at all its steps; `slack` of them may lie one bin further."""
        points = self._points("histogram", tag)
        assert points.keys() == expected.keys(), (tag, points.keys(), expected.keys())
        for step, values in expected.items():
            histogram, values = points[step], np.asarray(values, float)
            edges = np.array([histogram.min, *histogram.bucket_limit])
            assert (np.diff(edges) > 0).all(), (tag, step)
            counts, _ = np.histogram(values, _widened(edges))
            assert histogram.num == len(values) == sum(histogram.bucket), (tag, step)
            assert np.abs(counts - np.array(histogram.bucket)).sum() <= 2 * slack, (tag, step)
            assert histogram.bucket[0] and histogram.bucket[-1], (tag, step, "empty at the ends")
            # Bins tell where a value is to half of their width.
            widest = float(np.diff(edges).max())
            assert histogram.sum / len(values) == pytest.approx(values.mean(), abs=widest), (
                tag,
                step,
            )
        self._note("histogram", tag)

    def images(self, tag: str, expected: Mapping[int, np.ndarray]) -> None:
        """The pixels (height, width, 4) of a picture at all its steps."""
        points = self._points("image", tag)
        assert points.keys() == expected.keys(), (tag, points.keys(), expected.keys())
        for step, pixels in expected.items():
            height, width, png = points[step]
            assert (height, width) == pixels.shape[:2] and (png == pixels).all(), (tag, step)
        self._note("image", tag)

    def family(self, kind: str, row: str) -> set[str]:
        """Tags of this run that belong to a row with `<name>`, `<k>` or `<i>`."""
        return {tag for k, tag in self._found if k == kind and _row(k, tag) == row}

    def beginning(self, prefix: str) -> set[str]:
        """Scalars of this run that begin so."""
        numbers = ("scalar", "detail")
        return {tag for kind, tag in self._found if kind in numbers and tag.startswith(prefix)}

    def last(self, tag: str) -> float:
        """The newest value of a scalar, for what follows from it."""
        return list(self._points(_kind(tag), tag).values())[-1]

    def half_checked(self) -> list[str]:
        """Tags of this run that nobody compared although one of their row was."""
        rows = {(kind, _row(kind, tag)) for kind, tag in self._checked}
        left = self._found.keys() - self._checked
        return sorted(tag for kind, tag in left if (kind, _row(kind, tag)) in rows)

    def _points(self, kind: str, tag: str) -> Found:
        assert (kind, tag) in self._found, f"the run wrote no {kind} {tag}"
        return self._found[kind, tag]

    def _compare(
        self, kind: str, tag: str, points: Found, expected: Mapping[int, Any], close: Callable
    ) -> None:
        assert expected, f"nothing is expected of {tag}"
        assert list(points) == list(expected), f"{tag} is at the steps {list(points)}"
        for step, value in expected.items():
            assert points[step] == close(value), f"{tag}, {step}: {points[step]}, not {value}"
        self._note(kind, tag)

    def _note(self, kind: str, tag: str) -> None:
        self._checked.add((kind, tag))
        self._ledger.rows.add((kind, _row(kind, tag)))


def begun(points: Mapping[int, float]) -> dict[int, float]:
    """The points from the first one on that is not 0."""
    first = min((step for step, value in points.items() if value), default=math.inf)
    return {step: value for step, value in points.items() if step >= first}


def _kind(tag: str) -> str:
    """Where a number is written: to event files, or to metrics.jsonl only."""
    return "detail" if is_detail(tag) else "scalar"


def _close(tolerance: Mapping[str, float]) -> Callable[[float], Any]:
    options = {"rel": 1e-6, "abs": 1e-9, "nan_ok": True, **tolerance}
    return lambda value: pytest.approx(value, **options)


def _row(kind: str, tag: str) -> str:
    """The metric table's row of a tag of this kind."""
    patterns = {m.tag: _pattern(m.tag) for m in METRICS if m.kind == kind}
    rows = [row for row, pattern in patterns.items() if re.fullmatch(pattern, tag)]
    assert rows and find_metric(tag), f"the metric table has no {kind} {tag}"
    return min(rows, key=lambda row: ("<" in row, -len(row)))


def _pattern(row: str) -> str:
    return re.sub("<[ik]>", r"\\d+", re.escape(row)).replace("<name>", ".+")


def _content(kind: str, value: Any) -> Any:
    if kind == "scalar":
        return value.simple_value
    if kind == "text":
        return value.tensor.string_val[0].decode()
    if kind == "histogram":
        return value.histo
    png = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
    return value.image.height, value.image.width, png


def _widened(edges: np.ndarray) -> np.ndarray:
    """The outermost edges a hair further out, for values that lie on them and were rounded."""
    hair = 1e-6 * (abs(edges[[0, -1]]) + edges[-1] - edges[0])
    return np.array([edges[0] - hair[0], *edges[1:-1], edges[-1] + hair[1]])


def table_rows(text: str) -> list[list[str]]:
    """The rows of all Markdown tables of a text, without heads; characters as they were before escaping."""
    lines = [line.strip() for line in text.splitlines()]
    rows = []
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if (
            not line.startswith("|")
            or re.fullmatch(r"\|[\s\-|]+", line)
            or re.fullmatch(r"\|[\s\-|]*---[\s\-|]*", below)
        ):
            continue
        cells = re.split(r"(?<!\\) ?\|", line)[1:-1]
        plain = (re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells)
        rows.append([html.unescape(cell) for cell in plain])
    return rows


def by_step(values: Sequence[float], first: int = 1) -> dict[int, float]:
    """One value a step, from this step on."""
    return dict(enumerate(values, start=first))


@contextlib.contextmanager
def kept_figures() -> Iterator[dict[str, list]]:
    """The figures that are drawn for events, by tag."""
    figures: dict[str, list] = {}
    original = event_values.figure_value

    def kept(tag: str, figure: Callable) -> object:
        drawn = figure()
        value = original(tag, drawn)
        figures.setdefault(tag, []).append(drawn)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_values, "figure_value", kept)
        yield figures
