"""What people call a run: the name they gave it, else what was set otherwise than in the runs beside it."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetuning.common.formatting import UNKNOWN
from finetuning.common.text import clean_line, redact
from finetuning.config import DirectTrainingConfig
from finetuning.runs.directory import RUN_PREFIX

# Settings that people compare first, in this order; the others follow as they come.
COMPARED = (
    *("learning_rate", "lora_r", "max_seq_length", "batch_size", "num_epochs", "max_steps"),
    *("lora_alpha", "gradient_accumulation_steps", "model_name", "data_path", "seed"),
)
# The HPARAMS table shows 16 characters of a name.
SHORT = {
    **{"learning_rate": "lr", "lora_r": "r", "max_seq_length": "length", "batch_size": "batch"},
    **{"num_epochs": "epochs", "max_steps": "steps", "lora_alpha": "alpha"},
}
NAMED = 2  # settings in a label
LONGEST = 48  # characters of a label
_NAME = re.compile(rf"{RUN_PREFIX}(\d{{8}}_\d{{6}}(?:_\d+)?)(?:_(.+))?")


def stamp(run: str) -> str:
    """The time in a run's name, with its number where two began in one second."""
    found = _NAME.fullmatch(run)
    return found[1] if found else run.removeprefix(RUN_PREFIX)


def given_name(run: str) -> str:
    """What `--run-name` said; empty without one."""
    found = _NAME.fullmatch(run)
    return found[2] or "" if found else ""


def value_text(value: Any) -> str:
    """A setting's value in few characters: 0.001 is 1e-3."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return np.format_float_scientific(value, trim="-", exp_digits=1)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "+".join(map(value_text, value))
    return UNKNOWN if value is None else redact(clean_line(str(value), LONGEST))


def difference(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """`learning_rate=1e-3, lora_r=8`: the first `NAMED` of these names that people compare first."""
    known = [name for name in COMPARED if name in names]
    ordered = [*known, *(name for name in names if name not in known)]
    texts = [f"{name}={value_text(settings.get(name))}" for name in ordered[:NAMED]]
    return clean_line(", ".join(texts), LONGEST)


def unlike(settings: Mapping[str, Any]) -> str:
    """What of `COMPARED` was set otherwise than by default; empty where nothing was."""
    defaults = dataclasses.asdict(DirectTrainingConfig())
    names = [n for n in COMPARED if n in settings and _plain(settings[n]) != _plain(defaults[n])]
    if settings.get("max_steps") and "num_epochs" in names:
        names.remove("num_epochs")  # it follows from the steps
    return difference(settings, names)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def trial_name(run: str, settings: Mapping[str, Any]) -> str:
    """A run's name in the HPARAMS table, where each has its own: what was set, and when it began.

    settings: as they were set. What was left at "auto" is not in the name; its value is in the table.
    """
    text = given_name(run) or unlike(settings)
    for name, short in SHORT.items():
        text = text.replace(f"{name}=", f"{short}=")
    began = stamp(run)[4:]  # the table is narrow: without the year
    return f"{text} ({began})" if text else began


def labels(runs: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each of several runs: the given one, else in what it differs from the others, with its
    time where that is not enough.

    settings: of each run, those that are not the same in all.
    """
    texts = [
        given_name(run) or (difference(values, list(values)) if values else "")
        for run, values in zip(runs, settings, strict=True)
    ]
    return [
        text if text and texts.count(text) == 1 else f"{text} {stamp(run)}".strip()
        for run, text in zip(runs, texts, strict=True)
    ]
