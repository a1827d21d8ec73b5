"""Hardware gauges of one node, sampled beside the training and never waited for.

A source (the GPUs through NVML; the host and the disk through psutil) is a generator that yields
one `{tag: value}` per pass. One daemon thread per source draws from it every interval and folds the
values into a window; `SystemMonitor.read()` takes the window. A call that hangs costs the tags of
its own source, which are then absent. An unknown value is absent, never zero.

MB is 2**20 bytes, GB is 2**30 bytes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from finetuning.common.machine import memory_percent
from finetuning.monitoring.nvml import gpu_samples

MB, GB = 2**20, 2**30
_log = logging.getLogger(__name__)
_COUNTERS = ("Energy_J", "ECC_Corrected", "ECC_Uncorrected", "Disk_Free_GB")

Values = dict[str, float]
Problem = Callable[[str], None]


class SystemMonitor:
    """Samples this node's hardware in the background; `read()` returns in microseconds, always.

    `gpu_uuids`: this run's devices on this node, in the order of their global numbers, which start
    at `first_gpu_index` (see `gpu_uuid`). Empty: NVML is left alone. None:
    whatever CUDA_VISIBLE_DEVICES leaves visible. `disk_path`: any path on the disk to watch.
    `warn` is called from `read()` and `stop()`, once per cause, on the caller's thread.
    """

    def __init__(
        self,
        gpu_uuids: Sequence[str] | None = (),
        disk_path: str | Path = ".",
        interval_s: float = 1.0,
        first_gpu_index: int = 0,
        *,
        warn: Callable[[str], object] = _log.warning,
        stall_s: float = 10.0,
    ) -> None:
        self._warn, self._stall_s = warn, stall_s
        self._warned: set[str] = set()
        self._problems: deque[str] = deque()
        self._window = _Window()
        problem = self._problems.append
        sources = {"host": _host_samples(problem), "disk": _disk_samples(disk_path, problem)}
        if gpu_uuids is None or gpu_uuids:
            sources["NVML"] = gpu_samples(gpu_uuids, first_gpu_index, problem)
        self._samplers = [
            _Sampler(name, source, self._window, interval_s) for name, source in sources.items()
        ]

    def start(self) -> SystemMonitor:
        """Start sampling; the first values come some milliseconds later, rates one pass later."""
        for sampler in self._samplers:
            sampler.start()
        return self

    def read(self) -> Values:
        """Aggregates of the samples since the last read; what has no new sample is absent.

        The tag itself is the mean, and utilisation comes with `_Min` and `_Max` as well; of the
        temperature and the throttle reasons (1: it held at some time, `Throttle_Reasons`: how many
        at once) it is the highest; of counters (energy, ECC errors, free disk) the last value.
        """
        self._report()
        return self._window.take()

    def stop(self, wait_s: float = 1.0) -> None:
        """End sampling. A thread that hangs is left behind; it is a daemon and holds nothing."""
        for sampler in self._samplers:
            sampler.stopping.set()
        deadline = time.monotonic() + wait_s
        for sampler in self._samplers:
            if sampler.is_alive():
                sampler.join(max(0.0, deadline - time.monotonic()))
        self._report()

    def _report(self) -> None:
        for sampler in self._samplers:
            if sampler.stalled_for() > self._stall_s:
                self._problems.append(
                    f"a {sampler.name} call does not return; its metrics are absent until it does"
                )
        while self._problems:
            problem = self._problems.popleft()
            if problem not in self._warned:
                self._warned.add(problem)
                self._warn(problem)


def pressure_level(percent: float) -> int:
    """0 low (< 60% of the device memory in use), 1 moderate (< 80), 2 high (< 90), 3 critical."""
    return sum(percent >= threshold for threshold in (60, 80, 90))


def gpu_uuid(device: object = None) -> str:
    """UUID of a CUDA device (torch's current one by default), without NVML's "GPU-"/"MIG-" prefix."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def gpu_memory(device: object = None) -> Values:
    """`Memory/GPU_*` of one CUDA device (torch's current one by default); empty without CUDA.

    Allocated, Reserved and Peak (highest allocated since the last reading) are torch's own counters, in
    MB; utilisation is the device's memory in use by anybody. Touches counters only, no stream is waited
    for.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info(device)
    percent = 100 * (total - free) / total
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "Memory/GPU_Allocated_MB": torch.cuda.memory_allocated(device) / MB,
        "Memory/GPU_Reserved_MB": torch.cuda.memory_reserved(device) / MB,
        "Memory/GPU_Peak_MB": peak / MB,
        "Memory/GPU_Total_MB": total / MB,
        "Memory/GPU_Utilization_Percent": percent,
        "Memory/Pressure_Level": float(pressure_level(percent)),
    }


# ---- sampling -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Spread:
    count: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    last: float = math.nan

    def add(self, value: float) -> None:
        self.count, self.total, self.last = self.count + 1, self.total + value, value
        self.low, self.high = min(self.low, value), max(self.high, value)

    def finished(self, tag: str) -> Values:
        name = tag.rpartition("/")[2]
        if name in _COUNTERS:
            return {tag: self.last}
        if name.startswith("Throttle_") or name == "Temperature_C":
            return {tag: self.high}
        if name == "Utilization_Percent":
            extremes = {f"{tag}_Min": self.low, f"{tag}_Max": self.high}
            return {tag: self.total / self.count, **extremes}
        return {tag: self.total / self.count}


class _Window:
    """Values since the last `take`; the lock is held for dictionary work only, never over a call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spreads: dict[str, _Spread] = {}

    def add(self, values: Values) -> None:
        with self._lock:
            for tag, value in values.items():
                self._spreads.setdefault(tag, _Spread()).add(value)

    def take(self) -> Values:
        with self._lock:
            spreads, self._spreads = self._spreads, {}
        return {
            name: value
            for tag in sorted(spreads)
            for name, value in spreads[tag].finished(tag).items()
        }


class _Sampler(threading.Thread):
    """Draws one pass per interval from a source until told to stop or the source ends."""

    def __init__(
        self, name: str, source: Iterator[Values], window: _Window, interval_s: float
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.stopping = threading.Event()
        self._source, self._window, self._interval_s = source, window, interval_s
        self._called_at: float | None = None

    def run(self) -> None:
        pause = min(0.2, self._interval_s)  # the second pass comes soon: rates need two
        while not self.stopping.is_set():
            self._called_at = time.monotonic()
            values = next(self._source, None)
            self._called_at = None
            if values is None:
                return
            self._window.add(values)
            self.stopping.wait(pause)
            pause = self._interval_s
        self._source.close()

    def stalled_for(self) -> float:
        """Seconds that the call now in progress has taken; 0 when none is."""
        called_at = self._called_at
        return 0.0 if called_at is None else time.monotonic() - called_at


# ---- host ---------------------------------------------------------------------------------------

_PSUTIL_ERRORS = (psutil.Error, OSError, NotImplementedError, AttributeError)


def _host_samples(problem: Problem) -> Iterator[Values]:
    return _passes(
        {
            "System/CPU_Percent": _cpu_percent(),
            "System/Disk_Read_MBps": _rate(_disk_bytes_read),
            "System/Net_MBps": _rate(_network_bytes),
            "Memory/Host_RSS_MB": _ProcessTree().resident_mb,
            "Memory/Host_Percent": memory_percent,
        },
        problem,
    )


def _disk_samples(path: str | Path, problem: Problem) -> Iterator[Values]:
    """Apart from the host: a network disk that hangs must not take the other gauges along."""
    return _passes({"System/Disk_Free_GB": lambda: psutil.disk_usage(str(path)).free / GB}, problem)


def _passes(gauges: dict[str, Callable[[], float | None]], problem: Problem) -> Iterator[Values]:
    """One pass over the gauges per draw; None is absent, one that this system lacks is given up."""
    while gauges:
        values, missing = {}, []
        for tag, gauge in gauges.items():
            try:
                values[tag] = gauge()
            except _PSUTIL_ERRORS as error:
                missing.append(tag)
                problem(f"{tag} is absent: {type(error).__name__}: {error}")
        gauges = {tag: gauge for tag, gauge in gauges.items() if tag not in missing}
        yield {tag: float(value) for tag, value in values.items() if value is not None}


def _cpu_percent() -> Callable[[], float | None]:
    primed = False

    def percent() -> float | None:
        nonlocal primed
        value = psutil.cpu_percent()
        known, primed = primed, True  # psutil's first answer has no interval behind it
        return value if known else None

    return percent


def _rate(count_bytes: Callable[[], int]) -> Callable[[], float | None]:
    """MB per second between two calls of a byte counter; None when it was not there or restarted."""
    previous: tuple[float, int] | None = None

    def rate() -> float | None:
        nonlocal previous
        before, previous = previous, (time.monotonic(), count_bytes())
        if before is None or previous[1] < before[1] or previous[0] <= before[0]:
            return None
        return (previous[1] - before[1]) / MB / (previous[0] - before[0])

    return rate


def _disk_bytes_read() -> int:
    counters = psutil.disk_io_counters()
    if counters is None:
        raise NotImplementedError("this system counts no disk reads")
    return counters.read_bytes


def _network_bytes() -> int:
    """Bytes in and out over all interfaces but the loopback."""
    interfaces = psutil.net_io_counters(pernic=True)
    if not interfaces:
        raise NotImplementedError("this system shows no network interface")
    return sum(
        counters.bytes_sent + counters.bytes_recv
        for name, counters in interfaces.items()
        if name not in ("lo", "lo0") and not name.startswith("Loopback")
    )


class _ProcessTree:
    """This process and its children. Pages that they share are counted once for each."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._children: list[psutil.Process] = []
        self._next_walk = 0.0

    def resident_mb(self) -> float:
        self._find_children()
        total = self._process.memory_info().rss
        for child in self._children:
            # A child that has ended holds nothing; one of another user's cannot be read.
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += child.memory_info().rss
        return total / MB

    def _find_children(self) -> None:
        """Walks the whole process table, so as seldom as keeps it under 1% of the time."""
        started = time.monotonic()
        if started >= self._next_walk:
            self._children = self._process.children(recursive=True)
            finished = time.monotonic()
            self._next_walk = finished + 100 * (finished - started)
