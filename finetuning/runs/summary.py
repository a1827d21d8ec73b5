"""The texts and records about a whole run: what was set, what was resolved, how it ended."""

import dataclasses
import hashlib
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.files import strict
from finetuning.common.formatting import shown
from finetuning.common.text import redact_values, table_cell
from finetuning.data.packing import StepPlan
from finetuning.data.training_data import TrainingData
from finetuning.runs.directory import RunDirectory
from finetuning.training.state import TrainState

PACKAGES = ("torch", "transformers", "peft", "tensorboard", "datasets", "nvidia-ml-py", "numpy")

# -----------------------------------------------------------------------------
# What makes a run the same run


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


# -----------------------------------------------------------------------------
# Markdown for TensorBoard


def markdown_table(rows: Mapping[str, Any], header: tuple[str, str] = ("name", "value")) -> str:
    """A two-column Markdown table."""
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    lines += [f"| {table_cell(str(k))} | {table_cell(str(v), 300)} |" for k, v in rows.items()]
    return "\n".join(lines)


def epoch_summary(epoch: int, steps: int, metrics: Mapping[str, float]) -> str:
    """One epoch's line in TEXT."""
    rows = {name.partition("/")[2].replace("_", " "): f"{v:.4g}" for name, v in metrics.items()}
    return f"**Epoch {epoch}**, {steps} steps\n\n" + markdown_table(rows)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to one level, names joined by dots; lists become text."""
    rows: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = (
                ", ".join(map(str, value)) if isinstance(value, (list, tuple, Mapping)) else value
            )
    return rows


def hparams(settings: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Settings as the HPARAMS table takes them; secrets redacted."""
    values = flat(redact_values(dict(settings)))
    return {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in values.items()}


# -----------------------------------------------------------------------------
# The end


def final_metrics(
    settings: Mapping[str, Any],
    data: TrainingData,
    parameters: Mapping[str, int],
    state: TrainState,
    monitoring: Mapping[str, float],
    hardware: Mapping[str, float],
) -> dict[str, float]:
    """The Final_* tags and Training/Final_Loss; what is not known is absent."""
    numbers = {k: v for k, v in settings.items() if type(v) in (int, float)}
    eval_losses = {
        "Final_Model/First_Eval_Loss": state.first_eval_loss,
        "Final_Model/Last_Eval_Loss": state.last_eval_loss,
        "Final_Model/Best_Eval_Loss": state.best_eval_loss,
        "Training/Final_Loss": state.last_loss,
    }
    return {
        **{f"Final_Config/{name}": float(value) for name, value in numbers.items()},
        "Final_Dataset/Training_Samples": float(len(data.train)),
        "Final_Dataset/Held_Out_Samples": float(len(data.held_out)),
        "Final_Dataset/Broken_Samples": float(len(data.split.read.broken)),
        **{f"Final_Model/{name}": float(value) for name, value in parameters.items()},
        **{tag: value for tag, value in eval_losses.items() if value is not None},
        **{f"Final_{tag}": value for tag, value in monitoring.items()},
        **{f"Final_{tag}": value for tag, value in hardware.items() if tag.startswith("GPU_")},
    }


def training_statistics(
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    data: TrainingData,
    plan: StepPlan,
    state: TrainState,
    final: Mapping[str, float],
    run: RunDirectory,
) -> dict[str, Any]:
    """The content of training_statistics.json."""
    seconds = state.training_seconds
    return {
        "run": run.name,
        "config": redact_values(dict(settings)),
        "dataset": {
            "training_samples": len(data.train),
            "held_out_samples": len(data.held_out),
            **data.statistics.to_json(),
        },
        "model": dict(model),
        "training": {
            "steps": state.step,
            "planned_steps": plan.num_steps,
            "epochs": plan.fractional_epoch(state.step),
            "final_loss": state.last_loss,
            "first_eval_loss": state.first_eval_loss,
            "last_eval_loss": state.last_eval_loss,
            "best_eval_loss": state.best_eval_loss,
            "best_step": state.best_step,
            "nonfinite_steps": state.nonfinite_steps,
            "resume_count": state.resume_count,
        },
        "throughput": {
            "training_seconds": seconds,
            "tokens": state.tokens_seen,
            "samples": state.samples_seen,
            "tokens_per_second": state.tokens_seen / seconds if seconds > 0 else None,
            "packing_efficiency": plan.efficiency,
        },
        "monitoring": {tag: v for tag, v in final.items() if tag.startswith("Final_Monitoring/")},
        "gpus": {tag: v for tag, v in final.items() if tag.startswith("Final_GPU_")},
        "versions": versions(),
    }


def configuration(
    settings: Mapping[str, Any], model: Mapping[str, Any], plan: StepPlan
) -> dict[str, Any]:
    """The content of configuration.json; secrets redacted."""
    return {
        "config": redact_values(dict(settings)),
        "model": dict(model),
        "steps": plan.num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Python, the packages that matter, and the platform."""
    packages = {name: version(name) for name in PACKAGES}
    return {"python": sys.version.split()[0], **packages, "platform": platform.platform()}


def final_summary(statistics: Mapping[str, Any]) -> str:
    """Training/Final_Summary."""
    parts = ("training", "throughput", "model")
    return "\n\n".join(
        f"**{part}**\n\n" + markdown_table({k: shown(v) for k, v in statistics[part].items()})
        for part in parts
    )


def closing_lines(statistics: Mapping[str, Any], run: RunDirectory) -> str:
    """The last lines on the terminal."""
    training, speed = statistics["training"], statistics["throughput"]
    lines = [
        f"done: {training['steps']} steps in {speed['training_seconds']:.0f} s, "
        f"loss {shown(training['final_loss'])}"
    ]
    if training["first_eval_loss"] is not None:
        lines.append(
            f"held-out loss {shown(training['first_eval_loss'])} -> {shown(training['last_eval_loss'])}"
            f", best {shown(training['best_eval_loss'])} at step {training['best_step']}"
        )
    lines += [
        f"model: {run.final_model}",
        f"statistics: {run.statistics}",
        f"curves: uv run tensorboard --logdir={run.tensorboard.parent}",
    ]
    return "\n".join(lines)


def settings_of(config: object) -> dict[str, Any]:
    """A configuration dataclass as plain values."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]
