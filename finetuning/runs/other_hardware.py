"""The plan of a run on GPUs that are not here: from settings, data, a config.json and a tokenizer alone.

Nothing is loaded or measured. What only the model's weights or the GPU can tell is left out, and said.
"""

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from finetuning.common.distributed import Distributed
from finetuning.common.errors import UserError
from finetuning.common.machine import processors
from finetuning.common.terminal import Terminal
from finetuning.config import DirectTrainingConfig
from finetuning.data.accounts import Accounts, account_rows, accounts_of
from finetuning.data.packing import StepPlan
from finetuning.data.split import split_samples
from finetuning.data.training_data import TrainingData, prepare_data, read_data
from finetuning.model.flops import peak_flops
from finetuning.model.loading import load_tokenizer
from finetuning.model.parallel import parallel_mode
from finetuning.model.resolve import DEFAULT_MODEL, ResolvedModel, local_folder
from finetuning.runs.init_adapter import with_own_settings
from finetuning.runs.passes import evaluation_steps, plan_steps, workload
from finetuning.runs.placement import placement_of
from finetuning.runs.plan import MIN_CONSTANT_EFFICIENCY, positions_for, tokenized
from finetuning.runs.probing import plan_probes
from finetuning.runs.sequence_length import Fits, SequenceLength, fits_memory, model_positions
from finetuning.training.forecast import (
    GPU_SHARES,
    RunForecast,
    Speed,
    Workload,
    forecast,
    run_seconds,
)
from finetuning.training.memory_estimate import ModelShape, model_shape

# Name as people write it -> name as the driver has it, memory in GiB.
GPUS = {
    "T4": ("T4", 15), "L4": ("L4", 22), "A10": ("A10", 22), "A30": ("A30", 24), "3090": ("RTX 3090", 24),
    "4090": ("RTX 4090", 24), "A40": ("A40", 45), "L40S": ("L40S", 45), "A6000": ("RTX A6000", 48),
    "A100": ("A100-SXM4-80GB", 80), "A800": ("A800-SXM4-80GB", 80), "H20": ("H20", 96),
    "H100": ("H100 80GB HBM3", 80), "H800": ("H800", 80), "H200": ("H200", 141), "B200": ("B200", 180),
}  # fmt: skip
WITHOUT_BF16 = ("T4",)
TAKEN = 1.0  # GiB of a GPU that the driver and CUDA themselves hold
RANKS_OF_A_NODE = 8
_FORM = re.compile(r"(?:(\d+)x)?([A-Za-z0-9]+?)(?:-(\d+)G(?:B)?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Gpus:
    """So many GPUs of a kind."""

    count: int
    name: str  # as people write it
    driver_name: str
    gib: float

    @classmethod
    def parse(cls, text: str) -> "Gpus":
        """`8xH100`, `1x4090`, `1xA100-40G`. Raises UserError for a GPU that is not known."""
        found = _FORM.fullmatch(text.strip())
        known = {name.upper(): name for name in GPUS}
        name = found and known.get(found[2].upper().removeprefix("RTX"))
        if not name or found[1] == "0":
            raise UserError(
                f"--gpus {text}: give a number, x and a GPU, such as 8xH100, 1x4090 or 1xA100-40G; known "
                f"are {', '.join(GPUS)}"
            )
        driver_name, gib = GPUS[name]
        return cls(int(found[1] or 1), name, driver_name, float(found[3] or gib))

    @property
    def free(self) -> int:
        """Bytes that a run can take of one."""
        return int((self.gib - TAKEN) * 2**30)

    def __str__(self) -> str:
        return f"{self.count}x{self.name}-{self.gib:g}G"


@dataclass(frozen=True)
class _PlannedRanks(Distributed):
    """Rank 0 of ranks that are not there; the others would say the same."""

    def gather(self, value: object) -> list:
        return [value] * self.world_size

    def wait_alive(self, what: str) -> AbstractContextManager:
        return nullcontext()


@dataclass(frozen=True)
class PlanElsewhere:
    """What the run would do there, need and take."""

    gpus: Gpus
    model: str
    parallel: str
    accounts: tuple[Accounts, ...]
    length: SequenceLength
    steps: StepPlan
    forecast: RunForecast

    @property
    def fits(self) -> bool:
        """Whether it would fit into the memory of each GPU."""
        return self.forecast.memory.fits

    def rows(self) -> list[tuple[str, str]]:
        """Names and texts, and at the end what to change where it does not fit."""
        tokens = self.steps.num_tokens / self.steps.steps_per_epoch
        mode = self.parallel if self.gpus.count > 1 else "one GPU"
        return [
            ("GPUs", f"{self.gpus}, {mode}"),
            *account_rows(self.accounts),
            ("longest sample taken", self.length.text()),
            ("tokens an update", f"{tokens:,.0f}"),
            *self.forecast.rows(),
            ("does it fit", "yes" if self.fits else f"no: {self._advice()}"),
        ]

    def _advice(self) -> str:
        memory = self.forecast.memory
        ways = ["--gradient-checkpointing on"] if memory.recomputed < memory.layers else []
        ways += [] if self.parallel == "fsdp" else ["--quantization 4bit"]
        ways += [f"--max-seq-length {self.steps.row_tokens // 2}", "more GPUs with --parallel fsdp"]
        return "try " + ", ".join(ways)


def plan_elsewhere(
    config: DirectTrainingConfig,
    gpus: Gpus,
    terminal: Terminal,
    *,
    trust_remote_code: bool = False,
) -> PlanElsewhere:
    """Read and tokenize the data, and plan the run on these GPUs. Raises UserError."""
    config = with_own_settings(config, terminal.warning)
    ranks = {"local_world_size": min(gpus.count, RANKS_OF_A_NODE)}
    dist = _PlannedRanks(0, gpus.count, 0, torch.device("cuda"), **ranks)
    model = small_files(config, trust_remote_code)
    tokenizer = load_tokenizer(model)
    dtype = _dtype(config, gpus)
    fits = fits_memory(config, model, dist, dtype, gpus.free)
    told = model_positions(config, model)
    data, length = _data(config, told, tokenizer, dist, terminal, fits)
    as_set, config = config, length.of(config)
    shape = model_shape(
        model.path,
        config,
        init_adapter=config.init_adapter,
        trust_remote_code=trust_remote_code,
    )
    positions = positions_for(config, told, data, terminal.warning)
    plans = plan_steps(config, data, tokenizer, dist, terminal.warning, positions)
    probing = plan_probes(
        config, model.path, tokenizer, data.held_out, dist, terminal.warning, positions
    )
    eval_steps, probing = evaluation_steps(config, plans, probing, dist)
    work = workload(config, data, plans, eval_steps, probing, dist.device.type)
    parallel, estimate = _fitting(config, gpus, dist, shape, work, dtype)
    accounts = accounts_of(data, as_set)
    return PlanElsewhere(gpus, model.name, parallel, accounts, length, plans[0], estimate)


def small_files(config: DirectTrainingConfig, trust_remote_code: bool) -> ResolvedModel:
    """The model's folder, or from the hub its configuration and tokenizer only; weights are not needed."""
    name, revision = config.model_name or DEFAULT_MODEL, config.revision
    if folder := local_folder(name, revision):
        return ResolvedModel(name, folder, False, "its folder", trust_remote_code)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja", *(["*.py"] if trust_remote_code else [])]
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model_name {name}: config and tokenizer can't be had ({reason}); give --model-name a folder "
            "with config.json and tokenizer.json"
        ) from error
    return ResolvedModel(name, Path(folder), False, "the hub", trust_remote_code, revision)


