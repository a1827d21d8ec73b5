"""GPU readings through NVML, and which GPUs are this run's."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

TRANSIENT_ERRORS_ALLOWED = 5  # in a row, of one metric, before it is given up
THROTTLE_REASONS = {  # nvml.h, nvmlClocksEventReason*; idle and user-set clocks are no throttling
    "SW_Power_Cap": 0x04,
    "HW_Slowdown": 0x08,
    "SW_Thermal": 0x20,
    "HW_Thermal": 0x40,
    "Power_Brake": 0x80,
}
Values = dict[str, float]
Readings = dict[str, float | None]
Problem = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PhysicalGpu:
    """One board as NVML lists it (PCI order), with the UUIDs of its MIG instances."""

    uuid: str
    name: str
    mig: tuple[str, ...] = ()


def resolve_devices(
    mask: str | None, device_order: str | None, gpus: Sequence[PhysicalGpu]
) -> tuple[str, ...] | None:
    """UUIDs selected by CUDA_VISIBLE_DEVICES (`mask`) and CUDA_DEVICE_ORDER, read as CUDA does.

    The list ends at its first invalid entry; an entry given twice makes it empty; a UUID may be
    abbreviated; the number of a board in MIG mode means its first instance. None when numbers
    cannot be told: boards of several models, in CUDA's default order (fastest first).
    """
    if mask is None:
        return tuple(_first_device(gpu) for gpu in gpus)
    entries = [entry.strip() for entry in mask.split(",")]
    if entries[0].startswith(("GPU-", "MIG-")):
        return _by_uuid(entries, gpus)
    if device_order != "PCI_BUS_ID" and len({gpu.name for gpu in gpus}) > 1:
        return None if _leading_number(entries[0]) is not None else ()
    return _by_number(entries, gpus)


def physical_gpus(nvml: ModuleType) -> tuple[PhysicalGpu, ...]:
    """All boards NVML shows, in its own order. Needs an initialised `pynvml`; may raise NVMLError."""
    handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
    return tuple(
        PhysicalGpu(nvml.nvmlDeviceGetUUID(h), nvml.nvmlDeviceGetName(h), _mig_uuids(nvml, h))
        for h in handles
    )


def find_handle(nvml: ModuleType, uuid: str) -> tuple[object, bool] | None:
    """(NVML handle, is it a MIG instance) of a UUID with or without prefix; None if unknown."""
    prefixed = uuid.startswith(("GPU-", "MIG-"))
    for name in (uuid,) if prefixed else (f"GPU-{uuid}", f"MIG-{uuid}"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name), name.startswith("MIG-")
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            continue  # not a device of this kind: try the other prefix
    return None


def _first_device(gpu: PhysicalGpu) -> str:
    return gpu.mig[0] if gpu.mig else gpu.uuid


def _leading_number(entry: str) -> int | None:
    """The number an entry starts with, as C's strtoul: "1gpu" is 1; none, or negative: None."""
    number = re.match(r"\+?\d+", entry)
    return int(number[0]) if number else None


def _by_number(entries: Sequence[str], gpus: Sequence[PhysicalGpu]) -> tuple[str, ...]:
    chosen: list[int] = []
    for entry in entries:
        number = _leading_number(entry)
        if number is None or number >= len(gpus):
            break
        if number in chosen:
            return ()
        chosen.append(number)
    return tuple(_first_device(gpus[number]) for number in chosen)


def _by_uuid(entries: Sequence[str], gpus: Sequence[PhysicalGpu]) -> tuple[str, ...]:
    kind = entries[0][:4]
    known = [uuid for gpu in gpus for uuid in ((gpu.uuid,) if kind == "GPU-" else gpu.mig)]
    chosen: list[str] = []
    for entry in entries:
        matches = [uuid for uuid in known if uuid.startswith(entry)]
        if not entry.startswith(kind) or len(matches) != 1:
            break
        if matches[0] in chosen:
            return ()
        chosen.append(matches[0])
    return tuple(chosen)


def _mig_uuids(nvml: ModuleType, board: object) -> tuple[str, ...]:
    try:
        if nvml.nvmlDeviceGetMigMode(board)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return ()
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return ()  # the board, or the driver, knows no MIG
    uuids = []
    for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(board)):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(board, slot)
        except nvml.NVMLError_NotFound:
            continue  # an empty slot
        uuids.append(nvml.nvmlDeviceGetUUID(instance))
    return tuple(uuids)


# ---- one NVML call each: (nvml, handle) -> readings, None where NVML says "not available" --------
def _number(raw: int, divisor: int = 1) -> float | None:
    unknown = raw in (2**32 - 1, 2**64 - 1)  # NVML_VALUE_NOT_AVAILABLE of both widths
    return None if unknown else raw / divisor


