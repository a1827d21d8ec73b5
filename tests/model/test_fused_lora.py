"""The fused LoRA path against the adapter library's own: losses, gradients, state changes.

uv run pytest tests/model/test_fused_lora.py
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from finetuning.config import PROJECTIONS
from finetuning.model.fused_lora import adapter_copies, enable_fast_lora

ROOT = Path(__file__).parents[2]
TARGETS = list(PROJECTIONS)
IDS = torch.arange(3, 63).view(2, 30) % 61


def lora_model(*, random_b=True, dtype=torch.float32, attention_bias=False, **lora):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.1,
        attention_bias=attention_bias,
        eos_token_id=None,
        pad_token_id=0,
    )
    settings = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, **lora}
    model = get_peft_model(Qwen3ForCausalLM(config).to(dtype), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if random_b and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def assert_same(actual, expected, atol=1e-6, rtol=1e-4):
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=0)
    assert actual[1].keys() == expected[1].keys() and len(actual[1]) > 0
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0
        torch.testing.assert_close(actual[1][name], gradient, atol=atol, rtol=rtol)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("join", [False, True])
def test_same_loss_and_gradients(checkpointing, attention_bias, join):
    model = lora_model(attention_bias=attention_bias).train()
    if attention_bias:  # they are zeros as made
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    expected = loss_and_gradients(model)
    assert enable_fast_lora(model, join=join) == 14
    assert enable_fast_lora(model, join=join) == 0
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    assert_same(loss_and_gradients(model), expected)


def test_the_fused_path_is_taken():
    model = lora_model()
    enable_fast_lora(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer(torch.randn(3, 32)).grad_fn).__name__ == "_LoraLinearBackward"


def test_gradients_accumulate():
    model = lora_model()
    enable_fast_lora(model)
    _, once = loss_and_gradients(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient)


@pytest.mark.parametrize("join", [False, True])
def test_bf16_base_with_fp32_masters(join):
    """Gradients come as fp32 and near those of the exact fp32 model."""
    model = lora_model(dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    expected_loss, expected = loss_and_gradients(exact)
    assert enable_fast_lora(model, join=join) == 14
    loss, gradients = loss_and_gradients(model)
    assert abs(loss - expected_loss) < 0.02
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm()


def test_saves_only_the_input_and_its_projection():
    """No activation as wide as the output is kept, and the kept input is the caller's own tensor."""
    model = lora_model()
    enable_fast_lora(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    saved = []
    x = torch.randn(50, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    activations = [t for t in saved if t.data_ptr() not in parameters]
    assert sorted(tuple(t.shape) for t in activations) == [(50, 4), (50, 32)]
    assert any(t.data_ptr() == x.data_ptr() for t in activations)


@pytest.mark.parametrize("join", [False, True])
def test_disabling_and_merging_take_the_ordinary_way(join):
    model = lora_model().eval()
    plain = model.get_base_model()
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
        enable_fast_lora(model, join=join)
        torch.testing.assert_close(model(input_ids=IDS).logits, tuned, atol=1e-5, rtol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base)
        model.merge_adapter()
        torch.testing.assert_close(plain(input_ids=IDS).logits, tuned, atol=1e-4, rtol=1e-3)
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, tuned, atol=1e-4, rtol=1e-3)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, tuned, atol=1e-4, rtol=1e-3)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (tuned - base).abs().max() > 0.01


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_other_layers_are_left_alone(setting):
    assert enable_fast_lora(lora_model(**setting)) == 0


def test_trainable_base_is_left_alone():
    model = lora_model()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert enable_fast_lora(model) == 0


@pytest.mark.parametrize("join", [False, True])
def test_second_adapter_takes_the_ordinary_way(join):
    model = lora_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    assert enable_fast_lora(model, join=join) == 14
    expected = loss_and_gradients(copy.deepcopy(model))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert "Lora" not in type(layer(torch.randn(3, 32)).grad_fn).__name__
    model.set_adapter("default")
    assert_same(loss_and_gradients(model), expected)


