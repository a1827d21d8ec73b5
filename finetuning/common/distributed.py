"""Rank, world size, device and the few collectives of a run; rank 0 of 1 without torchrun.

Nothing of ours stands between the script and PyTorch's engine: torchrun sets the environment, this
file reads it once.
"""

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as torch_distributed

from finetuning.common.errors import UserError
from finetuning.common.limited import end_with
from finetuning.common.machine import check_device_name, processors

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # of a group, by its model's device
_POLL_SECONDS = 0.2  # between two questions to the store


@dataclass(frozen=True)
class Distributed:
    """This process's place in the group. `device` is where its model lives."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout_seconds: float = 600.0
    local_world_size: int = 1  # ranks on this node
    group_store: torch_distributed.Store | None = None  # this group's
    job_store: torch_distributed.Store | None = None  # of all groups that torchrun's restarts make

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; every rank gets the result."""
        if self.world_size > 1:
            torch_distributed.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag: whether it is true on at least one rank."""
        if self.world_size == 1:
            return list(flags)
        return (self.sum(torch.tensor(flags, dtype=torch.float)) > 0).tolist()  # no device waits

    def flag(self, name: str, raised: bool) -> bool:
        """Whether this rank raises the flag or another one has raised it. No rank waits for any other, so
        each sees it at its own time; a flag stays up."""
        if self.group_store is None:
            return raised
        if raised:
            self.group_store.set(f"flag/{name}", "up")
        return raised or self.group_store.check([f"flag/{name}"])

    def gather(self, value: object) -> list:
        """One picklable value of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        torch_distributed.all_gather_object(values, value)
        return values

    def gather_on_node(self, value: object) -> tuple:
        """One picklable value of every rank of this node, in rank order, on every rank."""
        node = self.rank - self.local_rank  # the number of its first rank
        return tuple(v for other, v in self.gather((node, value)) if other == node)

    def broadcast(self, value: object) -> object:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        torch_distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch_distributed.barrier()

    def put(self, key: str, value: str) -> None:
        """Keep a value for the groups that torchrun may start after this one; only rank 0 writes it."""
        if self.is_main and self.job_store is not None:
            self.job_store.set(f"note/{key}", value)

    def get(self, key: str) -> str:
        """The value that rank 0 of this or an earlier group has put; empty if there is none."""
        known = self.job_store is not None and self.job_store.check([f"note/{key}"])
        return self.job_store.get(f"note/{key}").decode() if known else ""

    @contextmanager
    def wait_alive(self, what: str) -> Iterator[None]:
        """Within it, a rank may work for hours; a rank that is done waits for the others while they live.

        The timeout of collectives would end the wait for a rank that is only slow. Here only silence ends
        it: each rank sends a heartbeat every few seconds, and listens to the rank after it.
        `what` names the work, once a run. Raises RuntimeError if that rank is silent for the timeout.
        """
        if self.world_size == 1:
            yield
            return
        heartbeat, done = f"heartbeat/{self.rank}", threading.Event()
        interval = min(5.0, self.timeout_seconds / 4)

        def beat() -> None:
            while not done.wait(interval):
                self.group_store.add(heartbeat, 1)

        beats = threading.Thread(target=beat, daemon=True)
        beats.start()
        try:
            yield
            self._wait_for_all(f"done/{what}")
        finally:
            done.set()
            beats.join()

    def _wait_for_all(self, counter: str) -> None:
        """Until every rank is here, or the next one gives no sign any more."""
        store, neighbour = self.group_store, (self.rank + 1) % self.world_size
        arrived = store.add(counter, 1)
        last, since = 0, time.monotonic()
        while arrived < self.world_size:
            time.sleep(_POLL_SECONDS)
            arrived, beats = store.add(counter, 0), store.add(f"heartbeat/{neighbour}", 0)
            now = time.monotonic()
            if beats != last:
                last, since = beats, now
            elif now - since > self.timeout_seconds:
                raise RuntimeError(
                    f"rank {neighbour} gave no sign of life for {self.timeout_seconds:g} s"
                )


