"""Looks at every logged step for what usually goes wrong, and says what to do about it.

One detector per trouble, each a short function of this step's metrics and a bounded memory. A metric
that is absent keeps its detector as it was. Nothing here acts: the loop logs, saves, stops, or
hands the alert to a command of the user's (`alert_command.py`).
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from typing import Any, TypedDict

from finetuning.common.files import strict
from finetuning.common.formatting import four_digits
from finetuning.common.language import translated
from finetuning.common.text import clean_line, table_cell
from finetuning.events.metric_table import METRICS
from finetuning.monitoring.advice import ADVICE, advice, ending
from finetuning.monitoring.detector_memory import KEEP, AlertLimits, DetectorMemory, Finding, finite
from finetuning.monitoring.detectors import DETECTORS, QUIET, is_watched
from finetuning.monitoring.saved_memory import check_memory, tried

SHOWN_STEPS = 400  # steps the table names for one kind of alert
TOKENS = "Throughput/Tokens_Seen"
# One of each tag that a detector looks at, with the most that it can be.
EXAMPLES = {
    tag: 1.0 if metric.unit in ("fraction", "0 to 1") else math.inf
    for metric in METRICS
    if is_watched(tag := re.sub("<.>|<name>", "0", metric.tag))
}
_HEADER = (
    "alert",
    "times",
    "steps",
    "last value",
    "limit",
    "evidence",
    "what to do",
)  # of the table


@dataclass(frozen=True)
class Alert:
    """One trouble, at the step it was first seen. `value` broke `threshold`; both in one unit."""

    name: str
    step: int
    value: float
    threshold: float
    evidence: dict = field(default_factory=dict)
    advice: str = ""
    ends: str = ""

    def line(self) -> str:
        """For a terminal: what, where, how far, which samples, and what to do."""
        value, limit = four_digits(self.value), four_digits(self.threshold)
        samples = self.evidence.get("samples")
        named = f" Samples: {_words_of(samples)}." if samples else ""
        return f"{self.name} at step {self.step}: {value}, limit {limit}.{named} {self.advice} {self.ends}"

    def record(self) -> dict:
        """As strict JSON: a value that isn't finite becomes its name, such as "nan"."""
        return strict(asdict(self), nonfinite=str)


NAMES = tuple(ADVICE)
ONLY_FOR = {  # evidence that says nothing about other alerts
    "slowest_rank": ("Slow_Rank",),
    "samples": ("NonFinite", "Gradient_Explosion", "Loss_Spike", "Divergence", "Source_Regression"),
}


class _Row(TypedDict, total=False):
    name: str
    times: int
    step: int
    steps: list[int]
    value: float | str
    threshold: float | str
    evidence: dict[str, Any]
    advice: str
    ends: str


class AlertMemory(TypedDict, total=False):
    """What `AlertMonitor.state_dict` gives; empty before the first logged step."""

    series: dict[str, list[float] | list[tuple[float, float]]]
    marks: dict[str, float | None]
    active: dict[str, bool]
    quiet: dict[str, int]
    rows: dict[str, _Row]


