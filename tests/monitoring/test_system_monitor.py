"""The hardware monitor, driven through the real NVML bindings over a fake driver library."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pynvml
import pytest

from finetuning.monitoring import system_monitor
from finetuning.monitoring.alerts import AlertMonitor
from finetuning.monitoring.nvml import (
    TRANSIENT_ERRORS_ALLOWED,
    PhysicalGpu,
    gpu_samples,
    physical_gpus,
    resolve_devices,
)
from finetuning.monitoring.system_monitor import (
    MB,
    SystemMonitor,
    gpu_memory,
    gpu_uuid,
    pressure_level,
)
from tests.helpers import fake_nvml

GPU0, GPU1 = (f"GPU-{n:08x}-0000-0000-0000-000000000000" for n in (1, 2))
MIG00, MIG01 = (f"MIG-00000001-{n:04x}-0000-0000-000000000000" for n in (1, 2))
LASTING = {3: "Not Supported", 13: "Function Not Found", 4: "Insufficient Permissions"}
FATAL = {1: "Uninitialized", 15: "GPU is lost"}
CODES = sorted(pynvml.NVMLError._valClassMapping.keys() - {0})
# NVML call -> what it gives; the calls that have an older twin keep their tag when they fail.
CALLS = {
    "nvmlDeviceGetUtilizationRates": "Utilization_Percent",
    "nvmlDeviceGetMemoryInfo": "Memory_Usage_Percent",
    "nvmlDeviceGetPowerUsage": "Power_W",
    "nvmlDeviceGetTotalEnergyConsumption": "Energy_J",
    "nvmlDeviceGetClockInfo": "SM_Clock_MHz",
}
TWINS = {
    "nvmlDeviceGetTemperatureV": "Temperature_C",
    "nvmlDeviceGetCurrentClocksEventReasons": "Throttle_Reasons",
}
ALL_TAGS = {
    *CALLS.values(),
    *TWINS.values(),
    *(f"Throttle_{r}" for r in ("SW_Power_Cap", "HW_Slowdown", "SW_Thermal", "HW_Thermal")),
    "Throttle_Power_Brake",
    "ECC_Corrected",
    "ECC_Uncorrected",
    "Temperature_Limit_C",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def nvml(library, tmp_path):
    with fake_nvml.installed(library, tmp_path / "state") as state:
        yield state


@pytest.fixture
def monitor(tmp_path):
    """Starts monitors that sample every 10 ms, and stops them before the fake goes away."""
    started = []

    def start(uuids=(), disk_path=tmp_path, **options):
        warnings = []
        monitor = SystemMonitor(uuids, disk_path, 0.01, warn=warnings.append, **options).start()
        started.append(monitor)
        return monitor, warnings

    yield start
    for one in started:
        one.stop(wait_s=10)


def passes(uuids, count=1, first_index=0):
    """The first `count` passes over the GPUs (fewer if the source ends), and what was reported."""
    problems = []
    source = gpu_samples(uuids, first_index, problems.append)
    values = list(itertools.islice(source, count))
    source.close()
    return values, problems


def read_until(monitor, wanted, seconds=20.0):
    """Reads until `wanted(values)`; the deadline is for a failing test only."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        values = monitor.read()
        if wanted(values):
            return values
        time.sleep(0.005)
    raise AssertionError(f"not seen within {seconds} s; last: {values}")


# ---- values -------------------------------------------------------------------------------------


