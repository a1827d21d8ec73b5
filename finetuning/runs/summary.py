"""The texts and records about a whole run: what was set, what was resolved, how it ended."""

import dataclasses
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn.attention import current_flash_attention_impl

from finetuning.common.distributed import Distributed
from finetuning.common.files import json_text
from finetuning.common.formatting import flat, shown
from finetuning.common.language import translated
from finetuning.common.text import table_cell
from finetuning.config import NO_LIMIT
from finetuning.data.accounts import account_rows
from finetuning.events.address import pinned_address
from finetuning.model.resolve import licence_of, shared_name
from finetuning.runs.directory import ORIGIN, RUN_NAME, RunDirectory
from finetuning.runs.model_card import CARD, model_card
from finetuning.runs.plan import RunPlan
from finetuning.runs.result import FINAL, why_best
from finetuning.training.engine import TrainingEngine
from finetuning.training.peak_rate import USUAL_HIDDEN_SIZE, more_teaches
from finetuning.training.state import TrainState

PACKAGES = ("torch", "transformers", "peft", "tensorboard", "datasets", "nvidia-ml-py", "numpy")

FEW_UPDATES = 100  # below which a run is told that it is short

# -----------------------------------------------------------------------------
# Markdown for TensorBoard


def markdown_table(rows: Mapping[str, Any], header: tuple[str, str] = ("name", "value")) -> str:
    """A two-column Markdown table."""
    lines = [f"| {' | '.join(map(translated, header))} |", "| --- | --- |"]
    lines += [f"| {table_cell(str(k))} | {table_cell(str(v), 300)} |" for k, v in rows.items()]
    return "\n".join(lines)


def epoch_summary(epoch: int, steps: int, metrics: Mapping[str, float]) -> str:
    """One epoch's line in TEXT."""
    rows = {name.partition("/")[2].replace("_", " "): f"{v:.4g}" for name, v in metrics.items()}
    return translated(f"**Epoch {epoch}**, {steps} steps") + "\n\n" + markdown_table(rows)


