"""Memory before the run: exact counts of weights and adapters, activations as autograd keeps them.

uv run pytest tests/training/test_memory_estimate.py
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from finetuning.common.errors import UserError
from finetuning.config import PROJECTIONS, LoraSettings
from finetuning.training.memory_estimate import (
    Placement,
    activation_bytes,
    estimate_memory,
    largest_batch,
    model_shape,
)
from tests.helpers import traced_step
from tests.helpers.settings import up_to
from tests.helpers.units import GIB, KIB

CUDA = Placement("cuda", 2)


# -----------------------------------------------------------------------------
# Counting


def test_the_published_numbers_of_qwen3_4b(qwen3_4b):
    assert qwen3_4b.parameters == 4_022_468_096
    assert qwen3_4b.linear_parameters == 3_633_315_840
    assert qwen3_4b.trainable == 33_030_144


def test_counting_takes_no_memory_of_the_host(tmp_path: Path):
    """Adapters are made on the meta device: those of Qwen3-4B would take 160 MB."""
    traced_step.qwen3_4b().save_pretrained(tmp_path)
    made = []

    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                made.append(result.nbytes)
            return result

    with Made():
        shape = model_shape(tmp_path, LoraSettings(rank_pattern={"down_proj": 32}))
    assert shape.trainable == 40_108_032
    assert sum(made) < 2**20


@pytest.mark.parametrize(
    ("targets", "pattern", "dora"),
    [
        (PROJECTIONS, {}, False),
        (("q_proj", "down_proj"), {"layers.0.self_attn.q_proj": 3}, False),
        (("all-linear",), {}, True),
        (("q_proj", "o_proj"), {"^.*q_proj": 2, "layers.1.*": 5}, True),
    ],
)
def test_adapters_are_counted_as_peft_makes_them(tiny_model: Path, targets, pattern, dora):
    settings = LoraSettings(lora_r=8, target_modules=targets, rank_pattern=pattern, use_dora=dora)
    shape = model_shape(tiny_model, settings)
    wanted = "all-linear" if targets == ("all-linear",) else list(targets)
    config = LoraConfig(
        r=8, target_modules=wanted, rank_pattern=pattern, use_dora=dora, task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    assert shape.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.total == sum(p.numel() for p in model.parameters()), "as the run says it"


def test_full_fine_tuning_and_a_saved_adapter(tiny_model: Path, tmp_path: Path):
    full = model_shape(tiny_model, LoraSettings(lora_r=0))
    assert full.trainable == full.parameters == full.total and not full.lora
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "adapter_model.safetensors")
    started = model_shape(tiny_model, LoraSettings(lora_r=16), init_adapter=str(tmp_path))
    assert started.trainable == 22


def test_what_cannot_be_counted_is_one_clear_error(tiny_model: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}', encoding="utf-8")
    with pytest.raises(UserError, match="can't be built"):
        model_shape(tmp_path, LoraSettings(lora_r=16))
    with pytest.raises(UserError, match="target_modules: nothing"):
        model_shape(tiny_model, LoraSettings(target_modules=("q_proj", "nothing")))
    with pytest.raises(UserError, match="rank_pattern"):
        model_shape(tiny_model, LoraSettings(lora_r=16, rank_pattern={"(": 2}))
    with pytest.raises(UserError, match="no module of this model fits it"):
        model_shape(tiny_model, LoraSettings(rank_pattern={"layers.99": 2}))
    with pytest.raises(UserError, match="init_adapter"):
        model_shape(tiny_model, LoraSettings(lora_r=16), init_adapter=str(tmp_path / "no"))


# -----------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    ("placement", "kib"),
    [
        (CUDA, 146),
        (Placement("cuda", 2, compiled=True), 78),
        (Placement("cuda", 2, fused_lora=False), 146 + 104 - 29),
        (Placement("cuda", 2, fused_lora=False, quantized=True), 146 + 104 - 29),
        (Placement("cuda", 2, fused_lora=False, quantized=True, compiled=True), 78),
    ],
)
def test_activations_of_a_token_and_layer(qwen3_4b, placement, kib):
    assert activation_bytes(qwen3_4b.dims, placement) / KIB == kib


def test_all_weights_trained_in_bf16_take_16_bytes_each_and_copies_of_what_is_used(qwen3_4b):
    """fp32 weights, gradients and moments, shared by the ranks; bf16 copies of parts, on every rank."""
    full = dataclasses.replace(qwen3_4b, lora=False, trainable=qwen3_4b.parameters)
    parts = [
        estimate_memory(full, Placement("cuda", 2, shards=n), 8192, recomputed=36) for n in (1, 8)
    ]
    state = [p.weights + p.gradients + p.optimizer for p in parts]
    assert state == [16 * full.parameters, 2 * full.parameters]
    assert parts[0].gathered == parts[1].gathered > 0
    exact = estimate_memory(full, Placement("cuda", 4), 8192, recomputed=36)
    assert exact.weights == parts[0].weights and exact.gathered == 0


def test_the_activations_are_what_autograd_keeps(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    """Counted tensor by tensor in a real forward pass on the CPU."""
    from finetuning.config import LoraSettings, ModelSettings
    from finetuning.data.packing import build_batch
    from finetuning.data.split import split_samples
    from finetuning.data.training_data import prepare_data, read_data
    from finetuning.model.fused_lora import enable_fast_lora
    from finetuning.model.loading import load_model, load_tokenizer
    from finetuning.model.packed_model import PackedLossModel
    from finetuning.model.resolve import resolve_model

    resolved = resolve_model(str(tiny_model), "cpu")
    tokenizer = load_tokenizer(resolved)
    settings = up_to(768, data_path=(str(tiny_data),))
    split = split_samples(read_data(settings)[0], settings)
    data = prepare_data(split, tokenizer, settings, cache_dir=tmp_path)
    model = load_model(resolved, tokenizer, ModelSettings(), LoraSettings(lora_r=4), device="cpu")
    enable_fast_lora(model)
    packed = PackedLossModel(model, data.train.tokens.close_id).train()
    batch = build_batch(data.train.tokens, range(8))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        packed(batch, len(batch.labels))
    shape = model_shape(tiny_model, LoraSettings(lora_r=4))
    tokens = batch.input_ids.shape[1]
    expected = activation_bytes(shape.dims, Placement("cpu", 4)) * shape.dims.layers * tokens
    assert sum(kept.values()) == pytest.approx(expected, rel=0.15)


def test_memory_follows_the_settings(qwen3_4b):
    def total(placement: Placement, tokens: int = 8192, recomputed: int = 0) -> float:
        return estimate_memory(qwen3_4b, placement, tokens, recomputed=recomputed).total

    assert 45 * GIB < total(CUDA) < 55 * GIB
    assert total(CUDA, recomputed=36) < 14 * GIB
    assert total(Placement("cuda", 2, quantized=True)) < total(CUDA) - 4 * GIB
    beside = total(Placement("cuda", 2, fp8=True)) - total(CUDA)  # two copies of a byte a weight
    assert beside == 2 * qwen3_4b.linear_parameters
    assert total(Placement("cuda", 2, shards=4)) < total(CUDA) - 4 * GIB
    assert total(CUDA, tokens=4096) < total(CUDA, tokens=8192)
    estimate = estimate_memory(qwen3_4b, CUDA, 8192, recomputed=0)
    smaller = min(estimate.logits, estimate.workspace)  # they are not there at the same time
    assert estimate.total == sum(vars(estimate).values()) - smaller
    captured = Placement("cuda", 2, captured=True)  # an evaluation finds what the graph holds taken
    assert total(captured) - total(CUDA) == max(estimate.logits, estimate.workspace)
    sharded = estimate_memory(qwen3_4b, Placement("cuda", 2, shards=8), 8192, recomputed=0)
    assert 0.9 * GIB < sharded.gathered < 1.2 * GIB, "embedding and two layers"
    assert estimate.optimizer == 2 * estimate.adapter == 2 * 4 * qwen3_4b.trainable


def test_the_largest_batch_fits_and_one_more_does_not():
    for free in (0, 99, 100, 1234, 10**9):
        rows = largest_batch(lambda rows: 100.0 * rows, free, limit=1000, usable=1.0)
        assert rows * 100 <= free or rows == 0
        assert rows == 1000 or (rows + 1) * 100 > free
