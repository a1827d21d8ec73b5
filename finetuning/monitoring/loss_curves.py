"""Recorded training runs as one kind of curve, whichever tool wrote them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object
from finetuning.events.reading import read_run
from finetuning.monitoring.column_names import PLANNED, STEP, meanings
from finetuning.monitoring.console_log import console_records, has_records

EVENTS = "*tfevents*"


@dataclass(frozen=True)
class Curve:
    """A recorded run: one dict per logged step with "step", "Training/Loss" and what else it has.

    total_steps: those planned, where the run says so; else its last step.
    """

    points: tuple[dict[str, float], ...]
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
        rows = list(_rows(path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as {path.suffix[1:]} ({error})") from error
    points = tuple(sorted(_latest(rows).values(), key=lambda row: row["step"]))
    if not any("Training/Loss" in row for row in points):
        raise UserError(f"{path}: holds no loss; a step and a loss per row are needed")
    below = next((row for row in points if row.get("Training/Loss", 0) < 0), None)
    if below:
        raise UserError(
            f"{path}: the loss at step {below['step']:g} is negative; score and forecast are for "
            "losses that end at zero or above, as a cross-entropy does"
        )
    total = max(max(row["step"], row.pop(PLANNED, 0)) for row in points)
    return Curve(points, int(total), _steps_per_epoch(points))


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


def _rows(path: Path) -> Iterator[dict[str, float]]:
    """The rows of a file under our names."""
    if path.is_dir() or path.match(EVENTS):
        return _named(_read_events(path), str(path))
    if path.suffix == ".csv":
        return _named(_read_csv(path), str(path))
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return _named(_read_lines(path, text), str(path))
    if path.suffix == ".json":
        return _named(_read_json(path, text), str(path))
    if has_records(text):
        return _named(((path, row) for row in console_records(text)), str(path))
    raise UserError(
        f"{path}: give a run directory, a .csv, .json, .jsonl, event files, or a text with lines such as "
        "{'loss': 1.23}"
    )


def _latest(rows: Iterable[dict]) -> dict[float, dict]:
    """Rows by step; a later row of the same step (after a resume) replaces its values."""
    merged: dict[float, dict] = {}
    for row in rows:
        merged[row["step"]] = merged.get(row["step"], {}) | row
    return merged


def _named(records: Iterable[tuple[object, Mapping]], place: str) -> Iterator[dict[str, float]]:
    """The numbers of (where it stands, record), under our names; records without a step are left out."""
    # The last record of HF's Trainer holds the mean loss of the whole run.
    records = [r for r in records if not any(str(k).endswith("train_runtime") for k in r[1])]
    names = meanings((str(name) for _, record in records for name in record if name), place)
    for where, record in records:
        row = _numbers({names.get(str(k), str(k)): v for k, v in record.items()}, str(where))
        if row:
            yield row


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
            if name in (STEP, "Training/Loss"):
                name = {"Training/Loss": "loss"}.get(name, name)
                raise UserError(f"{place}: {name} is no number: {value!r:.40}") from None
    if not (math.isfinite(row[STEP]) and row[STEP] >= 0):
        raise UserError(f"{place}: step must be a number from 0 up, not {row[STEP]:g}")
    return row


def _read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = [name.strip() for name in reader.fieldnames or ()]
        found = set(meanings(names, f"{path}:1").values())
        if not {STEP, "Training/Loss"} <= found:
            raise UserError(f"{path}:1: the first line must name the columns step and loss")
        reader.fieldnames = names
        for record in reader:
            yield f"{path}:{reader.line_num}", record


def _read_events(path: Path) -> Iterator[tuple[str, dict]]:
    """Scalars by step; tags that mean nothing here are left out."""
    series = read_run(path)
    for tag in meanings(series, str(path)):
        for step, value in series[tag]:
            yield str(path), {STEP: step, tag: value}


def _read_lines(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """One JSON object a line: ours, LLaMA-Factory's, or rows of any tool."""
    configuration = path.with_name("configuration.json")
    recorded = read_json_object(configuration) if configuration.is_file() else {}
    planned = {PLANNED: recorded["steps"]} if isinstance(recorded.get("steps"), int) else {}
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # a crash may cut the last line
                return
            raise UserError(f"{path}:{number}: broken JSON ({error.msg})") from error
        if not isinstance(record, dict):
            continue
        if isinstance(record.get("metrics"), dict):  # our own lines
            if not record["metrics"].keys() & {"Training/Loss", "Eval/Loss"}:
                continue  # a metric of the user's, which may be over another axis than steps
            record = {STEP: record.get(STEP), **record["metrics"]}
        if "Training/Loss" in record and record["Training/Loss"] is None:
            record["Training/Loss"] = math.nan  # JSON has no NaN: a null loss was not finite
        yield f"{path}:{number}", planned | record


def _read_json(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """HF's trainer_state.json, or a list of rows."""
    try:
        state = json.loads(text)
    except json.JSONDecodeError as error:
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


def _steps_per_epoch(points) -> float | None:
    """From the epoch column, where there is one."""
    known = [p for p in points if p.get("Training/Epoch", 0) > 0]
    if len(known) < 2:
        return None
    steps = known[-1]["step"] - known[0]["step"]
    epochs = known[-1]["Training/Epoch"] - known[0]["Training/Epoch"]
    return steps / epochs if epochs > 0 and steps > 0 else None
