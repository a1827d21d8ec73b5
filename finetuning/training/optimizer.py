"""One optimizer update: gradients over micro-batches, clipping, learning rate, AdamW.

No function here waits for the device.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from finetuning.common import distributed
from finetuning.config import OptimizerSettings
from finetuning.data.packing import PlannedStep, build_batch, split_micro_batch
from finetuning.data.token_table import TokenizedSamples
from finetuning.model import parallel
from finetuning.model.loss import LossSums
from finetuning.training.captured_step import StaticStep
from finetuning.training.step_clock import StepClock

MicroBatchSums = list[
    tuple[tuple[int, ...], LossSums]
]  # documents of a micro-batch, and their sums

# -----------------------------------------------------------------------------
# Gradients


class OnTheWay:
    """Tensors copied to the host behind the work that is queued now; reading waits for no later work."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        on_cuda = tensors[0].is_cuda
        # On CUDA such a copy goes to page-locked memory, and is there once the event is over.
        self._copies = [tensor.to("cpu", non_blocking=on_cuda) for tensor in tensors]
        self._event = torch.cuda.Event() if on_cuda else None
        if self._event is not None:
            self._event.record()

    def read(self) -> list[np.ndarray]:
        """The values, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return [copy.numpy() for copy in self._copies]


class StepResult:
    """What a step leaves behind: its tensors stay on the device, their values are on the way to the host."""

    def __init__(
        self,
        step: int,
        learning_rate: float,
        planned: PlannedStep,
        sums: MicroBatchSums,
        grad_norm: torch.Tensor,
    ) -> None:
        self.step, self.learning_rate, self.planned = step, learning_rate, planned
        self.sums, self.grad_norm = sums, grad_norm
        parts = [
            tensor
            for _, s in sums
            for tensor in (s.per_document, s.thinking_buckets, s.premature_close)
        ]
        self._numbers = OnTheWay(grad_norm, *parts)

    def read(self) -> tuple[float, list[tuple[tuple[int, ...], list[np.ndarray]]]]:
        """The gradient's norm; documents and (per document, thinking buckets, premature close) of each
        micro-batch, see `LossSums`. Waits for this step, not for the ones behind it."""
        grad_norm, *parts = self._numbers.read()
        return float(grad_norm), [
            (documents, parts[3 * i : 3 * i + 3]) for i, (documents, _) in enumerate(self.sums)
        ]


def forward_backward(
    model: torch.nn.Module,
    planned: PlannedStep,
    tokens: TokenizedSamples,
    dist: distributed.Distributed,
    clock: StepClock,
    *,
    splits: int = 0,
    batch_shape: Mapping[str, int] | None = None,
    captured: StaticStep | None = None,
) -> MicroBatchSums:
    """Gradients of the mean loss over the step's supervised tokens on all ranks.

    Forward and backward over this rank's micro-batches, each halved `splits` times; the gradients are
    summed over ranks in the last one. `batch_shape`: constant sizes for compiled layers. `captured`: does
    the same for batches of that shape with less work for the host.
    """
    results = []
    pieces = micro_batch_pieces(planned, tokens.lengths, splits)
    for index, (documents, weight) in enumerate(pieces):
        with clock.phase("data"):
            batch = build_batch(tokens, documents, **(batch_shape or {}))
            batch = batch if captured else batch.to(dist.device)
        with (
            clock.phase("forward_backward"),
            parallel.sync_gradients(model, is_last=index == len(pieces) - 1),
        ):
            # DDP and FSDP average over ranks; the loss is a mean over the tokens of all ranks.
            scale = weight * dist.world_size
            if captured:
                sums = captured(batch, planned.num_targets, scale)
            else:
                loss, sums = model(batch, planned.num_targets, scale)
                loss.backward()
        if weight:
            results.append((documents, sums))
    return results


def micro_batch_pieces(
    planned: PlannedStep, lengths: np.ndarray, splits: int
) -> list[tuple[tuple[int, ...], float]]:
    """(documents, weight) of this rank's micro-batches, halved `splits` times; fillers weigh 0."""
    own = len(planned.micro_batches) - planned.num_padding_batches
    pieces = [(m, float(i < own)) for i, m in enumerate(planned.micro_batches)]
    for _ in range(splits):
        pieces = [(half, w) for m, w in pieces for half in split_micro_batch(m, lengths)]
    return pieces


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own exception, or what the allocators of the host, of cuBLAS and of the driver say."""
    said = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    said += ("CUDA driver error: out of memory",)  # of segments that grow
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)


def is_compiler_error(error: RuntimeError) -> bool:
    """What torch.compile raises for code that it can't trace, and for a compiler that is not there."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


# -----------------------------------------------------------------------------
# Update


def build_optimizer(
    parameters: Sequence[torch.Tensor],
    *,
    learning_rate: float = 0.0,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; norms and biases, which are vectors, do not decay.

    learning_rate: until `set_learning_rate` gives another.
    """
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [{"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [{"params": matrices}, *vectors] if vectors[0]["params"] else matrices,
        lr=learning_rate,
        betas=betas,
        eps=epsilon,
        weight_decay=weight_decay,
        fused=True,
    )


def learning_rate_at(step: int, num_steps: int, peak: float, settings: OptimizerSettings) -> float:
    """Linear warmup to `peak`, then `cosine`, `linear` or `constant`; step 1 is above zero.

    peak: the learning rate as set, or as resolved by the plan.
    """
    warmup, lowest = math.ceil(settings.warmup_ratio * num_steps - 1e-6), settings.min_lr_ratio
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / max(1, num_steps - warmup)
    courses: dict[str, Callable[[], float]] = {
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": lambda: 1 - progress,
        "constant": lambda: 1.0,
    }
    return peak * (lowest + (1 - lowest) * courses[settings.lr_schedule]())


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give all parameter groups the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(parameters: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """L2 norm of all gradients before clipping to `max_norm` (0: no clipping), fp32 scalar."""
    return parallel.full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))


def update_weights(
    optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor, *, skip: bool = False
) -> None:
    """One AdamW update, left out on the device itself where the gradient is not finite."""
    # The fused kernel reads found_inf and then changes neither weights nor moments nor step counts.
    optimizer.grad_scale = None
    optimizer.found_inf = (
        torch.ones_like(grad_norm) if skip else (~torch.isfinite(grad_norm)).float()
    )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