def _data(
    config: DirectTrainingConfig,
    positions: int,
    tokenizer: object,
    dist: Distributed,
    terminal: Terminal,
    fits: Fits,
) -> tuple[TrainingData, SequenceLength]:
    options = {"workers": config.workers or processors(), "cache_dir": config.cache_path}
    with terminal.working("reading the data") as progress:
        read, eval_read = read_data(config, progress=progress, **options)
        split = split_samples(read, config, eval_read, seed=config.seed, **options)
    tokenize = partial(prepare_data, split, tokenizer, **options)
    return tokenized(config, positions, tokenize, dist, terminal, {}, fits)


def _dtype(config: DirectTrainingConfig, gpus: Gpus) -> torch.dtype:
    has_bf16 = gpus.name not in WITHOUT_BF16
    if config.precision in ("bf16", "fp8") and not has_bf16:
        raise UserError(
            f"precision {config.precision}: {gpus.name} has no bf16; use --precision auto"
        )
    return torch.bfloat16 if config.precision != "fp32" and has_bf16 else torch.float32


def _fitting(
    config: DirectTrainingConfig,
    gpus: Gpus,
    dist: Distributed,
    shape: ModelShape,
    work: Workload,
    dtype: torch.dtype,
) -> tuple[str, RunForecast]:
    """Replicas, or shards where a replica does not fit, as a run chooses them; and the forecast for it."""
    wide = work.plan.constant_efficiency >= MIN_CONSTANT_EFFICIENCY
    compiled = config.compile != "off" and dtype == torch.bfloat16 and wide and not config.use_dora

    def forecast_for(parallel: str) -> RunForecast:
        placement = placement_of(config, dist, dtype, compiled=compiled, parallel=parallel)
        estimate = forecast(
            shape,
            placement,
            work,
            device=torch.device("cpu"),
            dtype=dtype,
            free=gpus.free,
            gradient_checkpointing=config.gradient_checkpointing,
            output=config,
        )
        return _timed(estimate, gpus, shape, work)

    trains_all = not config.lora_r
    parallel = parallel_mode(
        config.parallel, trains_all=trains_all, dtype=dtype, world_size=gpus.count
    )
    estimate = forecast_for(parallel)
    may_shard = config.parallel == "auto" and config.quantization == "none" and gpus.count > 1
    if may_shard and parallel == "ddp" and not estimate.memory.fits:
        return "fsdp", forecast_for("fsdp")
    return parallel, estimate


def _timed(estimate: RunForecast, gpus: Gpus, shape: ModelShape, work: Workload) -> RunForecast:
    """With the time on these GPUs, by their peak; without one where it is not known."""
    peak, (low, high) = peak_flops(gpus.driver_name), GPU_SHARES
    if peak is None or shape.dims is None:
        return replace(estimate, device=gpus.name, seconds=None, speed="")
    speed = Speed(low * peak, high * peak, f"{low:.0%} to {high:.0%} of the peak of {gpus.name}")
    times = run_seconds(shape, work, speed, "cuda", estimate.memory.recomputed)
    return replace(estimate, device=gpus.name, seconds=times, speed=speed.source)
