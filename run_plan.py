"""What a run would do, need and take, told before any weight is loaded.

Memory is counted from the model's configuration, tensor by tensor of what the training keeps; time from
the number of operations and the speed of the device. Both are estimates and say so; how good they are,
`benchmarks/memory_estimate.py` measures.
"""

import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from errors import UserError
from packing import StepPlan
from run_checkpoints import MIN_SAVE_STEPS
from safe_text import clean_line
from segment_loss import rows_per_chunk
from terminal import duration
from throughput import ModelDims, dims_from_config, peak_flops, training_flops

FP32 = 4  # bytes
BITS_4 = 0.516  # bytes a weight in NF4: half a byte, and its doubly quantised scales
USABLE = 0.92  # of the free memory; the rest goes to fragmentation and what the estimate leaves out
GPU_SHARES = (0.25, 0.5)  # of a GPU's peak that training reaches; not measured by us
HOST_LAYERS = 3  # layers' activations that glibc's malloc holds in gaps no tensor fits into
HOST_LIBRARIES = 40 * 2**20  # bytes that libraries take with their first products
STEP_SECONDS, EVALUATION_SECONDS = 0.03, 0.3  # of one, beside its arithmetic
HOST_SHARES = (0.4, 1.0)  # of the rate of large matrix products; small models use two threads badly
EVALUATION_SHARE = 0.2  # what evaluations may add to the training
EVALUATIONS = (4, 50)  # after the one before the first step: the fewest and the most
MIN_EVAL_STEPS = 40  # between two evaluations
# Tokens of training in the time in which all probes' answers grow by one. On a CPU 32 to 55 were measured;
# 500 is arithmetic: 25 ms for the kernels of 36 layers, while Qwen3-4B trains 20,000 tokens a second.
CPU_ANSWER_COST, GPU_ANSWER_COST = 40, 500
Rows = list[tuple[str, str]]

# -----------------------------------------------------------------------------
# The model, not loaded


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model and its adapters; numbers of weights, shared ones once."""

    dims: ModelDims | None  # None: an architecture whose activations are not known here
    parameters: int
    linear_parameters: int  # those that 4-bit quantisation packs
    trainable: int  # of the adapters; all of them at lora_r 0
    lora: bool

    @property
    def total(self) -> int:
        """With the adapters."""
        return self.parameters + (self.trainable if self.lora else 0)

    @property
    def lora_weights(self) -> int | None:
        """As `training_flops` takes it."""
        return self.trainable if self.lora else None


def model_shape(
    folder: Path,
    *,
    lora_r: int,
    target_modules: Sequence[str],
    rank_pattern: Mapping[str, int] | None = None,
    use_dora: bool = False,
    init_adapter: str = "",
    trust_remote_code: bool = False,
) -> ModelShape:
    """Build the model of `folder` on the meta device, without weights, and count. Raises UserError."""
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"model folder {folder}: its architecture can't be built ({clean_line(str(error), 200)}); "
            "check that this version of transformers knows it"
        ) from error
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    parameters = sum(p.numel() for p in model.parameters())
    adapter = parameters
    if init_adapter:
        adapter = adapter_size(Path(init_adapter).expanduser())
    elif lora_r:
        _check_names(linear, target_modules, rank_pattern or {})
        adapter = sum(
            _adapter_weights(module, _rank(name, lora_r, rank_pattern or {}), use_dora)
            for name, module in linear.items()
            if _is_target(name, target_modules)
        )
    return ModelShape(
        dims=dims_from_config(config),
        parameters=parameters,
        linear_parameters=sum(m.weight.numel() for m in linear.values()),
        trainable=adapter,
        lora=bool(lora_r),
    )


def adapter_size(folder: Path) -> int:
    """Number of weights in a saved adapter, read from its header. Raises UserError."""
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"init_adapter {folder}: {path.name} can't be read ({clean_line(str(error), 200)}); give the "
            "folder of an adapter saved as safetensors"
        ) from error


def _check_names(
    linear: Mapping[str, torch.nn.Linear], wanted: Sequence[str], patterns: Mapping[str, int]
) -> None:
    """Every name must fit a layer and every pattern be an expression, or the plan would be another."""
    unknown = [w for w in wanted if not any(_is_target(name, [w]) for name in linear)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise UserError(
            f"target_modules: {clean_line(', '.join(unknown))}; this model has {', '.join(known)} (or "
            "all-linear)"
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"rank_pattern {clean_line(pattern)}: {error}") from error


def _is_target(name: str, wanted: Sequence[str]) -> bool:
    return list(wanted) == ["all-linear"] or any(
        name == w or name.endswith(f".{w}") for w in wanted
    )


def _rank(name: str, lora_r: int, pattern: Mapping[str, int]) -> int:
    """The rank that peft gives a module: of the first pattern that fits the end of its name."""
    fits = (rank for key, rank in pattern.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(fits, lora_r)


def _adapter_weights(module: torch.nn.Linear, rank: int, dora: bool) -> int:
    """A (r, in), B (out, r), and DoRA's magnitudes (out)."""
    return rank * (module.in_features + module.out_features) + dora * module.out_features


