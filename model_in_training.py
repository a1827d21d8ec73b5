"""The model while it is trained: as the ranks hold it, with its optimizer, and what it can do without."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import distributed
import model_loading
from captured_step import CapturedStep, why_not_captured
from chat_tokens import TokenizedSamples
from checkpoint import Tensors, optimizer_tensors, restore_optimizer
from errors import RunStopped
from fast_lora import enable_fast_lora
from optimization import (
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
from packed_model import PackedLossModel
from packing import PlannedStep, build_batch
from throughput import StepClock, dims_from_config, training_flops
from train_state import TrainState


class ModelInTraining:
    """Weights, their gradients and updates; the same on one device, as replicas and as shards.

    Args:
        model: of `model_loading.load_model`, with adapters or all weights trained.
        close_id: token id of `</think>`, see `PackedLossModel`.
        parallel, dtype: see `distributed.parallelize`.
        batch_shape: constant sizes of a batch for compiled layers; empty: nothing is compiled.
        must_compile: layers that can't be compiled end the run.
        recomputes: activations are made again in the backward pass already.
        may_recompute: they may be, once memory runs out.
        learning_rate, betas, epsilon, weight_decay: of AdamW.
        fp8: products with frozen matrices are made in FP8 in training.
        warn: told what is done about a lack of memory.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        close_id: int,
        dist: distributed.Distributed,
        *,
        parallel: str,
        dtype: torch.dtype,
        batch_shape: Mapping[str, int],
        must_compile: bool,
        recomputes: bool,
        may_recompute: bool,
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
        fp8: bool = False,
        warn: Callable[[str], None],
    ) -> None:
        self._model, self._dist, self._parallel, self._dtype = model, dist, parallel, dtype
        self._must_compile, self._may_recompute, self._warn = must_compile, may_recompute, warn
        self.batch_shape, self.recomputes = batch_shape, recomputes
        enable_fast_lora(model, join=False if parallel == "fsdp" else None, fp8=fp8)
        self.packed = PackedLossModel(model, close_id)
        if batch_shape:
            self.packed.compile_layers()
        self.wrapped = distributed.parallelize(self.packed, parallel, dist, dtype).train()
        self.not_captured = why_not_captured(
            model,
            device=dist.device,
            compiled=bool(batch_shape),
            alone=self.wrapped is self.packed,
            sharded=parallel == "fsdp",
        )
        self.captured: CapturedStep | None = None
        self._is_warm = False  # a step has been made kernel by kernel: all are compiled and chosen
        # By the model's own names, whatever wraps it.
        self._named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self._named.values())
        self.optimizer = build_optimizer(
            self.parameters,
            learning_rate=learning_rate,
            betas=betas,
            epsilon=epsilon,
            weight_decay=weight_decay,
        )
        self.num_trainable, self.num_parameters = model_loading.parameter_counts(model)
        self._dims = dims_from_config(model.config)

    def flops(self, lengths: np.ndarray, num_targets: int) -> float:
        """Arithmetic of training on documents of these lengths; 0 for an unknown architecture."""
        if self._dims is None:
            return 0
        trains_all = self.num_trainable == self.num_parameters
        adapters = None if trains_all else self.num_trainable
        return training_flops(self._dims, lengths, num_targets, lora_weights=adapters)

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

        Out of memory, or layers that can't be compiled, on one rank: all do with less, and begin the step
        again; the global batch, and so the loss, stays the same. Shards can't agree in the middle of a
        step: there the run ends, to be resumed with other settings. Raises RunStopped.
        """
        if self._is_warm and not (self.captured or self.not_captured):
            self._capture(planned, tokens)
        while True:
            full, broken, stuck = "", "", False
            try:
                sums = forward_backward(
                    self.wrapped,
                    planned,
                    tokens,
                    self._dist,
                    clock,
                    splits=state.micro_batch_splits,
                    batch_shape=self.batch_shape,
                    captured=self.captured,
                )
            except RuntimeError as error:
                reason = _reason(error)
                if is_out_of_memory(error):
                    pieces = micro_batch_pieces(planned, tokens.lengths, state.micro_batch_splits)
                    smallest = all(len(documents) == 1 for documents, _ in pieces)
                    full, stuck = reason, smallest and not self._may_recompute
                elif is_compiler_error(error):
                    broken, stuck = reason, self._must_compile
                else:
                    raise
            if self._parallel == "fsdp" and (full or broken):
                raise _no_way_on(state.step + 1, full, broken)
            with clock.phase("forward_backward"):
                if self._dist.world_size > 1 and self._parallel == "ddp":
                    clock.gradients_are_ready()
                # One message for all that ranks must agree on: a step waits for no other one.
                too_large, uncompiled, stuck, stops = self._dist.any(
                    bool(full), bool(broken), stuck, wants_stop()
                )
                if not (too_large or uncompiled):
                    distributed.average_gradients(self.wrapped)
                    self._is_warm = True
                    return sums, stops
            if stuck:
                raise _no_way_on(state.step + 1, full, broken)
            sums = []  # what this rank holds of the step is made anew
            if too_large:
                self._make_room(state)
            else:
                self._stop_compiling()
                reason = broken or "on another rank"
                self._warn(f"layers can't be compiled, training goes on without: {reason}")
            self.optimizer.zero_grad(set_to_none=True)
            # A backward pass that broke off leaves a replica unusable.
            self.wrapped = distributed.parallelize(self.packed, "ddp", self._dist, self._dtype)
            if self._dist.device.type == "cuda":
                torch.cuda.empty_cache()

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
            self._warn(f"no CUDA graph, kernels are launched one by one: {self.not_captured}")

    # -------------------------------------------------------------------------
    # Doing with less

    def release_graph(self, reason: str = "") -> bool:
        """Let go of the graph and the memory it holds; true if there was one.

        With a reason kernels are launched one by one from here on; without, the next step makes it anew.
        """
        had_one, self.captured = self.captured is not None, None
        self.not_captured = self.not_captured or reason
        if had_one:
            torch.cuda.empty_cache()
        return had_one

    def _make_room(self, state: TrainState) -> None:
        """From here on, on all ranks: activations are made again in the backward pass; then smaller parts."""
        if self._may_recompute:
            state.recomputes = True
            measure = "activations are now made again in the backward pass (gradient checkpointing)"
        else:
            state.micro_batch_splits += 1
            measure = f"micro-batches are now done in {2**state.micro_batch_splits} parts"
            measure += ", without compilation" if self.batch_shape else ""
        self.do_with_less(state)
        self._warn(
            f"step {state.step + 1}: out of memory; {measure}, the global batch and the loss stay the same"
        )

    def do_with_less(self, state: TrainState) -> None:
        """What the state says that lack of memory has taught, now or before a resume."""
        if state.recomputes and self._may_recompute:
            model_loading.recompute_activations(self._model)
            self.recomputes, self._may_recompute = True, False
        if (
            self._parallel == "fsdp"
        ):  # parts are not of equal number on all ranks, gathering must be
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
        distributed.reshard(self.wrapped)
        names = {parameter: name for name, parameter in self._named.items()}
        return {
            "adapter_model": model_loading.adapter_state(self._model),
            "optimizer": optimizer_tensors(self.optimizer, names),
        }

    def documents(self) -> dict[str, dict[str, Any]]:
        """What belongs beside the tensors of a checkpoint: the adapter's configuration."""
        return model_loading.adapter_documents(self._model)

    def restore(self, tensors: Mapping[str, Tensors], state: TrainState) -> None:
        """Weights and moments of a checkpoint, and what its run had learned about memory."""
        distributed.reshard(self.wrapped)
        model_loading.load_adapter_state(self._model, tensors["adapter_model"])
        restore_optimizer(self.optimizer, self._named, tensors["optimizer"])
        self.do_with_less(state)

    def save(self, directory: Path, tokenizer: Any, run: str) -> None:
        """The adapter of `run` with its tokenizer, whole or not at all."""
        distributed.reshard(self.wrapped)
        options = {"run": run, "dtype": self._dtype, "writes": self._dist.is_main}
        model_loading.save_adapter(self._model, tokenizer, directory, **options)


def _reason(error: RuntimeError) -> str:
    """The first line of what it says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _no_way_on(step: int, full: str, broken: str) -> RunStopped:
    """What ends a run that can't do with less, with this rank's reason if it has one."""
    if broken:
        return RunStopped(f"the layers can't be compiled: {broken}. Use --compile off")
    return RunStopped(
        f"step {step}: out of memory ({full or 'on another rank'}). Lower --batch-size "
        "or --max-seq-length, or use --gradient-checkpointing on, and go on with --resume latest"
    )