def test_every_gauge_has_the_drivers_value_and_the_global_number(nvml):
    nvml.set({"utilization.1": 37, "memory_used.1": 60 << 30, "temperature.1": 71})
    nvml.set({"power.1": 333500, "clock.1": 1980, "throttle.1": 0x1 | 0x4 | 0x40})
    nvml.set({"ecc_corrected.1": 7, "ecc_uncorrected.1": 2})
    (values,), problems = passes([GPU0, GPU1], first_index=8)
    assert problems == []
    assert values.keys() == {f"GPU_{i}/{tag}" for i in (8, 9) for tag in ALL_TAGS}
    assert {tag: value for tag, value in values.items() if tag.startswith("GPU_9/")} == {
        "GPU_9/Utilization_Percent": 37.0,
        "GPU_9/Memory_Usage_Percent": 75.0,
        "GPU_9/Temperature_C": 71.0,
        "GPU_9/Temperature_Limit_C": 92.0,
        "GPU_9/Power_W": 333.5,
        "GPU_9/Energy_J": 0.0,
        "GPU_9/SM_Clock_MHz": 1980.0,
        "GPU_9/Throttle_Reasons": 2.0,
        "GPU_9/Throttle_SW_Power_Cap": 1.0,
        "GPU_9/Throttle_HW_Slowdown": 0.0,
        "GPU_9/Throttle_SW_Thermal": 0.0,
        "GPU_9/Throttle_HW_Thermal": 1.0,
        "GPU_9/Throttle_Power_Brake": 0.0,
        "GPU_9/ECC_Corrected": 7.0,
        "GPU_9/ECC_Uncorrected": 2.0,
    }
    assert values["GPU_8/Throttle_Reasons"] == 0.0  # idle is no throttling


def test_a_window_has_mean_low_and_high_and_starts_anew_at_every_read():
    window = system_monitor._Window()
    for load, heat, joules in ((10, 60, 5), (90, 70, 9), (80, 80, 14)):
        window.add(
            {
                "GPU_0/Utilization_Percent": load,
                "GPU_0/Temperature_C": heat,
                "GPU_0/Energy_J": joules,
                "GPU_0/Throttle_SW_Thermal": float(heat == 70),
            }
        )
    assert window.take() == {
        "GPU_0/Utilization_Percent": 60.0,
        "GPU_0/Utilization_Percent_Min": 10,
        "GPU_0/Utilization_Percent_Max": 90,
        "GPU_0/Temperature_C": 80,
        "GPU_0/Energy_J": 14,
        "GPU_0/Throttle_SW_Thermal": 1.0,
    }
    assert window.take() == {}


def test_the_monitor_sees_the_extremes_between_two_reads(nvml, monitor):
    nvml.set({"utilization.0": 20})
    running, warnings = monitor([GPU0])
    read_until(running, lambda v: v.get("GPU_0/Utilization_Percent") == 20)
    nvml.set({"utilization.0": 95})
    values = read_until(running, lambda v: v.get("GPU_0/Utilization_Percent_Max") == 95)
    assert (
        20 <= values["GPU_0/Utilization_Percent_Min"] <= values["GPU_0/Utilization_Percent"] <= 95
    )
    assert warnings == []


def test_energy_is_the_exact_difference_of_the_drivers_counter(nvml, monitor):
    start = 2**52 + 12_345
    nvml.set({"energy.0": start})
    running, _ = monitor([GPU0])
    read_until(running, lambda v: v.get("GPU_0/Energy_J") == 0.0)
    nvml.set({"energy.0": start + 123_457})
    values = read_until(running, lambda v: v.get("GPU_0/Energy_J", 0.0) > 0)
    assert values["GPU_0/Energy_J"] == 123.457


def test_energy_never_runs_backwards_when_the_driver_was_loaded_again(nvml):
    source = gpu_samples([GPU0], 0, pytest.fail)
    next(source)
    nvml.set({"energy.0": 1000})
    assert next(source)["GPU_0/Energy_J"] == 0.0
    nvml.set({"energy.0": 3500})
    assert next(source)["GPU_0/Energy_J"] == 2.5
    source.close()


def test_not_available_is_absent(nvml):
    nothing = 2**32 - 1
    nvml.set({"power.0": nothing, "utilization.0": nothing, "memory_used.0": 2**64 - 1})
    nvml.set({"energy.0": 2**64 - 1, "ecc_corrected.0": 2**64 - 1})
    (values,), problems = passes([GPU0])
    absent = {"Power_W", "Utilization_Percent", "Memory_Usage_Percent", "Energy_J", "ECC_Corrected"}
    assert values.keys() == {f"GPU_0/{tag}" for tag in ALL_TAGS - absent}
    assert problems == []


# ---- every error of every call ------------------------------------------------------------------


