"""A run's event files and metrics.jsonl read back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetuning.common.bounds import RECORD
from finetuning.common.files import regular
from finetuning.events.event_file import event_files, surviving_events

_OF_TEXTS = b"\n\x04text"  # how the plugin's name stands in an event that holds a text


def _values(run_dir: str | Path, holding: bytes = b""):
    for event in surviving_events(event_files(Path(run_dir)), holding):
        for value in event.summary.value:
            yield event.step, value


def read_run(run_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars of a run: {tag: [(step, value), ...]} in the order of the files."""
    run: dict[str, list[tuple[int, float]]] = {}
    for step, value in _values(run_dir):
        if value.WhichOneof("value") == "simple_value":
            run.setdefault(value.tag, []).append((step, value.simple_value))
    return run


def read_end_texts(run_dir: str | Path) -> dict[str, list[tuple[int, str]]]:
    """The first and the last text of each tag; one where there is but one."""
    texts: dict[str, list[tuple[int, str]]] = {}
    for step, value in _values(run_dir, _OF_TEXTS):
        if value.metadata.plugin_data.plugin_name == "text" and value.tensor.string_val:
            text = value.tensor.string_val[0].decode(errors="replace")
            texts[value.tag] = [*texts.get(value.tag, ())[:1], (step, text)]
    return texts


def read_metrics(metrics_path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl: {"step", "time", "metrics": {tag: number or null}, ...}."""
    return list(metric_records(metrics_path))


def metric_records(metrics_path: str | Path) -> Iterator[dict[str, Any]]:
    """The same one after the other, without a last line that a crash cut. Raises ValueError for a line that
    is no JSON, or longer than any of ours."""
    with open(regular(Path(metrics_path)), "rb") as file:
        while line := file.readline(RECORD.limit):
            if line.endswith(b"\n"):
                yield json.loads(line)
            elif len(line) == RECORD.limit:
                raise ValueError(f"a line of more than {RECORD}")