def _utilization(nvml: ModuleType, device: object) -> Readings:
    """Share of time with a kernel running, over the last 1/6 to 1 s; not a measure of efficiency."""
    return {"Utilization_Percent": _number(nvml.nvmlDeviceGetUtilizationRates(device).gpu)}


def _memory(nvml: ModuleType, device: object) -> Readings:
    """Memory that is not free, the driver's own included."""
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    used, total = _number(memory.used), _number(memory.total)
    known = used is not None and total
    return {"Memory_Usage_Percent": 100 * used / total if known else None}


def _temperature_v(nvml: ModuleType, board: object) -> Readings:
    celsius = nvml.nvmlDeviceGetTemperatureV(board, nvml.NVML_TEMPERATURE_GPU)
    return {"Temperature_C": _number(celsius)}


def _temperature(nvml: ModuleType, board: object) -> Readings:
    """The older call, which CUDA 14 drops."""
    celsius = nvml.nvmlDeviceGetTemperature(board, nvml.NVML_TEMPERATURE_GPU)
    return {"Temperature_C": _number(celsius)}


def _temperature_limit(nvml: ModuleType, board: object) -> Readings:
    """Where the hardware starts to slow the clocks; newer boards may not tell."""
    celsius = nvml.nvmlDeviceGetTemperatureThreshold(
        board, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    )
    return {"Temperature_Limit_C": _number(celsius)}


def _power(nvml: ModuleType, board: object) -> Readings:
    return {"Power_W": _number(nvml.nvmlDeviceGetPowerUsage(board), 1000)}


def _energy(nvml: ModuleType, board: object) -> Readings:
    """Millijoules since the driver was loaded; `_Gpu` turns them into joules since the start."""
    return {"Energy_J": _number(nvml.nvmlDeviceGetTotalEnergyConsumption(board))}


def _clock(nvml: ModuleType, board: object) -> Readings:
    return {"SM_Clock_MHz": _number(nvml.nvmlDeviceGetClockInfo(board, nvml.NVML_CLOCK_SM))}


def _throttling(bits: int) -> Readings:
    active = {f"Throttle_{name}": float(bool(bits & bit)) for name, bit in THROTTLE_REASONS.items()}
    return {"Throttle_Reasons": sum(active.values()), **active}


def _event_reasons(nvml: ModuleType, board: object) -> Readings:
    return _throttling(nvml.nvmlDeviceGetCurrentClocksEventReasons(board))


def _throttle_reasons(nvml: ModuleType, board: object) -> Readings:
    """The older driver's name of the same."""
    return _throttling(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(board))


def _ecc_corrected(nvml: ModuleType, board: object) -> Readings:
    kind, span = nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_VOLATILE_ECC
    return {"ECC_Corrected": _number(nvml.nvmlDeviceGetTotalEccErrors(board, kind, span))}


def _ecc_uncorrected(nvml: ModuleType, board: object) -> Readings:
    kind, span = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return {"ECC_Uncorrected": _number(nvml.nvmlDeviceGetTotalEccErrors(board, kind, span))}


# For each metric the ways to read it, best first.
_DEVICE_READERS = {"Utilization_Percent": (_utilization,), "Memory_Usage_Percent": (_memory,)}
_BOARD_READERS = {
    "Temperature_C": (_temperature_v, _temperature),
    "Temperature_Limit_C": (_temperature_limit,),
    "Power_W": (_power,),
    "Energy_J": (_energy,),
    "SM_Clock_MHz": (_clock,),
    "Throttle_Reasons": (_event_reasons, _throttle_reasons),
    "ECC_Corrected": (_ecc_corrected,),
    "ECC_Uncorrected": (_ecc_uncorrected,),
}


# ---- devices ------------------------------------------------------------------------------------
def gpu_samples(
    uuids: Sequence[str] | None, first_index: int, problem: Problem
) -> Iterator[Values]:
    """One pass over the run's GPUs per draw. Ends when NVML is not there, or a GPU is lost."""
    try:
        import pynvml as nvml
    except ImportError as error:
        problem(f"GPU metrics are absent: {error} (install nvidia-ml-py)")
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        problem(f"GPU metrics are absent: NVML does not start: {error}")
        return
    try:
        gpus = _open_gpus(nvml, uuids, first_index, problem)
        while gpus:
            yield _gpu_pass(gpus, problem)
    except nvml.NVMLError as error:
        problem(f"GPU metrics end here: NVML says: {error}")
    finally:
        with contextlib.suppress(nvml.NVMLError):  # a lost driver has nothing left to release
            nvml.nvmlShutdown()