def test_a_metric_without_support_is_given_up_with_one_warning(nvml, subtests):
    for call in CALLS:
        for code in LASTING:
            nvml.clear()
            with subtests.test(call=call, code=code):
                nvml.set({f"error.{call}": code})
                values, problems = passes([GPU0, GPU1], count=3)
                left = {f"GPU_{i}/{tag}" for i in (0, 1) for tag in ALL_TAGS - {CALLS[call]}}
                assert [v.keys() for v in values] == [left] * 3
                assert len(problems) == 1
                assert LASTING[code] in problems[0]
                assert f"GPU_0/{CALLS[call]}, GPU_1/{CALLS[call]}" in problems[0]


def test_the_older_call_takes_over_silently(nvml, subtests):
    for call in TWINS:
        for code in LASTING:
            nvml.clear()
            with subtests.test(call=call, code=code):
                nvml.set({f"error.{call}": code, "throttle.0": 0x20})
                values, problems = passes([GPU0], count=2)
                assert [v.keys() for v in values] == [{f"GPU_0/{tag}" for tag in ALL_TAGS}] * 2
                assert values[0]["GPU_0/Temperature_C"] == 60.0
                assert values[0]["GPU_0/Throttle_SW_Thermal"] == 1.0
                assert problems == []


def test_a_driver_without_the_newer_symbols(tmp_path_factory, tmp_path):
    old = fake_nvml.build(tmp_path_factory.mktemp("old"), "-DOLD_DRIVER")
    with fake_nvml.installed(old, tmp_path / "state"):
        (values,), problems = passes([GPU0])
    assert values.keys() == {f"GPU_0/{tag}" for tag in ALL_TAGS}
    assert problems == []


def test_a_lost_gpu_ends_the_source_with_one_warning(nvml, subtests):
    for call in [*CALLS, *TWINS, "nvmlDeviceGetTotalEccErrors"]:
        for code in FATAL:
            nvml.clear()
            with subtests.test(call=call, code=code):
                source = gpu_samples([GPU0, GPU1], 0, (problems := []).append)
                assert "GPU_1/Power_W" in next(source)
                nvml.set({f"error.{call}.1": code})
                assert list(source) == []
                assert len(problems) == 1 and FATAL[code] in problems[0]


def test_a_passing_error_costs_its_pass_only(nvml, subtests):
    for call in CALLS:
        for code in [c for c in CODES if c not in LASTING | FATAL]:
            nvml.clear()
            with subtests.test(call=call, code=code):
                tag = f"GPU_0/{CALLS[call]}"
                source = gpu_samples([GPU0], 0, (problems := []).append)
                nvml.set({f"error.{call}": code})
                for _ in range(TRANSIENT_ERRORS_ALLOWED - 1):
                    assert tag not in next(source)
                nvml.set({f"error.{call}": 0})
                assert tag in next(source)
                nvml.set({f"error.{call}": code})
                for _ in range(TRANSIENT_ERRORS_ALLOWED - 1):  # errors count in a row only
                    assert tag not in next(source)
                assert problems == []
                for _ in range(TRANSIENT_ERRORS_ALLOWED + 2):
                    assert tag not in next(source)
                nvml.set({f"error.{call}": 0})
                assert tag not in next(source)  # given up
                assert len(problems) == 1 and tag in problems[0]
                source.close()


def test_nvml_that_does_not_start_is_one_warning(nvml, subtests):
    for code in CODES:
        nvml.clear()
        with subtests.test(code=code):
            nvml.set({"error.nvmlInitWithFlags": code})
            values, problems = passes([GPU0])
            assert values == []
            assert len(problems) == 1 and "does not start" in problems[0]


def test_a_handle_that_cannot_be_had_costs_its_gpu_only(nvml, subtests):
    for code in CODES:
        nvml.clear()
        with subtests.test(code=code):
            nvml.set({"error.nvmlDeviceGetHandleByUUID.1": code})
            values, problems = passes([GPU0, GPU1])
            assert len(problems) == 1
            if code in FATAL:
                assert values == []
            else:
                assert values[0].keys() == {f"GPU_0/{tag}" for tag in ALL_TAGS}


