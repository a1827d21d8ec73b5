"""Which GPUs belong to this run, named by UUID, the only name that CUDA and NVML share.

CUDA numbers devices fastest first and through CUDA_VISIBLE_DEVICES; NVML numbers them in PCI order
and ignores the mask. An index of one is never an index of the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType


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
