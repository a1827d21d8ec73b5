"""The step clock: time per phase and rates of training steps."""

from __future__ import annotations

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


class Stopwatch:
    """Seconds that were spent within it, in all."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> Stopwatch:
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


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