@pytest.mark.parametrize(("code", "warned"), [(3, 0), (4, 1), (13, 1)])
def test_what_many_boards_lack_is_absent_silently(nvml, code, warned):
    nvml.set({"error.nvmlDeviceGetTotalEccErrors": code})
    nvml.set({"error.nvmlDeviceGetTemperatureThreshold": code})
    (values,), problems = passes([GPU0])
    assert not {tag for tag in values if "ECC" in tag or "Limit" in tag}
    assert len(problems) == warned


def test_a_gpu_unknown_to_nvml_leaves_the_numbers_of_the_others(nvml):
    values, problems = passes(["GPU-00000099-dead", GPU1])
    assert {tag.split("/")[0] for tag in values[0]} == {"GPU_1"}
    assert problems == ["GPU_0 is absent: NVML knows no device GPU-00000099-dead"]


def test_a_board_that_drops_off_the_bus(nvml):
    source = gpu_samples([GPU0, GPU1], 0, (problems := []).append)
    next(source)
    nvml.set({"count": 1})  # handles in use stay valid
    assert "GPU_1/Power_W" in next(source)
    source.close()
    values, problems = passes([GPU0, GPU1])
    assert not {tag for tag in values[0] if tag.startswith("GPU_1/")}
    assert len(problems) == 1


# ---- never blocks -------------------------------------------------------------------------------


def of_nvml(warnings: list[str]) -> list[str]:
    """Those of NVML's calls: on a busy machine a call of the host may take longer than `stall_s`, too."""
    return [warning for warning in warnings if "NVML" in warning]


@pytest.mark.parametrize("call", ["nvmlInitWithFlags", "nvmlDeviceGetPowerUsage"])
def test_reads_and_host_metrics_go_on_while_nvml_hangs(nvml, monitor, call):
    nvml.set({f"hang.{call}": 1})
    running, warnings = monitor([GPU0], stall_s=0.05)
    read_until(running, lambda v: of_nvml(warnings))
    for _ in range(3):  # a read that waited for the call would never come back
        values = read_until(running, lambda v: "Memory/Host_RSS_MB" in v)
        assert not {tag for tag in values if tag.startswith("GPU_")}
    assert of_nvml(warnings) == [
        "a NVML call does not return; its metrics are absent until it does"
    ]
    running.stop(wait_s=0.05)  # does not wait for the hanging call either
    nvml.set({f"hang.{call}": 0})


def test_the_gauges_come_back_when_the_call_returns(nvml, monitor):
    running, warnings = monitor([GPU0], stall_s=0.05)
    read_until(running, lambda v: "GPU_0/Power_W" in v)
    nvml.set({"hang.nvmlDeviceGetClockInfo": 1})
    read_until(running, lambda v: of_nvml(warnings))
    nvml.set({"hang.nvmlDeviceGetClockInfo": 0})
    read_until(running, lambda v: "GPU_0/SM_Clock_MHz" in v)
    assert len(of_nvml(warnings)) == 1


def test_a_lost_gpu_leaves_the_host_metrics(nvml, monitor):
    running, warnings = monitor([GPU0, GPU1])
    read_until(running, lambda v: "GPU_1/Power_W" in v)
    nvml.set({"error.nvmlDeviceGetMemoryInfo.1": 15})
    read_until(running, lambda v: warnings)
    for _ in range(3):
        values = read_until(running, lambda v: "Memory/Host_Percent" in v)
    assert not {tag for tag in values if tag.startswith("GPU_")}
    assert len(warnings) == 1 and "GPU is lost" in warnings[0]


def test_warnings_come_on_the_readers_thread(nvml, tmp_path):
    nvml.set({"error.nvmlInitWithFlags": 18})
    threads = []
    running = SystemMonitor(
        [GPU0], tmp_path, 0.01, warn=lambda _: threads.append(threading.current_thread())
    ).start()
    read_until(running, lambda v: threads)
    running.stop()
    assert threads == [threading.current_thread()]