class AlertMonitor:
    """All detectors over one run. Deterministic; the state goes into the checkpoint.

    state: what `state_dict()` gave. Raises UserError where the detectors can't go on with it.
    """

    def __init__(
        self,
        state: Mapping | None = None,
        limits: AlertLimits | None = None,
        settings: Mapping | None = None,
    ) -> None:
        check_memory(state or {}, AlertMemory, "alerts")
        # A copy: it never shares lists with a checkpoint.
        state = json.loads(json.dumps(state)) if state else {}
        self.memory = DetectorMemory(limits or AlertLimits(), state, settings)
        self.quiet: dict[str, int] = state.get("quiet", {})
        self.rows: dict[str, dict] = state.get("rows", {})
        if state:
            tried(self._rehearse, "alerts")

    def _rehearse(self) -> None:
        """Go on, on copies, with numbers that are low, usual and high, in every order."""
        tags = EXAMPLES | dict.fromkeys(filter(is_watched, self.memory.series), math.inf)
        for levels in permutations((1e-3, 1.0, 1e3)):
            twin = copy.deepcopy(self)
            for step, level in enumerate(levels * 2, start=1):
                row = {tag: min(level, most) for tag, most in tags.items()}
                twin.observe(step, row | {TOKENS: 1e15 * step})
            twin.table()
            twin.scalars()
            twin.state_dict()

    def observe(
        self, step: int, metrics: Mapping[str, float], evidence: Mapping | None = None
    ) -> list[Alert]:
        """Take one logged step; return the alerts that are news.

        metrics: {tag: value} under the names of the metric table. evidence: what the loop knows of
        this step (sample ids, module, ...); it is passed on with the alert.
        """
        raised = []
        metrics = {tag: value for tag, value in metrics.items() if is_watched(tag)}
        for name, detector in DETECTORS.items():
            finding = detector(self.memory, metrics)
            if finding is KEEP:
                if self.memory.active.get(name):
                    continue
                finding = None  # it was quiet, and nothing says otherwise
            if (
                finding
                and self.quiet.get(name, QUIET) >= QUIET
                and not self.memory.active.get(name)
            ):
                raised.append(self._alert(name, step, finding, evidence or {}))
            self.memory.active[name] = finding is not None
            self.quiet[name] = 0 if finding else min(QUIET, self.quiet.get(name, QUIET) + 1)
        self.memory.end_row(step, finite(metrics, "Training/Epoch"))
        return raised

    def _alert(self, name: str, step: int, finding: Finding, evidence: Mapping) -> Alert:
        known = {k: v for k, v in evidence.items() if name in ONLY_FOR.get(k, (name,))}
        facts = {**finding.evidence, **known}
        told = advice(name, self.memory.settings), ending(name, finding)
        alert = Alert(name, int(step), float(finding.value), float(finding.threshold), facts, *told)
        record = alert.record()
        row = self.rows.setdefault(name, {"times": 0, "steps": [], **record})
        row["times"] += 1
        row["steps"] = [*row["steps"], int(step)][-SHOWN_STEPS:]
        row.update({key: told for key, told in record.items() if key != "step"})  # the first one's
        return alert

    def scalars(self) -> dict[str, float]:
        """How many alerts are raised now, and Alerts/<Name> of each that ever was: 1.0 while the trouble is
        present, else 0.0."""
        active = {name: float(self.memory.active.get(name, False)) for name in NAMES}
        told = {f"Alerts/{name}": now for name, now in active.items() if name in self.rows}
        return {"Monitoring/Alerts_Active": sum(active.values()), **told}

    def table(self) -> str:
        """All alerts of the run as one Markdown table: a row per kind, with every step of it."""
        if not self.rows:
            return translated("No alerts.")
        lines = [
            f"| {' | '.join(map(translated, _HEADER))} |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in sorted(self.rows.items(), key=lambda item: item[1]["step"]):
            cells = (
                name,
                str(row["times"]),
                _step_list(row["steps"], row["times"]),
                four_digits(row["value"]),
                four_digits(row["threshold"]),
                _facts(row["evidence"]),
                translated(f"{row['advice']} {row.get('ends', '')}".strip()),
            )
            lines.append("| " + " | ".join(map(table_cell, cells)) + " |")
        return "\n".join(lines)

    def state_dict(self) -> dict:
        """Everything remembered, as strict JSON, bounded however long the run."""
        memory = self.memory
        state = {"series": memory.series, "marks": memory.marks, "active": memory.active}
        return json.loads(json.dumps(state | {"quiet": self.quiet, "rows": self.rows}))


def _step_list(steps: Sequence[int], times: int) -> str:
    text = ", ".join(map(str, steps))
    return text if times == len(steps) else f"… {text}"


def _facts(evidence: Mapping) -> str:
    """Evidence in words."""
    return "; ".join(f"{key}: {_words_of(value)}" for key, value in evidence.items())


def _words_of(value: object) -> str:
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - 8} more" if len(value) > 8 else ""
        return ", ".join(_words_of(v) for v in value[:8]) + more
    return clean_line(four_digits(value) if isinstance(value, float) else str(value), 200)
