"""Recorded training runs as one kind of curve, whichever tool wrote them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from finetuning.common.bounds import CURVE_FILE, CURVE_LINE, RECORD
from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object, regular
from finetuning.events.reading import read_run
from finetuning.monitoring.column_names import (
    COUNTED,
    EVALUATION,
    LOSS,
    PLANNED,
    STEP,
    meanings,
    unpaired,
    with_one_loss,
)
from finetuning.monitoring.console_log import console_records, has_records
from finetuning.monitoring.detectors import is_watched
from finetuning.monitoring.epoch_length import steps_per_epoch
from finetuning.monitoring.foreign_table import Columns, Gaps, Records, is_text, numbers
from finetuning.monitoring.rows import Rows

EVENTS, EPOCH = "*tfevents*", "Training/Epoch"
CURVES = {LOSS, EVALUATION}  # a line of ours with neither tells nothing about convergence
MOST_STEPS = (
    10**13
)  # up to here a float also tells places between two steps; milliseconds since 1970 fit


@dataclass(frozen=True)
class Curve:
    """A recorded run. points: a row for each logged step, {"step": …, "Training/Loss": …, what else it has}.

    total_steps: those planned, where the run says so; else its last step. counted: its steps are the numbers
    of its losses, as nothing in it tells them.
    """

    points: Rows
    total_steps: int
    steps_per_epoch: float | None
    counted: bool = False


def read_curve(path: str | Path) -> Curve:
    """Read a run of ours or of another tool.

    A run directory of ours, metrics.jsonl, trainer_state.json (HF), trainer_log.jsonl (LLaMA-Factory), csv,
    json or jsonl of rows (wandb, SwanLab), a folder of TensorBoard's, or what a run printed. Raises UserError
    where there is no such file, no loss in it, a negative one, or a broken line.
    """
    path = _curve_file(Path(path))
    try:
        points = Rows.of(_rows(path), _is_needed, LOSS)
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
    planned = planned[(planned > 0) & (planned <= MOST_STEPS)]
    total = int(max(points.steps[-1], planned.max(initial=0)))
    length = steps_per_epoch(*points.column(EPOCH), total)
    return Curve(points, total, length, counted=COUNTED in points.columns)


def _is_needed(name: str) -> bool:
    """Whether score, forecast or an alert is made of it."""
    return name in (PLANNED, EPOCH, COUNTED) or is_watched(name)


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
        place = f"{path}:{number}"
        told = _with_nan(needed | {STEP: record.get(STEP)})
        row = numbers(told)
        _check(told, row, (STEP, LOSS), place)
        if _has_step(row, place):
            yield planned | row


def _named(records: Records, place: str) -> Iterator[dict[str, float]]:
    """The numbers of another tool's records under our names; records without a step are left out."""
    table = Columns.of(records)
    found = meanings(table.names)
    losses = [name for name, ours in found.items() if ours == LOSS]
    names = with_one_loss(found, table.values(losses), place)
    gaps = Gaps.of(records, names) if table.have_nan(names) else None
    needed = [name for name, ours in names.items() if ours in (STEP, LOSS)]
    for where, record in records():
        told = unpaired(_with_nan(record))
        row = numbers(told)
        _check(told, row, needed, str(where))
        if gaps:
            row = gaps.filled(row, names)
        # A name without a meaning stays, but for one that would be taken for ours.
        ours = {names.get(n, n): row[n] for n in row if n in names or n not in (STEP, LOSS)}
        if _has_step(ours, str(where)):
            yield ours


def _with_nan(record: Mapping) -> Mapping:
    """JSON has no NaN: in our own logs a loss of null is a loss that was not finite."""
    return {**record, LOSS: math.nan} if LOSS in record and record[LOSS] is None else record


def _check(record: Mapping, row: Mapping, names: Iterable[str], place: str) -> None:
    """Raises UserError where the record has text for step or loss, which its row of numbers has not."""
    for name in names:
        if name not in row and is_text(record.get(name)):
            raise UserError(f"{place}: {name} is no number: {record[name]!r:.40}")


def _has_step(row: Mapping[str, float], place: str) -> bool:
    """Raises UserError for a step that counts nothing."""
    step = row.get(STEP, math.nan)
    if math.isnan(step):
        return False
    if not 0 <= step <= MOST_STEPS:
        raise UserError(f"{place}: step must be a number from 0 to 1e13, not {step:g}")
    if step != int(step):
        raise UserError(
            f"{place}: step {step:g} is no whole number; give the column that counts steps"
        )
    return True


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
        if set(names) == {
            "Wall time",
            "Step",
            "Value",
        }:  # TensorBoard's own; its name may tell the tag
            tag = path.stem.partition("tag-")[2] or "loss"
            names = [tag if name == "Value" else name for name in names]
        if not {STEP, LOSS} <= set(meanings(names).values()):
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
    tags = meanings(series)
    # The losses first: where they go back, what was read before is replaced.
    for tag in sorted(tags, key=lambda tag: tags[tag] != LOSS):
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