def init_distributed(device: str = "auto", timeout_seconds: float = 600.0) -> Distributed:
    """Join torchrun's group if there is one. A rank that stays silent ends the group after the timeout."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch_device = pick_device(device, local_rank)
    limit_threads()
    if torch_device.type == "cuda":  # what is asked without a device is about this one
        torch.cuda.set_device(torch_device)
    job_store = group_store = None
    if torch_distributed.is_torchelastic_launched():  # the launcher may be killed
        end_with(os.getppid(), signal.SIGTERM)
    if world_size > 1 or torch_distributed.is_torchelastic_launched():
        timeout = timedelta(seconds=timeout_seconds)
        job_store = _job_store(timeout)
        group_store = _newest_group(job_store, rank, world_size, timeout_seconds)
        torch_distributed.init_process_group(
            BACKENDS.get(torch_device.type, "gloo"),
            store=group_store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    return Distributed(
        rank,
        world_size,
        local_rank,
        torch_device,
        timeout_seconds=timeout_seconds,
        local_world_size=local_world_size,
        group_store=group_store,
        job_store=job_store,
    )


def _job_store(timeout: timedelta) -> torch_distributed.Store:
    """torchrun's key-value store, without the prefix that some versions of torch put before each attempt."""
    store, _, _ = next(iter(torch_distributed.rendezvous("env://", timeout=timeout)))
    while isinstance(store, torch_distributed.PrefixStore):
        store = store.underlying_store
    return torch_distributed.PrefixStore("qwen3-thinking-finetuning", store)


def _newest_group(
    store: torch_distributed.Store, rank: int, world_size: int, timeout_seconds: float
) -> torch_distributed.Store:
    """The part of the job's store that belongs to the ranks that start now.

    A restarted group gets the store of the group before it, with the addresses of ranks that are gone
    (pytorch#135712). Neither may it go by torchrun's restart count, which every node counts for itself:
    the node whose rank died counts, the others do not. So rank 0 opens a new group, every other rank
    enters its name, made up now, into the newest group that it finds, and goes in when rank 0 has read
    that name: in an older group nobody does. Raises RuntimeError when somebody is missing at the timeout.
    """
    deadline = time.monotonic() + timeout_seconds
    name = uuid.uuid4().hex
    if rank == 0:
        group = store.add("groups", 1)
        others = [f"group-{group}/{other}" for other in range(1, world_size)]
        if others:
            store.wait(others, timedelta(seconds=timeout_seconds))
        names = b",".join(store.get(other) for other in others)
        store.set(f"group-{group}/names", names.decode())
        return torch_distributed.PrefixStore(f"group-{group}", store)
    while time.monotonic() < deadline:
        group = store.add("groups", 0)
        store.set(f"group-{group}/{rank}", name)
        names = f"group-{group}/names"
        if store.check([names]) and name in store.get(names).decode():
            return torch_distributed.PrefixStore(f"group-{group}", store)
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"rank 0 did not begin a group within {timeout_seconds:g} s")


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """`auto`: CUDA, else Apple's MPS, else CPU; `cuda`: this rank's GPU; `cuda:1`, `mps`, `cpu`. Raises
    UserError for what is not here."""
    check_device_name(device)
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, usable in there.items() if usable)
    name, _, number = device.partition(":")
    if not there[name]:
        raise UserError(
            f"device {device}: this machine has none that works here (driver, CUDA_VISIBLE_DEVICES, a "
            "torch without it?); leave --device at auto"
        )
    if name != "cuda":
        return torch.device(name)
    index = int(number or local_rank)
    if index >= torch.cuda.device_count():
        raise UserError(
            f"device cuda:{index}: {torch.cuda.device_count()} GPUs are visible; start fewer ranks, or give "
            "another --device"
        )
    return torch.device(name, index)


def limit_threads() -> None:
    """No more threads than processors are ours: torch knows the affinity, but no quota of a container.

    OMP_NUM_THREADS, where a user or torchrun has set it, counts as it is.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), processors()))


def leave() -> None:
    """Leave the group after a clean end. After an error the process's exit ends it, not a wait."""
    if in_group():
        torch_distributed.destroy_process_group()


def in_group() -> bool:
    """Whether this process is one of several ranks, or of a torchrun group of one."""
    return torch_distributed.is_available() and torch_distributed.is_initialized()