def hparams(settings: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Recorded settings as the HPARAMS table takes them."""
    values = flat(settings)
    return {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in values.items()}


# -----------------------------------------------------------------------------
# The beginning


def run_rows(plan: RunPlan, engine: TrainingEngine, dist: Distributed) -> list[tuple[str, object]]:
    """What was decided, for the table at the start."""
    data, steps = plan.data, plan.steps
    remarks = len(data.split.read.remarks)
    parallel, reason = plan.execution.parallel, engine.not_captured
    ranks = f", {dist.world_size} ranks, {parallel}" if dist.world_size > 1 else ""
    alone = "; one document a forward pass" if plan.rows.way == "alone" else ""
    trainable = f"{engine.num_trainable:,} trainable of {engine.num_parameters:,}"
    recomputed = "on" if engine.recomputes_all else plan.settings["gradient_checkpointing"]
    return [
        ("device", f"{dist.device}{ranks}"),
        ("model", plan.inputs.model.name),
        ("parameters", trainable),
        ("samples", f"{len(data.train)} train, {len(data.held_out)} held out"),
        *account_rows(plan.inputs.accounts),
        *([("remarks", f"{remarks}; --check-data lists them")] if remarks else []),
        ("longest sample taken", plan.inputs.length.text()),
        ("tokens per epoch", f"{steps.num_tokens:,}"),
        ("steps", _steps_text(plan)),
        ("learning rate", rate_text(plan)),
        ("logged", _logged(plan.settings["logging_steps"])),
        ("questions", plan.probing.text()),
        ("best model", plan.best_text),
        (
            "packing",
            f"{steps.num_rows} rows of training samples, {steps.efficiency:.1%} full{alone}",
        ),
        ("gradient checkpointing", recomputed),
        ("compiled layers", "on" if engine.batch_shape else "off"),
        ("CUDA graph", f"no: {reason}" if reason else "from the second step on"),
        *plan.forecast.short_rows(),
    ]


def _steps_text(plan: RunPlan) -> str:
    """How many updates, and which setting ends the run there."""
    steps, epochs = plan.steps, plan.settings["num_epochs"]
    end = "--max-steps" if plan.settings["max_steps"] else f"--num-epochs {epochs:g}"
    auto = " (auto)" * ("num_epochs" in plan.automatic and not plan.settings["max_steps"])
    return f"{steps.num_steps} by {end}{auto}, {steps.steps_per_epoch} per epoch"


def rate_text(plan: RunPlan) -> str:
    """The peak and, where it was left to the program, why."""
    if "learning_rate" not in plan.automatic:
        return f"{plan.settings['learning_rate']:.3g}"
    rate, updates = f"{plan.automatic_rate:.1e}", plan.steps.num_steps
    if plan.settings["learning_rate"] != plan.automatic_rate:
        return f"{plan.settings['learning_rate']:.2g} (auto, as in the checkpoint)"
    size, passes = plan.inputs.hidden_size, plan.steps.times_shown
    known = f"{size:,}" if size else f"{USUAL_HIDDEN_SIZE:,}, as the model's own is not known"
    often = f"{passes:.1f}" if passes >= 0.1 else f"{passes:.1g}"
    share = "" if plan.settings["lora_r"] else ", a tenth as all weights are trained"
    longer = "more --max-steps" if plan.settings["max_steps"] else "more --num-epochs"
    more = updates < FEW_UPDATES and more_teaches(passes, plan.steps.tokens_per_update)
    few = f"; {updates} updates are few, {longer} teach more" * more
    tokens = f"{plan.steps.tokens_per_update:,.0f}"
    why = (
        f"for a hidden size of {known}, {often} passes over the data and {tokens} tokens an update"
    )
    return f"{rate} (auto, {why}{share}{few})"


def _logged(steps: int) -> str:
    return "every step" if steps == 1 else f"every {steps} steps"


def model_size(plan: RunPlan, engine: TrainingEngine) -> dict[str, Any]:
    """The model's name and content, and its numbers of weights, for the run's files."""
    folder = plan.inputs.model.path
    revision = {"revision": folder.name} if folder.parent.name == "snapshots" else {}  # of the hub
    positions = plan.inputs.positions
    return {
        "name": plan.inputs.model.name,
        **revision,
        **{name: digest for name, digest in plan.inputs.contents.items() if digest},
        **({"positions": positions} if positions < NO_LIMIT else {}),
        "trainable": engine.num_trainable,
        "total": engine.num_parameters,
    }


# -----------------------------------------------------------------------------
# The end


def checkpoint_state(plan: RunPlan, state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds besides tensors: counters, the run's identity, settings without secrets."""
    return {
        "train_state": dataclasses.asdict(state),
        "identity": plan.identity,
        "config": dict(plan.settings),
    }


def model_notes(
    plan: RunPlan, run: RunDirectory, folder: Path, state: TrainState
) -> dict[str, str]:
    """Files in the `folder` of a saved model: its run; what it has come from; its card."""
    origin = _origin(plan, run.name, state)
    card = model_card(origin, "adapter" if plan.identity["lora_r"] else "whole", folder.name)
    return {RUN_NAME: f"{run.name}\n", ORIGIN: json_text(origin, indent=1) + "\n", CARD: card}


def _origin(plan: RunPlan, run: str, state: TrainState) -> dict[str, Any]:
    """The content of origin.json: step, the held-out loss that was measured last and its step, base,
    settings, and the system prompt of the data. No place of this machine."""
    identity, model = plan.identity, plan.inputs.model
    base = {name: identity[name] for name in ("model_weights", "model_config")}
    base["model"] = shared_name(model)
    licence = licence_of(model.path) if model.path else ""
    trained = ("steps", "lora_r", "lora_alpha", "max_seq_length", "data")
    return {
        "run": run,
        "step": state.step,
        "held_out_loss": state.last_eval_loss,
        "evaluated_step": state.last_eval_step,
        "base": base | ({"licence": licence} if licence else {}),
        "trained": {name: identity[name] for name in trained},
        **({"system_prompt": state.system_prompt} if state.system_prompt else {}),
    }


def final_metrics(
    plan: RunPlan,
    model: Mapping[str, Any],
    state: TrainState,
    monitoring: Mapping[str, float],
) -> dict[str, float]:
    """The Final_* tags but those of GPUs, and Training/Final_Loss; what is not known is absent."""
    data, settings = plan.data, plan.settings
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
        "Final_Dataset/Broken_Samples": float(len(plan.inputs.accounts[0].broken)),
        "Final_Model/Trainable_Parameters": float(model["trainable"]),
        "Final_Model/Total_Parameters": float(model["total"]),
        **{tag: value for tag, value in eval_losses.items() if value is not None},
        **{f"Final_{tag}": value for tag, value in monitoring.items()},
    }


