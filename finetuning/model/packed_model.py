"""A causal language model as one module: packed batch in, loss and sums out.

The decoder is called instead of the model with its head, and the head meets the labelled rows only, so
the full logits never exist. Being one module with one forward, it is what DDP and FSDP2 wrap.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
import torch._dynamo
import torch._functorch.config

from finetuning.data.packing import PackedBatch
from finetuning.model import attention
from finetuning.model.adapters import adapters_off
from finetuning.model.fused_lora import adapter_copies
from finetuning.model.joined_lora import AdapterCopies
from finetuning.model.loss import (
    CROSS_ENTROPY,
    Anchor,
    LossSums,
    Objective,
    divergence,
    packed_loss,
)
from finetuning.model.parallel import decoder_layers

# How documents go through the decoder: in one packed row; in one with transformers' own arguments for it
# too; or one after the other, with the model's own attention. `row_proof` finds the one that is right.
Way = Literal["packed", "marked", "alone"]


def compiler_is_there() -> bool:
    """Whether torch.compile can make kernels for this GPU: Triton, and the C compiler that it calls."""
    from torch.utils._triton import has_triton

    return has_triton() and any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang")))


def decoder_of(base: torch.nn.Module) -> torch.nn.Module:
    """The part of a transformers causal language model whose last hidden states the output head reads.

    Some classes name something else where they are asked for it: themselves, or their head.
    """
    names = ("model", base.base_model_prefix, "transformer")
    known = [base.get_decoder(), *(getattr(base, n, None) for n in names)]
    wrong = (None, base, base.get_output_embeddings())
    return next(module for module in known if not any(module is w for w in wrong))


class PackedLossModel(torch.nn.Module):
    """Wraps a transformers causal language model, bare or with adapters.

    Args:
        model: any model with a decoder and a linear output head without bias or logit transformation.
        close_id: token id of `</think>`, for the probability of closing too early; -1 if there is none.
        way: how its documents go through the decoder, see `row_proof`.
        objective: of training; its base is the model without adapters.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        close_id: int,
        way: Way = "packed",
        objective: Objective = CROSS_ENTROPY,
    ) -> None:
        super().__init__()
        self._objective = objective
        self.model, self.close_id, self._way = model, close_id, way
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if way != "alone":
            attention.enable(model)
        # Not as submodules: the parameters stay registered once, under `model`.
        self._base = (base,)
        self._adapters: AdapterCopies | None = None  # looked up by the first forward pass
        self._compiled = False

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """torch.compile for each decoder layer, one graph for all of them; wants constant shapes.

        Meant for CUDA: elsewhere the lengths of the documents are constants of the graph, and every
        batch would need another one.
        """
        # DDP would have each layer cut at its first megabyte of gradients, to send them meanwhile; ours
        # are sent after the backward pass.
        torch._dynamo.config.optimize_ddp = False
        # Outputs of norms and the MLP's product are inputs of a matrix product in the backward pass too, and
        # are made again for it all the same: 78 KiB a token and layer at 4B instead of 107.
        torch._functorch.config.ban_recompute_materialized_backward = False
        # Joined projections keep outputs for each other while a layer runs, and nothing after it: the
        # backward pass that makes activations again need not repeat that.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        # A start that finds its kernels in the cache need not divide the layer into passes again, two fifths
        # of what it takes until then. Functions with a backward pass of their own are left out of that unless
        # one asks; both their passes are traced, and the cache knows a layer by what was traced.
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        for layer in decoder_layers(self.model):
            layer.compile(backend=backend, fullgraph=True, dynamic=False)
        self._compiled = True

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """(T, H): the decoder's output for all tokens of the batch."""
        self.write_adapters()
        base = self._base[0]
        decoder = decoder_of(base)
        if self._way == "alone":
            documents = batch.input_ids.split(batch.lengths, dim=1)
            outputs = (decoder(input_ids=ids, use_cache=False) for ids in documents)
            return torch.cat([output.last_hidden_state[0] for output in outputs])
        embeds = base.get_input_embeddings()(batch.input_ids)
        kwargs = attention.attention_kwargs(
            batch.cu_seqlens, batch.lengths, batch.max_length, embeds.dtype
        )
        if self._way == "marked":
            kwargs |= attention.marking_kwargs(batch.cu_seqlens, batch.max_length)
        stance = nullcontext()
        if self._compiled and torch.is_grad_enabled():
            # The first layer would else see an input without gradient: a second graph.
            embeds.requires_grad_()
        elif self._compiled:
            # Batches of an evaluation have shapes of their own, and each would be a compilation.
            stance = torch.compiler.set_stance("force_eager")
        with stance:
            return decoder(
                inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False, **kwargs
            ).last_hidden_state[0]

    def forward(
        self,
        batch: PackedBatch,
        num_targets: int,
        scale: float | torch.Tensor = 1.0,
        base: Anchor | None = None,
    ) -> tuple[torch.Tensor, LossSums]:
        """Scalar `scale * loss sum / num_targets` for backward, and the sums on the device.

        A scale that differs from one replay of a CUDA graph to the next is a fp32 scalar on the device.
        base: the base's states at this batch's targets; the sums then hold how far the model is from it.
        """
        head = self._base[0].get_output_embeddings().weight
        anchor = weights = None
        if torch.is_grad_enabled():
            anchor, weights = self._held_to(batch), self._objective.weights(batch.segments)
        hidden = self.hidden_states(batch)
        loss, sums = packed_loss(
            hidden,
            head,
            target_positions=batch.target_positions,
            labels=batch.labels,
            segments=batch.segments,
            document=batch.document,
            num_documents=len(batch.cu_seqlens) - 1,
            thinking_bucket=batch.thinking_bucket,
            close_id=self.close_id,
            num_targets=num_targets,
            scale=scale,
            anchor=anchor,
            weights=weights,
        )
        if base is not None:
            distances = divergence(hidden[batch.target_positions], head, base)
            count = distances.new_tensor(len(distances))
            sums = replace(sums, divergence=torch.stack((distances.sum(), count)))
        own = sums.per_document[: len(batch.documents)]  # what is behind them is padding
        return loss, replace(sums, per_document=own)

    def _held_to(self, batch: PackedBatch) -> Anchor | None:
        weight = self._objective.kl_anchor
        return Anchor(self.base_rows(batch), weight=weight) if weight else None

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, H), detached."""
        return self._base[0].get_output_embeddings().weight.detach()

    @torch.no_grad()
    def base_rows(self, batch: PackedBatch) -> torch.Tensor:
        """(N, H): the base's states at the batch's targets; without adapters those of the weights now."""
        with adapters_off(self.model):
            return self.hidden_states(batch)[batch.target_positions]

    def write_adapters(self) -> None:
        """Into the matrices that hold them; one kernel, which a CUDA graph may capture."""
        if self._adapters is None:
            self._adapters = adapter_copies(self.model)
        self._adapters.write()
