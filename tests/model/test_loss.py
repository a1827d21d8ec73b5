"""The chunked head and loss against the plain one: values, gradients, sums, and bf16 accuracy.

uv run pytest tests/model/test_loss.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from finetuning.data.token_table import Segment
from finetuning.model import loss as model_loss
from finetuning.model.loss import packed_loss

ROOT = Path(__file__).parents[2]
CLOSE = 5
ROOT = Path(__file__).parents[1]


def problem(targets=300, tokens=400, hidden_size=24, vocab=203, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = {"generator": generator}
    segments = torch.randint(1, 5, (targets,), **random)
    bucket = torch.randint(0, 10, (targets,), **random)
    return (
        torch.randn(tokens, hidden_size, **random).to(dtype).requires_grad_(),
        torch.randn(vocab, hidden_size, **random).to(dtype).requires_grad_(),
        dict(
            target_positions=torch.randperm(tokens, **random)[:targets].sort().values,
            labels=torch.randint(0, vocab, (targets,), **random),
            segments=segments,
            document=torch.randint(0, 3, (targets,), **random),
            num_documents=4,
            thinking_bucket=torch.where(segments == Segment.THINKING, bucket, -1),
            close_id=CLOSE,
            num_targets=targets,
        ),
    )


@pytest.fixture(params=[64, 4096], ids=["chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(model_loss, "rows_per_chunk", lambda vocab, device: request.param)


def test_loss_and_gradients_equal_the_plain_head(chunk):
    hidden, weight, batch = problem()
    loss, _ = packed_loss(hidden, weight, **batch, scale=2.5)
    actual = torch.autograd.grad(loss * 3, (hidden, weight))
    logits = hidden[batch["target_positions"]] @ weight.t()
    expected_loss = 2.5 * F.cross_entropy(logits, batch["labels"])
    expected = torch.autograd.grad(expected_loss * 3, (hidden, weight))
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    for mine, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-4)


def test_sums_equal_a_loop_over_the_targets(chunk):
    hidden, weight, batch = problem()
    _, sums = packed_loss(hidden, weight, **batch)
    cells, buckets = torch.zeros(4, 5, 3).double(), torch.zeros(10, 2).double()
    premature = torch.zeros(2).double()
    with torch.no_grad():
        log_p = (hidden[batch["target_positions"]] @ weight.t()).double().log_softmax(-1)
    for row, label in enumerate(batch["labels"].tolist()):
        nll, right = -log_p[row, label], float(log_p[row].argmax() == label)
        segment, bucket = batch["segments"][row], batch["thinking_bucket"][row]
        cells[batch["document"][row], segment] += torch.tensor([nll, right, 1.0])
        if bucket >= 0:
            buckets[bucket] += torch.tensor([nll, 1.0])
        if segment == Segment.THINKING:
            premature += torch.tensor([log_p[row, CLOSE].exp(), 1.0])
    torch.testing.assert_close(sums.per_document, cells, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sums.thinking_buckets, buckets, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sums.premature_close, premature, atol=1e-6, rtol=1e-5)
    assert sums.per_document[3].eq(0).all()


def test_exact_values_on_hand_made_logits():
    """Two rows over four tokens; the head is the identity, so hidden states are the logits."""
    hidden = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    loss, sums = packed_loss(
        hidden,
        torch.eye(4),
        target_positions=torch.tensor([1, 2]),
        labels=torch.tensor([1, 1]),
        segments=torch.tensor([Segment.THINKING, 3]),
        document=torch.tensor([0, 0]),
        num_documents=1,
        thinking_bucket=torch.tensor([9, -1]),
        close_id=0,
        num_targets=2,
    )
    first = torch.log(torch.tensor(9.0).exp() + 3) - 9
    second = torch.log(torch.tensor(3.0).exp() + 3)
    torch.testing.assert_close(loss, (first + second) / 2)
    assert sums.per_document[0, :, 1].tolist() == [0, 1, 0, 0, 0]
    assert sums.per_document[0, :, 2].tolist() == [0, 1, 0, 1, 0]
    torch.testing.assert_close(sums.premature_close[0].item(), (-9 - first).exp().item())
    assert sums.thinking_buckets[:, 1].tolist() == [0] * 9 + [1]


def test_parts_recombine_to_the_loss():
    hidden, weight, batch = problem()
    loss, sums = packed_loss(hidden, weight, **batch)
    total, _, count = sums.per_document.sum((0, 1))
    assert count == 300
    assert abs(total / count - loss.double()) < 1e-6
    thinking = sums.per_document[:, Segment.THINKING].sum(0)
    torch.testing.assert_close(sums.thinking_buckets.sum(0), thinking[::2])


def test_extreme_logits_stay_finite():
    hidden, weight, batch = problem()
    loss, _ = packed_loss(hidden * 200, weight, **batch)
    logits = (hidden * 200)[batch["target_positions"]] @ weight.t()
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["labels"]), rtol=1e-5, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_bf16_loss_is_accumulated_in_fp32(monkeypatch):
    """Many chunks of bf16 rows: the loss must not sink, as it does when summed in bf16."""
    monkeypatch.setattr(model_loss, "rows_per_chunk", lambda vocab, device: 64)
    hidden, weight, batch = problem(4000, 4001, 32, 999, torch.bfloat16)
    loss, sums = packed_loss(hidden, weight, **batch)
    actual = torch.autograd.grad(loss, (hidden, weight))
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = exact_hidden[batch["target_positions"]] @ exact_weight.t()
    exact = F.cross_entropy(logits, batch["labels"])
    expected = torch.autograd.grad(exact, (exact_hidden, exact_weight))
    assert loss.dtype == torch.float32
    assert abs(loss.double() - exact) / exact < 1e-3
    assert abs(sums.per_document[..., 0].sum() / 4000 - exact) / exact < 1e-3
    for mine, plain in zip(actual, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - plain).norm() / plain.norm() < 0.01


def test_frozen_head_and_no_grad():
    hidden, weight, batch = problem()
    expected, _ = packed_loss(hidden, weight, **batch)
    loss, _ = packed_loss(hidden, weight.detach(), **batch)
    loss.backward()
    assert weight.grad is None and hidden.grad.norm() > 0
    with torch.no_grad():
        loss, _ = packed_loss(hidden, weight, **batch)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)


def test_without_a_close_token_nothing_is_counted():
    hidden, weight, batch = problem()
    _, sums = packed_loss(hidden, weight, **{**batch, "close_id": -1})
    assert sums.premature_close.tolist() == [0, 0]
    assert sums.per_document[..., 2].sum() == 300


def padded(batch: dict, rows: int) -> dict:
    """The batch with `rows` targets of padding, as constant shapes want it."""
    beyond = torch.full((rows,), batch["num_documents"])
    more = {"document": beyond, "thinking_bucket": torch.full((rows,), -1)}
    zeros = torch.zeros(rows, dtype=torch.int64)
    names = ("target_positions", "labels", "segments", "document", "thinking_bucket")
    return {**batch, **{n: torch.cat([batch[n], more.get(n, zeros)]) for n in names}}


@pytest.mark.parametrize("rows", [1, 84, 300])
def test_targets_of_padding_change_nothing(chunk, rows):
    """Position 0 belongs to a real target as well, and `segments` of padding may say anything."""
    hidden, weight, batch = problem()
    batch["target_positions"][0] = 0
    more = padded(batch, rows)
    more["segments"][300:] = Segment.THINKING
    loss, sums = packed_loss(hidden, weight, **batch)
    loss_padded, sums_padded = packed_loss(hidden, weight, **more)
    torch.testing.assert_close(loss_padded, loss)
    for name in ("per_document", "thinking_buckets", "premature_close"):
        torch.testing.assert_close(getattr(sums_padded, name), getattr(sums, name))
    expected = torch.autograd.grad(loss, (hidden, weight))
    for mine, plain in zip(
        torch.autograd.grad(loss_padded, (hidden, weight)), expected, strict=True
    ):
        torch.testing.assert_close(mine, plain, atol=1e-7, rtol=1e-5)


def test_a_batch_of_padding_alone():
    hidden, weight, batch = problem(targets=0)
    loss, sums = packed_loss(hidden, weight, **{**padded(batch, 70), "num_targets": 9})
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and all(g.eq(0).all() for g in gradients)
    assert not any(t.any() for t in vars(sums).values() if t is not None)


def test_the_number_of_targets_may_be_a_tensor(chunk):
    """Its quotient with the scale is no number of bf16, to which it must not be rounded."""
    hidden, weight, batch = problem(dtype=torch.bfloat16)
    results = []
    for number in (float, torch.tensor):
        settings = {"num_targets": number(307.0), "scale": number(1.7)}
        loss, _ = packed_loss(hidden, weight, **{**batch, **settings})
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for mine, plain in zip(*results, strict=True):
        assert mine.dtype == plain.dtype
        assert abs((mine.double().norm() / plain.double().norm()) - 1) < 2e-4


def test_a_micro_batch_without_targets():
    hidden, weight, batch = problem(targets=0)
    loss, sums = packed_loss(hidden, weight, **{**batch, "num_targets": 50})
    loss.backward()
    assert loss == 0 and hidden.grad.eq(0).all() and sums.per_document.eq(0).all()


def test_tied_embedding_gets_both_gradients():
    """In full fine-tuning one matrix is embedding and head; its gradient is the sum of both uses."""
    embedding = torch.randn(50, 8, requires_grad=True)
    ids = torch.randint(0, 50, (20,))
    _, _, batch = problem(targets=12, tokens=20, vocab=50)
    loss, _ = packed_loss(embedding[ids].tanh(), embedding, **batch)
    (actual,) = torch.autograd.grad(loss, embedding)
    logits = embedding[ids].tanh()[batch["target_positions"]] @ embedding.t()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, batch["labels"]), embedding)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


def test_full_logits_never_exist():
    """The largest tensor of forward and backward is a chunk of logits, not all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    hidden, weight, batch = problem(2000, 2100, 8, 4096)
    with Largest() as largest:
        packed_loss(hidden, weight.detach(), **batch)[0].backward()
    rows = model_loss.rows_per_chunk(4096, "cpu")
    assert largest.elements == rows * 4096 < 2000 * 4096 / 4


