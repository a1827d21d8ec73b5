"""What was left to the program, as a run uses it."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from finetuning.common.distributed import Distributed
from finetuning.config import DirectTrainingConfig
from finetuning.data.packing import StepPlan
from finetuning.training.engine import Execution
from finetuning.training.peak_rate import automatic_rate


def automatic_settings(config: DirectTrainingConfig) -> tuple[str, ...]:
    """Names of the settings that are left to the program."""
    return tuple(f.name for f in fields(config) if getattr(config, f.name) == "auto")


def automatic_rates(
    config: DirectTrainingConfig, hidden_size: int, steps: StepPlan, pinned: Mapping[str, Any]
) -> tuple[float, float]:
    """The peak learning rate by the rule for this plan, and the one that is used where none was set.

    The second is the rate of the checkpoint that the run goes on from, if there is one: another version of
    the program may have another rule. pinned: that checkpoint's settings.
    """
    often = steps.times_shown, steps.tokens_per_update
    own = automatic_rate(hidden_size, *often, trains_all=not config.lora_r)
    kept = pinned.get("learning_rate")
    sound = type(kept) is float and 0 < kept < math.inf  # of a file that anyone may write
    return own, kept if sound else own


def resolved_settings(
    config: DirectTrainingConfig,
    dist: Distributed,
    execution: Execution,
    steps: StepPlan,
    rate: float,
) -> dict[str, Any]:
    """What was left to the program, or is overridden by another setting, as it is used.

    rate: the peak learning rate where that is left to the program.
    """
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[execution.dtype]
    counted = config.max_steps or config.num_epochs == "auto"
    epochs = (round(steps.passes, 2) or steps.passes) if counted else config.num_epochs
    return {
        "device": dist.device.type if config.device == "auto" else config.device,
        "precision": precision if config.precision == "auto" else config.precision,
        "num_epochs": epochs,
        "learning_rate": rate if config.learning_rate == "auto" else config.learning_rate,
        "parallel": execution.parallel,
        "compile": "on" if execution.batch_shape else "off",
    }
