"""How good the model is now: held-out losses, questions answered, what the adapters do, hardest samples.

Nothing here touches the training state: modes are restored and no random number is drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from finetuning.analysis.sample_groups import Groups
from finetuning.common.distributed import Distributed
from finetuning.data.packing import StepPlan, build_batch
from finetuning.data.token_table import NUM_SEGMENTS, TokenizedSamples
from finetuning.data.training_data import DataPart
from finetuning.evaluation.adapter_health import AdapterHealth
from finetuning.evaluation.forgetting import BaseStates, Forgetting, general_metrics, kl_metric
from finetuning.evaluation.generation import (
    Completion,
    EvalPrompt,
    complete,
    probe_metrics,
    samples_text,
)
from finetuning.evaluation.hardest_samples import hardest, hardest_text, loss_rows
from finetuning.evaluation.loss_metrics import LossMetrics, eval_errors
from finetuning.evaluation.question_record import answers_of, losses_of
from finetuning.model.decoding import Decoder
from finetuning.model.packed_model import PackedLossModel


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents, one pass over them (None: there are none), and the groups of their losses.

    forgetting: what the base makes of them and of general text; None: that is not measured.
    """

    part: DataPart
    plan: StepPlan | None
    groups: Groups
    forgetting: Forgetting | None = None


@dataclass(frozen=True)
class Questions:
    """What is answered each time.

    decoder: writes with the evaluated model. most: tokens of an answer at most. sharded: the ranks hold parts
    of the weights, so that each needs all others for every token. only_at: the steps whose
    evaluations ask; empty: all do.
    """

    probes: Sequence[EvalPrompt]
    decoder: Decoder
    most: int
    sharded: bool
    only_at: tuple[int, ...] = ()

    def is_due(self, step: int) -> bool:
        """Whether the evaluation of this step asks."""
        return bool(self.probes) and (not self.only_at or step in self.only_at)


@dataclass(frozen=True)
class HeldOutSums:
    """What one pass leaves: documents (m, segments, 3) float64, loss sum, correct count and token count; and
    divergence (2,), the sum of KL(base‖model) and its targets, 0 of 0 where no base was given."""

    documents: np.ndarray
    divergence: np.ndarray


