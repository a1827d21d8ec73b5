"""What the hardware monitor and the step clock cost: `uv run python -m benchmarks.hardware_monitor`.

Processor time of one sampling pass (one per second in a run), of `read()` while NVML answers and
while it hangs, and of the step clock per training step. NVML is the tests' fake library, which opens
a file at every call, so the GPU pass is an upper bound for the Python side only.
"""

import statistics
import tempfile
import time
from pathlib import Path

import psutil

from finetuning.monitoring import system_monitor
from finetuning.monitoring.nvml import gpu_samples
from finetuning.training.step_clock import StepClock
from tests.helpers import fake_nvml

GPUS = [f"GPU-{n:08x}-0000-0000-0000-000000000000" for n in range(1, 9)]


def cpu_microseconds(call, times: int = 200) -> float:
    call()
    started = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - started) / times * 1e6


def read_microseconds(monitor: system_monitor.SystemMonitor, times: int = 200) -> str:
    """Wall time of `read()`: median and maximum."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        monitor.read()
        seconds.append(time.perf_counter() - started)
        time.sleep(0.01)
    return f"median {statistics.median(seconds) * 1e6:.0f} us, max {max(seconds) * 1e6:.0f} us"


def clock_step(clock: StepClock) -> None:
    for phase in ("data", "forward_backward", "optimizer"):
        with clock.phase(phase):
            pass
    clock.count(tokens=1, supervised=1, samples=1)


def main() -> None:
    host = system_monitor._host_samples(print)
    clock = StepClock()
    print(
        f"host pass, {len(psutil.pids())} processes: {cpu_microseconds(lambda: next(host)):.0f} us"
    )
    print(f"step clock, per step: {cpu_microseconds(lambda: clock_step(clock), 2000):.0f} us")
    with tempfile.TemporaryDirectory() as folder:
        library = fake_nvml.build(Path(folder))
        with fake_nvml.installed(library, Path(folder) / "state") as state:
            state.set({"count": 8})
            source = gpu_samples(GPUS, 0, print)
            print(f"pass over 8 GPUs: {cpu_microseconds(lambda: next(source), 50):.0f} us")
            source.close()
            monitor = system_monitor.SystemMonitor(GPUS, folder, 0.05).start()
            print("read():", read_microseconds(monitor))
            state.set({"hang.nvmlDeviceGetPowerUsage": 1})
            print("read() while NVML hangs:", read_microseconds(monitor))
            state.set({"hang.nvmlDeviceGetPowerUsage": 0})
            monitor.stop(wait_s=10)


if __name__ == "__main__":
    main()