# -----------------------------------------------------------------------------
# Memory


@dataclass(frozen=True)
class Placement:
    """How the model lies on the device."""

    device_type: str
    dtype_bytes: int  # of frozen weights, gathered ones and activations
    quantized: bool = False
    compiled: bool = False
    fused_lora: bool = True  # adapters with one autograd node each
    shards: int = 1  # devices that share the weights
    fp8: bool = False  # linear layers lie beside two copies of one byte a weight
    captured: bool = False  # a CUDA graph holds the memory of a step's passes between steps


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a step, which is in the loss or in the backward pass after it."""

    weights: float
    gathered: float  # from other ranks, for a while
    adapter: float
    gradients: float
    optimizer: float
    activations: float  # kept for the backward pass
    logits: float  # in the loss
    workspace: float  # in the backward pass
    allocator: float
    evaluation: float = 0.0  # beside what a CUDA graph holds

    @property
    def total(self) -> float:
        """All of it, but of logits and workspace the larger one."""
        return sum(vars(self).values()) - min(self.logits, self.workspace)


def estimate_memory(
    shape: ModelShape, placement: Placement, tokens: int, *, checkpointing: bool
) -> MemoryEstimate | None:
    """Peak of a step with `tokens` in a micro-batch; None for an unknown architecture.

    What is trained is fp32, adapters or at lora_r 0 all weights: 4 bytes each for weight and gradient, 8
    for AdamW's moments. Shards, and all weights trained in bf16 on one device too, gather what is outside
    the layers, and two layers; if they are trained, with their gradients. Activations: `activation_bytes`
    per token and layer; with checkpointing only each layer's input, and all of one layer while it is
    recomputed. An evaluation uses the memory of the passes again, unless a CUDA graph holds that. A GPU's
    allocator has its share of the memory left free (`USABLE`); a host's malloc is part of the estimate.
    """
    dims, size = shape.dims, placement.dtype_bytes
    if dims is None:
        return None
    packed = shape.linear_parameters if placement.quantized else 0
    adapters = shape.trainable if shape.lora else 0
    held = size if shape.lora else FP32
    mixed = held > size
    layer, on_host = activation_bytes(dims, placement), placement.device_type == "cpu"
    kept = dims.layers * (dims.hidden * size if checkpointing else layer)
    outside = shape.parameters - shape.linear_parameters
    in_flight = (size if shape.lora else 2 * size) * (
        outside + 2 * shape.linear_parameters / dims.layers
    )
    logits = _logits_bytes(shape, placement, tokens)
    workspace = _workspace_bytes(shape, placement, tokens)
    return MemoryEstimate(
        weights=(packed * BITS_4 + (shape.parameters - packed) * held) / placement.shards
        + placement.fp8 * 2 * shape.linear_parameters,
        gathered=in_flight if placement.shards > 1 or mixed else 0,
        adapter=adapters * FP32 / placement.shards,
        gradients=shape.trainable * FP32 / placement.shards,
        optimizer=2 * shape.trainable * FP32 / placement.shards,
        activations=tokens * kept,
        logits=logits,
        workspace=workspace + checkpointing * tokens * layer,
        evaluation=placement.captured * max(logits, workspace),
        allocator=tokens * HOST_LAYERS * layer + HOST_LIBRARIES if on_host else 0,
    )


def activation_bytes(dims: ModelDims, placement: Placement) -> int:
    """What one layer keeps of a token for its backward pass.

    With H hidden, Q and K the widths of queries and keys, I of the MLP, b bytes an element. Eager: both
    residuals and the queries and keys before their norms in fp32, 4(2H + Q + K); two norm outputs,
    queries, keys, values, attention output and four widths of the MLP, b(2H + 2Q + 2K + 4I). The CPU's
    attention gives its output document by document, so that it is copied once more, Q. Compiled: norms
    and the product of the MLP are recomputed, b(2H + 3Q + 3K + 2I). Adapters that are not fused keep, unless
    the base is fp32, a copy of each linear layer's input in fp32, 4(5H + Q + I), and eager ones not the
    input itself, b(2H + I). Qwen3-4B in bf16: 146 and 78 KiB, and 75 more where adapters are not fused.
    """
    hidden, mlp = dims.hidden, dims.intermediate
    queries, keys = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    size = placement.dtype_bytes
    if placement.compiled:
        kept = size * (2 * hidden + 3 * queries + 3 * keys + 2 * mlp)
    else:
        attention = 2 * queries + 2 * keys + (placement.device_type == "cpu") * queries
        kept = FP32 * (2 * hidden + queries + keys)
        kept += size * (2 * hidden + attention + 4 * mlp)
    if not placement.fused_lora and size < FP32:
        kept += FP32 * (5 * hidden + queries + mlp)
        kept -= 0 if placement.compiled else size * (2 * hidden + mlp)
    return kept


def _logits_bytes(shape: ModelShape, placement: Placement, tokens: int) -> int:
    """A chunk of logits, fp32, and off CUDA one of probabilities; the head's gradient if it is trained."""
    vocab = shape.dims.vocab
    rows = min(rows_per_chunk(vocab, placement.device_type), tokens)
    head = 0 if shape.lora else vocab * shape.dims.hidden * FP32
    return rows * vocab * (1 if placement.device_type == "cuda" else 2) * FP32 + head


