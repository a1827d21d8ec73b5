"""Memory, time and disk that a run will take, before weights are loaded."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetuning.common.formatting import duration, size_text
from finetuning.config import OutputSettings
from finetuning.data.packing import StepPlan
from finetuning.data.training_data import DataPart
from finetuning.model import flops as arithmetic
from finetuning.model.flops import ModelDims, peak_flops, training_flops
from finetuning.training.checkpoint_manager import MIN_SAVE_STEPS
from finetuning.training.memory_estimate import (
    FP32,
    MemoryEstimate,
    ModelShape,
    Placement,
    estimate_memory,
    largest_batch,
)
from finetuning.training.memory_plan import MemoryPlan, plan_memory

GPU_SHARES = (0.25, 0.5)  # of a GPU's peak that training reaches; not measured by us

STEP_SECONDS, EVALUATION_SECONDS = 0.03, 0.3  # of one, beside its arithmetic
HOST_SHARES = (0.4, 1.0)  # of the rate of large matrix products; small models use two threads badly
EVALUATION_SHARE = 0.2  # what evaluations may add to the training
EVALUATIONS = (4, 50)  # after the one before the first step: the fewest and the most
MIN_EVAL_STEPS = 40  # between two evaluations
# Tokens of training in the time in which all probes' answers grow by one. On a CPU 32 to 55 were measured; on
# an H200 32 answers of Qwen3-4B grow in 9.7 ms, in which it trains 249 tokens.
CPU_ANSWER_COST, GPU_ANSWER_COST = 40, 250
Rows = list[tuple[str, str]]

# -----------------------------------------------------------------------------
# Time


def step_flops(
    shape: ModelShape,
    lengths: Sequence[int],
    num_targets: int,
    *,
    recomputed: int,
) -> float:
    """Arithmetic of training on these documents once, and again of a pass through `recomputed` layers."""
    training = training_flops(shape.dims, lengths, num_targets, lora_weights=shape.lora_weights)
    return training + recomputed / shape.layers * forward_flops(shape, lengths, 0)


def forward_flops(shape: ModelShape, lengths: Sequence[int], num_targets: int) -> float:
    """Arithmetic of a forward pass over these documents."""
    adapters = shape.lora_weights or 0
    return arithmetic.forward_flops(shape.dims, lengths, num_targets, lora_weights=adapters)


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
    memory: MemoryPlan
    device: torch.device
    largest_batches: tuple[int, int]  # with no and with all layers recomputed
    num_rows: int  # of an epoch
    seconds: tuple[float, float] | None  # the shortest and the longest to expect
    speed: str
    disk_needed: int
    disk_free: int

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
        estimate = self.memory.estimate
        memory = [("memory", self._against_free(estimate))] if estimate else []
        return [("evaluations", dict(self.work)["evaluations"]), *memory, *self.closing_rows()]

    def memory_rows(self) -> Rows:
        """The parts of the estimate, and what fits."""
        memory = self.memory
        plain, *_, checkpointed = memory.estimates
        if plain is None or checkpointed is None:
            return [("memory", "not estimated: the architecture is not a dense decoder")]
        partly = 0 < memory.recomputed < memory.layers
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
            ("gradient checkpointing", memory.text),
            *([("memory as planned", self._against_free(memory.estimate))] if partly else []),
            *([("CUDA graph", f"no: {memory.no_graph}")] if memory.no_graph else []),
            (
                "largest batch_size that fits",
                f"{self._batch_text(batches[0])}; with checkpointing {self._batch_text(batches[1])}",
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
        fits = "" if self.memory.within_free(estimate) else ": does not fit"
        free = size_text(self.memory.free)
        return f"{size_text(estimate.total)} of {free} free on {self.device} (an estimate){fits}"


@dataclass(frozen=True)
class EvaluationPass:
    """Documents that every evaluation goes through, held-out ones or general text."""

    lengths: Sequence[int] = ()  # (k,) tokens of each
    num_targets: int = 0
    compared: float = 0.0  # share of it that is compared with the base

    @classmethod
    def of(cls, part: DataPart, compared: float) -> "EvaluationPass":
        """A pass over all documents of a part."""
        tokens, documents = part.tokens, part.documents
        return cls(tokens.lengths[documents], int(tokens.num_targets[documents].sum()), compared)

    def flops(self, shape: ModelShape) -> float:
        """Forward; where it is compared, the head's logits again and the base's."""
        head = 2 * shape.dims.hidden * shape.dims.vocab * self.num_targets
        return forward_flops(shape, self.lengths, self.num_targets) + 2 * self.compared * head

    def base_flops(self, shape: ModelShape) -> float:
        """The base's pass before the first step, over what is compared; without its head."""
        return self.compared * arithmetic.forward_flops(shape.dims, self.lengths, 0)


