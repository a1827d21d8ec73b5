"""Rank, world size, device and the few collectives of a run; rank 0 of 1 without torchrun.

Nothing of ours stands between the script and PyTorch's engine: torchrun sets the environment, this
file reads it once.
"""

import atexit
import inspect
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as torch_distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from errors import UserError
from safe_text import clean_line

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # of a group, by its model's device
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

    def note(self, key: str, value: str) -> None:
        """Rank 0 leaves a word for the groups that torchrun may start after this one."""
        if self.is_main and self.job_store is not None:
            self.job_store.set(f"note/{key}", value)

    def noted(self, key: str) -> str:
        """What rank 0 of this or an earlier group has noted; nothing if it has not."""
        known = self.job_store is not None and self.job_store.check([f"note/{key}"])
        return self.job_store.get(f"note/{key}").decode() if known else ""

    @contextmanager
    def patience(self, what: str) -> Iterator[None]:
        """Work that may take some ranks hours: whoever is through waits for the others while they live.

        The timeout of collectives would end the wait for a rank that is merely slow. Here only silence
        does: each rank gives a sign of life every few seconds, and listens to the one after it.
        `what` names the work, once a run. Raises RuntimeError if that rank is silent for the timeout.
        """
        if self.world_size == 1:
            yield
            return
        sign, through = f"sign/{self.rank}", threading.Event()
        beat = min(5.0, self.timeout_seconds / 4)

        def give_signs() -> None:
            while not through.wait(beat):
                self.group_store.add(sign, 1)

        signs = threading.Thread(target=give_signs, daemon=True)
        signs.start()
        try:
            yield
            self._wait_for_all(f"through/{what}")
        finally:
            through.set()
            signs.join()

    def _wait_for_all(self, counter: str) -> None:
        """Until every rank is here, or the next one gives no sign any more."""
        store, neighbour = self.group_store, (self.rank + 1) % self.world_size
        arrived = store.add(counter, 1)
        last, since = 0, time.monotonic()
        while arrived < self.world_size:
            time.sleep(_POLL_SECONDS)
            arrived, sign = store.add(counter, 0), store.add(f"sign/{neighbour}", 0)
            now = time.monotonic()
            if sign != last:
                last, since = sign, now
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
    if torch_device.type == "cuda":  # what is asked without a device is about this one
        torch.cuda.set_device(torch_device)
    job_store = group_store = None
    if world_size > 1 or torch_distributed.is_torchelastic_launched():
        timeout = timedelta(seconds=timeout_seconds)
        job_store = _job_store(timeout)
        group_store = _newest_group(job_store, rank, world_size, timeout_seconds)
        torch_distributed.init_process_group(
            _BACKENDS.get(torch_device.type, "gloo"),
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
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, usable in there.items() if usable)
    name, _, number = device.partition(":")
    if name not in there or (number and not (name == "cuda" and number.isdecimal())):
        raise UserError(
            f"device is {clean_line(device, 60)!r}, must be auto, cuda, cuda:1, mps or cpu"
        )
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


def leave() -> None:
    """Leave the group after a clean end. After an error the process's exit ends it, not a wait."""
    if _in_group():
        torch_distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """End the process with this exit code; a rank of torchrun's without the interpreter's own end.

    That end now and then aborts a process in which a thread of gloo's or autograd's still holds a tensor
    (pytorch#38228, pytorch#179291): a rank whose work is done would count as failed, and torchrun would
    end the others, which may still be writing.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# -----------------------------------------------------------------------------
# Wrapping


_DDP = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
# Buffers hold no state of the training; torch 2.14 has a new name for not sending them at every step.
_CONSTANT_BUFFERS = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP else "broadcast_buffers": False
}


class Replica(torch.nn.parallel.DistributedDataParallel):
    """DDP whose gradients are summed over ranks when told to, not in the backward pass.

    A rank that runs out of memory in its backward pass would else leave the others waiting for its
    gradients; so all ranks first say how it went (`Distributed.any`). What it costs is the overlap of
    the sum with the arithmetic: with adapters, milliseconds of a step.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module, gradient_as_bucket_view=True, **_CONSTANT_BUFFERS)
        self.buckets: list[torch.Tensor] = []  # flat gradients of this rank, (n,) each
        self.register_comm_hook(self.buckets, _hold_back)


