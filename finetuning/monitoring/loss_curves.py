"""Recorded training runs as one kind of curve, whichever tool wrote them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from finetuning.common.bounds import CURVE_FILE, CURVE_LINE, RECORD
from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object, regular
from finetuning.events.reading import read_run
from finetuning.monitoring.column_names import LOSS, PLANNED, STEP, meanings
from finetuning.monitoring.console_log import console_records, has_records
from finetuning.monitoring.detectors import is_watched
from finetuning.monitoring.rows import Rows

EVENTS, EPOCH = "*tfevents*", "Training/Epoch"
CURVES = {LOSS, "Eval/Loss"}  # a line of ours with neither tells nothing about convergence
Records = Callable[
    [], Iterable[tuple[object, Mapping]]
]  # (where it stands, record), from the start


@dataclass(frozen=True)
class Curve:
    """A recorded run. points: a row for each logged step, {"step": …, "Training/Loss": …, what else it has}.

    total_steps: those planned, where the run says so; else its last step.
    """

    points: Rows
    total_steps: int
    steps_per_epoch: float | None


def read_curve(path: str | Path) -> Curve:
    """Read a run of ours or of another tool.

    A run directory of ours, metrics.jsonl, trainer_state.json (HF), trainer_log.jsonl (LLaMA-Factory), csv,
    json or jsonl of rows (wandb, SwanLab), a folder of TensorBoard's, or what a run printed. Raises UserError
    where there is no such file, no loss in it, a negative one, or a broken line.
    """
    path = _curve_file(Path(path))
    try:
        points = Rows.of(_rows(path), _is_needed)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as {path.suffix[1:]} ({error})") from error
    steps, losses = points.column(LOSS)
    if not len(losses):
        raise UserError(f"{path}: holds no loss; a step and a loss per row are needed")
    below = np.flatnonzero(losses < 0)
    if len(below):
        raise UserError(
            f"{path}: the loss at step {steps[below[0]]:g} is negative; score and forecast are for "
            "losses that end at zero or above, as a cross-entropy does"
        )
    planned = points.column(PLANNED)[1]
    total = max(float(points.steps[-1]), float(planned.max(initial=0)))
    return Curve(points, int(total), _steps_per_epoch(points))


def _is_needed(name: str) -> bool:
    """Whether score, forecast or an alert is made of it."""
    return name in (PLANNED, EPOCH) or is_watched(name)


def _curve_file(path: Path) -> Path:
    """The file that holds the curve of `path`, or a folder of event files."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory")
    log = Path("training_logs") / path.name / "metrics.jsonl"
    places = [path / "metrics.jsonl", *(p / log for p in path.resolve().parents[:2])]
    places += [path / "trainer_state.json", path / "trainer_log.jsonl"]
    newest = sorted(path.glob("training_logs/*/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
    newest += sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    for place in [*places, *reversed(newest)]:
        if place.is_file():
            return place
    folders = sorted({file.parent for file in path.rglob(EVENTS)})
    if len(folders) > 1:
        some = ", ".join(str(folder.relative_to(path)) for folder in folders[:4])
        raise UserError(f"{path}: {len(folders)} folders with event files ({some}); name one")
    if folders:
        return folders[0]
    raise UserError(f"{path}: no metrics.jsonl, trainer_state.json or event file belongs to it")


# -----------------------------------------------------------------------------
# Rows under our names


def _rows(path: Path) -> Iterator[dict[str, float]]:
    """The rows of a file or of a folder of event files."""
    if path.is_dir() or path.match(EVENTS):
        return _named(lambda: _read_events(path), str(path))
    regular(path)
    if path.suffix == ".csv":
        return _named(lambda: _read_csv(path), str(path))
    if path.suffix == ".jsonl":
        ours = isinstance(next(_objects(path), (0, {}))[1].get("metrics"), dict)
        return _own_rows(path) if ours else _named(lambda: _read_lines(path), str(path))
    if path.suffix == ".json":
        return _named(lambda: _read_json(path), str(path))
    text = _whole(path)
    if has_records(text):
        return _named(lambda: ((path, row) for row in console_records(text)), str(path))
    raise UserError(
        f"{path}: give a run directory, a .csv, .json, .jsonl, event files, or a text with lines such as "
        "{'loss': 1.23}"
    )


def _own_rows(path: Path) -> Iterator[dict[str, float]]:
    """Of our metrics.jsonl, in which all names are ours."""
    planned = _planned_steps(path)
    for number, record in _objects(path):
        metrics = record.get("metrics")
        if not isinstance(metrics, dict) or not metrics.keys() & CURVES:
            continue  # a metric of the user's, which may be over another axis than steps
        needed = {tag: value for tag, value in metrics.items() if _is_needed(tag)}
        row = _numbers(_with_nan(needed | {STEP: record.get(STEP)}), f"{path}:{number}")
        if row:
            yield planned | row


def _named(records: Records, place: str) -> Iterator[dict[str, float]]:
    """The numbers of another tool's records under our names; records without a step are left out."""

    def steps() -> Iterator[tuple[object, Mapping]]:
        # The last record of HF's Trainer holds the mean loss of the whole run.
        return (r for r in records() if not any(str(k).endswith("train_runtime") for k in r[1]))

    names = meanings((str(name) for _, record in steps() for name in record if name), place)
    for where, record in steps():
        ours = {names.get(str(name), str(name)): value for name, value in record.items()}
        row = _numbers(_with_nan(ours), str(where))
        if row:
            yield row


def _with_nan(record: dict) -> dict:
    """JSON has no NaN: a loss of null is a loss that was not finite."""
    return record | {LOSS: math.nan} if LOSS in record and record[LOSS] is None else record


def _numbers(record: Mapping, place: str) -> dict[str, float] | None:
    """The numeric fields of a record; None where it has no step."""
    if record.get(STEP) in (None, ""):
        return None
    row = {}
    for name, value in record.items():
        if value in (None, "") or isinstance(value, (bool, list, dict)):
            continue
        try:
            row[name] = float(value)
        except ValueError:
            if name in (STEP, LOSS):
                name = {LOSS: "loss"}.get(name, name)
                raise UserError(f"{place}: {name} is no number: {value!r:.40}") from None
    if not (math.isfinite(row[STEP]) and row[STEP] >= 0):
        raise UserError(f"{place}: step must be a number from 0 up, not {row[STEP]:g}")
    return row


def _planned_steps(path: Path) -> dict[str, float]:
    """As a column of the curve, from the settings beside a metrics.jsonl of ours."""
    configuration = path.with_name("configuration.json")
    steps = read_json_object(configuration).get("steps") if configuration.is_file() else None
    return {PLANNED: float(steps)} if isinstance(steps, int) else {}


# -----------------------------------------------------------------------------
# Files


def _whole(path: Path) -> str:
    """The text of a file that can't be read piece by piece. Raises UserError where it is too large."""
    with path.open("rb") as file:
        content = file.read(CURVE_FILE.limit + 1)
    if len(content) > CURVE_FILE.limit:
        raise UserError(
            f"{path}: larger than {CURVE_FILE}; give metrics.jsonl, a .csv or .jsonl file"
        )
    return content.decode("utf-8-sig")


def _read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_bounded_lines(file))
        names = [name.strip() for name in reader.fieldnames or ()]
        found = set(meanings(names, f"{path}:1").values())
        if not {STEP, LOSS} <= found:
            raise UserError(f"{path}:1: the first line must name the columns step and loss")
        reader.fieldnames = names
        for record in reader:
            yield f"{path}:{reader.line_num}", record


def _bounded_lines(file: TextIO) -> Iterator[str]:
    """csv's own limit of a field is one for the whole process, and the readers of samples raise it."""
    while line := file.readline(CURVE_LINE.limit + 1):
        if len(line) > CURVE_LINE.limit:
            raise csv.Error(f"a line longer than {CURVE_LINE}")
        yield line


def _read_events(path: Path) -> Iterator[tuple[str, dict]]:
    """Scalars by step; tags that mean nothing here are left out."""
    series = read_run(path)
    for tag in meanings(series, str(path)):
        for step, value in series[tag]:
            yield str(path), {STEP: step, tag: value}


def _read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """LLaMA-Factory's log, or rows of any tool."""
    for number, record in _objects(path):
        yield f"{path}:{number}", record


def _objects(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, object) of a file with one JSON object a line. Raises UserError for a broken line."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(RECORD.limit):
            number += 1
            if not line.strip():
                continue
            try:
                record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            except ValueError as error:
                if not line.endswith(b"\n"):  # a crash may cut the last line
                    return
                raise UserError(f"{path}:{number}: broken JSON ({error})") from error
            if isinstance(record, dict):
                yield number, record


def _read_json(path: Path) -> Iterator[tuple[str, dict]]:
    """HF's trainer_state.json, or a list of rows."""
    try:
        state = json.loads(_whole(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error})") from error
    planned = {}
    if isinstance(state, dict):
        steps, state = state.get("max_steps"), state.get("log_history")
        planned = {PLANNED: steps} if isinstance(steps, int) else {}
    if not isinstance(state, list):
        raise UserError(f"{path}: no log_history; is it the trainer_state.json of a Trainer run?")
    for number, record in enumerate(state):
        if isinstance(record, dict):
            yield f"{path}: log_history[{number}]", planned | record


def _steps_per_epoch(points: Rows) -> float | None:
    """From the epoch column, where there is one."""
    steps, epochs = points.column(EPOCH)
    steps, epochs = steps[epochs > 0], epochs[epochs > 0]
    if len(steps) < 2:
        return None
    steps, epochs = float(steps[-1] - steps[0]), float(epochs[-1] - epochs[0])
    return steps / epochs if epochs > 0 and steps > 0 else None
