"""Runs as they were recorded: curves, alerts, settings and status, read back from their log directories.

Finished, running and broken-off runs alike; what a run has not written is empty here.
"""

import json
import math
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from finetuning.common.bounds import RECORD, SHOWN_ALERTS
from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object, regular
from finetuning.common.kinds import misfit
from finetuning.common.paths import expanded
from finetuning.common.text import clean_line
from finetuning.events.metric_table import is_custom
from finetuning.events.reading import read_end_texts
from finetuning.runs.directory import RunDirectory, is_abandoned
from finetuning.runs.series import MEDIANS, RunSeries

Points = Sequence[tuple[int, float]]  # (step, value), steps rise


@dataclass(frozen=True)
class Alerts:
    """Those of a run: how many there were, and the newest of them."""

    count: int = 0
    newest: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Alerts":
        """One object a line; a last line that a crash cut is left out. Raises UserError for a broken line."""
        if not path.is_file():
            return cls()
        count, newest = 0, deque(maxlen=SHOWN_ALERTS.limit)
        try:
            with open(regular(path), "rb") as file:
                while line := file.readline(RECORD.limit):
                    if not line.endswith(b"\n") or not line.strip():
                        continue
                    count += 1
                    newest.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError, OSError) as error:
            raise UserError(f"{path}: broken JSON ({clean_line(str(error), 200)})") from error
        return cls(count, tuple(newest))


@dataclass(frozen=True)
class RecordedRun:
    """What a run left in `training_logs/<run>/`."""

    directory: RunDirectory
    series: dict[str, Points]  # by tag; a value that was not finite is NaN
    medians: dict[str, float]  # of some tags, over all their values
    left_out: int  # tags that were too many to be read
    seconds: float  # of training in all its sessions, without the pauses between them
    alerts: Alerts
    configuration: dict[str, Any]  # settings, model, versions
    status: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.directory.name

    @property
    def as_set(self) -> dict[str, Any]:
        """The settings as they were set: auto where that was left to the program."""
        left = dict.fromkeys(self.configuration.get("automatic", ()), "auto")
        return {**self.configuration.get("config", {}), **left}

    @property
    def is_running(self) -> bool:
        """As far as can be seen from here."""
        return self.status.get("status") == "running"

    @property
    def is_complete(self) -> bool:
        """Whether it has come to its last planned step."""
        status, planned = self.status.get("status"), self.configuration.get("steps")
        if status in ("running", "killed", "preempted", "stopped", "failed"):
            return False
        return status == "completed" or (planned is not None and self.steps >= planned)

    @property
    def is_over(self) -> bool:
        """Whether it is complete, or was ended early for good: by early stopping or by an alert."""
        stopped = self.status.get("status") == "stopped"
        return self.is_complete or (stopped and bool(self.status.get("result")))

    def last(self, tag: str) -> float | None:
        """The newest value of a tag."""
        points = self.series.get(tag)
        return points[-1][1] if points else None

    def finite(self, tag: str) -> dict[int, float]:
        """The finite values of a tag by their steps, which rise."""
        return {step: value for step, value in self.series.get(tag, ()) if math.isfinite(value)}

    def highest(self, tag: str) -> float | None:
        """The largest finite value of a tag."""
        return max(self.finite(tag).values(), default=None)

    def lowest(self, tag: str) -> float | None:
        """The smallest finite value of a tag."""
        return min(self.finite(tag).values(), default=None)

    def first(self, tag: str) -> float | None:
        """The oldest value of a tag."""
        points = self.series.get(tag)
        return points[0][1] if points else None

    def median(self, tag: str) -> float | None:
        """The median of a tag's finite values (`series.MEDIANS`): what one odd interval does not move."""
        assert tag in MEDIANS, tag
        return self.medians.get(tag)

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

    def dataset(self) -> dict[str, Any]:
        """The statistics of its data, read when they are asked for; empty where there are none."""
        return _json(self.directory.logs / "dataset_statistics.json")

    def truncation(self) -> dict[str, Any]:
        """Ids of samples by what became of them for their length, one for each of their documents."""
        return _json(self.directory.logs / "truncation.json")

    def texts(self) -> dict[str, list[tuple[int, str]]]:
        """The first and the last text of each tag of its event files: (step, Markdown)."""
        return read_end_texts(self.directory.tensorboard)


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


def read_recorded(
    run: RunDirectory, wanted: Callable[[str], bool] = lambda tag: True
) -> RecordedRun:
    """Read a run's files. wanted: tags whose series are kept. Raises UserError for a file that is broken,
    naming it."""
    found = RunSeries.read(run.logs / "metrics.jsonl", wanted)
    return RecordedRun(
        directory=run,
        series=found.by_tag,
        medians=found.medians,
        left_out=len(found.left_out),
        seconds=found.seconds,
        alerts=Alerts.read(run.logs / "alerts.jsonl"),
        configuration=_record(run.logs / "configuration.json", _Configuration),
        status=_status(run),
    )


def _status(run: RunDirectory) -> dict[str, Any]:
    """How the run stands. One that was killed could not say so: its word is still that it is running.

    Only on the run's own machine: on disks that several share, a lock may be seen on one of them alone.
    """
    status = _json(run.logs / "status.json")
    is_here = status.get("host") == socket.gethostname()
    if status.get("status") == "running" and is_here and is_abandoned(run.output_dir):
        return {"status": "killed", "at": status.get("at", "")}
    return status


class _Configuration(TypedDict, total=False):
    """What of a configuration.json is read by name."""

    config: dict[str, Any]
    automatic: list[str]
    automatic_learning_rate: float
    model: dict[str, Any]
    steps: int
    changes: list[str]
    held_out_samples: dict[str, int]


def _record(path: Path, kind: Any) -> dict[str, Any]:
    """The object in a file, empty where it is missing; what is read of it by name has the kinds of ours."""
    content = _json(path)
    fault = misfit({name: content[name] for name in kind.__annotations__ if name in content}, kind)
    if fault:
        raise UserError(f"{path}: not of this program, or of another version of it ({fault})")
    return content


@contextmanager
def files_of_ours(run: RunDirectory) -> Iterator[None]:
    """Within it, what does not fit in a run's files is a UserError: another program wrote them."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = clean_line(repr(error), 200)
        raise UserError(
            f"{run.logs}: its files are not of this program, or of another version of it ({reason})"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where the file is missing."""
    return read_json_object(path) if path.is_file() else {}