def test_without_gpus_nvml_is_left_alone(nvml, monitor):
    nvml.set({"error.nvmlInitWithFlags": 9})
    running, warnings = monitor(())
    values = read_until(running, lambda v: v.keys() >= {"System/CPU_Percent", "System/Net_MBps"})
    assert not {tag for tag in values if tag.startswith("GPU_")}
    assert warnings == []


def test_a_wild_wall_clock_changes_nothing(nvml, monitor, monkeypatch):
    wild = itertools.cycle([0.0, 4e9, -1e9, float("nan")])
    monkeypatch.setattr(time, "time", lambda: next(wild))
    running, warnings = monitor([GPU0])
    for _ in range(3):
        values = read_until(running, lambda v: v.keys() >= {"System/Net_MBps", "GPU_0/Power_W"})
        assert values["System/Net_MBps"] >= 0
    assert warnings == []


# ---- which GPUs ---------------------------------------------------------------------------------


def test_mig_instances(nvml):
    nvml.set({"mig.0": 2})
    bare = [uuid.removeprefix("MIG-") for uuid in (MIG00, MIG01)]  # as torch gives them
    (values, _), problems = passes(bare, count=2)
    assert values["GPU_0/Memory_Usage_Percent"] == 12.5  # the instance's own
    assert values["GPU_1/Temperature_C"] == 60.0  # the board's
    counted_once = {tag for tag in values if tag.endswith(("/Energy_J", "/Power_W"))}
    assert counted_once == {"GPU_0/Energy_J", "GPU_0/Power_W"}
    assert not {tag for tag in values if "Utilization" in tag}
    assert len(problems) == 1 and "Not Supported" in problems[0]


def test_a_mig_instance_whose_board_is_not_ours(nvml):
    nvml.set({"mig.0": 1, "error.nvmlDeviceGetDeviceHandleFromMigDeviceHandle": 4})
    (values,), problems = passes([MIG00])
    assert values == {"GPU_0/Memory_Usage_Percent": 12.5}
    assert sum("MIG instance" in problem for problem in problems) == 1


ONE_MODEL = (PhysicalGpu("GPU-aa1", "A"), PhysicalGpu("GPU-aa2", "A"), PhysicalGpu("GPU-b", "A"))
TWO_MODELS = (PhysicalGpu("GPU-aa1", "A"), PhysicalGpu("GPU-b", "B"))
WITH_MIG = (PhysicalGpu("GPU-aa1", "A", ("MIG-x", "MIG-y")), PhysicalGpu("GPU-b", "A"))


def test_the_mask_is_read_as_cuda_reads_it(subtests):
    for mask, order, gpus, chosen in [
        (None, None, ONE_MODEL, ("GPU-aa1", "GPU-aa2", "GPU-b")),
        ("", None, ONE_MODEL, ()),
        ("1,0", None, ONE_MODEL, ("GPU-aa2", "GPU-aa1")),
        (" 2 , 0", None, ONE_MODEL, ("GPU-b", "GPU-aa1")),
        ("1gpu2,2ampere", None, ONE_MODEL, ("GPU-aa2", "GPU-b")),
        ("0,-1,1", None, ONE_MODEL, ("GPU-aa1",)),
        ("0,7,1", None, ONE_MODEL, ("GPU-aa1",)),
        ("1,1", None, ONE_MODEL, ()),
        ("NoDevFiles", None, ONE_MODEL, ()),
        ("GPU-b,GPU-aa1", None, ONE_MODEL, ("GPU-b", "GPU-aa1")),
        ("GPU-b,GPU-aa", None, ONE_MODEL, ("GPU-b",)),  # two boards start so: not valid
        ("GPU-b,GPU-b", None, ONE_MODEL, ()),
        ("GPU-b,0", None, ONE_MODEL, ("GPU-b",)),
        ("GPU-zz", None, ONE_MODEL, ()),
        ("0", None, TWO_MODELS, None),  # fastest first: which one that is, NVML cannot say
        ("0", "FASTEST_FIRST", TWO_MODELS, None),
        ("1", "PCI_BUS_ID", TWO_MODELS, ("GPU-b",)),
        ("", None, TWO_MODELS, ()),
        ("GPU-b", None, TWO_MODELS, ("GPU-b",)),
        (None, None, TWO_MODELS, ("GPU-aa1", "GPU-b")),
        ("MIG-y,MIG-x", None, WITH_MIG, ("MIG-y", "MIG-x")),
        ("MIG-y,GPU-b", None, WITH_MIG, ("MIG-y",)),
        ("0", None, WITH_MIG, ("MIG-x",)),
        ("0", None, (), ()),
    ]:
        with subtests.test(mask=mask):
            assert resolve_devices(mask, order, gpus) == chosen


