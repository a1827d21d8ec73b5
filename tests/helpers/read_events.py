"""All texts and histograms of a run's event files; the program needs the ends of the texts only."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetuning.events.event_file import event_files, surviving_events


def _values(run_dir: str | Path) -> Iterator[tuple[int, Any]]:
    for event in surviving_events(event_files(Path(run_dir)), b""):
        for value in event.summary.value:
            yield event.step, value


def read_texts(run_dir: str | Path) -> dict[str, list[tuple[int, str]]]:
    """All texts of a run: {tag: [(step, Markdown), ...]}."""
    texts: dict[str, list[tuple[int, str]]] = {}
    for step, value in _values(run_dir):
        if value.metadata.plugin_data.plugin_name == "text" and value.tensor.string_val:
            text = value.tensor.string_val[0].decode(errors="replace")
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
