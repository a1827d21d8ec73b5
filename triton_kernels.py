"""Kernels of our own, for CUDA; Triton's interpreter runs them on a CPU (TRITON_INTERPRET=1)."""

import torch
import triton
import triton.language as tl

_COPY_BLOCK = 4096  # elements of a program


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