def _hold_back(
    buckets: list[torch.Tensor], bucket: torch_distributed.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: nothing is sent yet."""
    buckets.append(bucket.buffer())
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def parallel_mode(wanted: str, *, trains_all: bool, dtype: torch.dtype, world_size: int) -> str:
    """ "ddp" or "fsdp" for what `--parallel` says, as long as memory decides nothing.

    `auto` shards where all weights are trained: on several ranks, and in bf16 also on one, as FSDP2 is
    what keeps fp32 weights and computes with bf16 copies of them. Raises UserError.
    """
    mixed = trains_all and dtype == torch.bfloat16
    if mixed and wanted == "ddp":
        raise UserError(
            "--parallel ddp trains all weights (--lora-r 0) in fp32 only: use --parallel auto, or "
            "--precision fp32"
        )
    if wanted != "auto":
        return wanted
    return "fsdp" if mixed or (trains_all and world_size > 1) else "ddp"


def parallelize(
    module: torch.nn.Module, mode: str, dist: Distributed, dtype: torch.dtype
) -> torch.nn.Module:
    """The module as all ranks train it: itself (no group), a replica, or FSDP2 shards of itself.

    mode: "ddp" or "fsdp", which makes every decoder layer a unit of its own.
    dtype: under fsdp, the type of frozen weights and of the arithmetic. What is trained is held in fp32:
    adapters, which cast themselves, or all weights, which FSDP2 casts as it gathers them.
    """
    if mode == "fsdp":
        return _shard(module, dist, dtype)
    # A process that trains alone, though it belongs to a group, needs nobody.
    alone = not _in_group() or dist.world_size < torch_distributed.get_world_size()
    return module if alone else Replica(module)


def _in_group() -> bool:
    return torch_distributed.is_available() and torch_distributed.is_initialized()


def _shard(module: torch.nn.Module, dist: Distributed, dtype: torch.dtype) -> torch.nn.Module:
    """Unit by unit, so that no rank ever holds more than its shards and one whole unit."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if dist.device.type not in _BACKENDS:
        raise UserError(
            f"FSDP2 does not run on {dist.device.type}; use --parallel ddp, and with --lora-r 0 also "
            "--precision fp32"
        )
    if not _in_group():  # a process without torchrun is a group of its own
        store = torch_distributed.HashStore()
        backend = _BACKENDS[dist.device.type]
        torch_distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    mesh = torch_distributed.init_device_mesh(dist.device.type, (dist.world_size,))
    casts = {}
    if all(p.requires_grad for p in module.parameters()):
        casts["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in (*decoder_layers(module), module):
        for parameter in unit.parameters():
            held = torch.float32 if parameter.requires_grad else dtype
            if parameter.is_floating_point() and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(held)
        fully_shard(unit, mesh=mesh, **casts)
    return module


def reshard(module: torch.nn.Module) -> None:
    """Let go of what the last forward pass gathered: its parameters are the rank's fp32 shards again.

    Before parameters are read or written; FSDP2 leaves those outside the layers gathered.
    """
    if hasattr(module, "reshard"):
        module.reshard()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered from all ranks, which call together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor that lies as the example does: on its device, this rank's part of it."""
    copy = tensor.to(example.device, copy=True)
    if not isinstance(example, DTensor):
        return copy
    # Every rank has the whole tensor, so nobody has to send it.
    return distribute_tensor(copy, example.device_mesh, example.placements, src_data_rank=None)


def decoder_layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated layers of a decoder: the longest module list inside."""
    lists = [m for m in module.modules() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists, key=len))


def sync_gradients(module: torch.nn.Module, *, is_last: bool) -> AbstractContextManager:
    """Within it, a replica's gradients are only accumulated; the last micro-batch's are ready for all ranks.

    Shards add up theirs after every micro-batch: else each rank would hold those of the whole model.
    """
    return module.no_sync() if isinstance(module, Replica) and not is_last else nullcontext()


def average_gradients(module: torch.nn.Module) -> None:
    """A replica's gradients become their mean over ranks, in place; shards have done it already."""
    if not isinstance(module, Replica):
        return
    world_size = torch_distributed.get_world_size()
    sums = [
        torch_distributed.all_reduce(bucket.div_(world_size), async_op=True)
        for bucket in module.buckets
    ]
    for handle in sums:
        handle.wait()
    module.buckets.clear()
