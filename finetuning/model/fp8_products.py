"""Products with frozen matrices in FP8, on Hopper GPUs and later: twice the rate of bf16.

Both operands are e4m3 with a scale for each row of the one and each column of the other, so that the
largest number of each is FP8's largest. A product by W and one by Wᵀ sum over different indices and
need W with different scales: it is held twice, which takes the memory of one bf16 matrix.
"""

from collections.abc import Sequence

import torch

from finetuning.common.errors import UserError

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_SMALLEST = 1e-12  # stands for the largest of a row of zeros
_CAPABILITY = (9, 0)  # scales by row need Hopper


def require_fp8(device: torch.device) -> None:
    """Raise UserError with the reason if the device has no products in FP8."""
    if device.type != "cuda":
        reason = f"the device is {device.type}"
    elif torch.cuda.get_device_capability(device) < _CAPABILITY:
        reason = f"{torch.cuda.get_device_name(device)} has none"
    else:
        return
    raise UserError(
        f"precision fp8: {reason}, and FP8 products need a Hopper GPU (H100) or later; "
        "use --precision auto"
    )


class Fp8Matrix:
    """A frozen matrix (out, in) for rows @ Wᵀ and gradients @ W."""

    def __init__(self, weight: torch.Tensor) -> None:
        by_row, scale = quantized([weight.detach()[None]])
        by_column, other = quantized([weight.detach().t().contiguous()[None]])
        # (out, in), (1, out); (in, out), (1, in)
        self.tensors = by_row, scale.t().contiguous(), by_column, other.t().contiguous()


def quantized(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts (1, n, k) side by side in FP8 (n, sum of k), and the fp32 scales of their rows (n, 1).

    Plain operations on each part where it is made, so that a compiler puts them into that kernel.
    """
    top = parts[0].abs().amax(2, keepdim=True)
    for part in parts[1:]:
        top = torch.maximum(top, part.abs().amax(2, keepdim=True))
    top = top.float().clamp(min=_SMALLEST)
    small = [(part.float() * (_LARGEST / top)).to(FP8) for part in parts]
    whole = small[0] if len(small) == 1 else torch.cat(small, 2)
    return whole[0], (top / _LARGEST)[0]


def fp8_product(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    matrix: torch.Tensor,
    matrix_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(n, out) in `dtype`: rows (n, k) with scales (n, 1) times matrix (out, k) transposed, (1, out)."""
    return torch._scaled_mm(
        rows,
        matrix.t(),
        scale_a=row_scale,
        scale_b=matrix_scale,
        out_dtype=dtype,
        use_fast_accum=True,
    )


@torch.library.custom_op("fp8_products::add_product", mutates_args={"out"})
def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out += a @ b in place; the compiler's own addmm would copy `out` first."""
    out.addmm_(a, b)


@add_product.register_fake
def _(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    return None
