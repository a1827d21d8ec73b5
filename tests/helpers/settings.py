"""Settings and plans with the few values that a test is about."""

import numpy as np

from finetuning.config import BatchSettings, DataSettings
from finetuning.data.packing import StepPlan


def up_to(max_seq_length: int, **changes: object) -> DataSettings:
    """Data settings with samples of at most so many tokens."""
    return DataSettings(max_seq_length=max_seq_length, **changes)


def step_plan(
    lengths: np.ndarray,
    num_targets: np.ndarray,
    documents: np.ndarray | None = None,
    *,
    data: DataSettings,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    **batch: object,
) -> StepPlan:
    """A plan of one epoch; `batch` are fields of BatchSettings."""
    return StepPlan(
        lengths,
        num_targets,
        documents,
        data=data,
        batch=BatchSettings(**{"num_epochs": 1, **batch}),
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
