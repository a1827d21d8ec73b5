"""The machine: names of its devices, and the share of processors and memory that this process may use.

A job gets a share of a node through its scheduler or its container: a set of processors, and limits of
control groups (v1 or v2) at any level above it. What the machine as a whole has is not ours.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line

PROC = Path("/proc/self")
USUAL_MOUNT = Path(
    "/sys/fs/cgroup"
)  # looked at in any case: what a container binds there has no type
_ESCAPED = re.compile(r"\\([0-7]{3})")  # blanks, line ends and backslashes in the list of mounts
_UNLIMITED = 2**60  # bytes; v1 writes a number near 2**63 where there is no limit
# Version of control groups -> files of limits, file of the usage, prefix in memory.stat of what counts
# the groups below, too. Beyond memory.high a process is slowed down until it hardly moves.
_MEMORY_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
    2: (("memory.max", "memory.high"), "memory.current", ""),
}
# Of version 1's memory.stat: the tightest limit of the group and of all above it, also of those that a
# container does not see.
_ABOVE = "hierarchical_memory_limit"
# Of memory.stat: file pages that the kernel takes back before a limit is felt.
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")


def check_device_name(device: str) -> None:
    """Raise UserError for what names no device; whether it is here, only torch can say (`pick_device`)."""
    if not re.fullmatch(r"auto|mps|cpu|cuda:?|cuda:[0-9]+", device):
        raise UserError(
            f"device is {clean_line(device, 60)!r}, must be auto, cuda, cuda:1, mps or cpu"
        )


@dataclass(frozen=True)
class MemoryLimit:
    """A limit of a control group that this process lives in, bytes."""

    limit: int
    used: int  # without pages that can be taken back

    @property
    def percent(self) -> float:
        """Share of the limit that is used."""
        return 100 * self.used / self.limit

    @property
    def room(self) -> int:
        """What can still be taken."""
        return max(0, self.limit - self.used)


def processors(proc: Path | None = None) -> int:
    """Processors that this process may use: those of its affinity, and no more than a quota pays for."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in processor_quotas(proc)]
    return max(1, min([allowed, *quotas]))


def processor_quotas(proc: Path | None = None) -> list[float]:
    """Processors that control groups give, one number for each level with a limit."""
    found = []
    for version, folder in _levels(proc or PROC, "cpu"):
        if version == 2:
            limit, _, period = _text(folder / "cpu.max").partition(" ")
        else:
            limit, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if limit.isdigit() and period.isdigit() and int(limit) and int(period):
            found.append(int(limit) / int(period))
    return found


def memory_limits(proc: Path | None = None) -> list[MemoryLimit]:
    """Limits of control groups on memory, one for each level with a limit."""
    found = []
    for version, folder in _levels(proc or PROC, "memory"):
        limits, usage, prefix = _MEMORY_FILES[version]
        statistics = _numbers(folder / "memory.stat")
        texts = [_text(folder / name) for name in limits]
        known = [int(text) for text in texts if text.isdigit()]
        known += [statistics[_ABOVE]] if _ABOVE in statistics else []
        limit, used = min(known, default=0), _text(folder / usage)
        if used.isdigit() and 0 < limit < _UNLIMITED:
            back = sum(statistics.get(prefix + name, 0) for name in _RECLAIMABLE)
            found.append(MemoryLimit(limit, max(0, int(used) - back)))
    return found


def available_memory(proc: Path | None = None) -> int:
    """Bytes that this process can still take: of the host, and of every limit above it."""
    return min([psutil.virtual_memory().available, *(m.room for m in memory_limits(proc))])


def memory_percent(proc: Path | None = None) -> float:
    """Memory in use, %, of the host or of the limit above this process that is fullest."""
    return max([psutil.virtual_memory().percent, *(m.percent for m in memory_limits(proc))])


# -----------------------------------------------------------------------------
# Control groups


def _levels(proc: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of the group of a controller and of all groups above it that can be seen."""
    places, seen, mounts = _memberships(proc), set(), [*_mounts(proc, controller)]
    usual = [(2, USUAL_MOUNT, "/"), (1, USUAL_MOUNT / controller, "/")]
    told = {mount.resolve() for _, mount, _ in mounts}
    for version, mount, root in [*mounts, *(u for u in usual if u[1].resolve() not in told)]:
        place = places.get(controller if version == 1 else "", root)
        inside = _relative(place, root)
        if inside is None:  # what is mounted there is another group
            continue
        # A container sees its own group as the root of the mount; the path may be that of the host.
        folder = mount.joinpath(inside) if (mount / inside).is_dir() else mount
        while (version, folder) not in seen:
            seen.add((version, folder))
            yield version, folder
            if folder == mount:
                break
            folder = folder.parent


def _memberships(proc: Path) -> dict[str, str]:
    """Controller -> path of this process's group; v2 has no controller, its name is empty."""
    places = {}
    for line in _text(proc / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        places |= dict.fromkeys(controllers.split(","), path)
    return places


def _mounts(proc: Path, controller: str) -> Iterator[tuple[int, Path, str]]:
    """(version, mount point, root of the mount within the hierarchy) of where a controller is mounted."""
    for line in _text(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 5 or kinds[0] not in ("cgroup", "cgroup2"):
            continue
        if kinds[0] == "cgroup" and controller not in kinds[-1].split(","):
            continue
        root, point = (_ESCAPED.sub(lambda c: chr(int(c[1], 8)), name) for name in fields[3:5])
        yield (2 if kinds[0] == "cgroup2" else 1), Path(point), root


def _relative(path: str, root: str) -> str | None:
    """`path` as seen from `root`; None where it lies outside."""
    root = root.rstrip("/")
    if path != root and not path.startswith(f"{root}/"):
        return None
    parts = path.removeprefix(root).strip("/")
    return "" if ".." in parts.split("/") else parts


def _numbers(path: Path) -> dict[str, int]:
    """A group's memory.stat."""
    lines = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}


def _text(path: Path) -> str:
    """What a file of the kernel says; empty where there is none, or it is not for us."""
    try:
        return os.fsdecode(path.read_bytes()).strip()
    except OSError:
        return ""
