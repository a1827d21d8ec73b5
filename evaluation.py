"""Held-out loss: every held-out sample once, summed over ranks, without touching the training state."""

from collections.abc import Callable

import numpy as np
import torch

from chat_tokens import TokenizedSamples
from distributed import Distributed
from packing import StepPlan, build_batch
from segment_loss import NUM_SEGMENTS


@torch.no_grad()
def held_out_sums(
    model: torch.nn.Module,
    tokens: TokenizedSamples,
    plan: StepPlan,
    dist: Distributed,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """(m, segments, 3) float64: loss sum, correct count and token count of every planned document.

    `plan` is one epoch; all ranks go through the model equally often and get the same result, in the
    order of `plan.documents`, which are distinct and ascending. Training mode is restored and no
    random number is drawn. `progress` is called with (steps done, all steps).
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(len(plan.documents), NUM_SEGMENTS, 3, dtype=torch.float64)
    for step in range(1, plan.num_steps + 1):
        planned = plan[step]
        own = len(planned.micro_batches) - planned.num_fillers
        for index, documents in enumerate(planned.micro_batches):
            _, result = model(build_batch(tokens, documents).to(dist.device), 1)
            if index < own:
                rows = np.searchsorted(plan.documents, documents)
                sums[torch.from_numpy(rows)] = result.per_document.double().cpu()
        progress(step, plan.num_steps)
    model.train(was_training)
    return dist.sum(sums).numpy()
