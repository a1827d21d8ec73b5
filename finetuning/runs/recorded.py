"""Runs as they were recorded: curves, alerts, settings and status, read back from their log directories.

Finished, running and broken-off runs alike; what a run has not written is empty here.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object
from finetuning.common.paths import expanded
from finetuning.events.metric_table import is_custom
from finetuning.events.reading import read_metrics, read_texts
from finetuning.runs.directory import RunDirectory

Points = list[tuple[int, float]]  # (step, value), steps rise


@dataclass(frozen=True)
class RecordedRun:
    """What a run left in `training_logs/<run>/`."""

    directory: RunDirectory
    series: dict[str, Points]  # by tag; a value that was not finite is NaN
    seconds: float  # of training in all its sessions, without the pauses between them
    alerts: list[dict[str, Any]]
    configuration: dict[str, Any]  # settings, model, versions
    status: dict[str, Any]
    dataset: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.directory.name

    def last(self, tag: str) -> float | None:
        """The newest value of a tag."""
        points = self.series.get(tag)
        return points[-1][1] if points else None

    def highest(self, tag: str) -> float | None:
        """The largest finite value of a tag."""
        return max((v for _, v in self.series.get(tag, ()) if math.isfinite(v)), default=None)

    def lowest(self, tag: str) -> float | None:
        """The smallest finite value of a tag."""
        return min((v for _, v in self.series.get(tag, ()) if math.isfinite(v)), default=None)

    def median(self, tag: str) -> float | None:
        """The median of a tag's finite values: what one odd interval does not move."""
        finite = [v for _, v in self.series.get(tag, ()) if math.isfinite(v)]
        return statistics.median(finite) if finite else None

    @property
    def steps(self) -> int:
        """The newest optimizer step; a user's own tags may be over another axis."""
        own = self.custom
        ends = (points[-1][0] for tag, points in self.series.items() if tag not in own)
        return max(ends, default=0)

    @property
    def custom(self) -> dict[str, Points]:
        """The series of the user's own tags."""
        return {tag: points for tag, points in sorted(self.series.items()) if is_custom(tag)}

    def texts(self) -> dict[str, list[tuple[int, str]]]:
        """The texts of its event files by tag: (step, Markdown)."""
        return read_texts(self.directory.tensorboard)


def find_runs(places: Sequence[str | Path]) -> list[RunDirectory]:
    """Runs that are meant: output directories (all their runs), log or event directories of one run.

    Sorted by name, which is by time. Raises UserError for a place where there is no run.
    """
    paths = [Path(expanded(str(place), "run")) for place in places]
    found = {run.logs.resolve(): run for path in paths for run in _runs_at(path)}
    return sorted(found.values(), key=lambda run: (run.name, str(run.output_dir)))


def _runs_at(place: Path) -> list[RunDirectory]:
    place = place.absolute()
    if not place.exists():
        raise UserError(f"{place}: no such directory; give an output directory or a run's logs")
    if place.name == "metrics.jsonl":
        place = place.parent
    if place.parent.name in ("training_logs", "tensorboard_logs"):
        runs = [RunDirectory(place.parent.parent, place.name)]
    else:
        output = place.parent if place.name in ("training_logs", "tensorboard_logs") else place
        runs = [RunDirectory(output, path.name) for path in output.glob("training_logs/*")]
    runs = [run for run in runs if (run.logs / "metrics.jsonl").is_file()]
    if not runs:
        raise UserError(
            f"{place}: no run has left a metrics.jsonl here; give an --output-dir or one of its "
            "training_logs/<run>/"
        )
    return runs


def read_recorded(run: RunDirectory) -> RecordedRun:
    """Read a run's files. Raises UserError for one that is broken, naming it."""
    series, seconds = _curves(run.logs / "metrics.jsonl")
    return RecordedRun(
        directory=run,
        series=series,
        seconds=seconds,
        alerts=_json_lines(run.logs / "alerts.jsonl"),
        configuration=_json(run.logs / "configuration.json"),
        status=_json(run.logs / "status.json"),
        dataset=_json(run.logs / "dataset_statistics.json"),
    )


def _curves(path: Path) -> tuple[dict[str, Points], float]:
    """Points by tag, and the seconds of training; a later record of a step replaces its values."""
    by_tag: dict[str, dict[int, float]] = {}
    try:
        records = read_metrics(path)
        for record in records:
            for tag, value in record["metrics"].items():
                number = math.nan if value is None else float(value)
                by_tag.setdefault(tag, {})[int(record["step"])] = number
        seconds = _training_seconds(records)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: not a metrics file of this program ({error!r:.120})") from error
    return {tag: sorted(points.items()) for tag, points in by_tag.items()}, seconds


def _training_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Whole epochs as the run itself has measured them; after them from record to record, without the
    longest gap where the count of resumes rises."""
    gaps = [float(after["time"]) - float(before["time"]) for before, after in pairwise(records)]
    resumes = [(0, 0.0), *_places(records, "Monitoring/Resume_Count")]
    for (start, before), (end, after) in pairwise(resumes):
        if before != after and start < end:
            gaps[max(range(start, end), key=gaps.__getitem__)] = 0.0
    epochs = [(0, 0.0), *_places(records, "Epoch/Duration_Seconds")]
    return sum(seconds for _, seconds in epochs) + sum(gaps[epochs[-1][0] :])


def _places(records: Sequence[Mapping[str, Any]], tag: str) -> list[tuple[int, float]]:
    """Which records have the tag, and its value there."""
    return [(i, r["metrics"][tag]) for i, r in enumerate(records) if tag in r["metrics"]]


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where the file is missing."""
    return read_json_object(path) if path.is_file() else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """One object a line; a last line that a crash cut is left out."""
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    try:
        return [json.loads(line) for line in whole if line.strip()]
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error})") from error
