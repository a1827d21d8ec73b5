"""All that is decided about a run before its weights are loaded: data, tokens, steps, memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from finetuning.analysis.sample_groups import Groups, groups_of
from finetuning.analysis.statistics import DatasetStatistics, describe
from finetuning.common.cache import kept_in
from finetuning.common.distributed import Distributed
from finetuning.common.errors import UserError
from finetuning.common.fingerprint import adapter_fingerprint, model_fingerprint
from finetuning.common.machine import processors
from finetuning.common.paths import check_name
from finetuning.common.terminal import Terminal
from finetuning.config import DirectTrainingConfig
from finetuning.data.accounts import Accounts, accounts_of
from finetuning.data.packing import StepPlan
from finetuning.data.split import split_samples
from finetuning.data.training_data import (
    DataPart,
    TrainingData,
    prepare_data,
    read_data,
)
from finetuning.model.loading import load_tokenizer
from finetuning.model.loss import Objective
from finetuning.model.packed_model import compiler_is_there
from finetuning.model.parallel import parallel_mode
from finetuning.model.resolve import (
    ResolvedModel,
    embedded_because,
    ensure_local,
    resolve_model,
    weight_dtype,
)
from finetuning.model.row_proof import RowProof, configuration, proven_way
from finetuning.model.small_config import hidden_size
from finetuning.readers.sample import NothingLeftError
from finetuning.runs.identity import (
    check_ranks,
    identity,
    recorded_settings,
    tokenizer_contents,
)
from finetuning.runs.init_adapter import check_base
from finetuning.runs.passes import (
    Plans,
    evaluation_steps,
    plan_steps,
    steps_between_points,
    workload,
)
from finetuning.runs.placement import placement_of
from finetuning.runs.probing import Probing, plan_probes
from finetuning.runs.resolved_settings import (
    automatic_rates,
    automatic_settings,
    resolved_settings,
)
from finetuning.runs.sequence_length import Fits, SequenceLength, fits_here, model_positions
from finetuning.training.engine import Execution
from finetuning.training.forecast import (
    RunForecast,
    Workload,
    forecast,
)
from finetuning.training.memory_estimate import free_memory, model_shape
from finetuning.training.memory_plan import MemoryPlan

MIN_CONSTANT_EFFICIENCY = 0.6  # of what compiled layers would go through, what is no padding


@dataclass(frozen=True)
class RunData:
    """The model that was found, its tokenizer, and the data as its tokens."""

    model: ResolvedModel  # with its folder on this machine
    tokenizer: transformers.PreTrainedTokenizerBase
    contents: Mapping[str, str]  # digests of model, tokenizer and the adapter to start from
    data: TrainingData
    accounts: tuple[Accounts, ...]  # what became of all that was read
    length: SequenceLength  # that samples may have, and why
    positions: int  # tokens that the model's configuration says it takes; `NO_LIMIT`: any number
    hidden_size: int  # of the text model; 0: its configuration does not say it

    @cached_property
    def statistics(self) -> DatasetStatistics:
        """Statistics of everything that was read; they are computed when they are first asked for."""
        return describe(self.data)

    @property
    def system_prompt(self) -> str:
        """The system text that all samples have; empty where they have none, or not the same."""
        samples = self.data.split.read.samples
        return samples[0].system if len(self.statistics.facts.systems) == 1 else ""


@dataclass(frozen=True)
class RunPlan:
    """What a run will do. Two plans of the same settings and data are equal on all ranks.

    settings: every setting as it is used, eval_steps 0 for none between the first and the last evaluation;
    identity: what a checkpoint must share with the run that resumes it.
    """

    inputs: RunData
    settings: Mapping[str, Any]
    steps: StepPlan
    evaluation: StepPlan | None  # one pass over the held-out documents; None where there are none
    general: (
        tuple[DataPart, StepPlan] | None
    )  # text by which forgetting is measured, and a pass over it
    groups: tuple[Groups, Groups]  # of the training and of the held-out documents
    probing: Probing  # what the evaluations ask
    automatic: tuple[str, ...]  # settings that were left at auto, `settings` has what they became
    automatic_rate: float  # the learning rate that auto is, also where another one was set
    identity: Mapping[str, Any]
    execution: Execution
    rows: RowProof  # whether packed rows are right for the model, else why not
    forecast: RunForecast

    @property
    def best_text(self) -> str:
        """By what a model is the best, for a person."""
        return self.probing.best_text(self.best_by_as_set, len(self.data.held_out))

    @property
    def best_by_as_set(self) -> str:
        """auto where that is left to the program."""
        return "auto" if "best_by" in self.automatic else self.settings["best_by"]

    @property
    def data(self) -> TrainingData:
        """The training and the held-out part."""
        return self.inputs.data


def plan_run(
    config: DirectTrainingConfig,
    dist: Distributed,
    terminal: Terminal,
    *,
    trust_remote_code: bool = False,
    pinned: Mapping[str, Any] | None = None,
) -> RunPlan:
    """Read, split and tokenize the data, plan every step, estimate memory, time and disk.

    No weights are loaded. pinned: settings of the checkpoint that the run goes on from. Raises UserError
    on all ranks where a rank has other data or settings.
    """
    options = {"trust_remote_code": trust_remote_code, "pinned": pinned}
    inputs, automatic = load_data(config, dist, terminal, **options), automatic_settings(config)
    config = inputs.length.of(config)
    rows = prove_rows(config, inputs.model, dist, terminal)
    data, tokenizer, warn = inputs.data, inputs.tokenizer, terminal.warning
    positions = positions_for(config, inputs.positions, data, warn)
    steps, evaluation, general = plans = plan_steps(config, data, tokenizer, dist, warn, positions)
    eval_steps, probing = plan_evaluations(config, inputs, plans, dist, warn, positions)
    settings, contents = recorded_settings(config), all_contents(config, inputs, general, probing)
    run_identity = identity(settings, inputs.model.name, contents, data, steps)
    check_ranks(dist.gather(run_identity))
    dtype = weight_dtype(dist.device, config.precision)
    compiled = rows.way == "packed" and compiles(config, dist.device, dtype, steps)
    work = workload(config, data, plans, eval_steps, probing, dist.device.type)
    parallel, estimate = choose_parallel(config, dist, inputs, rows, work, dtype, compiled)
    shape = steps.constant_shape if compiled else {}
    execution = execution_of(config, rows, parallel, dtype, shape, estimate.memory)
    settings |= probing.settings(config.best_by) | {"eval_steps": eval_steps}
    settings["logging_steps"] = steps_between_points(config, steps.num_steps)
    own_rate, rate = automatic_rates(config, inputs.hidden_size, steps, pinned or {})
    settings |= resolved_settings(config, dist, execution, steps, rate)
    settings["gradient_checkpointing"] = estimate.memory.text
    return RunPlan(
        inputs=inputs,
        settings=settings,
        steps=steps,
        evaluation=evaluation,
        general=general,
        groups=groups_of(data),
        probing=probing,
        automatic=automatic,
        automatic_rate=own_rate,
        identity=run_identity,
        execution=execution,
        rows=rows,
        forecast=estimate,
    )


def all_contents(
    config: DirectTrainingConfig,
    inputs: RunData,
    general: tuple[DataPart, StepPlan] | None,
    probing: Probing,
) -> dict[str, str]:
    """Digests of what the run starts from, and of the user's own general text and questions, empty where
    there are none."""
    own_text = general[0].fingerprint() if general and config.general_path else ""
    return {**inputs.contents, "general_text": own_text, "questions": probing.source}


def plan_evaluations(
    config: DirectTrainingConfig,
    inputs: RunData,
    plans: Plans,
    dist: Distributed,
    warn: Callable[[str], None],
    positions: int,
) -> tuple[int, Probing]:
    """Steps between two evaluations, and what these ask; warned where no model may be the best by them.
    positions: tokens that a question and its answer may have together."""
    held_out = inputs.data.held_out
    probing = plan_probes(
        config, inputs.model.path, inputs.tokenizer, held_out, dist, warn, positions
    )
    eval_steps, probing = evaluation_steps(config, plans, probing, dist)
    for doubt in probing.doubts(config, len(held_out)):
        warn(doubt)
    return eval_steps, probing


def execution_of(
    config: DirectTrainingConfig,
    rows: RowProof,
    parallel: str,
    dtype: torch.dtype,
    shape: Mapping[str, int],
    memory: MemoryPlan,
) -> Execution:
    """How the model is held and run. shape: constant sizes of a batch; empty: not compiled."""
    return Execution(
        parallel=parallel,
        dtype=dtype,
        batch_shape=shape,
        must_compile=config.compile == "on",
        recomputed_layers=memory.recomputed,
        may_recompute=config.gradient_checkpointing == "auto" and memory.recomputed < memory.layers,
        no_graph=memory.no_graph,
        fp8=config.precision == "fp8",
        way=rows.way,
        objective=Objective(config.kl_anchor, config.answer_weight),
    )


def prove_rows(
    config: DirectTrainingConfig, model: ResolvedModel, dist: Distributed, terminal: Terminal
) -> RowProof:
    """How documents go through the model; the user is told where it is not in packed rows.

    Raises UserError for a model that can't be trained here, and for settings that packed rows are needed for.
    """
    with terminal.working("trying packed rows"):
        rows = proven_way(
            model.path,
            config.cache_path,
            longest=config.most_tokens,
            row=max(config.row_capacity, config.most_tokens) * config.batch_size,
            device=dist.device.type,
            trust_remote_code=model.trust_remote_code,
        )
    if config.compile == "on" and rows.way != "packed":
        raise UserError(f"compile on does not go with this model: {rows.reason}; use --compile off")
    if rows.way == "alone":
        terminal.warning(
            f"one document a forward pass, as packed rows are wrong here: {rows.reason}"
        )
    return rows


def positions_for(
    config: DirectTrainingConfig, told: int, data: TrainingData, warn: Callable[[str], None]
) -> int:
    """Tokens that whatever the model reads or writes in this run may have; warned where samples have more
    than its configuration tells (`told`)."""
    if (longest := data.lengths.max()) > told:
        warn(
            f"the longest sample has {longest:,} tokens, and the model's configuration says {told:,}: "
            "positions beyond are computed, but may never have been learned; --max-seq-length "
            f"{told} stays within"
        )
    return max(told, config.max_seq_length)


def check_passes(
    config: DirectTrainingConfig, dist: Distributed, rows: RowProof, parallel: str
) -> None:
    """Raise UserError where shards would wait for each other, as ranks make unequal numbers of passes."""
    one_each = config.batch_size == 1 and not config.packing
    shared = parallel == "fsdp" and dist.world_size > 1
    if shared and rows.way == "alone" and not one_each:
        raise UserError(
            f"packed rows are wrong here ({rows.reason}), and shards need as many forward passes on every "
            "rank: use --no-packing with --batch-size 1, or --parallel ddp"
        )


def load_data(
    config: DirectTrainingConfig,
    dist: Distributed,
    terminal: Terminal,
    *,
    trust_remote_code: bool = False,
    pinned: Mapping[str, Any] | None = None,
) -> RunData:
    """Find the model, and make tokens of the samples, from the files or from the cache.

    A rank that is done waits for the others while they live, however long they take. pinned: settings of the
    checkpoint that the run goes on from. Raises UserError where too much is left out.
    """
    check_name(config.cache_path, "cache_dir")
    found = find_model(config, dist, trust_remote_code)
    workers = config.workers or processors()
    with dist.wait_alive("data"):
        with terminal.working("reading the data") as progress:
            read, eval_read = read_data(
                config, workers=workers, cache_dir=config.cache_path, progress=progress
            )
        with terminal.working("looking for near duplicates"):
            options = {"seed": config.seed, "cache_dir": config.cache_path}
            split = split_samples(read, config, eval_read, workers=workers, **options)
        demonstration = "getting the demonstration model, which is built once for these data"
        with terminal.working(demonstration if found.embedded else "getting the tokenizer"):
            with kept_in(config.cache_path):
                model = ensure_local(found, split.training_texts, config.cache_path, config.seed)
            tokenizer = load_tokenizer(model)
            contents = contents_of(config, model, tokenizer)
        if config.init_adapter:
            check_base(Path(config.init_adapter), model, contents, terminal.warning)
    tokenize = partial(prepare_data, split, tokenizer, workers=workers, cache_dir=config.cache_path)
    positions = model_positions(config, model)
    hidden = hidden_size(configuration(model.path, model.trust_remote_code))
    fits = fits_here(config, model, dist)
    data, length = tokenized(config, positions, tokenize, dist, terminal, pinned or {}, fits)
    accounts = accounts_of(data, config)
    for account in accounts:
        account.check(config.max_broken_fraction)
    return RunData(model, tokenizer, contents, data, accounts, length, positions, hidden)


def tokenized(
    config: DirectTrainingConfig,
    positions: int,
    tokenize: Callable[..., TrainingData],
    dist: Distributed,
    terminal: Terminal,
    pinned: Mapping[str, Any],
    fits: Fits,
) -> tuple[TrainingData, SequenceLength]:
    """The tokens, and how long a sample may be: where the data decide that, all are made first, and
    again only where some turn out to be too long. positions: what the model takes. Raises NothingLeftError.
    """

    def tokens(settings: DirectTrainingConfig, what: str) -> TrainingData:
        with dist.wait_alive(what), terminal.working("tokenizing") as progress:
            return tokenize(settings, progress=progress)

    if length := SequenceLength.known(config, pinned):
        return tokens(length.of(config), "tokens"), length
    whole = tokens(replace(config, over_length="drop"), "all tokens")
    length = SequenceLength.of_data(config, positions, whole.own_lengths, dist, fits)
    if whole.lengths.max() <= length.max_seq_length:
        return whole.of_length(length.max_seq_length), length
    try:
        return tokens(length.of(config), "tokens"), length
    except NothingLeftError as error:
        shortest = whole.own_lengths.min()
        if shortest <= positions:
            raise
        raise NothingLeftError(
            f"the shortest sample has {shortest:,} tokens, and the model has positions for {positions:,}; "
            "use a model with more of them, or --over-length truncate_thinking",
            error.findings,
        ) from error


def contents_of(
    config: DirectTrainingConfig,
    model: ResolvedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> dict[str, str]:
    """Digests of all that a run starts from besides its data."""
    adapter = adapter_fingerprint(Path(config.init_adapter)) if config.init_adapter else ""
    return {
        **model_fingerprint(model.path),
        **tokenizer_contents(tokenizer),
        "init_adapter": adapter,
    }


def find_model(
    config: DirectTrainingConfig, dist: Distributed, trust_remote_code: bool
) -> ResolvedModel:
    """The same model on all ranks: the embedded one for all, if one GPU has no room for the default."""
    found = resolve_model(
        config.model_name or None,
        dist.device,
        precision=config.precision,
        trust_remote_code=trust_remote_code,
        revision=config.revision,
    )
    if found.path is not None:
        check_name(found.path, "model_name")
    reasons = dist.gather(found.reason if found.embedded else "")
    reason = next(filter(None, reasons), "")
    return embedded_because(reason) if reason else found


def compiles(
    config: DirectTrainingConfig, device: torch.device, dtype: torch.dtype, steps: StepPlan
) -> bool:
    """Whether the decoder layers are compiled: auto does where that can be done and is worth it."""
    possible = device.type == "cuda" and dtype == torch.bfloat16
    if config.compile == "on" and not possible:
        raise UserError(
            f"compile on needs CUDA and bf16: on {device.type} in {str(dtype).removeprefix('torch.')} "
            "every batch would be compiled anew; leave it at auto"
        )
    if config.compile != "auto":
        return config.compile == "on"
    # DoRA's layers can't be traced.
    if not possible or config.use_dora or not compiler_is_there():
        return False
    return steps.constant_efficiency >= MIN_CONSTANT_EFFICIENCY  # padding costs arithmetic


def choose_parallel(
    config: DirectTrainingConfig,
    dist: Distributed,
    inputs: RunData,
    rows: RowProof,
    work: Workload,
    dtype: torch.dtype,
    compiled: bool,
) -> tuple[str, RunForecast]:
    """Replicas, or shards where a replica does not fit on one of the ranks; and the forecast for it."""
    shape = model_shape(
        inputs.model.path,
        config,
        init_adapter=config.init_adapter,
        trust_remote_code=inputs.model.trust_remote_code,
    )
    if rows.way == "alone" and shape.attention == "eager":
        shape = replace(
            shape, dims=None
        )  # its scores are not in the estimate, so that nothing is known
    free = free_memory(dist.device, dist.local_world_size)

    def forecast_for(parallel: str) -> RunForecast:
        placement = placement_of(config, dist, dtype, compiled=compiled, parallel=parallel)
        return forecast(
            shape,
            placement,
            work,
            device=dist.device,
            dtype=dtype,
            free=free,
            gradient_checkpointing=config.gradient_checkpointing,
            output=config,
        )

    parallel = parallel_mode(
        config.parallel, trains_all=not config.lora_r, dtype=dtype, world_size=dist.world_size
    )
    estimate = forecast_for(parallel)
    may_shard = config.parallel == "auto" and config.quantization == "none" and dist.world_size > 1
    if may_shard and parallel == "ddp" and any(dist.any(not estimate.memory.fits)):
        parallel, estimate = "fsdp", forecast_for("fsdp")
    most = max(dist.gather(estimate.memory.recomputed))  # all ranks alike
    estimate = replace(estimate, memory=replace(estimate.memory, recomputed=most))
    check_passes(config, dist, rows, parallel)
    if config.precision == "fp8" and (parallel == "fsdp" or not compiled):
        reason = "shards" if parallel == "fsdp" else "layers that are not compiled"
        raise UserError(f"precision fp8 does not go with {reason}; use --precision bf16")
    return parallel, estimate