def training_statistics(
    plan: RunPlan,
    model: Mapping[str, Any],
    state: TrainState,
    final: Mapping[str, float],
    end: Mapping[str, str],
) -> dict[str, Any]:
    """The content of training_statistics.json.

    end: the run's name, its outcome, and which of its models is the result.
    """
    data, steps = plan.data, plan.steps
    seconds = state.training_seconds
    return {
        **end,
        "config": settings_at_end(plan, state),
        **({"changes": state.changes} if state.changes else {}),
        "dataset": {
            "training_samples": len(data.train),
            "held_out_samples": len(data.held_out),
            **plan.inputs.statistics.to_json(),
        },
        "model": dict(model),
        "training": {
            "steps": state.step,
            "planned_steps": steps.num_steps,
            "epochs": steps.fractional_epoch(state.step),
            "final_loss": state.last_loss,
            "first_eval_loss": state.first_eval_loss,
            "last_eval_loss": state.last_eval_loss,
            "best_eval_loss": state.best_eval_loss,
            "best_score": state.best_score,
            "best_step": state.best_step,
            "nonfinite_steps": state.nonfinite_steps,
            "micro_batch_splits": state.micro_batch_splits,
            "resume_count": state.resume_count,
        },
        "throughput": {
            "training_seconds": seconds,
            "tokens": state.tokens_seen,
            "samples": state.samples_seen,
            "tokens_per_second": state.tokens_seen / seconds if seconds > 0 else None,
            "packing_efficiency": steps.efficiency,
        },
        "monitoring": {tag: v for tag, v in final.items() if tag.startswith("Final_Monitoring/")},
        "gpus": {tag: v for tag, v in final.items() if tag.startswith("Final_GPU_")},
        "versions": versions(),
    }


def settings_at_end(plan: RunPlan, state: TrainState) -> dict[str, Any]:
    """The settings, with what a lack of memory has changed."""
    measures = {"gradient_checkpointing": "on"} if state.recomputes else {}
    return {**plan.settings, **measures}