@dataclass(frozen=True)
class Workload:
    """The documents that a run goes through, and how often it evaluates."""

    plan: StepPlan
    lengths: Sequence[
        int
    ]  # (m,) tokens of the planned documents, an entry for each time in an epoch
    num_targets: int  # their supervised tokens
    held_out: EvaluationPass
    general: EvaluationPass
    eval_steps: int  # between evaluations; 0: only before the first step and at the end
    answer_tokens: int  # longest answer to a probe
    answers_always: bool = True  # at every evaluation, else at the first and the last
    anchored: bool = False  # each step also goes through the base, for kl_anchor

    @property
    def num_evaluations(self) -> int:
        """Before the first step, every `eval_steps`, and at the end; none without anything to measure."""
        documents = len(self.held_out.lengths) + len(self.general.lengths)
        measured = documents + self.answer_tokens
        return number_of_evaluations(self.plan.num_steps, self.eval_steps, measured)

    def rows(self, save_steps: int | str, kept: int) -> Rows:
        """Samples, tokens, steps, checkpoints and evaluations, as names and texts."""
        plan = self.plan
        automatic = save_steps == "auto"
        checkpoints = planned_checkpoints(plan.num_steps, save_steps)
        full = f"{plan.row_tokens:,} tokens, {plan.efficiency:.1%} full"
        return [
            ("samples", f"{len(self.lengths):,} an epoch, {len(self.held_out.lengths):,} held out"),
            ("tokens", f"{plan.num_tokens:,} an epoch, {self.num_targets:,} of them supervised"),
            ("steps", f"{plan.num_steps:,} ({plan.steps_per_epoch:,} an epoch)"),
            ("epochs", f"{plan.passes:.4g}"),
            ("rows", f"{plan.num_rows:,} of {full}"),
            ("checkpoints", f"{'up to ' * automatic}{checkpoints:,}; at most {kept:,} are kept"),
            ("evaluations", _evaluations_text(self.num_evaluations, self.eval_steps)),
        ]


def forecast(
    shape: ModelShape,
    placement: Placement,
    work: Workload,
    *,
    device: torch.device,
    dtype: torch.dtype,
    free: int,
    gradient_checkpointing: str,
    output: OutputSettings,
) -> RunForecast:
    """Everything about a run that is planned but not begun. What does not fit raises no error.

    free: bytes of memory. gradient_checkpointing: as `plan_memory` takes it.
    """
    plan = work.plan
    row = _row_tokens(plan, placement, work.lengths)

    batch_size = plan.rows_per_micro_batch
    memory = plan_memory(shape, placement, batch_size * row, free, gradient_checkpointing)
    most, bare = max(batch_size, plan.num_rows), replace(placement, captured=False)

    def largest(recomputed: int) -> int:
        def total(rows: int) -> float:
            return estimate_memory(shape, bare, rows * row, recomputed=recomputed).total

        return largest_batch(total, free, most) if shape.dims is not None else 0

    speed = device_speed(device, shape.dims, dtype) if shape.dims is not None else None
    checkpoints = planned_checkpoints(plan.num_steps, output.save_steps)
    kept = min(checkpoints, output.save_total_limit + 1)  # the best one may be kept beside them
    return RunForecast(
        work=work.rows(output.save_steps, kept),
        shape=shape,
        memory=memory,
        device=device,
        largest_batches=(largest(0), largest(shape.layers)),
        num_rows=plan.num_rows,
        seconds=speed and run_seconds(shape, work, speed, device.type, memory.recomputed),
        speed=speed.source if speed else "",
        disk_needed=disk_bytes(shape, placement.dtype_bytes, kept),
        disk_free=disk_free(Path(output.output_dir)),
    )


def run_seconds(
    shape: ModelShape, work: Workload, speed: Speed, device_type: str, recomputed: int
) -> tuple[float, float]:
    """The shortest and the longest time of training and evaluations to expect, s."""
    plan, evaluations = work.plan, work.num_evaluations
    answers = answer_cost(work.answer_tokens, device_type, plan.world_size)
    documents = work.lengths, work.num_targets
    epoch = step_flops(shape, *documents, recomputed=recomputed)
    base = work.anchored * arithmetic.forward_flops(shape.dims, *documents)
    passes = (work.held_out, work.general)
    flops = (epoch + base) * plan.num_steps / plan.steps_per_epoch
    flops += evaluations * sum(one.flops(shape) for one in passes)
    answered = evaluations if work.answers_always else min(evaluations, 2)
    flops += answered * answers * epoch / plan.num_tokens
    flops += sum(one.base_flops(shape) for one in passes)
    flops /= plan.world_size
    fixed = plan.num_steps * STEP_SECONDS + evaluations * EVALUATION_SECONDS
    return fixed + flops / speed.highest, fixed + flops / speed.lowest


def planned_checkpoints(num_steps: int, save_steps: int | str) -> int:
    """Checkpoints of a whole run, at most so many where the run decides itself ("auto")."""
    return number_of_checkpoints(num_steps, MIN_SAVE_STEPS if save_steps == "auto" else save_steps)


def number_of_evaluations(num_steps: int, eval_steps: int, measured: int) -> int:
    """Before the first step, every `eval_steps` (0: never), at the end; none if nothing is measured."""
    if not measured:
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


def _row_tokens(plan: StepPlan, placement: Placement, lengths: Sequence[int]) -> int:
    """Tokens of the longest row: of the constant shape, or its capacity if it holds several documents."""
    if placement.compiled:
        return math.ceil(plan.constant_tokens / plan.rows_per_micro_batch)
    packed = plan.num_rows < len(lengths)
    return min(plan.row_tokens, plan.num_tokens) if packed else int(max(lengths))
