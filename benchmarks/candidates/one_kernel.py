"""An FP8 product with its adapters in one kernel of Triton: the wide output is written once, never read.

torch multiplies by `fp8_product` and adds by `add_product`, which reads and writes the output once
more. Here the accumulator takes the adapters' product, in bf16, before it is stored.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """What one program makes, in steps of `depth`; stages are loaded ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = (
    Tile(
        128, 128, 128, 4, 3
    ),  # two programs on a multiprocessor: one stores while the other multiplies
    Tile(128, 128, 128, 8, 3),
    Tile(128, 256, 128, 8, 3),
    Tile(128, 256, 128, 8, 4),
    Tile(256, 128, 128, 8, 4),
)
_SMALLEST_RANK = 16  # of a product in the tensor cores
_GROUP = (
    16  # blocks of rows that take turns at one block of columns, so that both stay in the cache
)


def one_kernel(
    small: tuple[torch.Tensor, torch.Tensor],
    matrix: tuple[torch.Tensor, torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    tile: Tile,
) -> torch.Tensor:
    """(n, out): as `fp8_product` of rows (n, k), (n, 1) and matrix (out, k), (1, out), with a @ b added.

    a (n, r) and b (r, out) are in the type of the result and may be parts of wider matrices. Where
    projections share rows their b is block-diagonal, as for `add_product`.
    """
    (rows, row_scale), (columns, column_scale) = small, matrix
    count, height, rank = len(rows), len(columns), a.shape[1]
    out = torch.empty(count, height, dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(count, tile.rows) * triton.cdiv(height, tile.columns),)
    _one_kernel[grid](
        TensorDescriptor.from_tensor(rows, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(columns, [tile.columns, tile.depth]),
        *(row_scale, column_scale, a, b, out),
        *(count, height, rows.shape[1], rank, a.stride(0), b.stride(0), b.stride(1)),
        *tile[:3],
        RANK=max(_SMALLEST_RANK, triton.next_power_of_2(rank)),
        GROUP=_GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def _one_kernel(
    rows, columns, row_scale, column_scale, a, b, out,
    count, height, width, rank, a_stride, b_stride, b_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    RANK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    down, across = (count + ROWS - 1) // ROWS, (height + COLUMNS - 1) // COLUMNS
    first = tl.program_id(0) // (GROUP * across) * GROUP
    place, size = tl.program_id(0) % (GROUP * across), min(GROUP, down - first)
    top, left = (first + place % size) * ROWS, place // size * COLUMNS
    i, j, r = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    in_i, in_j, in_r = i < count, j < height, r < rank
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for k in range(0, width, DEPTH):
        total = tl.dot(rows.load([top, k]), columns.load([left, k]).T, total)
    narrow = tl.load(a + i[:, None] * a_stride + r, mask=in_i[:, None] & in_r, other=0.0)
    beside = tl.load(b + r[:, None] * b_stride + j * b_step, mask=in_r[:, None] & in_j, other=0.0)
    total *= tl.load(row_scale + i, mask=in_i, other=0.0)[:, None]
    total *= tl.load(column_scale + j, mask=in_j, other=0.0)
    total = tl.dot(narrow, beside, total)
    places = out + i[:, None].to(tl.int64) * height + j
    tl.store(places, total.to(out.dtype.element_ty), mask=in_i[:, None] & in_j)