def _open_gpus(
    nvml: ModuleType, uuids: Sequence[str] | None, first_index: int, problem: Problem
) -> list[_Gpu]:
    if uuids is None:
        mask, order = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER")
        uuids = resolve_devices(mask, order, physical_gpus(nvml))
    if uuids is None:
        problem(
            "GPU metrics are absent: CUDA_VISIBLE_DEVICES gives numbers, and with boards of several"
            " models these mean nothing to NVML; set CUDA_DEVICE_ORDER=PCI_BUS_ID or give UUIDs"
        )
        return []
    gpus, boards = [], set()
    for index, uuid in enumerate(uuids, first_index):
        gpu = _open_gpu(nvml, f"GPU_{index}", uuid, boards, problem)
        if gpu is not None:
            gpus.append(gpu)
    return gpus


def _open_gpu(
    nvml: ModuleType, prefix: str, uuid: str, boards: set[str], problem: Problem
) -> _Gpu | None:
    """`boards` collects the boards whose energy is counted already (MIG instances share one)."""
    try:
        found = find_handle(nvml, uuid)
    except nvml.NVMLError as error:
        _raise_if_fatal(nvml, error)
        problem(f"{prefix} is absent: NVML says: {error}")
        return None
    if found is None:
        problem(f"{prefix} is absent: NVML knows no device {uuid}")
        return None
    handle, is_mig = found
    metrics = {name: list(readers) for name, readers in _DEVICE_READERS.items()}
    gpu = _Gpu(nvml, prefix, handle, handle, metrics)
    try:
        if is_mig:
            gpu.board = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            uuid = nvml.nvmlDeviceGetUUID(gpu.board)
    except nvml.NVMLError as error:
        _raise_if_fatal(nvml, error)
        problem(f"{prefix} is a MIG instance whose board cannot be read ({error}): memory only")
        return gpu
    metrics |= {name: list(readers) for name, readers in _BOARD_READERS.items()}
    if uuid in boards:
        del metrics["Energy_J"], metrics["Power_W"]
    boards.add(uuid)
    return gpu


def _gpu_pass(gpus: Sequence[_Gpu], problem: Problem) -> Values:
    values, given_up = {}, {}
    for gpu in gpus:
        values |= gpu.sample(given_up)
    for cause, tags in given_up.items():
        problem(f"NVML says: {cause}: absent from here on: {', '.join(tags)}")
    return values


def _raise_if_fatal(nvml: ModuleType, error: Exception) -> None:
    """After these, further NVML calls fail or hang."""
    if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_UNINITIALIZED):
        raise error


@dataclass(slots=True)
class _Gpu:
    """One device: `own` handle for memory and utilisation, `board` for the rest (MIG differs).

    `readers`: for each metric the ways to read it that are left, best first. None left: given up.
    """

    nvml: ModuleType
    prefix: str
    own: object
    board: object
    readers: dict[str, list[Callable]]
    failures: dict[str, int] = field(default_factory=dict)
    first_millijoules: float | None = None

    def sample(self, given_up: dict[str, list[str]]) -> Values:
        """`GPU_i/…` of one pass; metrics that end here are added to `given_up` by cause."""
        values = {}
        for metric in self.readers:
            values |= self._read(metric, given_up)
        if "Energy_J" in values:
            values["Energy_J"] = self._joules(values["Energy_J"])
        return {f"{self.prefix}/{name}": float(v) for name, v in values.items() if v is not None}

    def _read(self, metric: str, given_up: dict[str, list[str]]) -> Readings:
        handle = self.own if metric in _DEVICE_READERS else self.board
        readers = self.readers[metric]
        while readers:
            try:
                values = readers[0](self.nvml, handle)
                self.failures[metric] = 0
                return values
            except self.nvml.NVMLError as error:
                if not self._is_lasting(metric, error):
                    return {}
                readers.pop(0)
                if not readers and not self._is_normal(metric, error):
                    given_up.setdefault(str(error), []).append(f"{self.prefix}/{metric}")
        return {}

    def _is_lasting(self, metric: str, error: Exception) -> bool:
        """Will asking again be of no use? Raises the error itself if that goes for all of NVML."""
        _raise_if_fatal(self.nvml, error)
        self.failures[metric] = self.failures.get(metric, 0) + 1
        return self.failures[metric] >= TRANSIENT_ERRORS_ALLOWED or error.value in (
            self.nvml.NVML_ERROR_NOT_SUPPORTED,
            self.nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            self.nvml.NVML_ERROR_NO_PERMISSION,
        )

    def _is_normal(self, metric: str, error: Exception) -> bool:
        """Many boards have no ECC memory, or tell no limit: nothing to warn of."""
        optional = ("ECC_Corrected", "ECC_Uncorrected", "Temperature_Limit_C")
        return metric in optional and error.value == self.nvml.NVML_ERROR_NOT_SUPPORTED

    def _joules(self, millijoules: float | None) -> float | None:
        """Since the first sample. The counter is whole millijoules, so differences are exact."""
        if millijoules is None:
            return None
        if self.first_millijoules is None or millijoules < self.first_millijoules:
            self.first_millijoules = millijoules  # the first one, or the driver was loaded again
        return (millijoules - self.first_millijoules) / 1000