def configuration(
    plan: RunPlan, model: Mapping[str, Any], changes: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of configuration.json. changes: of settings, by resumes."""
    return {
        "config": dict(plan.settings),
        "automatic": list(plan.automatic),
        "automatic_learning_rate": plan.automatic_rate,
        **({"changes": list(changes)} if changes else {}),
        "model": dict(model),
        "steps": plan.steps.num_steps,
        "steps_per_epoch": plan.steps.steps_per_epoch,
        "held_out_samples": held_out_samples(plan),
        "versions": versions(),
    }


def held_out_samples(plan: RunPlan) -> dict[str, int]:
    """How many documents of each source are held out, by the name that the source has in tags."""
    if plan.evaluation is None:
        return {}
    names, labels = plan.groups[1]["By_Source/"]
    counts = np.bincount(labels[plan.evaluation.documents], minlength=len(names)).tolist()
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def versions() -> dict[str, str]:
    """Python, the packages that matter, whose kernels compute attention if not torch's, and the platform."""
    packages = {name: version(name) for name in PACKAGES}
    kernels = current_flash_attention_impl()
    packages |= {"attention": kernels} if kernels else {}
    return {"python": sys.version.split()[0], **packages, "platform": platform.platform()}


def final_summary(statistics: Mapping[str, Any]) -> str:
    """Training/Final_Summary."""
    parts = ("training", "throughput", "model")
    end = {name: statistics[name] for name in ("outcome", "result")}
    tables = {"result": end} | {part: statistics[part] for part in parts}
    if changes := statistics.get("changes"):
        tables["changed by resumes"] = dict(enumerate(changes, 1))
    return "\n\n".join(
        f"**{title}**\n\n" + markdown_table({k: shown(v) for k, v in rows.items()})
        for title, rows in tables.items()
    )


def result_lines(statistics: Mapping[str, Any], run: RunDirectory) -> list[str]:
    """What a run has come to."""
    training, speed = statistics["training"], statistics["throughput"]
    lines = [
        f"done: {training['steps']} steps in {speed['training_seconds']:.0f} s, "
        f"loss {shown(training['final_loss'])}"
    ]
    if training["first_eval_loss"] is not None:
        ends = shown(training["first_eval_loss"]), shown(training["last_eval_loss"])
        best = f", best {shown(training['best_eval_loss'])} at step {training['best_step']}"
        lines.append(
            f"held-out loss {ends[0]} -> {ends[1]}{best * (training['best_score'] is None)}"
        )
    if training["best_score"] is not None:
        score = shown(training["best_score"])
        lines.append(f"best answers: score {score} at step {training['best_step']}")
    return [*lines, *_model_lines(statistics, run)]


def closing_lines(statistics: Mapping[str, Any], run: RunDirectory) -> str:
    """The last lines on the terminal."""
    lines = [
        *result_lines(statistics, run),
        f"statistics: {run.statistics}",
        f"curves: uv run tensorboard --logdir={run.tensorboard.parent}",
        f"then open: {pinned_address()}",
    ]
    return "\n".join(lines)


def _model_lines(statistics: Mapping[str, Any], run: RunDirectory) -> list[str]:
    """Which folder is the result, and which other one there is."""
    training, final = statistics["training"], run.final_model
    best_step, loss, score = (training[f"best_{name}"] for name in ("step", "eval_loss", "score"))
    good = f"held-out loss {shown(loss)}" if score is None else f"answer score {shown(score)}"
    best = f"{run.best_model}, of step {best_step}, {good}"
    if statistics["result"] == run.best_model.name:
        why = why_best(statistics["outcome"])
        last = f", {shown(training['last_eval_loss'])}" * (score is None)
        return [f"model: {best} ({why}); ask.py and export.py take it. The last one{last}: {final}"]
    better = best_step and best_step != training["steps"]
    return [
        f"model: {final} ({FINAL}); ask.py and export.py take it",
        *([f"best: {best}"] * bool(better)),
    ]


def result(outcome: str, state: TrainState, best_by: str) -> str:
    """Name of the folder whose model is what the run has come to: the best, where it was stopped early or
    where a user has said what makes it the best (best_by as it was set, auto: left open); empty where the
    run is to go on."""
    if outcome == "preempted":
        return ""
    asked = best_by != "auto" and state.best_step != state.step
    return "best_model" if state.best_step and (asked or outcome == "stopped") else "final_model"


def stopped_text(state: TrainState, patience: int, actions: Mapping[str, str], best_by: str) -> str:
    """Why a run has ended before its last step and does not go on; empty where it goes on. best_by: loss or
    answers."""
    if patience and state.evals_without_gain >= patience:
        better = {"loss": "no better held-out loss", "answers": "no better answers"}[best_by]
        return (
            f"early stopping: {better} in {state.evals_without_gain} evaluations. To train "
            "on, resume with a larger --early-stopping-patience, or 0"
        )
    alerts = [name for name in state.stop_alerts if actions.get(name) == "stop"]
    if alerts:
        names = ", ".join(alerts)
        return (
            f"the alert {names} asked for the end. To train on, resume with another action for it"
        )
    return ""


def nonfinite_text(state: TrainState, places: Sequence[str]) -> str:
    """Why a gradient that is not finite has ended the run, and what to do."""
    return (
        f"step {state.nonfinite_steps[-1]}: non-finite gradient, samples {', '.join(places[:4])}. "
        "No bad update reached the weights; look at these samples, lower --learning-rate or use "
        "--nonfinite skip, then --resume latest"
    )


def preempted_text(signal_name: str, step: int, num_steps: int) -> str:
    """What a signal has ended, and how to go on."""
    return (
        f"{signal_name or 'a signal to another rank'}: saved step {step} of {num_steps}. Go on with the "
        "same command and --resume latest"
    )