@pytest.mark.parametrize("join", [False, True])
def test_save_and_load(tmp_path, join):
    model = lora_model()
    expected = loss_and_gradients(model)
    enable_fast_lora(model, join=join)
    model.save_pretrained(tmp_path)
    fresh = lora_model(random_b=False)
    fresh.load_adapter(tmp_path, "default")
    assert abs(loss_and_gradients(fresh)[0] - expected[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("join", [False, True])
def test_each_layer_compiles_to_a_whole_graph(join):
    torch._dynamo.reset()
    model = lora_model().train()
    expected = loss_and_gradients(model)
    enable_fast_lora(model, join=join)
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model), expected)


# -----------------------------------------------------------------------------
# Adapters as parts of the matrices


def joined_layers(model):
    """q, k, v, o, gate, up, down of the first decoder layer."""
    layer = model.base_model.model.model.layers[0]
    return [getattr(layer.self_attn, n) for n in TARGETS[:4]] + [
        getattr(layer.mlp, n) for n in TARGETS[4:]
    ]


def test_projections_of_one_input_are_one_product():
    model = lora_model()
    enable_fast_lora(model, join=True)
    q, k, v, o, gate, up, down = joined_layers(model)
    x = torch.randn(3, 5, 32)
    outputs = [layer(x) for layer in (q, k, v)]
    assert type(outputs[0].grad_fn).__name__ == "_JoinedLoraBackward"
    assert outputs[0].grad_fn is outputs[1].grad_fn is outputs[2].grad_fn
    assert gate(x).grad_fn is up(x).grad_fn
    assert len({id(layer._group) for layer in (q, o, gate, down)}) == 4


def test_a_layer_called_alone_or_twice_or_on_other_input_is_right():
    model = lora_model()
    x, other = torch.randn(2, 4, 32), torch.randn(7, 32)
    q, k, v, *_ = joined_layers(model)
    expected = [layer(rows) for layer in (q, k, v) for rows in (x, other)]
    enable_fast_lora(model, join=True)
    for calls in ((0, 1, 2, 3, 4, 5), (4, 0, 2, 4, 1, 2, 5), (0, 0, 3, 2, 2, 4, 5)):
        for call in calls:
            output = (q, k, v)[call // 2]((x, other)[call % 2])
            torch.testing.assert_close(output, expected[call], atol=1e-5, rtol=1e-4)
    k(x)
    v(x)  # whoever asks last empties the group
    assert q._group._input is None and q._group._outputs == []


def test_weights_are_held_once():
    model = lora_model()
    before = [layer.base_layer.weight.detach().clone() for layer in joined_layers(model)]
    enable_fast_lora(model, join=True)
    for layer, weight in zip(joined_layers(model), before, strict=True):
        view = layer.base_layer.weight
        assert torch.equal(view, weight)
        assert view.untyped_storage().data_ptr() == layer._group.matrix.untyped_storage().data_ptr()


def test_changed_adapters_reach_the_matrices_when_written():
    model = lora_model()
    enable_fast_lora(model, join=True)
    fresh = lora_model()
    with torch.no_grad():
        for m in (model, fresh):
            for name, parameter in m.named_parameters():
                if "lora" in name:
                    parameter.mul_(1.5)
    adapter_copies(model).write()
    assert_same(loss_and_gradients(model), loss_and_gradients(fresh))


def test_large_ranks_stay_apart():
    """Zeros between the blocks would be most of the product."""
    model = lora_model(rank_pattern={"q_proj": 200})
    expected = loss_and_gradients(model)
    enable_fast_lora(model, join=True)
    q, k, *_, gate, up, _ = joined_layers(model)
    assert q._group is not k._group and gate._group is up._group
    assert_same(loss_and_gradients(model), expected)


def test_the_copying_kernel_equals_the_loop():
    """In Triton's interpreter, which has to be chosen before the import, and cuts bf16 off."""
    pytest.importorskip("triton")
    program = """
import torch
from finetuning.model.joined_lora import _copy_table
from finetuning.model.triton_kernels import copy_scaled
torch.manual_seed(0)
matrix = torch.zeros(300, 200, dtype=torch.float16)
expected = matrix.clone()
copies = []
for rows, columns, top, left, scale in ((16, 150, 280, 0, 1.0), (270, 16, 0, 150, 0.375)):
    master = torch.randn(rows, columns)
    place = matrix[top:, left:][:rows, :columns]
    expected[top:, left:][:rows, :columns] = master * scale
    copies.append((master, place, scale))
copy_scaled(_copy_table(copies), 270 * 16, matrix)
assert expected.any() and torch.equal(matrix, expected)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
