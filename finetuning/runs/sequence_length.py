"""The longest sample of a run, where that is left to the program.

It is the longest of the data, and 2,048 tokens at least. Where that does not fit the memory, or is more than
the model has positions, it is what keeps 99% of the samples, or what fits. A run that goes on keeps what it
had.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from finetuning.common.distributed import Distributed
from finetuning.config import ROW_TOKENS, DirectTrainingConfig
from finetuning.model.parallel import parallel_mode
from finetuning.model.resolve import ResolvedModel, weight_dtype
from finetuning.model.row_proof import positions_of
from finetuning.runs.placement import placement_of
from finetuning.training.memory_estimate import (
    USABLE,
    estimate_memory,
    free_memory,
    largest_batch,
    model_shape,
)

LENGTH_STEP = 64  # tokens; a length above that of a row is a multiple
KEPT = 99  # per cent of the samples that a shorter length keeps
PINNED = ("max_seq_length", "tokens_per_row")
Fits = Callable[[int], bool | None]  # whether so long a sample fits the memory; None: not known


@dataclass(frozen=True)
class SequenceLength:
    """max_seq_length and tokens_per_row as they are used, and why."""

    max_seq_length: int
    tokens_per_row: int
    reason: str = ""  # empty: the length is as it was set

    def of(self, config: DirectTrainingConfig) -> DirectTrainingConfig:
        """The settings with these."""
        own = {"max_seq_length": self.max_seq_length, "tokens_per_row": self.tokens_per_row}
        return replace(config, **own)

    @classmethod
    def known(
        cls, config: DirectTrainingConfig, pinned: Mapping[str, Any]
    ) -> "SequenceLength | None":
        """As it is set, or as the checkpoint has it that the run goes on from; None: the data decide."""
        names = [name for name in PINNED if getattr(config, name) == "auto" and name in pinned]
        as_used = {name: pinned.get(name) for name in names}
        if any(
            type(value) is not int for value in as_used.values()
        ):  # of a file that anyone may write
            as_used = {}
        settings = replace(config, **as_used)
        if settings.max_seq_length == "auto":
            return None
        row = 0 if settings.tokens_per_row == "auto" else settings.tokens_per_row
        reason = "as in the checkpoint" if "max_seq_length" in as_used else ""
        return cls(settings.max_seq_length, row, reason)

    @classmethod
    def of_data(
        cls,
        config: DirectTrainingConfig,
        positions: int,
        lengths: np.ndarray,
        dist: Distributed,
        fits: Fits,
    ) -> "SequenceLength":
        """Decided by the tokens (n,) of every sample, and by how many the model takes (`positions`); on all
        ranks alike. A collective."""
        tokens, reason = min(dist.gather(choose_length(lengths, positions, fits)))
        return cls(tokens, config.row_capacity, reason)

    def text(self) -> str:
        """For a person."""
        return f"{self.max_seq_length:,} tokens" + f" (auto: {self.reason})" * bool(self.reason)


def choose_length(lengths: np.ndarray, positions: int, fits: Fits) -> tuple[int, str]:
    """Tokens that a sample may have, and the reason in words."""
    longest = int(lengths.max())
    if longest <= min(ROW_TOKENS, positions):
        return min(ROW_TOKENS, positions), f"the longest sample has {longest:,}"
    most = min(_rounded(longest), positions)
    whose = f"the longest sample has {longest:,}"
    if longest > positions:
        whose += f", the model {positions:,} positions"
    if most <= ROW_TOKENS:  # a row has as many anyway, so nobody has asked the memory
        return most, whose
    if fits(most):
        return most, f"{whose}, which fit{'s' * (longest <= positions)} the memory"
    kept = min(_rounded(int(np.percentile(lengths, KEPT, method="higher"))), most)
    kept = max(kept, min(ROW_TOKENS, positions))
    known = fits(kept)
    if kept <= ROW_TOKENS or known or known is None:
        why = "whose memory is not known" if known is None else "too many for the memory"
        return kept, f"{whose}, {why}; {KEPT}% have no more"
    steps = largest_batch(lambda n: 0 if fits(n * LENGTH_STEP) else 1, 0, kept // LENGTH_STEP)
    if steps * LENGTH_STEP < ROW_TOKENS:
        return (
            ROW_TOKENS,
            f"{whose}, too many for the memory; a row has {ROW_TOKENS:,}, which may be, too",
        )
    return steps * LENGTH_STEP, f"{whose}; no more fit the memory"


def model_positions(config: DirectTrainingConfig, model: ResolvedModel) -> int:
    """How many tokens it can take, as far as is known; `NO_LIMIT`: any number."""
    return positions_of(model.path, config.cache_path, trust_remote_code=model.trust_remote_code)


def fits_here(config: DirectTrainingConfig, model: ResolvedModel, dist: Distributed) -> Fits:
    """As `fits_memory`, into what is free on the devices of this run."""
    dtype = weight_dtype(dist.device, config.precision)
    return fits_memory(config, model, dist, dtype, free_memory(dist.device, dist.local_world_size))


def fits_memory(
    config: DirectTrainingConfig,
    model: ResolvedModel,
    dist: Distributed,
    dtype: torch.dtype,
    free: int,
) -> Fits:
    """Whether micro-batches with such samples fit into `free` bytes of each rank, by the estimate; with
    gradient checkpointing where that may be turned on, and with shards where these may be chosen."""
    mode = parallel_mode(
        config.parallel, trains_all=not config.lora_r, dtype=dtype, world_size=dist.world_size
    )
    shards = config.parallel == "auto" and config.quantization == "none" and dist.world_size > 1
    places = [
        placement_of(config, dist, dtype, compiled=False, parallel=parallel)
        for parallel in {mode, *(["fsdp"] if shards else [])}
    ]

    @cache
    def shape() -> Any:
        trust = {"trust_remote_code": model.trust_remote_code}
        return model_shape(model.path, config, init_adapter=config.init_adapter, **trust)

    def fits(tokens: int) -> bool | None:
        recomputed = 0 if config.gradient_checkpointing == "off" else shape().layers
        rows = tokens * config.batch_size
        found = [estimate_memory(shape(), p, rows, recomputed=recomputed) for p in places]
        known = [estimate.total <= USABLE * free for estimate in found if estimate is not None]
        return any(known) if known else None

    return fits


def _rounded(tokens: int) -> int:
    return math.ceil(tokens / LENGTH_STEP) * LENGTH_STEP
