"""How good the model is now: held-out losses, questions answered, what the adapters do, hardest samples.

Nothing here touches the training state: modes are restored and no random number is drawn.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from finetuning.common.distributed import Distributed
from finetuning.data.packing import StepPlan, build_batch
from finetuning.data.token_table import TokenizedSamples
from finetuning.data.training_data import DataPart
from finetuning.evaluation.adapter_health import LoraHealth
from finetuning.evaluation.generation import Probe, complete, probe_metrics, samples_text
from finetuning.evaluation.hardest_samples import hardest, hardest_text, loss_rows
from finetuning.evaluation.loss_metrics import LossLedger
from finetuning.model.loss import NUM_SEGMENTS
from finetuning.model.packed_model import PackedLossModel
from tb_logger import NullLogger, TensorBoardLogger


class Evaluator:
    """Measures a model on held-out data, always the same samples and questions.

    Args:
        packed: the model, whole or sharded; its `generate` answers the questions.
        plan: one epoch over `part`; None without held-out data, then only adapters are measured.
        probes: questions answered each time.
        max_new_tokens: longest answer.
        histograms: also write the distributions of the trainable weights.
    """

    def __init__(
        self,
        packed: PackedLossModel,
        tokenizer: Any,
        part: DataPart,
        plan: StepPlan | None,
        dist: Distributed,
        *,
        probes: Sequence[Probe],
        max_new_tokens: int,
        histograms: bool,
    ) -> None:
        self._packed, self._tokenizer = packed, tokenizer
        self._part, self._plan, self._dist = part, plan, dist
        self._ledger = LossLedger(part.groups)
        self._probes, self._max_new_tokens = probes, max_new_tokens
        self._histograms = histograms
        self.health = LoraHealth(packed.model)
        self._gradient_norms: dict[str, float] = {}

    def note_gradients(self) -> None:
        """Keep the adapters' gradient norms for the coming `measure`: call it before the update."""
        self._gradient_norms = self.health.gradient_norms()

    def measure(
        self,
        step: int,
        writer: TensorBoardLogger | NullLogger,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, float]:
        """Eval/ and LoRA/ tags of this step; texts and pictures go to `writer`. All ranks take part."""
        metrics = {}
        if self._plan is not None:
            metrics = self._held_out(step, writer, progress)
            metrics |= self._answers(step, writer, progress)
        return metrics | self._adapters(step, writer)

    def _held_out(self, step: int, writer: Any, progress: Callable) -> dict[str, float]:
        sums = held_out_sums(
            self._packed, self._part.tokens, self._plan, self._dist, progress=progress
        )
        if self._dist.is_main:
            rows = hardest(loss_rows(self._plan.documents, sums))
            writer.add_text("Eval/Hardest_Samples", hardest_text(self._part, rows), step)
        return self._ledger.eval_metrics(self._ledger.vector(self._plan.documents, sums))

    def _answers(self, step: int, writer: Any, progress: Callable) -> dict[str, float]:
        if not self._probes:
            return {}
        completions = complete(  # on all ranks alike: sharded weights need all of them
            self._packed,
            self._tokenizer,
            [probe.prompt for probe in self._probes],
            max_new_tokens=self._max_new_tokens,
            end_id=self._part.tokens.end_id,
            close_id=self._part.tokens.close_id,
            device=self._dist.device,
            progress=progress,
        )
        writer.add_text("Eval/Samples", samples_text(self._probes, completions), step)
        return probe_metrics(self._probes, completions, self._max_new_tokens)

    def _adapters(self, step: int, writer: Any) -> dict[str, float]:
        health = self.health
        if not health.modules:
            return {}
        values = health.scalars() | self._gradient_norms
        tags = {name: f"LoRA/{name}/Update_Ratio" for name in health.names}
        ratios = {name: values[tag] for name, tag in tags.items() if tag in values}
        for tag, by_layer in health.ratios_by_projection(ratios).items():
            writer.add_histogram(tag, by_layer, step)
        if self._dist.is_main:
            writer.add_figure("LoRA/Update_Ratio_Map", partial(health.figure, ratios), step)
            writer.add_text("LoRA/Modules", health.table(values), step)
        if self._histograms:
            for tag, histogram in health.weight_histograms().items():
                writer.log_histogram_counts(tag, histogram.counts, histogram.edges, step)
        return health.by_projection(values)


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
