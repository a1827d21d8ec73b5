"""The share of the machine: limits of control groups at every level, in trees of files like the kernel's.

uv run pytest tests/common/test_machine.py
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetuning.common import distributed, machine
from finetuning.monitoring import system_monitor
from finetuning.training.memory_estimate import free_memory

GIB = 2**30


def write(folder: Path, **files: str) -> None:
    """Files of a group; a dot in a name is written as two underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n", encoding="utf-8")


def second_version(tmp_path: Path, group: str = "/job/step/task", root: str = "/") -> Path:
    """/proc/self of a process in a group of version 2; the hierarchy lies in `cgroup`."""
    escapes = {" ": "\\040", "\t": "\\011", "\\": "\\134"}
    point = "".join(escapes.get(letter, letter) for letter in str(tmp_path / "cgroup"))
    mount = f"30 25 0:26 {root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw"
    write(tmp_path / "proc", cgroup=f"0::{group}", mountinfo=mount)
    return tmp_path / "proc"


def first_version(tmp_path: Path, group: str = "/slurm/job_1/step_0", root: str = "/") -> Path:
    """The same of version 1: a hierarchy for memory, and one for processors."""
    mounts = "\n".join(
        f"3{i} 25 0:2{i} {root} {tmp_path}/cgroup/{name} rw - cgroup cgroup rw,{name}"
        for i, name in enumerate(("cpu,cpuacct", "memory"))
    )
    groups = f"4:memory:{group}\n3:cpu,cpuacct:{group}\n1:name=systemd:/\n0::/"
    write(tmp_path / "proc", cgroup=groups, mountinfo=mounts)
    return tmp_path / "proc"


@pytest.fixture(autouse=True)
def sixteen_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)), raising=False)
    monkeypatch.setattr(machine, "USUAL_MOUNT", Path("/nothing/is/here"))
    host = SimpleNamespace(available=48 * GIB, percent=25.0)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: host)


def test_without_limits_it_is_the_affinity_and_the_host(tmp_path: Path):
    for proc in (tmp_path / "nothing", second_version(tmp_path), first_version(tmp_path)):
        assert machine.processors(proc) == 16
        assert machine.available_memory(proc) == 48 * GIB
        assert machine.memory_percent(proc) == 25.0


@pytest.mark.parametrize("level", ["", "job", "job/step", "job/step/task"])
def test_a_limit_of_version_2_counts_at_every_level(tmp_path: Path, level: str):
    folder = tmp_path / "a space" / "cgroup"
    proc = second_version(tmp_path / "a space")
    for inner in ("", "job", "job/step", "job/step/task"):
        write(folder / inner, cpu__max="max 100000", memory__max="max", memory__current="5")
    stat = f"anon 1\ninactive_file {GIB}\nactive_file {GIB}"
    write(folder / level, cpu__max="250000 100000", memory__max=str(8 * GIB), memory__stat=stat)
    write(folder / level, memory__current=str(6 * GIB))
    assert machine.processors(proc) == 3
    assert machine.available_memory(proc) == 4 * GIB, "file pages can be taken back"
    assert machine.memory_percent(proc) == 50.0