def test_the_boards_as_nvml_lists_them(nvml):
    nvml.set({"mig.1": 2, "model.1": 200, "error.nvmlDeviceGetMigMode.0": 3})
    pynvml.nvmlInit()
    mig = tuple(f"MIG-00000002-{n:04x}-0000-0000-000000000000" for n in (1, 2))
    assert physical_gpus(pynvml) == (
        PhysicalGpu(GPU0, "Fake Model 100"),
        PhysicalGpu(GPU1, "Fake Model 200", mig),
    )
    pynvml.nvmlShutdown()


def test_numbers_over_boards_of_two_models_are_not_guessed(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    nvml.set({"model.1": 200})
    values, problems = passes(None)
    assert values == []
    assert len(problems) == 1 and "PCI_BUS_ID" in problems[0]


PROGRAM = """
import json, sys, time
from finetuning.monitoring.system_monitor import SystemMonitor
warnings = []
monitor = SystemMonitor(None, ".", 0.01, warn=warnings.append).start()
values, deadline = {}, time.monotonic() + 20
def done():
    return "System/CPU_Percent" in values and (warnings or "GPU_0/Power_W" in values)
while not done() and time.monotonic() < deadline:
    values |= monitor.read()
    time.sleep(0.01)
monitor.stop()
print(json.dumps([values, warnings]))
"""


def run_program(library_folder: Path, **environment):
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "LD_LIBRARY_PATH": str(library_folder), **environment},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.mark.slow
def test_the_library_found_by_the_loader_and_a_mask_in_reverse(library, tmp_path):
    state = fake_nvml.State(tmp_path / "state")
    state.set({"power.0": 100_000, "power.1": 200_000})
    values, warnings = run_program(
        library.parent, FAKE_NVML_STATE=str(tmp_path / "state"), CUDA_VISIBLE_DEVICES="1,0"
    )
    assert (values["GPU_0/Power_W"], values["GPU_1/Power_W"]) == (200.0, 100.0)
    assert warnings == []


@pytest.mark.slow
def test_a_broken_or_missing_library_is_one_warning(tmp_path):
    (tmp_path / "libnvidia-ml.so.1").write_text("no library\n")
    values, warnings = run_program(tmp_path)
    assert "System/CPU_Percent" in values
    assert not {tag for tag in values if tag.startswith("GPU_")}
    assert warnings == [
        "GPU metrics are absent: NVML does not start: NVML Shared Library Not Found"
    ]


# ---- host ---------------------------------------------------------------------------------------


def test_host_values_agree_with_psutil(monitor, tmp_path):
    running, warnings = monitor()
    wanted = {"System/CPU_Percent", "System/Disk_Free_GB", "Memory/Host_RSS_MB", "System/Net_MBps"}
    values = read_until(running, lambda v: v.keys() >= wanted)
    assert 0 <= values["System/CPU_Percent"] <= 100
    assert 0 < values["Memory/Host_Percent"] <= 100
    free = psutil.disk_usage(str(tmp_path)).free / 2**30
    assert values["System/Disk_Free_GB"] == pytest.approx(free, rel=0.2)
    resident = psutil.Process().memory_info().rss / 2**20
    assert values["Memory/Host_RSS_MB"] > 0.5 * resident
    assert (
        warnings == [] or "System/Disk_Read_MBps" in warnings[0]
    )  # a container may hide its disks


