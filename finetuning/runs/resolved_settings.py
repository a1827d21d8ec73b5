"""What was left to the program, as a run uses it."""

from dataclasses import fields
from typing import Any

import torch

from finetuning.common.distributed import Distributed
from finetuning.config import DirectTrainingConfig
from finetuning.data.packing import StepPlan
from finetuning.training.engine import Execution


def automatic_settings(config: DirectTrainingConfig) -> tuple[str, ...]:
    """Names of the settings that are left to the program."""
    return tuple(f.name for f in fields(config) if getattr(config, f.name) == "auto")


def resolved_settings(
    config: DirectTrainingConfig,
    dist: Distributed,
    execution: Execution,
    steps: StepPlan,
    own_rate: float,
) -> dict[str, Any]:
    """What was left to the program, or is overridden by another setting, as it is used.

    own_rate: the learning rate where that is left to the program.
    """
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[execution.dtype]
    counted = config.max_steps or config.num_epochs == "auto"
    epochs = (round(steps.passes, 2) or steps.passes) if counted else config.num_epochs
    return {
        "device": dist.device.type if config.device == "auto" else config.device,
        "precision": precision if config.precision == "auto" else config.precision,
        "num_epochs": epochs,
        "learning_rate": own_rate if config.learning_rate == "auto" else config.learning_rate,
        "parallel": execution.parallel,
        "compile": "on" if execution.batch_shape else "off",
        "gradient_checkpointing": "on" if execution.gradient_checkpointing else "off",
    }
