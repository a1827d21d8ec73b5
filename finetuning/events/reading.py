"""A run's event files and metrics.jsonl read back."""

import json
from pathlib import Path
from typing import Any

from finetuning.events.event_file import event_files, surviving_events


def _values(run_dir: str | Path):
    for event in surviving_events(event_files(Path(run_dir))):
        for value in event.summary.value:
            yield event.step, value


def read_run(run_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars of a run: {tag: [(step, value), ...]} in the order of the files."""
    run: dict[str, list[tuple[int, float]]] = {}
    for step, value in _values(run_dir):
        if value.WhichOneof("value") == "simple_value":
            run.setdefault(value.tag, []).append((step, value.simple_value))
    return run


def read_texts(run_dir: str | Path) -> dict[str, list[tuple[int, str]]]:
    """All texts of a run: {tag: [(step, Markdown), ...]}."""
    texts: dict[str, list[tuple[int, str]]] = {}
    for step, value in _values(run_dir):
        if value.metadata.plugin_data.plugin_name == "text":
            text = value.tensor.string_val[0].decode()
            texts.setdefault(value.tag, []).append((step, text))
    return texts


def read_histograms(run_dir: str | Path) -> dict[str, list[tuple[int, list[float], list[float]]]]:
    """All histograms of a run: {tag: [(step, counts, edges), ...]}."""
    histograms: dict[str, list[tuple[int, list[float], list[float]]]] = {}
    for step, value in _values(run_dir):
        if value.WhichOneof("value") == "histo":
            edges = [value.histo.min, *value.histo.bucket_limit]
            histograms.setdefault(value.tag, []).append((step, list(value.histo.bucket), edges))
    return histograms


def read_metrics(metrics_path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl: {"step", "time", "metrics": {tag: number or null}, ...}."""
    with open(metrics_path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