class Evaluator:
    """Measures a model on held-out data, always the same samples and questions.

    Args:
        packed: the model, whole or sharded.
        held_out: what is measured; without documents only adapters are.
        histograms: also write the distributions of the trainable weights.
    """

    def __init__(
        self,
        packed: PackedLossModel,
        tokenizer: Any,
        held_out: HeldOut,
        questions: Questions,
        dist: Distributed,
        *,
        histograms: bool,
    ) -> None:
        self._packed, self._tokenizer = packed, tokenizer
        self._questions = questions
        self._part, self._plan, self._dist = held_out.part, held_out.plan, dist
        self._losses, self._forgetting = LossMetrics(held_out.groups), held_out.forgetting
        self._histograms = histograms
        self.health = AdapterHealth(packed.model)
        self._gradient_norms: dict[str, float] = {}
        self.questions: dict[str, Any] = {}  # what the newest evaluation found on each

    def note_gradients(self) -> None:
        """Keep the adapters' gradient norms for the coming `measure`: call it before the update."""
        self._gradient_norms = self.health.gradient_norms()

    def measure(
        self,
        step: int,
        logger: Any,
        progress: Callable[[int, int], None] = lambda done, total: None,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Eval/ and LoRA/ tags of this step; texts and pictures go to `logger`, a TensorBoardLogger or a
        NullLogger. All ranks take part. None where `wants_stop`, asked on each rank for itself, became true
        on one of them: all leave within a micro-batch or a few tokens, and nothing is measured."""
        forgetting, held_out, of_general = self._forgetting, None, None
        general = forgetting and forgetting.general
        if self._plan is not None:
            base = forgetting and forgetting.held_out
            held_out = self._sums(self._part, self._plan, base, wants_stop, progress)
            if held_out is None:
                return None
        completions = self._answers(progress, wants_stop) if self._questions.is_due(step) else []
        if completions is None:
            return None
        if general is not None:
            of_general = self._sums(general.part, general.plan, general.base, wants_stop)
            if of_general is None:
                return None
        metrics = {} if held_out is None else self._held_out(held_out, step, logger)
        self._note_questions(step, held_out, completions)
        if completions:
            asked = self._questions
            logger.add_text("Eval/Samples", samples_text(asked.probes, completions), step)
            metrics |= probe_metrics(asked.probes, completions, asked.most)
        metrics |= {} if of_general is None else general_metrics(of_general)
        return metrics | self._adapters(step, logger)

    def _note_questions(
        self, step: int, held_out: HeldOutSums | None, completions: Sequence[Completion]
    ) -> None:
        part, asked = self._part, self._questions
        losses = (
            [] if held_out is None else losses_of(part, self._plan.documents, held_out.documents)
        )
        answers = answers_of(asked.probes, completions, asked.most) if completions else []
        number = 0 if held_out is None else len(self._plan.documents)
        found = {"losses": losses, "held_out": number, "answers": answers}
        self.questions = {"step": step} | found

    def _sums(
        self,
        part: DataPart,
        plan: StepPlan,
        base: BaseStates | None,
        wants_stop: Callable[[], bool],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> HeldOutSums | None:
        options = {"base": base, "progress": progress, "wants_stop": wants_stop}
        return held_out_sums(self._packed, part.tokens, plan, self._dist, **options)

    def _held_out(self, found: HeldOutSums, step: int, logger: Any) -> dict[str, float]:
        sums = found.documents
        if self._dist.is_main:
            rows = hardest(loss_rows(self._plan.documents, sums))
            logger.add_text("Eval/Hardest_Samples", hardest_text(self._part, rows), step)
        known = kl_metric("Forgetting/KL_Held_Out", found.divergence) | eval_errors(sums)
        return self._losses.eval_metrics(self._losses.vector(self._plan.documents, sums)) | known

    def _answers(
        self, progress: Callable, wants_stop: Callable[[], bool]
    ) -> list[Completion] | None:
        """Completions of all probes; None where a rank wants to stop."""
        asked = self._questions
        left = False

        def written(done: int, total: int) -> bool:
            nonlocal left
            progress(done, total)
            # Replicas may write answers of other lengths, so there nobody waits for another rank's word.
            agree = (
                self._dist.any if asked.sharded else lambda want: [self._dist.flag("stop", want)]
            )
            (left,) = agree(left or wants_stop())
            return left

        completions = complete(  # on all ranks alike: sharded weights need all of them
            asked.decoder,
            self._tokenizer,
            [probe.prompt for probe in asked.probes],
            max_new_tokens=asked.most,
            end_id=self._part.tokens.end_id,
            close_id=self._part.tokens.close_id,
            device=self._dist.device,
            progress=written,
        )
        return None if any(self._dist.any(left)) else completions

    def _adapters(self, step: int, logger: Any) -> dict[str, float]:
        health = self.health
        if not health.modules:
            return {}
        values = health.scalars() | self._gradient_norms
        tags = {name: f"LoRA/{name}/Update_Ratio" for name in health.names}
        ratios = {name: values[tag] for name, tag in tags.items() if tag in values}
        for tag, by_layer in health.ratios_by_projection(ratios).items():
            logger.add_histogram(tag, by_layer, step)
        if self._dist.is_main:
            logger.add_figure("LoRA/Update_Ratio_Map", partial(health.figure, ratios), step)
            logger.add_text("LoRA/Modules", health.table(values), step)
        if self._histograms:
            for tag, histogram in health.weight_histograms().items():
                logger.log_histogram_counts(tag, histogram.counts, histogram.edges, step)
        return health.by_projection(values)


@torch.no_grad()
def held_out_sums(
    model: torch.nn.Module,
    tokens: TokenizedSamples,
    plan: StepPlan,
    dist: Distributed,
    *,
    base: BaseStates | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    wants_stop: Callable[[], bool] = lambda: False,
) -> HeldOutSums | None:
    """Sums of loss, correct predictions and tokens of every planned document; and the distance from `base`.

    `plan` is one epoch; all ranks go through the model equally often and get the same result, in the
    order of `plan.documents`, which are distinct and ascending. Training mode is restored and no
    random number is drawn. `progress` is called with (steps done, all steps). None where `wants_stop`
    became true on a rank.
    """
    was_training, left = model.training, False
    model.eval()
    sums = torch.zeros(len(plan.documents), NUM_SEGMENTS, 3, dtype=torch.float64)
    distance = torch.zeros(2, dtype=torch.float64)
    for step in range(1, plan.num_steps + 1):
        planned = plan[step]
        own = len(planned.micro_batches) - planned.num_padding_batches
        for index, documents in enumerate(planned.micro_batches):
            batch = build_batch(tokens, documents).to(dist.device)
            known = base.of(step, index, dist.device) if base else None
            _, result = model(batch, 1, base=known)
            if index < own:
                if known is not None:
                    distance += result.divergence.double().cpu()
                rows = np.searchsorted(plan.documents, documents)
                sums[torch.from_numpy(rows)] = result.per_document.double().cpu()
        progress(step, plan.num_steps)
        if left := any(dist.any(wants_stop())):
            break
    model.train(was_training)
    if left:
        return None
    total = dist.sum(torch.cat([sums.flatten(), distance]))
    return HeldOutSums(total[:-2].view_as(sums).numpy(), total[-2:].numpy())
