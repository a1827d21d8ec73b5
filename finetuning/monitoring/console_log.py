"""Losses in a text that a training run printed: `{'loss': 1.23, ...}`, as HF's Trainer prints them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from finetuning.monitoring.column_names import COUNTED, is_step, unpaired
from finetuning.monitoring.progress_bars import steps_at

_BRACES = re.compile(r"\{[^{}]*\}")
_LOSS = re.compile(r"['\"](?:eval_|train_)?loss['\"]\s*:")
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # and the moves of a cursor between bars
FIELD = re.compile(r"['\"]([\w/.-]+)['\"]\s*:\s*['\"]?([-+\w./]+)['\"]?")


def has_records(text: str) -> bool:
    """Does such a record stand in the text?"""
    return next(_records(text), None) is not None


def console_records(text: str) -> Iterator[dict[str, str]]:
    """Every record with its fields as text, with a "step", and "total_steps" where a progress bar says it.

    The step is the record's own, else that of the progress bar which goes with the losses (`steps_at`), else
    the number of the record among those with a training loss, which then has a field COUNTED.
    """
    text = _COLOUR.sub("", text)
    records = [(found.start(), _fields(found[0])) for found in _records(text)]
    losses = [(place, fields) for place, fields in records if _is_training(fields)]
    told = any(is_step(name) for _, fields in losses for name in fields)
    steps = None
    if not told:
        steps = steps_at(text, [p for p, _ in losses], [_epoch(fields) for _, fields in losses])
    known: dict[str, str] = {} if told else {"step": "0"}
    number = 0
    for _, fields in records:
        if not told and _is_training(fields):
            known = {"step": str(number + 1), COUNTED: "1"}
            if steps:
                known = {"step": str(steps[number][0]), "total_steps": str(steps[number][1])}
            number += 1
        yield known | fields


def _records(text: str) -> Iterator[re.Match]:
    """What stands in braces and holds a loss."""
    return (found for found in _BRACES.finditer(text) if _LOSS.search(found[0]))


def _fields(record: str) -> dict[str, str]:
    return unpaired(dict(FIELD.findall(record)))


def _is_training(fields: Mapping[str, str]) -> bool:
    """Is it a loss of the training, and not the mean that HF's Trainer prints at its end?"""
    return "loss" in fields or ("train_loss" in fields and "train_runtime" not in fields)


def _epoch(fields: Mapping[str, str]) -> float | None:
    try:
        return float(fields.get("epoch", ""))
    except ValueError:
        return None
