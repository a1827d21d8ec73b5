"""The training engine: the model on all ranks, its optimizer, and measures when memory runs out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from finetuning.common import distributed
from finetuning.common.errors import RunStopped
from finetuning.config import OptimizerSettings
from finetuning.data.packing import PlannedStep, build_batch
from finetuning.data.token_table import TokenizedSamples
from finetuning.model import adapters as model_adapters
from finetuning.model import loading, saving
from finetuning.model import parallel as model_parallel
from finetuning.model.flops import dims_of, forward_flops, training_flops
from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.loss import CROSS_ENTROPY, Objective
from finetuning.model.packed_model import PackedLossModel, Way
from finetuning.training.captured_step import CapturedStep, why_not_captured
from finetuning.training.checkpoint import Tensors, optimizer_tensors, restore_optimizer
from finetuning.training.optimizer import (
    MicroBatchSums,
    build_optimizer,
    clip_gradients,
    forward_backward,
    is_compiler_error,
    is_out_of_memory,
    micro_batch_pieces,
    set_learning_rate,
    update_weights,
)
from finetuning.training.state import TrainState
from finetuning.training.step_clock import StepClock

Result = TypeVar("Result")


@dataclass(frozen=True)
class Execution:
    """How the model is held on the ranks and run."""

    parallel: str  # "ddp" or "fsdp", see `parallel.parallelize`
    dtype: torch.dtype  # of frozen weights and of the arithmetic
    batch_shape: Mapping[str, int] = field(
        default_factory=dict
    )  # constant sizes; empty: not compiled
    must_compile: bool = False  # layers that can't be compiled end the run
    recomputed_layers: int = 0  # the first ones: their activations are made again, not kept
    may_recompute: bool = False  # all layers may be, once memory runs out
    no_graph: str = ""  # why a step is no CUDA graph though it could be one
    fp8: bool = False  # products with frozen matrices are made in FP8 in training
    way: Way = "packed"  # how documents go through the decoder
    objective: Objective = CROSS_ENTROPY  # of training


@dataclass(frozen=True)
class _Trouble:
    """What kept a rank from a step's gradients, with the error's words."""

    full: str = ""  # memory ran out
    broken: str = ""  # layers can't be compiled
    stuck: bool = False  # no further measure is left

    @property
    def any(self) -> bool:
        return bool(self.full or self.broken)


class TrainingEngine:
    """Weights, their gradients and updates; the same on one device, as replicas and as shards.

    Args:
        model: of `loading.load_model`, with adapters or all weights trained.
        close_id: token id of `</think>`, see `PackedLossModel`.
        execution: how the model is held and run.
        optimizer: of AdamW.
        warn: told what is done about a lack of memory.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        close_id: int,
        dist: distributed.Distributed,
        execution: Execution,
        optimizer: OptimizerSettings,
        warn: Callable[[str], None],
    ) -> None:
        parallel, dtype = execution.parallel, execution.dtype
        self._model, self._dist, self._parallel, self._dtype = model, dist, parallel, dtype
        self._must_compile, self.warn = execution.must_compile, warn
        self.batch_shape = execution.batch_shape
        self._may_recompute = execution.may_recompute
        self.recomputes_all = False  # as memory ran out
        joins = False if parallel == "fsdp" else None
        enable_fast_lora(model, join=joins, fp8=execution.fp8)
        self.packed = PackedLossModel(model, close_id, execution.way, execution.objective)
        if self.batch_shape:
            self.packed.compile_layers()
        self.wrapped = model_parallel.parallelize(self.packed, parallel, dist, dtype).train()
        impossible = why_not_captured(
            model,
            device=dist.device,
            compiled=bool(self.batch_shape),
            alone=self.wrapped is self.packed,
            sharded=parallel == "fsdp",
            anchored=bool(execution.objective.kl_anchor),
        )
        self.not_captured = impossible or execution.no_graph
        self.captured: CapturedStep | None = None
        self._is_warm = False  # a step has been made kernel by kernel: all are compiled and chosen
        # By the model's own names, whatever wraps it.
        self._named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self._named.values())
        self.optimizer = build_optimizer(
            self.parameters,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            epsilon=optimizer.adam_epsilon,
            weight_decay=optimizer.weight_decay,
        )
        self.num_trainable, self.num_parameters = loading.parameter_counts(model)
        self._dims, self._anchored = dims_of(model), bool(execution.objective.kl_anchor)

    def flops(self, lengths: np.ndarray, num_targets: int) -> float:
        """Arithmetic of training on documents of these lengths, and of the base's pass over them for
        kl_anchor; 0 for an unknown architecture."""
        if self._dims is None:
            return 0
        trains_all = self.num_trainable == self.num_parameters
        adapters = None if trains_all else self.num_trainable
        training = training_flops(self._dims, lengths, num_targets, lora_weights=adapters)
        return training + self._anchored * forward_flops(self._dims, lengths, num_targets)

    # -------------------------------------------------------------------------
    # One step

    def forward_backward(
        self,
        planned: PlannedStep,
        tokens: TokenizedSamples,
        clock: StepClock,
        state: TrainState,
        wants_stop: Callable[[], bool],
    ) -> tuple[MicroBatchSums, bool]:
        """The step's gradients, the mean over all ranks, and its sums; and whether a rank wants to stop.

        Out of memory, or layers that can't be compiled, on one rank: all ranks take the next measure and
        repeat the step; the global batch, and so the loss, stays the same. Shards can't agree in the middle
        of a step: there the run ends, to be resumed with other settings. Raises RunStopped.
        """
        if self._is_warm and not (self.captured or self.not_captured):
            self._capture(planned, tokens)
        while True:
            sums, trouble = self._passes(planned, tokens, clock, state)
            if self._parallel == "fsdp" and trouble.any:
                raise _stopped_run(state.step + 1, trouble)
            with clock.phase("forward_backward"):
                if self._dist.world_size > 1 and self._parallel == "ddp":
                    clock.gradients_are_ready()
                # One message for all that ranks must agree on: a step waits for no other one.
                too_large, uncompiled, stuck, stops = self._dist.any(
                    bool(trouble.full), bool(trouble.broken), trouble.stuck, wants_stop()
                )
                if not (too_large or uncompiled):
                    model_parallel.average_gradients(self.wrapped)
                    self._is_warm = True
                    return sums, stops
            if stuck:
                raise _stopped_run(state.step + 1, trouble)
            sums = []  # what this rank holds of the step is made anew
            if too_large:
                self._reduce_memory(state)
            else:
                self._stop_compiling()
                reason = trouble.broken or "on another rank"
                self.warn(f"layers can't be compiled, training goes on without: {reason}")
            self.optimizer.zero_grad(set_to_none=True)
            # A backward pass that broke off leaves a replica unusable.
            self.wrapped = model_parallel.parallelize(self.packed, "ddp", self._dist, self._dtype)
            if self._dist.device.type == "cuda":
                torch.cuda.empty_cache()

    def _passes(
        self,
        planned: PlannedStep,
        tokens: TokenizedSamples,
        clock: StepClock,
        state: TrainState,
    ) -> tuple[MicroBatchSums, _Trouble]:
        """This rank's passes over its micro-batches; without sums where there was trouble."""
        splits = state.micro_batch_splits
        try:
            sums = forward_backward(
                self.wrapped,
                planned,
                tokens,
                self._dist,
                clock,
                splits=splits,
                batch_shape=self.batch_shape,
                captured=self.captured,
            )
            return sums, _Trouble()
        except RuntimeError as error:
            if is_out_of_memory(error):
                pieces = micro_batch_pieces(planned, tokens.lengths, splits)
                smallest = all(len(documents) == 1 for documents, _ in pieces)
                stuck = smallest and not self._may_recompute
                return [], _Trouble(full=_reason(error), stuck=stuck)
            if is_compiler_error(error):
                return [], _Trouble(broken=_reason(error), stuck=self._must_compile)
            raise

    def update(
        self, learning_rate: float, *, max_grad_norm: float, skip: bool = False
    ) -> torch.Tensor:
        """Clip, and update the weights unless the gradient is not finite or `skip`; no wait for the device.

        Returns the gradient's L2 norm before clipping, a scalar on the device.
        """
        set_learning_rate(self.optimizer, learning_rate)
        grad_norm = clip_gradients(self.parameters, max_grad_norm)
        update_weights(self.optimizer, grad_norm, skip=skip)
        return grad_norm

    def _capture(self, planned: PlannedStep, tokens: TokenizedSamples) -> None:
        """Make one CUDA graph of a micro-batch's passes; steps go on without where that fails."""
        example = build_batch(tokens, planned.micro_batches[0], **self.batch_shape)
        device = self._dist.device
        try:
            self.captured = CapturedStep(self.packed, self.parameters, example, device)
        except RuntimeError as error:
            self.not_captured = _reason(error)
        if self.not_captured:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.warn(f"no CUDA graph, kernels are launched one by one: {self.not_captured}")

    # -------------------------------------------------------------------------
    # When memory runs out

    def release_graph(self, reason: str = "") -> bool:
        """Let go of the graph and the memory it holds; true if there was one.

        With a reason kernels are launched one by one from here on; without, the next step makes it anew.
        """
        had_one, self.captured = self.captured is not None, None
        self.not_captured = self.not_captured or reason
        if had_one:
            torch.cuda.empty_cache()
        return had_one

    def beside_graph(self, work: Callable[[], Result]) -> Result:
        """What `work` returns; where its memory runs out it is done again with what the graph held.

        A graph holds what the passes of a step use, also in between.
        """
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.captured is None:
                raise
        self.release_graph()  # behind the handler, whose error keeps what was there
        return work()

    def _reduce_memory(self, state: TrainState) -> None:
        """From here on, on all ranks: activations are made again in the backward pass; then smaller parts."""
        if self._may_recompute:
            state.recomputes = True
            measure = "activations are now made again in the backward pass (gradient checkpointing)"
        else:
            state.micro_batch_splits += 1
            measure = f"micro-batches are now done in {2**state.micro_batch_splits} parts"
            measure += ", without compilation" if self.batch_shape else ""
        self.apply_memory_measures(state)
        self.warn(
            f"step {state.step + 1}: out of memory; {measure}, the global batch and the loss stay the same"
        )

    def apply_memory_measures(self, state: TrainState) -> None:
        """Apply the measures that the state names: those of now, or of before a resume."""
        if state.recomputes and self._may_recompute:
            loading.recompute_activations(self._model)
            self.recomputes_all, self._may_recompute = True, False
        if self._parallel == "fsdp":  # its ranks gather weights as often as one another
            state.micro_batch_splits = 0
        if state.recomputes or state.micro_batch_splits:
            self.release_graph("memory was short: activations are made again, or parts are smaller")
        if state.micro_batch_splits:  # their shapes are not the compiled one, each is its own
            self._stop_compiling()

    def _stop_compiling(self) -> None:
        """The layers run as they are written from here on."""
        self.release_graph("layers are not compiled")
        if self.batch_shape:
            self.batch_shape = {}
            torch.compiler.set_stance("force_eager")

    # -------------------------------------------------------------------------
    # Saving and going back

    def tensors(self) -> dict[str, Tensors]:
        """Trained weights and the optimizer's moments for a checkpoint, as they lie."""
        model_parallel.reshard(self.wrapped)
        names = {parameter: name for name, parameter in self._named.items()}
        return {
            "adapter_model": model_adapters.adapter_state(self._model),
            "optimizer": optimizer_tensors(self.optimizer, names),
        }

    def documents(self) -> dict[str, dict[str, Any]]:
        """What belongs beside the tensors of a checkpoint: the adapter's configuration."""
        return model_adapters.adapter_documents(self._model)

    def restore(self, tensors: Mapping[str, Tensors], state: TrainState) -> None:
        """Weights and moments of a checkpoint, and what its run had learned about memory."""
        model_parallel.reshard(self.wrapped)
        model_adapters.load_adapter_state(self._model, tensors["adapter_model"])
        moments = tensors.get("optimizer", {})  # before the first step there are none
        restore_optimizer(self.optimizer, self._named, moments)
        self.apply_memory_measures(state)

    def save(self, directory: Path, tokenizer: Any, notes: Mapping[str, str]) -> None:
        """Write the adapter with its tokenizer, whole or not at all; `notes`: see `save_adapter`."""
        model_parallel.reshard(self.wrapped)
        options = {"notes": notes, "dtype": self._dtype, "writes": self._dist.is_main}
        saving.save_adapter(self._model, tokenizer, directory, **options)


def _reason(error: RuntimeError) -> str:
    """The first line of what it says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _stopped_run(step: int, trouble: _Trouble) -> RunStopped:
    """The error that ends a run without a further measure, with this rank's reason if it has one."""
    if trouble.broken:
        return RunStopped(f"the layers can't be compiled: {trouble.broken}. Use --compile off")
    return RunStopped(
        f"step {step}: out of memory ({trouble.full or 'on another rank'}). Lower --batch-size "
        "or --max-seq-length, or use --gradient-checkpointing on, and go on with --resume latest"
    )
