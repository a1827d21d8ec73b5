"""An FP8 product with its adapters as further columns of both operands: one product, no addition.

u·Bᵀ is [u_high | u_high | u_low] · [B_high | B_low | B_high]ᵀ, parts in e4m3 of four bits each; what is
missing is low times low, 2⁻⁸ of it at most. The parts have the scales of the rows and of W's columns,
which know nothing of u and B, so powers of two bring them into FP8's range: B is raised by one, for
each rank, and u lowered by it. u being x·Aᵀ, it fits any row once it is lowered by Σ|A|. Where B has
no room for that, the rows' own scale rises, which costs x nothing but some of its smallest numbers.
"""

import torch

from finetuning.model.fp8_products import FP8

Parts = list[torch.Tensor]  # in FP8, to be put side by side behind the matrix
_LARGEST = torch.finfo(FP8).max
_SMALLEST = 1e-12  # stands for a sum or a largest number of zero
_BETWEEN = 4.0  # a low part is raised by this, and the high part lowered that it meets
ALIGNMENT = 16  # of the columns, for a product in FP8


def factors(
    sums: torch.Tensor, b: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Powers of two: what raises B and lowers u (r,), and what the scale of the rows rises by ().

    sums (r,): Σ|A| of each rank, where u = x·Aᵀ. b: (out, r). scale: (1, out), of W's columns.
    """
    room = (_LARGEST * scale.t() / b.float().abs().clamp(min=_SMALLEST)).amin(0).log2().floor()
    need = sums.float().clamp(min=_SMALLEST).log2().ceil()
    raised = torch.minimum(room, need)
    return raised.exp2(), (need - raised).amax().exp2()


def raised_rows(rows: torch.Tensor, rise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, k) in FP8, and their scales (n, 1) times the power of two that makes room for u."""
    top = rows.abs().amax(1, keepdim=True).float().clamp(min=_SMALLEST) * rise
    return (rows.float() * (_LARGEST / top)).to(FP8), top / _LARGEST


def columns_of_rows(
    u: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor, alignment: int = ALIGNMENT
) -> Parts:
    """What stands behind rows of scale (n, 1) for u (n, r)."""
    high, low = _high_and_low(u.float() / (scale * factor))
    return _filled([high, high / _BETWEEN, low * _BETWEEN], alignment)


def columns_of_matrix(
    b: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor, alignment: int = ALIGNMENT
) -> Parts:
    """What stands behind the columns of W, of scale (1, out), for B (out, r)."""
    high, low = _high_and_low(b.float() * (factor / scale.t()))
    return _filled([high, low * _BETWEEN, high / _BETWEEN], alignment)


def _high_and_low(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One of FP8's numbers and what it leaves, both fp32."""
    high = values.to(FP8).float()
    return high, values - high


def _filled(parts: Parts, alignment: int) -> Parts:
    rows, rank = parts[0].shape
    missing = -3 * rank % alignment
    zeros = [parts[0].new_zeros(rows, missing)] if missing else []
    return [part.to(FP8) for part in (*parts, *zeros)]
