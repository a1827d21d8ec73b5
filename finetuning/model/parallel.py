"""The model on several ranks: DDP replicas or FSDP2 shards, and gradients summed over them."""

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as torch_distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from finetuning.common.distributed import BACKENDS, Distributed, in_group
from finetuning.common.errors import UserError

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
    alone = not in_group() or dist.world_size < torch_distributed.get_world_size()
    return module if alone else Replica(module)


def _shard(module: torch.nn.Module, dist: Distributed, dtype: torch.dtype) -> torch.nn.Module:
    """Unit by unit, so that no rank ever holds more than its shards and one whole unit."""
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if dist.device.type not in BACKENDS:
        raise UserError(
            f"FSDP2 does not run on {dist.device.type}; use --parallel ddp, and with --lora-r 0 also "
            "--precision fp32"
        )
    if not in_group():  # a process without torchrun is a group of its own
        store = torch_distributed.HashStore()
        backend = BACKENDS[dist.device.type]
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
    register_fsdp_forward_method(module, "base_rows")
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
    return list(max(lists, key=len, default=()))


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