def _workspace_bytes(shape: ModelShape, placement: Placement, tokens: int) -> int:
    """Gradients in flight: three widths of the MLP and four hidden states; adapters cast to bf16."""
    dims, size = shape.dims, placement.dtype_bytes
    casts = shape.trainable * size if shape.lora and size < FP32 else 0
    return tokens * size * (3 * dims.intermediate + 4 * dims.hidden) + casts


def free_memory(device: torch.device, ranks: int = 1) -> int:
    """Bytes that this process can still take: of its GPU, else of the host and its container, which it
    shares with the other `ranks` there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_container_room()]) // ranks


def _container_room() -> list[int]:
    """What a Linux container's limit leaves; nothing where there is no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return []
    return [int(limit) - used] if limit.isdigit() else []


def largest_batch(
    total: Callable[[int], float], free: float, limit: int, *, usable: float = USABLE
) -> int:
    """The most rows up to `limit` whose `total(rows)`, which rises, stays within the free memory."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total(middle) <= usable * free else (low, middle - 1)
    return low


# -----------------------------------------------------------------------------
# Time


def step_flops(
    shape: ModelShape, lengths: Sequence[int], num_targets: int, *, checkpointing: bool
) -> float:
    """Arithmetic of training on these documents once; checkpointing goes through the layers again."""
    training = training_flops(shape.dims, lengths, num_targets, lora_weights=shape.lora_weights)
    return training + checkpointing * forward_flops(shape, lengths, 0)


def forward_flops(shape: ModelShape, lengths: Sequence[int], num_targets: int) -> float:
    """Arithmetic of a forward pass over these documents: 2 of the 4 or 6 of a training step."""
    training = training_flops(shape.dims, lengths, num_targets, lora_weights=shape.lora_weights)
    return training / (2 if shape.lora else 3)


@dataclass(frozen=True)
class Speed:
    """FLOP/s to expect of training, and where the numbers come from."""

    lowest: float
    highest: float
    source: str


def device_speed(device: torch.device, dims: ModelDims, dtype: torch.dtype) -> Speed:
    """From the peak of a known GPU, else from a matrix product that is measured now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_flops(name)
    low, high = GPU_SHARES if peak else HOST_SHARES
    rate = peak or matmul_rate(device, dims, dtype)
    of = f"the peak of {name}" if peak else "a measured matrix product"
    alone = ", if the processors are free" if device.type == "cpu" else ""
    return Speed(low * rate, high * rate, f"{low:.0%} to {high:.0%} of {of}{alone}")


