"""Recorded training runs as one kind of curve: ours, a csv or an HF trainer_state.json."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetuning.common.bounds import RECORD
from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object, regular
from finetuning.monitoring.detectors import is_watched
from finetuning.monitoring.rows import Rows

PLANNED, EPOCH = "total_steps", "Training/Epoch"


@dataclass(frozen=True)
class Curve:
    """A recorded run. points: a row for each logged step, {"step": …, "Training/Loss": …, what else it has}.

    total_steps: those planned, where the run says so; else its last step.
    """

    points: Rows
    total_steps: int
    steps_per_epoch: float | None


def read_curve(path: str | Path) -> Curve:
    """Read a run directory of ours, a metrics.jsonl, a csv or an HF trainer_state.json.

    Raises UserError where there is no such file, no loss in it, a negative one, or a broken line.
    """
    path = _curve_file(Path(path))
    readers = {".csv": _read_csv, ".json": _read_trainer_state, ".jsonl": _read_metrics}
    if path.suffix not in readers:
        raise UserError(f"{path}: give a run directory, a .csv, .jsonl or trainer_state.json")
    try:
        points = Rows.of(readers[path.suffix](regular(path)), _is_needed)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as {path.suffix[1:]} ({error})") from error
    steps, losses = points.column("Training/Loss")
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
    """The file that holds the curve of `path`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory")
    log = Path("training_logs") / path.name / "metrics.jsonl"
    places = [path / "metrics.jsonl", *(p / log for p in path.resolve().parents[:2])]
    places += [path / "trainer_state.json"]
    newest = sorted(path.glob("training_logs/*/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
    newest += sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    for place in [*places, *reversed(newest)]:
        if place.is_file():
            return place
    raise UserError(f"{path}: neither a metrics.jsonl nor a trainer_state.json belongs to it")


CURVES = {
    "Training/Loss",
    "Eval/Loss",
}  # a line of ours with neither tells nothing about convergence
FOREIGN_NAMES = {
    "loss": "Training/Loss",
    "train_loss": "Training/Loss",
    "learning_rate": "Training/Learning_Rate",
    "lr": "Training/Learning_Rate",
    "grad_norm": "Training/Gradient_Norm",
    "epoch": EPOCH,
    "eval_loss": "Eval/Loss",
}


def _numbers(record: Mapping, place: str) -> dict[str, float] | None:
    """The numeric fields of a record under our names; None where it has no step."""
    if record.get("step") in (None, ""):
        return None
    row = {}
    for name, value in record.items():
        if name is None or value in (None, "") or isinstance(value, (bool, list, dict)):
            continue
        try:
            row[FOREIGN_NAMES.get(name.strip(), name.strip())] = float(value)
        except ValueError:
            if name.strip() in ("step", "loss"):
                raise UserError(f"{place}: {name} is no number: {value!r:.40}") from None
    if not (math.isfinite(row["step"]) and row["step"] >= 0):
        raise UserError(f"{place}: step must be a number from 0 up, not {row['step']:g}")
    return row


def _read_csv(path: Path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"step", "loss"} <= {(n or "").strip() for n in reader.fieldnames or ()}:
            raise UserError(f"{path}:1: the first line must name the columns step and loss")
        reader.fieldnames = [name.strip() for name in reader.fieldnames]
        for record in reader:
            row = _numbers(record, f"{path}:{reader.line_num}")
            if row:
                yield row


def _planned_steps(record: dict, name: str) -> dict[str, float]:
    """As a column of the curve: what `record` has under `name`."""
    steps = record.get(name)
    return {PLANNED: float(steps)} if isinstance(steps, int) else {}


def _read_metrics(path: Path):
    configuration = path.with_name("configuration.json")
    recorded = read_json_object(configuration) if configuration.is_file() else {}
    planned = _planned_steps(recorded, "steps")
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if not line.endswith(b"\n"):  # a crash may cut the last line
                return
            raise UserError(f"{path}:{number}: broken JSON ({error})") from error
        if isinstance(record, dict) and isinstance(record.get("metrics"), dict):  # our own lines
            if not record["metrics"].keys() & CURVES:
                continue  # a metric of the user's, which may be over another axis than steps
            own = record["metrics"].items()
            record = {t: value for t, value in own if _is_needed(t)} | {"step": record.get("step")}
        row = _numbers(record, f"{path}:{number}") if isinstance(record, dict) else None
        if row:
            # JSON has no NaN: a null loss is a loss that was not finite
            if "Training/Loss" in record and record["Training/Loss"] is None:
                row["Training/Loss"] = math.nan
            yield planned | row


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while line := file.readline(RECORD.limit):
            yield line


def _read_trainer_state(path: Path):
    state = read_json_object(path)
    history = state.get("log_history")
    if not isinstance(history, list):
        raise UserError(f"{path}: no log_history; is it the trainer_state.json of a Trainer run?")
    planned = _planned_steps(state, "max_steps")
    for number, record in enumerate(history):
        row = _numbers(record, f"{path}: log_history[{number}]")
        if row and "train_runtime" not in row:  # the end's, with the mean loss of the whole run
            yield planned | row


def _steps_per_epoch(points: Rows) -> float | None:
    """From the epoch column, where there is one."""
    steps, epochs = points.column(EPOCH)
    steps, epochs = steps[epochs > 0], epochs[epochs > 0]
    if len(steps) < 2:
        return None
    steps, epochs = float(steps[-1] - steps[0]), float(epochs[-1] - epochs[0])
    return steps / epochs if epochs > 0 and steps > 0 else None
