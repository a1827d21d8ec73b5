"""GPUs over a whole run, all its sessions: metrics.jsonl comes in, means, peaks and throttling go out."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetuning.events.reading import metric_records

MEANS = (
    "Utilization_Percent",
    "Memory_Usage_Percent",
    "Temperature_C",
    "Power_W",
    "SM_Clock_MHz",
)
# Name at the end -> the gauge of a logged step whose highest value it is.
PEAKS = {
    "Utilization_Percent_Max": "Utilization_Percent_Max",
    "Memory_Usage_Percent_Max": "Memory_Usage_Percent",
    "Temperature_C_Max": "Temperature_C",
    "Power_W_Max": "Power_W",
    "Throttle_Reasons_Max": "Throttle_Reasons",
}
_TAG = re.compile(r"GPU_(\d+)/(.+)")
_THROTTLED = re.compile(r"Throttle_(?!Reasons$)(.+)")


class GpuSummary:
    """Every GPU's gauges over all logged steps; a step that was done again counts once.

    records: lines of metrics.jsonl, {"step", "metrics": {tag: number or null}}.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._values: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
        for record in records:
            for tag, value in record["metrics"].items():
                found = tag.startswith("GPU_") and _TAG.fullmatch(tag)
                if found and value is not None and math.isfinite(value):
                    self._values[int(found[1]), found[2]][record["step"]] = value

    @classmethod
    def read(cls, metrics_path: Path) -> "GpuSummary":
        """Of a run's metrics.jsonl; empty where there is none. Raises ValueError for a broken line."""
        return cls(metric_records(metrics_path) if metrics_path.is_file() else ())

    @property
    def gpus(self) -> list[int]:
        """Numbers of the devices that were seen."""
        return sorted({gpu for gpu, _ in self._values})

    def metrics(self) -> dict[str, float]:
        """Final_GPU_<i>/<name>: means and peaks over the logged steps, and the energy of all sessions (J)."""
        result = {}
        for gpu in self.gpus:
            for name in MEANS:
                if values := self._of(gpu, name):
                    result[f"Final_GPU_{gpu}/{name}"] = sum(values) / len(values)
            for name, gauge in PEAKS.items():
                if values := self._of(gpu, gauge):
                    result[f"Final_GPU_{gpu}/{name}"] = max(values)
            if values := self._of(gpu, "Energy_J"):
                result[f"Final_GPU_{gpu}/Energy_J"] = _of_all_sessions(values)
        return result

    def throttling(self) -> str:
        """Markdown: what has slowed which device down, and in how many of its logged steps."""
        rows = []
        for (gpu, name), values in sorted(self._values.items()):
            reason, slowed = _THROTTLED.fullmatch(name), sum(map(bool, values.values()))
            if reason and slowed:
                first = min(step for step, value in values.items() if value)
                words = reason[1].replace("_", " ")
                rows.append(f"| {gpu} | {words} | {slowed} of {len(values)} | {first} |")
        if not rows:
            return "No device was slowed down."
        heads = ["| GPU | slowed down by | logged steps | first |", "|---|---|---|---|"]
        return "\n".join([*heads, *rows])

    def _of(self, gpu: int, name: str) -> list[float]:
        return list(self._values.get((gpu, name), {}).values())


def _of_all_sessions(counter: list[float]) -> float:
    """A counter that begins at 0 in each session: what all of them have counted."""
    ends = [a for a, b in pairwise(counter) if b < a]
    return sum(ends) + counter[-1]
