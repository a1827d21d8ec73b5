"""Kernels of our own, for CUDA; Triton's interpreter runs them on a CPU (TRITON_INTERPRET=1)."""

import torch
import triton
import triton.language as tl

_COPY_BLOCK = 4096  # elements of a program
_ROW_BLOCK = 8192  # of a row of logits at once


def copy_scaled(table: torch.Tensor, largest: int, example: torch.Tensor) -> None:
    """place[i, j] = scale * master[i, j] for all fp32 masters of a table, in one kernel.

    table: (copies, 6) int64, of `joined_lora`. largest: elements of the largest master. example: a
    tensor of the places' type.
    """
    grid = (len(table), triton.cdiv(largest, _COPY_BLOCK))
    _copy_scaled[grid](table, example, BLOCK=_COPY_BLOCK)


@triton.jit
def _copy_scaled(table, example, BLOCK: tl.constexpr):
    row = table + tl.program_id(0) * 6
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tl.load(row + 2)
    columns = tl.load(row + 3).to(tl.int32)
    scale = tl.load(row + 5).to(tl.int32).to(tl.float32, bitcast=True)
    master = tl.load(row).to(tl.pointer_type(tl.float32))
    place = tl.load(row + 1).to(tl.pointer_type(example.dtype.element_ty))
    values = tl.load(master + offsets, mask=inside) * scale
    i, j = offsets // columns, offsets % columns
    places = place + i.to(tl.int64) * tl.load(row + 4) + j
    tl.store(places, values.to(example.dtype.element_ty), mask=inside)


def softmax_error(
    logits: torch.Tensor,
    labels: torch.Tensor,
    close_id: int,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Two passes over a chunk of logits (C, V), fp32, where torch's own operations take eight.

    outputs: (C,) fp32 each: loss in nats, whether the label's logit is the largest, probability of
    close_id. Returns softmax minus one-hot (C, V) in `dtype`, in the place of the logits; with None
    they stay as they are.
    """
    rows, vocab = logits.shape
    assert logits.is_contiguous()
    error = logits if dtype is None else logits.view(dtype)[:, :vocab]
    arguments = (logits, labels, *outputs, error, vocab, error.stride(0), max(close_id, 0))
    wanted = dtype is not None
    _softmax_error[(rows,)](*arguments, WANTED=wanted, BLOCK=_ROW_BLOCK, num_warps=16)
    return error


@triton.jit
def _softmax_error(
    logits, labels, nll, correct, close, error, vocab, error_stride, close_id,
    WANTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * vocab
    lanes = tl.arange(0, BLOCK)
    # Each lane has its own largest logit and sum; lanes meet once, at the end. A NaN stays in the sum.
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab, BLOCK):
        x = tl.load(start + first + lanes, mask=first + lanes < vocab, other=-float("inf"))
        larger = tl.maximum(top, x)
        total = total * tl.exp(top - larger) + tl.exp(x - larger)
        top = larger
    largest = tl.max(top, 0)
    normaliser = largest + tl.log(tl.sum(total * tl.exp(top - largest), 0))
    label = tl.load(labels + row)
    label_logit = tl.load(start + label)
    tl.store(nll + row, normaliser - label_logit)
    tl.store(correct + row, (label_logit == largest).to(tl.float32))
    tl.store(close + row, tl.exp(tl.load(start + close_id) - normaliser))
    if WANTED:
        target = error + row.to(tl.int64) * error_stride
        for first in range(0, vocab, BLOCK):
            at = first + lanes
            x = tl.load(start + at, mask=at < vocab, other=-float("inf"))
            # Narrower numbers in the same place fall behind what is read; only this block must be read.
            tl.debug_barrier()
            difference = tl.exp(x - normaliser) - (at == label).to(tl.float32)
            tl.store(target + at, difference.to(error.dtype.element_ty), mask=at < vocab)
