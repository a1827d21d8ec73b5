"""Forward and backward pass of a micro-batch as one CUDA graph: the host launches one thing, not thousands.

A layer of a few thousand tokens is over sooner than Python and the driver can launch its kernels; at
rows of 2,048 tokens the GPU stood idle half of the time. A graph is launched at once, with the same
kernels in the same order on the same addresses. So everything that differs between micro-batches lies in
buffers that stay: the batch, the scale of its loss, the gradients and the sums.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from finetuning.data.packing import PackedBatch
from finetuning.model.cuda_graph import recorded
from finetuning.model.flops import ModelDims
from finetuning.model.loss import LossSums

LAUNCH_SECONDS = 3.7e-3  # of the host, for a layer's passes, whatever the row: 133 ms for 36
RATE = 350e12  # FLOP/s of a layer's passes on an H100: 86 ms for 2,048 tokens of Qwen3-4B, 315 for 8,192
ROOM = 2  # for GPUs twice as fast, or hosts half as fast


def hides_launches(dims: ModelDims, tokens: int) -> bool:
    """Whether a GPU is at a micro-batch for so long that a graph, which takes memory, brings nothing.

    By the products with the frozen matrices, 4 operations a weight and token; attention and head come on
    top.
    """
    busy = 4 * dims.linear_parameters() * tokens / RATE
    return busy > ROOM * dims.layers * LAUNCH_SECONDS


def why_not_captured(
    model: torch.nn.Module,
    *,
    device: torch.device,
    compiled: bool,
    alone: bool,
    sharded: bool,
    anchored: bool = False,
) -> str:
    """Why the passes of this model are not captured; empty if they can be.

    compiled: layers are, which also makes all micro-batches one shape. alone: no other rank wants the
    gradients. anchored: every micro-batch also goes through the base.
    """
    dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    packed = any(type(m).__module__.startswith("bitsandbytes") for m in model.modules())
    reasons = {
        "there is no CUDA device": device.type != "cuda",
        "layers are not compiled, so that each micro-batch has a shape of its own": not compiled,
        "weights are gathered during the passes": sharded,
        "ranks exchange gradients": not alone,
        "dropout draws random numbers": dropout,
        "the base goes along, for kl_anchor": anchored,
        "weights are unpacked from 4 bits": packed,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


class StaticStep:
    """The passes of a micro-batch over buffers that stay, run kernel by kernel: what the graph records.

    Args:
        model: `PackedLossModel` in training mode.
        parameters: those that get gradients; none has one yet.
        example: a batch of the one shape, on the host.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Sequence[torch.nn.Parameter],
        example: PackedBatch,
        device: torch.device,
    ) -> None:
        assert all(p.grad is None for p in parameters), "gradients would be added to"
        self._model, self._parameters = model, list(parameters)
        self._bytes = example.pinned_bytes().to(device)
        most = len(example.cu_seqlens) - 1  # documents; those behind a batch's own have no target
        self._batch = replace(example.views(self._bytes), documents=(-1,) * most)
        self._scale = torch.ones((), dtype=torch.float32, device=device)
        self._sums = torch.empty(0)  # those of the last run, flat
        self._shapes: list[torch.Size] = []
        self._gradients: list[torch.Tensor | None] = []  # those of the last run
        self._totals: list[torch.Tensor | None] = []  # over several micro-batches

    def __call__(self, batch: PackedBatch, num_targets: int, scale: float) -> LossSums:
        """Add the gradients of `scale * loss sum / num_targets` to the parameters; the sums of the batch."""
        self._bytes.copy_(batch.pinned_bytes(), non_blocking=True)
        self._scale.fill_(scale / num_targets)
        adds = self._keep_gradients()
        self._run()
        if adds:
            torch._foreach_add_(_there(self._totals), _there(self._gradients))
        self._hand_out(self._totals if adds else self._gradients)
        return self._sums_of(len(batch.documents))

    def passes(self) -> None:
        """Forward and backward over the buffers; leaves new gradients and sums in others."""
        for parameter in self._parameters:
            parameter.grad = None
        loss, sums = self._model(self._batch, 1, self._scale)
        loss.backward()
        parts = (sums.per_document, sums.thinking_buckets, sums.premature_close)
        self._shapes = [part.shape for part in parts]
        self._sums = torch.cat([part.flatten() for part in parts])
        self._gradients = [parameter.grad for parameter in self._parameters]

    def _run(self) -> None:
        self.passes()

    def _keep_gradients(self) -> bool:
        """Before a further micro-batch of a step: its gradients will lie where those of the first do."""
        held = [parameter.grad for parameter in self._parameters]
        if not _there(held):
            return False
        if not self._totals:
            self._totals = [None if g is None else torch.empty_like(g) for g in held]
        if _there(held)[0] is not _there(self._totals)[0]:
            torch._foreach_copy_(_there(self._totals), _there(held))
        return True

    def _hand_out(self, gradients: Sequence[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _let_go(self) -> None:
        """Free what the last run left: the parameters' gradients and the sums."""
        self._hand_out([None] * len(self._parameters))
        self._gradients, self._sums = [], torch.empty(0)

    def _sums_of(self, num_documents: int) -> LossSums:
        """A copy that the next run leaves alone."""
        parts = self._sums.clone().split([shape.numel() for shape in self._shapes])
        per_document, *others = (p.view(s) for p, s in zip(parts, self._shapes, strict=True))
        return LossSums(per_document[:num_documents], *others)


def _there(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


class CapturedStep(StaticStep):
    """The same, recorded once and replayed. Raises RuntimeError where that can't be done.

    `peak_bytes`: the most memory in use while it was recorded; a replay uses the same, which the
    allocator's counters do not see.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Sequence[torch.nn.Parameter],
        example: PackedBatch,
        device: torch.device,
    ) -> None:
        super().__init__(model, parameters, example, device)
        stream = torch.cuda.Stream(device)
        self._warm_up(stream)
        torch.cuda.reset_peak_memory_stats(device)
        self._graph = recorded(self.passes, stream)
        self.peak_bytes = torch.cuda.max_memory_allocated(device)
        self._hand_out([None] * len(self._parameters))

    def _warm_up(self, stream: torch.cuda.Stream) -> None:
        """Once on the stream of the capture, for workspaces and kernels that are made at first use."""
        torch.cuda.empty_cache()  # the other stream's activations, which this one can't use
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.passes()
        self._let_go()
        torch.cuda.current_stream().wait_stream(stream)

    def _run(self) -> None:
        self._graph.replay()
