"""Where the time goes, and how much of the hardware's peak the training uses.

`StepClock` splits training time into phases and turns counts into rates per interval; evaluation
and saving are left out. `training_flops` counts the arithmetic that the training needs (model
FLOPs: recomputation, padding and element-wise work do not count), `peak_flops` what a GPU can do.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

PHASES = ("data", "forward_backward", "optimizer", "logging")
EXCLUDED = ("evaluation", "saving")
WAITING = "waiting"  # the end of forward_backward: the other ranks' gradients
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Timeline(Protocol):
    """A source of stamps. `ready` may say no for a while: the stamp's moment is not over yet."""

    def stamp(self) -> object: ...
    def ready(self, stamp: object) -> bool: ...
    def seconds(self, start: object, end: object) -> float: ...


class HostTimeline:
    """The process's monotonic clock."""

    def stamp(self) -> float:
        return time.perf_counter()

    def ready(self, stamp: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaTimeline:
    """Events in the current CUDA stream: when the device comes past, not when the host does."""

    def stamp(self) -> object:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ready(self, stamp: object) -> bool:
        return stamp.query()

    def seconds(self, start: object, end: object) -> float:
        return start.elapsed_time(end) / 1000


@dataclass(slots=True)
class _Interval:
    """Seconds per phase (None: training time outside any phase) and counts since the last read."""

    seconds: dict[str | None, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def training_seconds(self) -> float:
        return sum(s for phase, s in self.seconds.items() if phase not in EXCLUDED)

    def own_seconds(self) -> float | None:
        if WAITING not in self.seconds:
            return None
        own = self.seconds.get("data", 0.0) + self.seconds.get("forward_backward", 0.0)
        return own / self.counts["steps"]


class StepClock:
    """Time and rates of training steps.

        with clock.phase("data"): batch = next(batches)
        with clock.phase("forward_backward"): ...
        with clock.phase("optimizer"): optimizer.step()
        clock.count(tokens=…, supervised=…, samples=…, flops=…)      # once per optimizer step
        with clock.phase("logging"): metrics |= clock.read(metrics)

    Time starts with the first phase, so loading the model never counts. A phase inside a phase
    stops the outer one. "evaluation" and "saving" are phases that are no training time; what lies
    between phases is training time of no part, so the parts sum to at most Step_Seconds.

    On the host's timeline (the default) and CUDA, a phase is the time until the host had *queued*
    its work: "forward_backward" is short and the phase that first asks for a result waits for all.
    Sums over an interval that ends with such a wait are right, parts are not. With
    `CudaTimeline()` a phase is the device's time between two events, and "data" or "logging" is
    the time the device stood waiting for them: nothing if they were done while it computed. Neither
    one synchronises: `read` covers the steps that the device has finished.

    `own_seconds`: of a step in the interval last read, this rank's data, forward and backward without
    the wait for other ranks; None where `gradients_are_ready` never said where that wait begins.

    `peak_flops`: of all devices that the counts cover together, or None if unknown.
    """

    def __init__(
        self, *, peak_flops: float | None = None, timeline: Timeline | None = None
    ) -> None:
        self.own_seconds: float | None = None
        self._peak_flops = peak_flops
        self._timeline = timeline if timeline is not None else HostTimeline()
        self._phase: str | None = None
        self._counts: dict[str, float] = {}
        self._marks: deque[tuple[object, str | None, dict[str, float]]] = deque()
        self._last_stamp: object = None
        self._interval = _Interval()
        self._session: dict[str | None, float] = {}  # seconds per phase in all intervals read
        self._energy: dict[str, float] | None = None
        self._tokens_since_energy = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent inside belongs to `name`, one of PHASES or EXCLUDED."""
        assert name in PHASES or name in EXCLUDED, name
        outer = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def gradients_are_ready(self) -> None:
        """From here to the end of the phase this rank only waits for the others."""
        self._enter(WAITING)

    def count(
        self, *, tokens: int, supervised: int, samples: int, flops: float = 0.0, steps: int = 1
    ) -> None:
        """Work done since the last call: real tokens (no padding), those with a label, documents."""
        step = {
            "steps": steps,
            "tokens": tokens,
            "supervised": supervised,
            "samples": samples,
            "flops": flops,
        }
        for name, amount in step.items():
            self._counts[name] = self._counts.get(name, 0) + amount
        self._enter(self._phase)

    def read(self, metrics: Mapping[str, float] | None = None) -> dict[str, float]:
        """`Throughput/…` over the steps finished since the last read; then a new interval starts.

        `metrics`: this step's hardware metrics; their `GPU_*/Energy_J` counters give the energy per
        1,000 tokens (everything drawn since the last such reading, evaluation included). What has
        no step, no time or no known peak behind it is absent.
        """
        if self._last_stamp is not None or self._marks:
            self._enter(self._phase)
        rates: dict[str, float] = {}
        if self._interval.counts:  # else no step has ended yet: its time waits for it
            interval, self._interval = self._interval, _Interval()
            self.own_seconds = interval.own_seconds()
            rates = self._rates(interval) | self._step_parts(interval) | self._shares(interval)
            self._tokens_since_energy += interval.counts["tokens"]
        return rates | self._energy_per_1k_tokens(metrics or {})

    def _enter(self, phase: str | None) -> None:
        """Mark now as the end of the phase so far, with the counts made in it."""
        self._marks.append((self._timeline.stamp(), self._phase, self._counts))
        self._phase, self._counts = phase, {}
        self._settle()

    def _settle(self) -> None:
        """Fold the marks that the timeline has come past into the interval."""
        while self._marks and self._timeline.ready(self._marks[0][0]):
            stamp, phase, counts = self._marks.popleft()
            seconds, totals = self._interval.seconds, self._interval.counts
            if self._last_stamp is not None:
                passed = self._timeline.seconds(self._last_stamp, stamp)
                seconds[phase] = seconds.get(phase, 0.0) + passed
            for name, amount in counts.items():
                totals[name] = totals.get(name, 0) + amount
            self._last_stamp = stamp

    def _rates(self, interval: _Interval) -> dict[str, float]:
        seconds, counts = interval.training_seconds(), interval.counts
        if seconds <= 0:
            return {}
        rates = {
            "Throughput/Tokens_Per_Second": counts["tokens"] / seconds,
            "Throughput/Supervised_Tokens_Per_Second": counts["supervised"] / seconds,
            "Throughput/Samples_Per_Second": counts["samples"] / seconds,
        }
        if self._peak_flops and counts["flops"]:
            used = counts["flops"] / seconds / self._peak_flops
            rates["Throughput/MFU_Percent"] = 100 * used
        return rates

    def _step_parts(self, interval: _Interval) -> dict[str, float]:
        steps, seconds = interval.counts["steps"], dict(interval.seconds)
        if WAITING in seconds:
            waited = seconds.pop(WAITING)
            seconds["forward_backward"] = seconds.get("forward_backward", 0.0) + waited
        parts = {
            f"Throughput/Step_Seconds_{phase.title()}": seconds.get(phase, 0.0) / steps
            for phase in PHASES
        }
        return {"Throughput/Step_Seconds": interval.training_seconds() / steps, **parts}

    def _shares(self, interval: _Interval) -> dict[str, float]:
        """Of all time since the first phase, up to now."""
        for phase, seconds in interval.seconds.items():
            self._session[phase] = self._session.get(phase, 0.0) + seconds
        everything = sum(self._session.values())
        return {
            f"Throughput/{phase.title()}_Percent": 100 * self._session.get(phase, 0.0) / everything
            for phase in EXCLUDED
            if everything > 0
        }

    def _energy_per_1k_tokens(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Needs the same GPUs in two readings; a counter that fell has restarted."""
        energy = {tag: joules for tag, joules in metrics.items() if tag.endswith("/Energy_J")}
        if not energy:
            return {}
        before, tokens = self._energy, self._tokens_since_energy
        self._energy, self._tokens_since_energy = energy, 0.0
        if before is None or before.keys() != energy.keys() or tokens <= 0:
            return {}
        used = [energy[tag] - before[tag] for tag in energy]
        if min(used) < 0:
            return {}
        return {"Throughput/Energy_J_Per_1K_Tokens": 1000 * sum(used) / tokens}


def straggler(seconds: Sequence[float]) -> tuple[float, int]:
    """How far the slowest rank's own time lies above the median of all, %; and which rank it is.

    Own time, because a whole step takes all ranks equally long: the fast ones wait in it.
    """
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    typical = statistics.median(seconds)
    return 100 * (seconds[slowest] - typical) / typical, slowest


# ---- arithmetic ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelDims:
    """Shape of a dense decoder with grouped-query attention and a gated MLP (Qwen3, Llama, …)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear maps of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def linear_parameters(self) -> int:
        """Weights of all layers' linear maps; embedding and head apart."""
        return self.layers * sum(i * o for i, o in self.linear_shapes().values())


def dims_from_config(config: object) -> ModelDims | None:
    """From a Hugging Face model config; None for a model this count does not fit (MoE, GPT-2, …)."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    known = all(isinstance(getattr(config, name, None), int) for name in (*names, "vocab_size"))
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if not known or any(getattr(config, name, None) for name in experts):
        return None
    heads = config.num_attention_heads
    return ModelDims(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
    )


def lora_parameters(dims: ModelDims, r: int, targets: Sequence[str] | str = ALL_LINEAR) -> int:
    """Weights of rank-r adapters on the named linear maps of every layer ("all-linear": all)."""
    names = ALL_LINEAR if targets == "all-linear" else targets
    shapes = dims.linear_shapes()
    return dims.layers * r * sum(sum(shapes[name]) for name in names)


def training_flops(
    dims: ModelDims, lengths: Sequence[int], num_targets: int, *, lora_weights: int | None
) -> int:
    """Model FLOPs of forward and backward over documents of these lengths, one attention each.

    `num_targets`: labelled positions, the only ones the head is computed for. `lora_weights`:
    number of adapter weights over a frozen base (`lora_parameters`); None: all weights are trained.

    A multiply-add is 2. Per token and weight: forward 2, gradient of the input 2, gradient of the
    weight 2 if it is trained; so frozen weights cost 4 and trained ones 6 (the count of Kaplan et
    al. 2020, arXiv 2001.08361, less what LoRA skips). Attention: QKᵀ and PV over the causal half,
    2·heads·head_dim·length² forward and twice that backward, per layer.
    """
    per_weight = 6 if lora_weights is None else 4
    lengths = [int(length) for length in lengths]  # numpy's own integers would overflow
    tokens, square = sum(lengths), sum(length**2 for length in lengths)
    linear = per_weight * dims.linear_parameters() * tokens
    adapters = 6 * (lora_weights or 0) * tokens
    head = per_weight * dims.hidden * dims.vocab * int(num_targets)
    attention = 6 * dims.heads * dims.head_dim * square * dims.layers
    return linear + adapters + head + attention


# Dense tensor-core peak in TFLOP/s, bf16 with fp32 accumulation (fp16 where a GPU has no bf16: V100,
# T4), from NVIDIA's data sheets (the figures "with sparsity" halved). The pattern must fit the whole
# name, so a laptop chip, a vGPU or a MIG instance of a listed board is unknown, as it must be.
_SIZE = r"(?:[ -]\d+GB)?"
_PEAKS = (
    (rf"GB200{_SIZE}", 2500),
    (rf"B200{_SIZE}", 2250),
    (rf"(?:H[128]00|GH200)(?: SXM\d?)?{_SIZE}(?: HBM3e?)", 989.4),
    (rf"(?:H200|H800|GH200){_SIZE}", 989.4),
    (rf"H[12]00 NVL{_SIZE}", 835.5),
    (rf"H[18]00{_SIZE}(?:[ -]PCIe)", 756),
    (rf"H20{_SIZE}(?: HBM3e?)?|H20-3e", 148),
    (rf"A[18]00{_SIZE}(?:[ -](?:SXM\d?|PCIE|PCIe))?{_SIZE}", 312),
    (r"A30", 165),
    (r"A40", 149.7),
    (r"A10", 125),
    (r"A10G", 70),
    (r"L40S", 362),
    (r"L40", 181),
    (r"L4", 121),
    (rf"V100-SXM[23]{_SIZE}(?:-LS)?", 125),
    (rf"V100-PCIE{_SIZE}", 112),
    (r"T4", 65),
    (r"RTX A6000", 154.8),
    (r"RTX 6000 Ada Generation", 364.2),
    (r"RTX 3090", 71),
    (r"RTX 3090 Ti", 80),
    (r"RTX 4090", 165.2),
    (r"RTX 5090", 209.5),
)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s that a GPU of this name (`torch.cuda.get_device_name`) can do; None if not known."""
    name = re.sub(r"^(?:NVIDIA|Tesla|GeForce|Quadro)\s+", "", device_name.strip())
    name = re.sub(r"^(?:Tesla|GeForce)\s+", "", name)
    for pattern, teraflops in _PEAKS:
        if re.fullmatch(pattern, name):
            return teraflops * 1e12
    return None
