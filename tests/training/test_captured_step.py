"""Passes over buffers that stay: the same numbers as without, whatever batch is copied in.

What records and replays them needs a GPU (tests/test_cuda.py); what is recorded runs anywhere.

uv run pytest tests/test_captured_step.py
"""

import pytest
import torch

from finetuning.data.packing import build_batch
from finetuning.model.flops import ModelDims
from finetuning.model.packed_model import PackedLossModel
from finetuning.training.captured_step import StaticStep, hides_launches, why_not_captured
from tests.model.test_attention import use_bounds, varlen_2_12
from tests.model.test_packed_model import CLOSE, lora_model, make_documents

CPU = torch.device("cpu")
ROWS = ((0, 1), (2, 3, 4), (5,))  # three micro-batches
DOCUMENTS = make_documents((60, 41, 30, 17, 50, 96))
SHAPE = {"pad_to": 128, "pad_documents": 5, "pad_targets": 100, "max_length": 128}


def packed_model() -> tuple[PackedLossModel, list[torch.nn.Parameter]]:
    torch.manual_seed(1)
    model = lora_model()
    return PackedLossModel(model, CLOSE).train(), [p for p in model.parameters() if p.requires_grad]


def test_padded_targets_change_nothing():
    packed, parameters = packed_model()
    for row in ROWS:
        found = []
        for shape in ({}, {"pad_to": 128, "pad_targets": 100}):
            batch = build_batch(DOCUMENTS, row, **shape)
            loss, sums = packed(batch, 150, 0.5)
            found.append((loss, sums, torch.autograd.grad(loss, parameters)))
        assert len(batch.labels) == 100
        (loss, sums, plain), (padded_loss, padded_sums, padded) = found
        assert padded_loss.item() == pytest.approx(loss.item(), rel=1e-6)
        for name, expected in vars(sums).items():
            torch.testing.assert_close(getattr(padded_sums, name), expected)
        for one, other in zip(padded, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_padding_reaches_no_gradient_of_a_trained_head():
    packed, _ = packed_model()
    head = packed.model.get_base_model().get_output_embeddings().weight.requires_grad_()
    gradients = []
    for shape in ({}, {"pad_to": 128, "pad_targets": 100}):
        loss, _ = packed(build_batch(DOCUMENTS, (0, 1), **shape), 150)
        gradients += torch.autograd.grad(loss, [head])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_a_batch_comes_through_one_buffer_unchanged():
    batch = build_batch(DOCUMENTS, (2, 3, 4), **SHAPE)
    copy = batch.views(batch.pinned_bytes())
    for name, value in vars(batch).items():
        other = getattr(copy, name)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same and type(value) is type(other), name
    assert copy.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one micro-batch", "three"])
def test_buffers_that_stay_give_the_gradients_and_sums_of_plain_passes(monkeypatch, rows):
    """Two steps, so that the second one meets what the first has left in the buffers.

    With a stand-in for CUDA's attention: the CPU's takes lengths, which a recorded step can't.
    """
    use_bounds(monkeypatch, varlen_2_12)
    packed, parameters = packed_model()
    step = StaticStep(packed, parameters, build_batch(DOCUMENTS, ROWS[0], **SHAPE), CPU)
    for targets in (170, 90):
        sums, expected = [], []
        for row in rows:
            batch = build_batch(DOCUMENTS, row, **SHAPE)
            loss, kept = packed(batch, targets, 1.0)
            loss.backward()
            expected.append(kept)
        gradients = [p.grad.clone() for p in parameters]
        packed.zero_grad(set_to_none=True)
        for row in rows:
            batch = build_batch(DOCUMENTS, row, **SHAPE)
            sums.append(step(batch, targets, 1.0))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
        for one, other in zip(sums, expected, strict=True):
            pairs = zip(vars(one).values(), vars(other).values(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs if pair != (None, None))
        packed.zero_grad(set_to_none=True)


def test_what_can_not_be_captured_says_why():
    cuda = torch.device("cuda")
    fine = {"device": cuda, "compiled": True, "alone": True, "sharded": False}
    model = lora_model()
    assert why_not_captured(model, **fine) == ""
    assert "CUDA" in why_not_captured(model, **fine | {"device": CPU})
    assert "compiled" in why_not_captured(model, **fine | {"compiled": False})
    assert "ranks" in why_not_captured(model, **fine | {"alone": False})
    assert "gathered" in why_not_captured(model, **fine | {"sharded": True, "alone": False})
    assert "kl_anchor" in why_not_captured(model, **fine, anchored=True)
    model.dropout = torch.nn.Dropout(0.1)
    assert "dropout" in why_not_captured(model, **fine)
    model.dropout.p = 0.0
    kind = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.packed = kind(1, 1)
    assert "4 bits" in why_not_captured(model, **fine)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "few", "many"),
    [(2560, 9728, 36, 4096, 8192), (1024, 3072, 28, 32768, 65536), (4096, 12288, 36, 2048, 4096)],
    ids=["4B", "0.6B", "8B"],
)
def test_long_micro_batches_need_no_graph(hidden, intermediate, layers, few, many):
    """Measured at 4B: at 2,048 tokens a graph made a step 1.5 times as fast, at 8,192 it did nothing."""
    heads = 32 if hidden > 2048 else 16
    dims = ModelDims(hidden, layers, heads, 8, 128, intermediate, vocab=151936)
    assert not hides_launches(dims, few) and hides_launches(dims, many)