def matmul_rate(device: torch.device, dims: ModelDims, dtype: torch.dtype) -> float:
    """FLOP/s of (512, hidden) x (hidden, intermediate), the mean of at least three, in about 0.2 s."""
    rows = torch.randn(512, dims.hidden, device=device, dtype=dtype)
    weight = torch.randn(dims.hidden, dims.intermediate, device=device, dtype=dtype)
    seconds_of(lambda: rows @ weight, device)  # the first one also loads libraries
    seconds, times = 0.0, 3
    while seconds < 0.1 and times < 10_000:
        times *= 2
        seconds = seconds_of(lambda n=times: [rows @ weight for _ in range(n)], device)
    return 2 * 512 * dims.hidden * dims.intermediate * times / seconds


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes where nothing else runs.

    On a host that is processor time over the number of threads: wall time on a busy machine was up to
    nine times as long. Elsewhere it is wall time.
    """
    on_host = device.type == "cpu"
    clock = time.process_time if on_host else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = clock()
    work()
    wait()
    return (clock() - start) / (torch.get_num_threads() if on_host else 1)


# -----------------------------------------------------------------------------
# Disk


def disk_bytes(shape: ModelShape, dtype_bytes: int, checkpoints: int) -> int:
    """So many checkpoints with weights and moments, one in the making, final and best model."""
    model = shape.trainable * (FP32 if shape.lora else dtype_bytes)
    return (checkpoints + 1) * 3 * shape.trainable * FP32 + 3 * model


def disk_free(directory: Path) -> int:
    """Bytes free where `directory` is, or would be."""
    existing = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def number_of_checkpoints(num_steps: int, save_steps: int) -> int:
    """Checkpoints that a whole run writes: every `save_steps` (0: never) and at the end."""
    regular = num_steps // save_steps if save_steps else 0
    return regular + (not save_steps or num_steps % save_steps > 0)


# -----------------------------------------------------------------------------
# All together


@dataclass(frozen=True)
class RunForecast:
    """What is known before the weights are."""

    work: Rows  # samples, tokens, steps
    shape: ModelShape
    estimates: Mapping[bool, MemoryEstimate | None]  # without and with checkpointing
    checkpointing: bool  # what the run does
    free: int
    device: torch.device
    largest_batches: Mapping[bool, int]
    num_rows: int  # of an epoch
    seconds: tuple[float, float] | None  # the shortest and the longest to expect
    speed: str
    disk_needed: int
    disk_free: int

    @property
    def fits(self) -> bool:
        """Whether the estimate stays within the free memory; true where there is no estimate."""
        estimate = self.estimates[self.checkpointing]
        return estimate is None or self._within_free(estimate)

    def _within_free(self, estimate: MemoryEstimate) -> bool:
        return estimate.total <= USABLE * self.free

    def rows(self) -> Rows:
        """Everything, as names and texts."""
        shape = self.shape
        kind = "adapters" if shape.lora else "full fine-tuning"
        return [
            *self.work,
            ("parameters", f"{shape.trainable:,} trainable ({kind}) of {shape.total:,}"),
            *self.memory_rows(),
            *self.closing_rows(),
        ]

    def short_rows(self) -> Rows:
        """What the start of a run says: evaluations, memory, time, disk."""
        estimate = self.estimates[self.checkpointing]
        memory = [("memory", self._against_free(estimate))] if estimate else []
        return [("evaluations", dict(self.work)["evaluations"]), *memory, *self.closing_rows()]

    def memory_rows(self) -> Rows:
        """The parts of the estimate, and what fits."""
        plain, checkpointed = self.estimates[False], self.estimates[True]
        if plain is None or checkpointed is None:
            return [("memory", "not estimated: the architecture is not a dense decoder")]
        chosen = "on" if self.checkpointing else "off"
        batches = self.largest_batches
        return [
            ("memory: weights", size_text(plain.weights + plain.gathered)),
            ("memory: adapter", size_text(plain.adapter)),
            ("memory: gradients", size_text(plain.gradients)),
            ("memory: optimizer", size_text(plain.optimizer)),
            (
                "memory: activations",
                f"{size_text(plain.activations)}; {size_text(checkpointed.activations)} with "
                "gradient checkpointing",
            ),
            ("memory: loss", f"{size_text(plain.logits)}, logits of a chunk"),
            (
                "memory: or backward pass",
                f"{size_text(plain.workspace)}; {size_text(checkpointed.workspace)} with gradient "
                "checkpointing",
            ),
            *([("memory: allocator", size_text(plain.allocator))] if plain.allocator else []),
            *(
                [("memory: evaluation", f"{size_text(plain.evaluation)}, beside the CUDA graph's")]
                if plain.evaluation
                else []
            ),
            ("memory without checkpointing", self._against_free(plain)),
            ("memory with checkpointing", self._against_free(checkpointed)),
            ("gradient checkpointing", chosen),
            (
                "largest batch_size that fits",
                f"{self._batch_text(batches[False])}; with checkpointing "
                f"{self._batch_text(batches[True])}",
            ),
        ]

    def closing_rows(self) -> Rows:
        """Time and disk."""
        rows = []
        if self.seconds is not None:
            shortest, longest = (duration(max(1.0, seconds)) for seconds in self.seconds)
            span = f"{shortest} to {longest}" if shortest != longest else f"about {longest}"
            text = f"{span} (an estimate: {self.speed})"
            rows.append(("training and evaluation", text))
        short = "" if self.disk_free >= self.disk_needed else ": too little"
        disk = f"{size_text(self.disk_needed)} of {size_text(self.disk_free)} free{short}"
        return [*rows, ("disk", disk)]

    def _batch_text(self, rows: int) -> str:
        if not rows:
            return "none"
        return f"{rows} (a whole epoch)" if rows >= self.num_rows else str(rows)

    def _against_free(self, estimate: MemoryEstimate) -> str:
        fits = "" if self._within_free(estimate) else ": does not fit"
        free = size_text(self.free)
        return f"{size_text(estimate.total)} of {free} free on {self.device} (an estimate){fits}"


def forecast(
    shape: ModelShape,
    placement: Placement,
    *,
    device: torch.device,
    free: int,
    dtype: torch.dtype,
    plan: StepPlan,
    lengths: Sequence[int],
    num_targets: int,
    eval_lengths: Sequence[int],
    eval_targets: int,
    batch_size: int,
    eval_steps: int,
    answer_tokens: int,
    gradient_checkpointing: str,
    save_steps: int | str,
    save_total_limit: int,
    output_dir: Path,
) -> RunForecast:
    """Everything about a run that is planned but not begun.

    lengths: (m,) tokens of the planned documents, one entry for each time in an epoch. num_targets:
    their supervised tokens. free: bytes of memory. gradient_checkpointing: on, off, or auto, which
    turns it on where the estimate without it does not fit. save_steps: auto, or steps. Raises no error
    for what does not fit.
    """
    row = _row_tokens(plan, placement, lengths)

    def total(rows: int, checkpointing: bool) -> float:
        return estimate_memory(shape, placement, rows * row, checkpointing=checkpointing).total

    estimates = {
        way: estimate_memory(shape, placement, batch_size * row, checkpointing=way)
        for way in (False, True)
    }
    plain = estimates[False]
    tight = plain is not None and plain.total > USABLE * free
    checkpointing = gradient_checkpointing == "on" or (gradient_checkpointing == "auto" and tight)
    most = max(batch_size, plan.num_rows)
    largest = (
        {way: largest_batch(lambda rows, w=way: total(rows, w), free, most) for way in estimates}
        if plain is not None
        else {}
    )
    evaluations = number_of_evaluations(plan.num_steps, eval_steps, len(eval_lengths))
    answers = answer_cost(answer_tokens, device.type, plan.world_size)
    seconds, speed = None, None
    if shape.dims is not None:
        speed = device_speed(device, shape.dims, dtype)
        epoch = step_flops(shape, lengths, num_targets, checkpointing=checkpointing)
        held_out = forward_flops(shape, eval_lengths, eval_targets)
        work = epoch * plan.num_steps / plan.steps_per_epoch
        work += evaluations * (held_out + answers * epoch / plan.num_tokens)
        work /= plan.world_size
        fixed = plan.num_steps * STEP_SECONDS + evaluations * EVALUATION_SECONDS
        seconds = (fixed + work / speed.highest, fixed + work / speed.lowest)
    automatic = save_steps == "auto"
    checkpoints = number_of_checkpoints(plan.num_steps, MIN_SAVE_STEPS if automatic else save_steps)
    kept = min(checkpoints, save_total_limit + 1)  # the best one may be kept beside them
    return RunForecast(
        work=[
            ("samples", f"{len(lengths):,} an epoch, {len(eval_lengths):,} held out"),
            ("tokens", f"{plan.num_tokens:,} an epoch, {num_targets:,} of them supervised"),
            ("steps", f"{plan.num_steps:,} ({plan.steps_per_epoch:,} an epoch)"),
            ("epochs", f"{plan.fractional_epoch(plan.num_steps):.4g}"),
            (
                "rows",
                f"{plan.num_rows:,} of {plan.row_tokens:,} tokens, {plan.efficiency:.1%} full",
            ),
            (
                "checkpoints",
                f"{'up to ' * automatic}{checkpoints:,}; at most {kept:,} are kept",
            ),
            ("evaluations", _evaluations_text(evaluations, eval_steps)),
        ],
        shape=shape,
        estimates=estimates,
        checkpointing=checkpointing,
        free=free,
        device=device,
        largest_batches=largest,
        num_rows=plan.num_rows,
        seconds=seconds,
        speed=speed.source if speed else "",
        disk_needed=disk_bytes(shape, placement.dtype_bytes, kept),
        disk_free=disk_free(output_dir),
    )


def number_of_evaluations(num_steps: int, eval_steps: int, held_out: int) -> int:
    """Before the first step, every `eval_steps` (0: never), and at the end; none without data."""
    if not held_out:
        return 0
    return 1 + number_of_checkpoints(num_steps, eval_steps)


def steps_between_evaluations(
    plan: StepPlan, eval_tokens: int, answer_tokens: int, *, device_type: str, lora: bool
) -> int:
    """How far apart evaluations are, so that all of them add a fifth to the training at most.

    An evaluation costs as much as training on `eval_tokens` x 1/2 (a forward pass; 1/3 where all weights
    are trained), and `answer_cost`. Besides the one before the first step there are at most 50, at least
    40 steps apart, and, whatever they cost, 4 in a run of 160 steps or more.
    """
    trained = plan.num_tokens * plan.num_steps / plan.steps_per_epoch
    cost = eval_tokens / (2 if lora else 3)
    cost += answer_cost(answer_tokens, device_type, plan.world_size)
    fewest, most = EVALUATIONS
    affordable = int(EVALUATION_SHARE * trained / cost) - 1 if cost else most  # one comes first
    number = min(max(affordable, fewest), most)
    return max(MIN_EVAL_STEPS, math.ceil(plan.num_steps / number))


def answer_cost(tokens: int, device_type: str, world_size: int) -> int:
    """Tokens that all ranks train in the time of answers of so many tokens, as every rank writes all."""
    cost = CPU_ANSWER_COST if device_type == "cpu" else GPU_ANSWER_COST
    return tokens * cost * world_size


def _evaluations_text(number: int, eval_steps: int) -> str:
    if not number:
        return "none: nothing is held out"
    return f"{number:,}, " + (f"every {eval_steps:,} steps" if number > 2 else "first and last")


def size_text(number: float) -> str:
    """Bytes for people, in GiB or MiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _row_tokens(plan: StepPlan, placement: Placement, lengths: Sequence[int]) -> int:
    """Tokens of the longest row: of the constant shape, or its capacity if it holds several documents."""
    if placement.compiled:
        return math.ceil(plan.constant_tokens / plan.rows_per_micro_batch)
    packed = plan.num_rows < len(lengths)
    return min(plan.row_tokens, plan.num_tokens) if packed else int(max(lengths))