def test_the_kernel_equals_torchs_operations():
    """In Triton's interpreter, which has to be chosen before the import."""
    pytest.importorskip("triton")
    program = """
import torch
from finetuning.model.loss import _softmax_error
from finetuning.model.triton_kernels import softmax_error
torch.manual_seed(0)
rows, vocab, close_id = 5, 20_011, 7
logits = 8 * torch.randn(rows, vocab)
logits[1] *= 40
logits[2, 100] = logits[2, 19_000] = logits[2].max() + 1  # a tie for the top
labels = torch.tensor([3, 20_010, 19_000, int(logits[3].argmax()), 0])
mine, plain = ([torch.full((rows,), 9.0) for _ in range(3)] for _ in range(2))
expected = _softmax_error(logits, labels, close_id, *plain, torch.empty_like(logits))
error = softmax_error(logits.clone(), labels, close_id, tuple(mine), torch.float32)
half = softmax_error(logits.clone(), labels, close_id, tuple(mine), torch.float16)
torch.testing.assert_close(half.float(), expected, atol=1e-6, rtol=1e-3)
torch.testing.assert_close(error, expected, atol=1e-6, rtol=1e-4)  # logits of 1,000
for got, want in zip(mine, plain):
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
assert plain[1].tolist() == [0, 0, 1, 1, 0]
again = [torch.full((rows,), 9.0) for _ in range(3)]
before = logits.clone()
assert softmax_error(logits, labels, -1, tuple(again), None) is logits
assert torch.equal(logits, before)
assert torch.equal(again[0], mine[0]) and torch.equal(again[1], mine[1])
logits[4, 5] = float("nan")
softmax_error(logits, labels, close_id, tuple(again), torch.float32)
assert again[0].isnan().tolist() == [False] * 4 + [True]
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_chunk_size_is_bounded(subtests):
    for vocab in [97, 4096, 151_936]:
        for device in ["cpu", "cuda"]:
            with subtests.test(vocab=vocab, device=device):
                rows = model_loss.rows_per_chunk(vocab, device)
                assert rows % 64 == 0 and 64 <= rows <= 4096
                assert rows == 64 or rows * vocab * 4 <= 1 << 30
