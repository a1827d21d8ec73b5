"""Training steps over tensors without data: what a GPU would hold, at any size, on a machine without one.

FakeTensorMode computes shapes and types only. The backward pass of tensors that say `cuda` asks for a
real GPU's stream, so these say `cpu`, and what depends on the device is set to what CUDA has: kernel of
the attention, size of a chunk of logits, type of their product. Not seen: the allocator's rounding and
gaps, buffers inside kernels, compiled layers.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, Qwen3Config, Qwen3ForCausalLM

from finetuning.config import PROJECTIONS
from finetuning.data.packing import PackedBatch, build_batch
from finetuning.data.token_table import Segment, TokenizedSample
from finetuning.model import attention, loading
from finetuning.model import loss as model_loss
from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.packed_model import PackedLossModel
from finetuning.training.optimizer import build_optimizer, clip_gradients, update_weights


def qwen3_4b(layers: int = 36) -> Qwen3Config:
    """The published shape."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )


class HeldBytes(TorchDispatchMode):
    """Bytes of all storages that operations within it have made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def count(self, values: Iterable[object]) -> None:
        """Take in tensors; what is known already counts once."""
        for tensor in values:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(tree_leaves(out))
        return out


def bf16_model(config: PretrainedConfig, *, lora_r: int, recompute: bool | int) -> torch.nn.Module:
    """As `loading` makes it for a GPU, on the meta device. recompute: all layers, or the first so many."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
        if recompute:
            loading.recompute_activations(model, None if recompute is True else recompute)
        if not lora_r:
            return model
        adapters = LoraConfig(r=lora_r, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
        return get_peft_model(model, adapters)


def without_data(model: torch.nn.Module, device: str) -> None:
    """Give every weight a tensor without data on the device; shared weights stay shared."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    made[id(old)] = torch.empty(old.shape, dtype=old.dtype, device=device)
                    if isinstance(old, torch.nn.Parameter):
                        made[id(old)] = torch.nn.Parameter(made[id(old)], old.requires_grad)
                tensors[name] = made[id(old)]


def documents_of(tokens: int, *, vocab: int = 1000, length: int = 256) -> list[TokenizedSample]:
    """Random documents of one length, a quarter of each prompt, that fill a row."""
    rng = np.random.default_rng(0)
    segments = np.full(length, Segment.THINKING, dtype=np.uint8)
    segments[: length // 4], segments[-1] = Segment.PROMPT, Segment.END
    return [
        TokenizedSample(rng.integers(0, min(1000, vocab), length, dtype=np.int32), segments, i)
        for i in range(tokens // length)
    ]


def packed_row(tokens: int) -> PackedBatch:
    """Such documents in one batch."""
    documents = documents_of(tokens)
    return build_batch(documents, range(len(documents)))


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """What the program does on a GPU, for tensors that say `cpu`."""

    def kernel(bounds, lengths: Sequence[int], max_length: int, dtype: torch.dtype) -> dict:
        return {"packed_bounds": bounds, "packed_max_length": max_length}

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)

    # Traced without the kernel: half the rows, with probabilities beside them, are as many bytes.
    chunk = {"cpu": model_loss._CHUNK_BYTES["cuda"] // 2}
    with (
        mock.patch.object(attention, "attention_kwargs", kernel),
        mock.patch.object(model_loss, "_logits", product),
        mock.patch.dict(model_loss._CHUNK_BYTES, chunk),
    ):
        yield


def peak_of_a_step(
    config: PretrainedConfig,
    tokens: int,
    *,
    lora_r: int = 16,
    recomputed: int = 0,
    fused_lora: bool = True,
    kl_anchor: float = 0.0,
) -> int:
    """Bytes at the peak of the second update with one packed row of so many tokens, in bf16."""
    model = bf16_model(config, lora_r=lora_r, recompute=recomputed)
    held = HeldBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_cuda(), held:
        without_data(model, "cpu")
        if fused_lora:
            enable_fast_lora(model)
        objective = model_loss.Objective(kl_anchor)
        packed = PackedLossModel(model, close_id=5, objective=objective).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(
            parameters, learning_rate=1e-4, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0
        )
        batch = packed_row(tokens)
        for _ in range(2):  # the first makes the moments
            loss, _ = packed(batch, len(batch.labels))
            loss.backward()
            update_weights(optimizer, clip_gradients(parameters, 1.0))
        return held.peak
