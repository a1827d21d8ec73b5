"""What a run goes through, and how often: the training, held-out documents, general text."""

from collections.abc import Callable
from dataclasses import replace

import transformers

from finetuning.common.distributed import Distributed
from finetuning.config import (
    BatchSettings,
    DirectTrainingConfig,
    OutputSettings,
    bundled_data,
)
from finetuning.data.packing import StepPlan
from finetuning.data.training_data import DataPart, TrainingData, general_part
from finetuning.evaluation.forgetting import CPU_TOKENS, most_tokens
from finetuning.runs.probing import Probing
from finetuning.training.forecast import (
    EVALUATION_SHARE,
    EvaluationPass,
    Workload,
    answer_cost,
    number_of_evaluations,
    steps_between_evaluations,
)

SHORT_RUN = 200  # steps, below which every one is logged

# Of the training, of a pass over the held-out documents, and of general text with a pass over it.
Plans = tuple[StepPlan, StepPlan | None, tuple[DataPart, StepPlan] | None]


def plan_steps(
    config: DirectTrainingConfig,
    data: TrainingData,
    tokenizer: transformers.PreTrainedTokenizerBase,
    dist: Distributed,
    warn: Callable[[str], None],
    positions: int,
) -> Plans:
    """The steps of the training, those of one pass over the held-out documents, and over general text, whose
    documents have no more tokens than the model has positions."""
    held_out = data.held_out
    steps = plan_of(data.train, config, config, dist)
    evaluation = one_pass(held_out, config, dist) if len(held_out) else None
    return steps, evaluation, plan_general(config, tokenizer, evaluation, dist, warn, positions)


def plan_general(
    config: DirectTrainingConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    evaluation: StepPlan | None,
    dist: Distributed,
    warn: Callable[[str], None],
    positions: int,
) -> tuple[DataPart, StepPlan] | None:
    """The text by which forgetting is measured, and a pass over it; on a CPU no more than is held out, and
    little."""
    if not config.forgetting:
        return None
    own = config.general_path
    ours = bundled_data("general") + (
        "/gauge.jsonl" if config.replay else ""
    )  # not what is trained
    paths, option = (own, "--general-path") if own else ((ours,), "")
    most = 0
    if dist.device.type == "cpu":
        most = min(evaluation.num_tokens, CPU_TOKENS) if evaluation else CPU_TOKENS
    options = {"option": option, "positions": positions, "cache_dir": config.cache_path}
    part = general_part(paths, tokenizer, config, warn, most, **options)
    return part, one_pass(part, config, dist)


def one_pass(part: DataPart, config: DirectTrainingConfig, dist: Distributed) -> StepPlan:
    """Every document of the part once."""
    once = BatchSettings(batch_size=config.batch_size, num_epochs=1)
    return plan_of(part, config, once, dist)


def plan_of(
    part: DataPart, config: DirectTrainingConfig, batch: BatchSettings, dist: Distributed
) -> StepPlan:
    """The steps of a part for this rank."""
    return StepPlan(
        part.tokens.lengths,
        part.tokens.num_targets,
        part.documents,
        data=replace(config, max_seq_length=part.tokens.max_seq_length),
        batch=batch,
        seed=config.seed,
        rank=dist.rank,
        world_size=dist.world_size,
    )


def evaluation_steps(
    config: DirectTrainingConfig, plans: Plans, probing: Probing, dist: Distributed
) -> tuple[int, Probing]:
    """Steps between two evaluations: as set, or as far apart as they cost; and how often these ask.

    Where the number of questions is left to the program, and answers at every evaluation would take more than
    a fifth of the training, only the first and the last evaluation ask.
    """
    steps, evaluation, general = plans
    tokens = sum(plan.num_tokens for plan in (evaluation, general and general[1]) if plan)

    def apart(answer_tokens: int) -> int:
        if config.eval_steps != "auto":
            return config.eval_steps
        options = {"device_type": dist.device.type, "lora": bool(config.lora_r)}
        return steps_between_evaluations(steps, tokens, answer_tokens, **options)

    often, measured = apart(probing.most), tokens + probing.most
    number = number_of_evaluations(steps.num_steps, often, measured)
    cost = answer_cost(probing.most, dist.device.type, dist.world_size)
    dear = (
        number * cost
        > EVALUATION_SHARE * steps.num_tokens * steps.num_steps / steps.steps_per_epoch
    )
    if config.num_probes == "auto" and config.best_by != "answers" and dear:
        return apart(0), replace(probing, always=False)
    return often, probing


def workload(
    config: DirectTrainingConfig,
    data: TrainingData,
    plans: Plans,
    eval_steps: int,
    probing: Probing,
    device_type: str,
) -> Workload:
    """All that a run goes through: the training, its evaluations, and the base where they need it."""
    steps, evaluation, general = plans

    def evaluated(part: DataPart, once: StepPlan) -> EvaluationPass:
        share = min(1.0, most_tokens(device_type) / max(once.num_tokens, 1))
        return EvaluationPass.of(part, config.forgetting * share)

    tokens = data.train.tokens
    return Workload(
        steps,
        lengths=tokens.lengths[steps.documents],
        num_targets=int(tokens.num_targets[steps.documents].sum()),
        held_out=evaluated(data.held_out, evaluation) if evaluation else EvaluationPass(),
        general=evaluated(*general) if general else EvaluationPass(),
        eval_steps=eval_steps,
        answer_tokens=probing.most,
        answers_always=probing.always,
        anchored=bool(config.kl_anchor),
    )


def steps_between_points(output: OutputSettings, num_steps: int) -> int:
    """As set; every step of a short run, which has few points anyway."""
    if output.logging_steps != "auto":
        return output.logging_steps
    return 1 if num_steps < SHORT_RUN else 5
