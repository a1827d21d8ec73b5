"""Arithmetic of a training step: counted by hand, by torch, and the peaks of known GPUs."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from finetuning.config import PROJECTIONS
from finetuning.model.flops import (
    ModelDims,
    dims_from_config,
    dims_of,
    forward_flops,
    lora_parameters,
    peak_flops,
    training_flops,
)

QWEN3_4B = ModelDims(2560, 36, 32, 8, 128, 9728, 151936)


def products_by_hand(dims, lengths, num_targets, r, targets):
    """Every matrix product of one LoRA step, one by one: (what, rows, inner, columns)."""
    q, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    maps = [
        ("q_proj", dims.hidden, q),
        ("k_proj", dims.hidden, kv),
        ("v_proj", dims.hidden, kv),
        ("o_proj", q, dims.hidden),
        ("gate_proj", dims.hidden, dims.intermediate),
        ("up_proj", dims.hidden, dims.intermediate),
        ("down_proj", dims.intermediate, dims.hidden),
    ]
    tokens = sum(lengths)
    for _ in range(dims.layers):
        for name, wide_in, wide_out in maps:
            yield tokens, wide_in, wide_out  # y = xW
            yield tokens, wide_out, wide_in  # dx = dy Wᵀ
            if name in targets:
                yield tokens, wide_in, r  # xA
                yield tokens, r, wide_out  # (xA)B
                yield tokens, wide_out, r  # dy Bᵀ
                yield tokens, r, wide_in  # … Aᵀ
                yield wide_in, tokens, r  # dA
                yield r, tokens, wide_out  # dB
        for length in lengths:
            for _ in range(dims.heads):
                seen = (length + 1) / 2  # keys that a query sees, on average
                for _ in range(6):  # QKᵀ, PV, and two products backward for each
                    yield length, dims.head_dim, seen
    yield num_targets, dims.hidden, dims.vocab  # logits
    yield num_targets, dims.vocab, dims.hidden  # their input's gradient


def test_lora_flops_are_within_one_percent_of_a_count_by_hand(subtests):
    for targets in [PROJECTIONS, ("q_proj", "v_proj")]:
        for lengths in [[900, 1500, 300], [8192], [120] * 30]:
            with subtests.test(targets=targets, lengths=lengths):
                num_targets = sum(lengths) * 3 // 4
                by_hand = sum(
                    2 * rows * inner * columns
                    for rows, inner, columns in products_by_hand(
                        QWEN3_4B, lengths, num_targets, 16, targets
                    )
                )
                weights = lora_parameters(QWEN3_4B, 16, targets)
                ours = training_flops(QWEN3_4B, lengths, num_targets, lora_weights=weights)
                assert ours == pytest.approx(by_hand, rel=0.01)


def test_a_forward_pass_is_counted_as_by_hand():
    """Of the products of a step, those of the forward pass: adapters' too, or the base alone."""
    lengths, targets = [900, 1500, 300], 2000
    every = products_by_hand(QWEN3_4B, lengths, targets, 0, ())
    both = sum(2 * rows * inner * columns for rows, inner, columns in every)
    found = forward_flops(QWEN3_4B, lengths, targets)
    width = QWEN3_4B.heads * QWEN3_4B.head_dim * QWEN3_4B.layers
    attention = 2 * width * sum(length**2 for length in lengths)
    # Backward the inputs of frozen weights cost as much again, attention twice as much.
    assert 2 * found + attention == pytest.approx(both, rel=0.01)
    adapters = forward_flops(QWEN3_4B, lengths, targets, lora_weights=1000) - found
    assert adapters == 2 * 1000 * sum(lengths)


def test_numpy_lengths_do_not_overflow():
    lengths = [60_000, 70_000]
    as_numpy = np.array(lengths, dtype=np.int32)
    assert training_flops(QWEN3_4B, as_numpy, 9, lora_weights=5) == training_flops(
        QWEN3_4B, lengths, 9, lora_weights=5
    )


def test_documents_attend_to_themselves_only():
    def attention(lengths):
        one = training_flops(QWEN3_4B, lengths, 0, lora_weights=0)
        return one - 4 * QWEN3_4B.linear_parameters() * sum(lengths)

    assert attention([4000]) == 4 * attention([2000]) == 8 * attention([1000, 1000])


TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def counted_by_torch(model, length, *, embeddings_want_gradient):
    """FLOPs of forward and backward that torch sees dispatched, over one document."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.arange(length).remainder(TINY["vocab_size"]).unsqueeze(0)
    if embeddings_want_gradient:  # else torch skips the first layer's input gradient
        model.enable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
    return counter.get_total_flops()


def tiny_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**TINY)
    config._attn_implementation = "eager"
    return Qwen3ForCausalLM(config)


def test_full_fine_tuning_flops_are_those_torch_counts():
    model = tiny_qwen3()
    length, dims = 48, dims_from_config(model.config)
    counted = counted_by_torch(model, length, embeddings_want_gradient=False)
    masked_half = 6 * dims.heads * dims.head_dim * length**2 * dims.layers  # eager computes it too
    ours = training_flops(dims, [length], length, lora_weights=None)
    assert ours + masked_half == pytest.approx(counted, rel=0.01)


def test_lora_flops_are_those_torch_counts():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_dropout=0.0, target_modules=list(PROJECTIONS))
    model = get_peft_model(tiny_qwen3(), config)
    length, dims = 48, dims_from_config(model.config)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert weights == lora_parameters(dims, 4, "all-linear")
    counted = counted_by_torch(model, length, embeddings_want_gradient=True)
    masked_half = 6 * dims.heads * dims.head_dim * length**2 * dims.layers
    ours = training_flops(dims, [length], length, lora_weights=weights)
    assert ours + masked_half == pytest.approx(counted, rel=0.01)


def test_the_known_sizes_of_qwen3_4b():
    assert QWEN3_4B.linear_parameters() == 3_633_315_840
    assert lora_parameters(QWEN3_4B, 16) == 33_030_144


def test_dims_of_models_that_the_count_does_not_fit_are_absent():
    from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

    assert dims_from_config(GPT2Config()) is None
    assert dims_from_config(Qwen3MoeConfig()) is None
    assert dims_from_config(LlamaConfig()).head_dim == 128


def test_peaks_of_known_gpus_and_no_guess_for_others(subtests):
    for name, teraflops in [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 2g.20gb", None),
        ("NVIDIA A10-24Q", None),
        ("GRID A100-40C", None),
        ("NVIDIA H100", None),  # which of three? no guess
        ("AMD Instinct MI300X", None),
        ("", None),
    ]:
        with subtests.test(name=name):
            assert peak_flops(name) == (
                None if teraflops is None else pytest.approx(teraflops * 1e12)
            )


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("qwen3", True),
        ("llama", True),
        ("stablelm", True),
        ("starcoder2", False),
        ("qwen3_5_text", False),
    ],
)
def test_dimensions_are_known_where_they_give_the_weights_of_the_linear_layers(
    kind: str, known: bool
):
    config = CONFIG_MAPPING[kind](num_hidden_layers=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert dims_from_config(config) is not None
    assert (dims_of(model) is not None) == (dims_of(adapted) is not None) == known
