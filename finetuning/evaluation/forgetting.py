"""What a model forgets: KL(base‖tuned) on held-out and on general text, and the loss on the latter.

The base is read once, before the first step: its states at the targets stay on the host, in the type of the
arithmetic, so that an evaluation goes through the tuned model alone. Of a large held-out part the first
`MOST_TOKENS` (on a CPU `CPU_TOKENS`) of the plan are compared.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetuning.common.distributed import Distributed
from finetuning.data.packing import StepPlan, build_batch
from finetuning.data.token_table import TokenizedSamples
from finetuning.data.training_data import DataPart
from finetuning.evaluation.loss_metrics import standard_errors
from finetuning.model.loss import Anchor
from finetuning.model.packed_model import PackedLossModel
from finetuning.model.parallel import reshard

MOST_TOKENS = 16_384  # of a plan, all ranks; at 4B their states take 84 MB
CPU_TOKENS = 4_096  # there they would take as long as the evaluation itself


def most_tokens(device_type: str) -> int:
    """So many tokens of a plan are compared with the base, its first step in any case."""
    return CPU_TOKENS if device_type == "cpu" else MOST_TOKENS


class BaseStates:
    """The base's states at the targets of one pass over documents.

    Args:
        packed: whole or sharded; without adapters it is the base as long as no step is made.
        head: (V, H), a copy of the base's where the head is trained; None: the model's own is the base's.
    """

    def __init__(
        self,
        packed: PackedLossModel,
        tokens: TokenizedSamples,
        plan: StepPlan,
        dist: Distributed,
        *,
        head: torch.Tensor | None,
    ) -> None:
        self._rows: dict[tuple[int, int], torch.Tensor] = {}
        seen, was_training = 0, packed.training
        most = most_tokens(dist.device.type)
        packed.eval()
        for step in range(1, plan.num_steps + 1):
            planned = plan[step]
            if seen and seen + planned.num_tokens > most:
                break
            seen += planned.num_tokens
            for index, documents in enumerate(planned.micro_batches):
                rows = packed.base_rows(build_batch(tokens, documents).to(dist.device))
                self._rows[step, index] = rows.cpu()
        packed.train(was_training)
        reshard(packed)
        self._head = head

    def of(self, step: int, index: int, device: torch.device) -> Anchor | None:
        """Those of a rank's micro-batch on the device; None behind the last that is compared."""
        rows = self._rows.get((step, index))
        return None if rows is None else Anchor(rows.to(device), self._head)


@dataclass(frozen=True)
class GeneralText:
    """General questions with answers, one pass over them, and what the base makes of them."""

    part: DataPart
    plan: StepPlan
    base: BaseStates


@dataclass(frozen=True)
class Forgetting:
    """What is compared with the base; None: there is nothing to compare."""

    held_out: BaseStates | None
    general: GeneralText | None


def kl_metric(tag: str, sums: np.ndarray) -> dict[str, float]:
    """The mean over the targets of (2,) sum and count, nats per token; absent without any."""
    return {tag: float(sums[0] / sums[1])} if sums[1] else {}


def general_metrics(sums: Any) -> Mapping[str, float]:
    """Tags of the general text from `HeldOutSums`."""
    tag, totals = "Forgetting/General_Loss", sums.documents.sum(axis=1)[:, [0, 2]]
    loss, count = totals.sum(axis=0)
    metrics = {tag: float(loss / count) if count else math.nan}
    return (
        metrics
        | standard_errors({tag: totals})
        | kl_metric("Forgetting/KL_General", sums.divergence)
    )
