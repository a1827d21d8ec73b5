"""Products in FP8 against exact ones: errors as expected, training as in bf16, refusals with a reason.

torch multiplies FP8 on a CPU too, in the same numbers. uv run pytest tests/model/test_fp8_products.py
"""

import copy

import pytest
import torch
from torch import nn

from finetuning.common.errors import UserError
from finetuning.config import DirectTrainingConfig
from finetuning.model.fp8_products import (
    FP8,
    Fp8Matrix,
    add_product,
    fp8_product,
    quantized,
    require_fp8,
)
from finetuning.model.resolve import weight_dtype
from tests.model.test_fused_lora import IDS, TARGETS, adapter_copies, enable_fast_lora, lora_model

# Four significant bits: an error of 2.5% in each operand, and by the root of two more in a product.
EXPECTED_ERROR = 0.036


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def test_rows_keep_their_scale():
    """Rows that differ by a factor of a million are equally exact; zeros stay zeros."""
    torch.manual_seed(0)
    parts = [torch.randn(1, 5, k) * torch.tensor([1e-4, 1, 1e2, 0, 1])[:, None] for k in (48, 16)]
    whole, scale = quantized(parts)
    assert whole.dtype == FP8 and whole.shape == (5, 64) and scale.shape == (5, 1)
    exact = torch.cat(parts, 2)[0].double()
    values = whole.double() * scale.double()
    for row in (0, 1, 2, 4):
        assert relative(values[row], exact[row]) < 0.04
        torch.testing.assert_close(
            values[row].abs().max(), exact[row].abs().max(), rtol=1e-6, atol=0
        )
    assert values[3].eq(0).all()


def test_both_products_of_a_matrix():
    torch.manual_seed(0)
    weight = (torch.randn(96, 160) * torch.rand(96, 1) * torch.rand(160)).bfloat16()
    tensors = Fp8Matrix(weight).tensors
    for rows, exact, parts in (
        (torch.randn(64, 160).bfloat16(), weight.double().t(), tensors[:2]),
        (torch.randn(64, 96).bfloat16(), weight.double(), tensors[2:]),
    ):
        product = fp8_product(*quantized([rows[None]]), *parts, torch.bfloat16)
        error = relative(product, rows.double() @ exact)
        assert 0.3 * EXPECTED_ERROR < error < 1.2 * EXPECTED_ERROR


def test_adding_a_product_happens_in_place():
    out, a, b = torch.randn(5, 7), torch.randn(5, 3), torch.randn(3, 7)
    expected, address = out + a @ b, out.data_ptr()
    add_product(out, a, b)
    torch.testing.assert_close(out, expected)
    assert out.data_ptr() == address


def gradients_of(layers: list[nn.Module], x: torch.Tensor, upstream: list[torch.Tensor]):
    outputs = [layer(x) for layer in layers]
    wanted = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    return outputs, torch.autograd.grad(outputs, wanted, upstream)


@pytest.mark.parametrize("attention_bias", [False, True])
def test_a_group_of_projections(attention_bias):
    """Outputs and gradients are as far from the exact ones as FP8 products of their size are."""
    model = lora_model(dtype=torch.bfloat16, attention_bias=attention_bias)
    exact = copy.deepcopy(model).double()
    attentions = [m.base_model.model.model.layers[0].self_attn for m in (model, exact)]
    enable_fast_lora(model, join=True, fp8=True)
    layers, plain = ([a.q_proj, a.k_proj, a.v_proj] for a in attentions)
    x = torch.randn(1, 200, 32).bfloat16().requires_grad_()
    upstream = [torch.randn(1, 200, size).bfloat16() for size in (32, 16, 16)]
    outputs, gradients = gradients_of(layers, x, upstream)
    assert type(outputs[0].grad_fn).__name__ == "_Fp8LoraBackward"
    wide = x.detach().double().requires_grad_()
    expected, wanted = gradients_of(plain, wide, [g.double() for g in upstream])
    for out, want in zip(outputs, expected, strict=True):
        assert out.dtype == torch.bfloat16
        assert 0.003 < relative(out, want) < 1.3 * EXPECTED_ERROR
    for place, (gradient, want) in enumerate(zip(gradients, wanted, strict=True)):
        # Adapters meet no FP8 on their own way: their gradients are as exact as in bf16.
        assert relative(gradient, want) < (1.3 * EXPECTED_ERROR if place == 0 else 0.01)


def losses(fp8: bool, steps: int = 40) -> list[float]:
    """Of a tiny model that learns one batch."""
    model = lora_model(dtype=torch.bfloat16, random_b=False).train()
    enable_fast_lora(model, join=True, fp8=fp8)
    copies = adapter_copies(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, values = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(steps):
        copies.write()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def test_training_falls_as_in_bf16():
    ours, theirs = losses(True), losses(False)
    assert theirs[-1] < 0.8 * theirs[0]
    assert abs(ours[0] - theirs[0]) < 0.01 * theirs[0]
    assert abs(ours[-1] - theirs[-1]) < 0.05 * theirs[-1]


def test_without_gradients_the_products_are_those_of_bf16():
    """An evaluation measures the model that is saved."""
    results = []
    for fp8 in (False, True):
        model = lora_model(dtype=torch.bfloat16)
        enable_fast_lora(model, join=True, fp8=fp8)
        with torch.no_grad():
            results.append(model(input_ids=IDS).logits)
    assert torch.equal(*results)


@pytest.mark.slow
def test_layers_compile_to_whole_graphs():
    torch._dynamo.reset()
    model = lora_model(dtype=torch.bfloat16).train()
    enable_fast_lora(model, join=True, fp8=True)
    model.enable_input_require_grads()
    expected = model(input_ids=IDS, labels=IDS).loss
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)
    assert all(p.grad.norm() > 0 for n, p in model.named_parameters() if "lora" in n)


def test_a_device_without_fp8_is_refused():
    for refuse in (require_fp8, lambda device: weight_dtype(device, "fp8")):
        with pytest.raises(UserError, match=r"fp8: the device is cpu.*Hopper.*--precision auto"):
            refuse(torch.device("cpu"))


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_r": 0},
        {"quantization": "4bit"},
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"compile": "off"},
        {"parallel": "fsdp"},
    ],
)
def test_settings_that_fp8_does_not_go_with(setting):
    (name,) = setting
    with pytest.raises(UserError, match=f"precision fp8 is for plain adapters.*{name}"):
        DirectTrainingConfig(precision="fp8", target_modules=tuple(TARGETS), **setting)
    DirectTrainingConfig(precision="fp8")
