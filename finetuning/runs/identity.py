"""What makes two runs the same run: for a resume, and for the ranks of one run."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.files import strict
from finetuning.common.text import REDACTED, redact
from finetuning.config import COMMANDS, NAMES_AND_PATHS, DirectTrainingConfig, allowed_values
from finetuning.data.packing import StepPlan
from finetuning.data.training_data import TrainingData
from finetuning.monitoring.alerts import program_of


def identity(
    settings: Mapping[str, Any], model: str, data: TrainingData, plan: StepPlan
) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it, or the steps would not be the same."""
    lengths = data.train.tokens.lengths[data.train.documents].tobytes()
    names = ("lora_r", "lora_alpha", "use_rslora", "use_dora", "seed", "packing", "max_seq_length")
    return {
        "model": model,
        "data": data.split.read.fingerprint,
        "documents": hashlib.sha256(lengths).hexdigest()[:16],
        "rows_per_step": plan.rows_per_step,
        "steps": plan.num_steps,
        **{name: settings[name] for name in names},
        "target_modules": sorted(settings["target_modules"]),
    }


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], path: object) -> None:
    """Raise UserError naming every difference between a checkpoint's identity and this run's."""
    differences = [
        f"{name} is {wanted[name]}, the checkpoint has {found.get(name)}"
        for name in wanted
        if found.get(name) != wanted[name]
    ]
    if differences:
        raise UserError(
            f"--resume {path}: {'; '.join(differences)}. Use the settings and data of the run that "
            "wrote it, or start a fresh run without --resume"
        )


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name before -> now` of every setting that a resumed run has otherwise than its checkpoint."""
    before, now = strict(before), strict(now)
    return [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    ]


def check_ranks(identities: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError naming what is not the same on all ranks: they would train on different samples."""
    first = identities[0]
    for rank, other in enumerate(identities):
        names = [name for name in first if other[name] != first[name]]
        if names:
            raise UserError(
                f"rank {rank} differs from rank 0 in {', '.join(names)}: give all nodes the same data, "
                "model and settings"
            )


def recorded_settings(config: DirectTrainingConfig) -> dict[str, Any]:
    """Every setting as records show it. What a setting is decides, not how its value looks.

    Numbers, switches and words of a choice are shown; a text only where the setting is a name or a path, and
    then without what looks like a secret; of a command its program. Any other text is hidden.
    """
    return {f.name: _recorded(f, getattr(config, f.name)) for f in dataclasses.fields(config)}


def _recorded(setting: dataclasses.Field, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _recorded(setting, entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_recorded(setting, entry) for entry in value]
    if not isinstance(value, str) or value in allowed_values(setting)[0]:
        return value
    if setting.name in COMMANDS:
        return program_of(value)
    if setting.name in NAMES_AND_PATHS:
        return redact(value)
    return REDACTED if value else value
