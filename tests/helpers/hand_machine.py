"""A machine whose clock, host and GPUs say what a test tells them; what reads them is the program's own."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from finetuning.monitoring import system_monitor
from finetuning.monitoring.system_monitor import SystemMonitor
from tests.helpers.fake_nvml import State

MB = 2**20


class HandTime:
    """Stands in for the module `time`: it moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now

    perf_counter = time = monotonic


@dataclass(frozen=True)
class Reading:
    """What one look at the machine finds; the counters of bytes only rise."""

    seconds: float  # since the look before
    cpu_percent: float
    memory_percent: float
    resident: int  # bytes, of this process
    of_children: Sequence[int]
    disk_free: int  # bytes
    disk_bytes: int  # read since the look before
    net_bytes: tuple[
        int, int
    ]  # received and sent since the look before, and as many in the loopback
    nvml: Mapping[str, int] = field(default_factory=dict)  # lines of the fake driver


class HandHost:
    """psutil's functions over a reading."""

    def __init__(self) -> None:
        self.now: Reading | None = None
        self.disk_bytes, self.received, self.sent = 10**9, 10**8, 10**7

    def look(self, reading: Reading) -> None:
        self.now = reading
        self.disk_bytes += reading.disk_bytes
        self.received += reading.net_bytes[0]
        self.sent += reading.net_bytes[1]

    def module(self) -> SimpleNamespace:
        """What the monitor imports as psutil."""
        own = SimpleNamespace(
            memory_info=lambda: SimpleNamespace(rss=self.now.resident), children=self._children
        )
        return SimpleNamespace(
            cpu_percent=lambda: self.now.cpu_percent,
            disk_usage=lambda path: SimpleNamespace(free=self.now.disk_free),
            disk_io_counters=lambda: SimpleNamespace(read_bytes=self.disk_bytes),
            net_io_counters=lambda pernic: {
                "eth0": SimpleNamespace(bytes_sent=self.sent, bytes_recv=self.received),
                "lo": SimpleNamespace(bytes_sent=7 * self.sent, bytes_recv=self.received),
            },
            Process=lambda: own,
            NoSuchProcess=psutil.NoSuchProcess,
            AccessDenied=psutil.AccessDenied,
        )

    def _children(self, recursive: bool) -> list[SimpleNamespace]:
        assert recursive
        sizes = self.now.of_children
        return [
            SimpleNamespace(memory_info=lambda size=size: SimpleNamespace(rss=size))
            for size in sizes
        ]


class HandMonitor(SystemMonitor):
    """The program's monitor without its threads: before each read it takes the looks that are due."""

    def __init__(self, looks: Iterator[Sequence[Reading]], machine: "HandMachine", gpus=()) -> None:
        super().__init__(gpus, Path("."), warn=pytest.fail)
        self._looks, self._machine = looks, machine

    def start(self) -> "HandMonitor":
        return self

    def read(self) -> dict[str, float]:
        self._machine.reads += 1
        for reading in next(self._looks):
            self._machine.look(reading)
            for sampler in self._samplers:
                self._window.add(next(sampler._source))
        return super().read()


class HandMachine:
    """Host and GPUs; installed while the monitors that are made read it."""

    def __init__(self, looks: Sequence[Sequence[Reading]], nvml: State | None = None) -> None:
        self._looks, self._nvml = iter(looks), nvml
        self.host, self.time = HandHost(), HandTime()
        self.reads = 0

    def look(self, reading: Reading) -> None:
        self.time.spend(reading.seconds)
        self.host.look(reading)
        if self._nvml is not None:
            self._nvml.set(dict(reading.nvml))

    def monitor(self, gpus: Sequence[str] = ()) -> HandMonitor:
        return HandMonitor(self._looks, self, gpus)

    @contextlib.contextmanager
    def installed(self) -> Iterator["HandMachine"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(system_monitor, "psutil", self.host.module())
            # The limits of the container in which the tests run are nobody's here.
            patch.setattr(system_monitor, "memory_percent", lambda: self.host.now.memory_percent)
            patch.setattr(system_monitor, "time", self.time)
            yield self
