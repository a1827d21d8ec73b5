"""Qwen3-4B at its real size without a GPU: what a step holds, and that its forward pass waits for nothing.

uv run pytest -m "not long" tests/runs/test_traced_step.py
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from finetuning.config import LoraSettings
from finetuning.model import packed_model
from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.loss import packed_loss, rows_per_chunk
from finetuning.model.packed_model import PackedLossModel
from finetuning.training.memory_estimate import Placement, estimate_memory, model_shape
from tests.helpers.traced_step import (
    HeldBytes,
    as_on_cuda,
    bf16_model,
    packed_row,
    peak_of_a_step,
    qwen3_4b,
    without_data,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "recomputed"), [(8192, 0), (8192, 12), (8192, 24), (8192, 36), (2048, 36)]
)
def test_the_plan_estimates_what_a_step_holds(tmp_path: Path, tokens: int, recomputed: int):
    qwen3_4b().save_pretrained(tmp_path)
    shape = model_shape(tmp_path, LoraSettings(lora_r=16))
    estimate = estimate_memory(shape, Placement("cuda", 2), tokens, recomputed=recomputed)
    held = peak_of_a_step(qwen3_4b(), tokens, recomputed=recomputed)
    assert estimate.total == pytest.approx(held, rel=0.05)


@pytest.mark.slow
def test_the_base_that_goes_along_is_in_the_estimate(tmp_path: Path):
    """For kl_anchor: its states at the targets, and its logits beside those of a smaller chunk.

    Two layers and a short row, so that the peak is in the loss.
    """
    qwen3_4b(layers=2).save_pretrained(tmp_path)
    shape = model_shape(tmp_path, LoraSettings(lora_r=16))
    planned, held = [], []
    for anchored in (False, True):
        placement = Placement("cuda", 2, anchored=anchored)
        estimate = estimate_memory(shape, placement, 2048, recomputed=0)
        assert estimate.logits > estimate.workspace
        planned.append(estimate.total)
        held.append(peak_of_a_step(qwen3_4b(layers=2), 2048, kl_anchor=float(anchored)))
    assert planned[0] == pytest.approx(held[0], rel=0.06)
    # Without the kernel the traced chunk is half as large, and 64 rows are the fewest.
    assert held[1] < planned[1] < 1.1 * held[1]
    assert held[1] < held[0] and planned[1] < planned[0], "a smaller chunk"


def test_the_forward_pass_on_a_gpu_asks_for_no_value():
    """Nor does it mix devices: the tensors say `cuda`, and the real decisions for it are taken."""
    model = bf16_model(qwen3_4b(layers=2), lora_r=16, recompute=False)
    batch = packed_row(2048)

    def forward() -> torch.Tensor:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
        ):
            without_data(model, "cuda")
            enable_fast_lora(model)
            packed = PackedLossModel(model, close_id=5).train()
            return packed(batch.to(torch.device("cuda")), len(batch.labels))[0]

    assert forward().device.type == "cuda"

    def asking(*args: object, **kwargs: object) -> tuple:
        loss, sums = packed_loss(*args, **kwargs)
        return loss * loss.item(), sums

    with (
        mock.patch.object(packed_model, "packed_loss", asking),
        pytest.raises(DataDependentOutputException),
    ):
        forward()


def test_the_loss_holds_two_chunks_of_logits_at_most():
    tokens, vocab = 4096, qwen3_4b().vocab_size
    with FakeTensorMode(), as_on_cuda(), HeldBytes() as held:
        chunk = 4 * vocab * rows_per_chunk(vocab, "cpu")
        assert chunk < 4 * vocab * tokens / 3, "several chunks"
        zeros = torch.zeros(tokens, dtype=torch.int64)
        hidden = torch.empty(tokens, 64, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocab, 64, dtype=torch.bfloat16)
        before = held.now
        packed_loss(
            hidden,
            weight,
            target_positions=zeros,
            labels=zeros,
            segments=zeros,
            document=zeros,
            num_documents=1,
            thinking_bucket=zeros,
            close_id=5,
            num_targets=tokens,
        )
    assert held.peak - before < 2.1 * chunk