@pytest.mark.parametrize("level", ["", "slurm", "slurm/job_1", "slurm/job_1/step_0"])
def test_a_limit_of_version_1_counts_at_every_level(tmp_path: Path, level: str):
    proc, none = first_version(tmp_path), str(2**63 - 4096)
    for inner in ("", "slurm", "slurm/job_1", "slurm/job_1/step_0"):
        cpu, memory = tmp_path / "cgroup/cpu,cpuacct", tmp_path / "cgroup/memory"
        write(cpu / inner, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
        usage = {"memory__usage_in_bytes": str(3 * GIB)}
        write(memory / inner, memory__limit_in_bytes=none, **usage)
    write(cpu / level, cpu__cfs_quota_us="50000")
    write(memory / level, memory__limit_in_bytes=str(4 * GIB))
    assert machine.processors(proc) == 1, "half a processor is one"
    assert machine.available_memory(proc) == GIB
    assert machine.memory_percent(proc) == 75.0


def test_the_tightest_of_several_limits_counts(tmp_path: Path):
    proc = second_version(tmp_path)
    write(tmp_path / "cgroup/job", cpu__max="400000 100000", memory__max=str(8 * GIB))
    write(tmp_path / "cgroup/job", memory__current=str(7 * GIB))
    write(tmp_path / "cgroup/job/step", cpu__max="800000 100000", memory__max=str(4 * GIB))
    write(tmp_path / "cgroup/job/step", memory__current=str(GIB), memory__high=str(3 * GIB))
    write(tmp_path / "cgroup/job/step/task")
    assert machine.processors(proc) == 4
    assert machine.available_memory(proc) == GIB
    assert [limit.limit for limit in machine.memory_limits(proc)] == [3 * GIB, 8 * GIB]


@pytest.mark.parametrize("make", [first_version, second_version])
def test_a_container_that_is_named_as_the_host_names_it(tmp_path: Path, make):
    """Without a name space of its own, a container's group is the root of its mount."""
    proc = make(tmp_path, group="/docker/abc", root="/docker/abc")
    limits = {"cpu__max": "200000 100000", "memory__max": str(GIB), "memory__current": "0"}
    write(tmp_path / "cgroup", **limits)
    old = {"memory__limit_in_bytes": str(GIB), "memory__usage_in_bytes": "0"}
    write(tmp_path / "cgroup/memory", **old)
    write(tmp_path / "cgroup/cpu,cpuacct", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    assert machine.processors(proc) == 2 and machine.available_memory(proc) == GIB


def test_a_limit_above_a_container_of_version_1_is_in_its_statistics(tmp_path: Path):
    """A pod's limit, of which the container sees the number and not the group."""
    proc = first_version(tmp_path, group="/kubepods/pod/c", root="/kubepods/pod/c")
    usage = {"memory__limit_in_bytes": str(2**63 - 4096), "memory__usage_in_bytes": str(2 * GIB)}
    stat = f"cache 0\nhierarchical_memory_limit {4 * GIB}\ntotal_inactive_file {GIB}\nodd x\nof 5 6"
    write(tmp_path / "cgroup/memory", **usage, memory__stat=stat)
    assert machine.available_memory(proc) == 3 * GIB and machine.memory_percent(proc) == 25.0
    write(tmp_path / "cgroup/memory", memory__stat=f"hierarchical_memory_limit {2**63 - 4096}")
    assert machine.memory_limits(proc) == []


@pytest.mark.parametrize("make", [first_version, second_version])
@pytest.mark.parametrize("group", ["/docker/def", "/docker/abcd", "/docker", "/"])
@pytest.mark.parametrize("usual", [False, True])
def test_what_is_mounted_of_another_group_is_not_ours(
    tmp_path: Path, monkeypatch, make, group: str, usual: bool
):
    proc = make(tmp_path, group=group, root="/docker/abc")
    if usual:
        monkeypatch.setattr(machine, "USUAL_MOUNT", tmp_path / "cgroup")
    write(tmp_path / "cgroup", cpu__max="200000 100000")
    old = {"memory__limit_in_bytes": str(GIB), "memory__usage_in_bytes": "0"}
    if make is second_version:
        write(tmp_path / "cgroup", memory__max=str(GIB), memory__current="0")
    else:
        (tmp_path / "cgroup/cpu.max").unlink()
        write(tmp_path / "cgroup/memory", **old)
        write(tmp_path / "cgroup/cpu,cpuacct", cpu__cfs_quota_us="9", cpu__cfs_period_us="9")
    assert machine.memory_limits(proc) == [] and machine.processor_quotas(proc) == []


@pytest.mark.parametrize("name", ["控制组", "a b\\c\td", "naïve"])
def test_mounts_have_any_name(tmp_path: Path, name: str):
    folder = tmp_path / name
    proc = second_version(folder, group="/任务")
    limits = {"cpu__max": "200000 100000", "memory__max": str(GIB), "memory__current": "0"}
    write(folder / "cgroup/任务", **limits)
    assert machine.processors(proc) == 2 and machine.available_memory(proc) == GIB


def test_the_usual_mount_counts_without_a_word_about_it(tmp_path: Path, monkeypatch):
    """What a container binds there is no mount of control groups, to the list of mounts."""
    monkeypatch.setattr(machine, "USUAL_MOUNT", tmp_path / "usual")
    limits = {"cpu__max": "100000 100000", "memory__max": str(GIB), "memory__current": "0"}
    write(tmp_path / "usual", **limits)
    nothing = tmp_path / "proc"
    assert machine.processors(nothing) == 1 and machine.available_memory(nothing) == GIB
    (tmp_path / "usual" / "memory.max").unlink()
    old = {"memory__limit_in_bytes": str(2 * GIB), "memory__usage_in_bytes": "0"}
    write(tmp_path / "usual" / "memory", **old)
    assert machine.available_memory(nothing) == 2 * GIB


def test_a_quota_binds_the_threads_of_torch_but_not_a_users_own_number(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(distributed, "processors", lambda: 1)
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        distributed.limit_threads()
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        distributed.limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_plan_and_the_monitor_see_the_limits(tmp_path: Path, monkeypatch):
    proc = second_version(tmp_path)
    limits = {"memory__max": str(4 * GIB), "memory__current": str(3 * GIB)}
    write(tmp_path / "cgroup/job/step/task", **limits)
    monkeypatch.setattr(machine, "PROC", proc)
    assert free_memory(torch.device("cpu")) == GIB
    assert free_memory(torch.device("cpu"), ranks=2) == GIB // 2, "the ranks of a host share it"
    values = next(system_monitor._host_samples(lambda problem: None))
    assert values["Memory/Host_Percent"] == 75.0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux has affinities")
def test_a_job_with_one_processor_of_many_starts_one_worker():
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.cpu_count = lambda: 64\n"
        "from finetuning.common.machine import processors; print(processors())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["1"], done.stderr