@pytest.mark.slow
def test_resident_memory_counts_the_children():
    tree = system_monitor._ProcessTree()
    alone = tree.resident_mb()
    program = "x = b'x' * 2**26; print(flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        child.stdout.readline()
        tree._next_walk = 0.0
        assert tree.resident_mb() > alone + 60
        child.kill()
    assert tree.resident_mb() < alone + 60  # a child that has ended holds nothing


def test_rates_need_two_readings_and_a_counter_that_rises(monkeypatch):
    clock, counter = [100.0], [0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    rate = system_monitor._rate(lambda: counter[0])
    assert rate() is None
    clock[0], counter[0] = 102.0, 6 * 2**20
    assert rate() == 3.0
    clock[0], counter[0] = 103.0, 2**20  # wrapped, or an interface has gone
    assert rate() is None
    clock[0] = 104.0
    assert rate() == 0.0


def test_the_first_cpu_reading_is_absent():
    percent = system_monitor._cpu_percent()
    assert percent() is None
    assert isinstance(percent(), float)


def test_what_the_system_lacks_is_absent_with_one_warning_each(monitor, monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    monkeypatch.delattr(psutil, "net_io_counters")
    running, warnings = monitor(disk_path=tmp_path / "gone")
    values = {}
    for _ in range(3):
        values |= read_until(running, lambda v: "System/CPU_Percent" in v)
    assert values.keys() == {"System/CPU_Percent", "Memory/Host_RSS_MB", "Memory/Host_Percent"}
    missing = sorted(warning.split(" is absent")[0] for warning in warnings)
    assert missing == ["System/Disk_Free_GB", "System/Disk_Read_MBps", "System/Net_MBps"]


# ---- device memory, and a real GPU --------------------------------------------------------------


def test_pressure_levels():
    percents = (0, 59.9, 60, 79.9, 80, 89.9, 90, 100)
    assert [pressure_level(p) for p in percents] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_device_memory_is_absent_without_cuda_and_true_with_it():
    import torch

    if not torch.cuda.is_available():
        assert gpu_memory() == {}
        return
    block = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    memory = gpu_memory()
    assert memory["Memory/GPU_Allocated_MB"] >= 64
    assert memory["Memory/GPU_Peak_MB"] >= memory["Memory/GPU_Allocated_MB"]
    torch.empty(2**28, dtype=torch.uint8, device="cuda")  # a peak, over when it is read
    peaks = [gpu_memory()["Memory/GPU_Peak_MB"] for _ in range(2)]
    assert peaks[0] >= 256 + 64 and peaks[1] < peaks[0] - 200
    assert 0 < memory["Memory/GPU_Utilization_Percent"] <= 100
    assert memory["Memory/Pressure_Level"] == pressure_level(
        memory["Memory/GPU_Utilization_Percent"]
    )
    del block


def test_the_peak_of_device_memory_is_that_since_the_last_reading(monkeypatch):
    """On any machine: torch.cuda with counters of ours, and what the alert makes of them."""
    import torch

    counters = {"now": 40, "peak": 79}
    fake = {
        "is_available": lambda: True,
        "mem_get_info": lambda device: (32 * MB, 80 * MB),
        "memory_allocated": lambda device: counters["now"] * MB,
        "memory_reserved": lambda device: 48 * MB,
        "max_memory_allocated": lambda device: counters["peak"] * MB,
        "reset_peak_memory_stats": lambda device: counters.update(peak=counters["now"]),
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    alerts, seen = AlertMonitor(), []
    for step in range(3):
        memory = gpu_memory()
        alerts.observe(step, memory)
        seen.append((memory["Memory/GPU_Peak_MB"], alerts.scalars().get("Alerts/OOM_Risk", 0.0)))
    assert seen == [(79, 1), (40, 0), (40, 0)]


def test_the_real_gpu(monitor):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here; the fake driver stands in for it above")
    running, _ = monitor((gpu_uuid(),))
    values = read_until(running, lambda v: "GPU_0/Temperature_C" in v and "GPU_0/Power_W" in v)
    assert 0 < values["GPU_0/Temperature_C"] < 120
    assert 0 <= values["GPU_0/Memory_Usage_Percent"] <= 100
