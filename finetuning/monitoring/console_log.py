"""Losses in a text that a training run printed: `{'loss': 1.23, ...}`, as HF's Trainer prints them."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BRACES = re.compile(r"\{[^{}]*\}")
_LOSS = re.compile(r"['\"](?:eval_|train_)?loss['\"]\s*:")
FIELD = re.compile(r"['\"]([\w/.-]+)['\"]\s*:\s*['\"]?([-+\w.]+)['\"]?")
PROGRESS = re.compile(r"(?<!\d)(\d+)/(\d+) \[")  # a progress bar's "120/3000 [01:10<..."


def has_records(text: str) -> bool:
    """Does such a record stand in the text?"""
    return next(_records(text), None) is not None


def console_records(text: str) -> Iterator[dict[str, str]]:
    """Every record with its fields as text, with a "step", and "total_steps" where a progress bar says it.

    The step is the record's own, else the newest that a progress bar has shown, else the number of the
    record among those with a loss. A bar of the evaluation, which has another end, is left aside.
    """
    bars = [(m.start(), int(m[1]), int(m[2])) for m in PROGRESS.finditer(text)]
    total = max((bar[2] for bar in bars), default=0)
    bars = [(at, step) for at, step, end in bars if end == total and step > 0]
    planned = {"total_steps": str(total)} if bars else {}
    counted = place = 0
    step: int | None = None
    for record in _records(text):
        fields = dict(FIELD.findall(record[0]))
        counted += "loss" in fields
        while place < len(bars) and bars[place][0] < record.start():
            step, place = bars[place][1], place + 1
        yield planned | {"step": str(counted if step is None else step)} | fields


def _records(text: str) -> Iterator[re.Match]:
    """What stands in braces and holds a loss."""
    return (found for found in _BRACES.finditer(text) if _LOSS.search(found[0]))
