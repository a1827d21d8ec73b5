"""LoRA inside the matrix product: the adapters of a projection are columns and rows of its matrix.

y = xWᵀ + s·(xAᵀ)Bᵀ is one product of [x | xAᵀ] and [W | sB], and its gradient by x one of
[g | g·sB] and [W; A]. Both matrices are parts of one:

    M = | W  sB |    (out + R, in + R), R: all ranks together, rounded up
        | A   0 |

W stays where the layer expects it, as a view of M, so nothing is held twice but the adapters. No
result as wide as a layer is read again to add an adapter. Projections of one input (q, k, v; gate
and up) share M, with B in blocks on a diagonal: one product instead of three. The compiler lets the
neighbours write x and g into the wider rows themselves, which a GPU needs for it to pay; only
attention's output, gradients of q, k and v, and that from the next layer are copied there.

Adapters stay fp32 masters; `AdapterCopies` writes them into the matrices, for all layers at once.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from finetuning.model.fp8_products import Fp8Matrix, add_product, fp8_product, quantized

ALIGNMENT = (
    64  # of R: rows of M then start at multiples of 128 bytes, and tiles of a product are full
)


@dataclass(frozen=True)
class Adapter:
    """One projection's part: masters a (r, in) and b (out, r), and the scale of their product."""

    base: torch.nn.Linear
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scaling: float


class JoinedProjections:
    """The matrix M of projections that read one input; makes their outputs, in one product."""

    def __init__(self, adapters: Sequence[Adapter], *, fp8: bool = False) -> None:
        self.adapters = tuple(adapters)
        self.sizes = tuple(adapter.base.out_features for adapter in adapters)
        self.ranks = tuple(len(adapter.a) for adapter in adapters)
        self.scalings = tuple(adapter.scaling for adapter in adapters)
        first = adapters[0].base.weight
        self.width, self.height = first.shape[1], sum(self.sizes)
        padded = math.ceil(sum(self.ranks) / ALIGNMENT) * ALIGNMENT
        self.matrix = torch.zeros(
            self.height + padded, self.width + padded, dtype=first.dtype, device=first.device
        )
        self.bias = _joined_bias([adapter.base for adapter in adapters])
        for adapter, rows in zip(adapters, self._rows(), strict=True):
            view = self.matrix[rows, : self.width]
            view.copy_(adapter.base.weight.detach())
            adapter.base.weight.data = view
        self._fp8 = Fp8Matrix(self.matrix[: self.height, : self.width]).tensors if fp8 else None
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

    def fits(self, x: torch.Tensor) -> bool:
        """Whether the matrix is of the input's type and where it is."""
        return x.dtype == self.matrix.dtype and x.device == self.matrix.device

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """What projection number `place` makes of x (…, in); the others' are kept until asked for."""
        if self._input is not x or self._outputs[place] is None:
            masters = [tensor for adapter in self.adapters for tensor in (adapter.a, adapter.b)]
            parts = (self.matrix, self.bias, self.sizes, self.ranks, self.scalings)
            if self._fp8 is None or not torch.is_grad_enabled():
                self._outputs = list(_JoinedLora.apply(x, *parts, *masters))
            else:
                self._outputs = list(_Fp8Lora.apply(x, *parts, self._fp8, *masters))
            self._input = x
        output, self._outputs[place] = self._outputs[place], None
        if place == len(self._outputs) - 1:
            self._input, self._outputs = None, []
        return output

    def copies(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """(master, its place in M, scale) of all adapters."""
        column = 0
        for adapter, rows, rank in zip(self.adapters, self._rows(), self.ranks, strict=True):
            below = self.matrix[self.height + column :][:rank, : self.width]
            yield adapter.a.detach(), below, 1.0
            beside = self.matrix[rows, self.width + column :][:, :rank]
            yield adapter.b.detach(), beside, adapter.scaling
            column += rank

    def _rows(self) -> Iterator[slice]:
        start = 0
        for size in self.sizes:
            yield slice(start, start + size)
            start += size


def _joined_bias(layers: Sequence[torch.nn.Linear]) -> torch.Tensor | None:
    """(out,) biases one after the other, zeros where a layer has none; None if no layer has one."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [
            layer.weight.new_zeros(layer.out_features)
            if layer.bias is None
            else layer.bias.detach()
            for layer in layers
        ]
    )


class _JoinedLora(torch.autograd.Function):
    """Rows are kept as (1, n, …): a view would make the compiler write them apart from the wider ones."""

    @staticmethod
    def forward(ctx, x, matrix, bias, sizes, ranks, scalings, *masters):
        """x (…, in); matrix (out + R, in + R); masters a, b, a, b, …: gradients reach them."""
        width, height = x.shape[-1], sum(sizes)
        rows = _one_batch(x)
        projected = _small_product(rows, matrix[height:, :width].t())
        wide = torch.cat([rows, projected], 2)[0]
        outputs = []
        # Queries get a tensor of their own: torch 2.11 makes slow kernels for norms of a wider one's columns.
        for start, run in _equal_runs(sizes):
            rows_of = slice(start, start + sum(run))
            weight = matrix[rows_of].t()
            out = wide @ weight if bias is None else torch.addmm(bias[rows_of], wide, weight)
            outputs += out.split(run, 1)
        ctx.save_for_backward(rows, projected, matrix)
        ctx.sizes, ctx.ranks, ctx.scalings = sizes, ranks, scalings
        ctx.dtype = masters[0].dtype
        return tuple(part.reshape(*x.shape[:-1], -1) for part in outputs)

    @staticmethod
    def backward(ctx, *grads):
        rows, projected, matrix = ctx.saved_tensors
        width, height, rank = rows.shape[2], sum(ctx.sizes), sum(ctx.ranks)
        parts = [_one_batch(grad) for grad in grads]
        wide = torch.cat([*parts, *_through_b(ctx, parts, matrix, width)], 2)[0]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (wide @ matrix[:, :width]).view(*grads[0].shape[:-1], width)
        all_a = _product(wide[:, height : height + rank].t(), rows[0], ctx.dtype)
        all_b = _product(wide[:, :height].t(), projected[0, :, :rank], ctx.dtype)
        gradients, row, column = [], 0, 0
        for size, r, scaling in zip(ctx.sizes, ctx.ranks, ctx.scalings, strict=True):
            gradients.append(all_a[column : column + r])
            gradients.append(all_b[row : row + size, column : column + r] * scaling)
            row, column = row + size, column + r
        return grad_x, None, None, None, None, None, *gradients


class _Fp8Lora(torch.autograd.Function):
    """W's two products in FP8; the adapters' stay in the type of x and are added to them in place."""

    @staticmethod
    def forward(ctx, x, matrix, bias, sizes, ranks, scalings, fp8, *masters):
        """As `_JoinedLora`; fp8: the tensors of an `Fp8Matrix` of W."""
        width, height, rank = x.shape[-1], sum(sizes), sum(ranks)
        rows = _one_batch(x)
        projected = _small_product(rows, matrix[height : height + rank, :width].t())
        small, scale = quantized([rows])
        outputs = []
        for start, run in _equal_runs(sizes):
            rows_of = slice(start, start + sum(run))
            out = fp8_product(small, scale, fp8[0][rows_of], fp8[1][:, rows_of], x.dtype)
            add_product(out, projected[0], matrix[rows_of, width : width + rank].t())
            outputs += (out if bias is None else out + bias[rows_of]).split(run, 1)
        ctx.save_for_backward(rows, projected, matrix, *fp8[2:])
        ctx.sizes, ctx.ranks, ctx.scalings = sizes, ranks, scalings
        ctx.dtype = masters[0].dtype
        return tuple(part.reshape(*x.shape[:-1], -1) for part in outputs)

    @staticmethod
    def backward(ctx, *grads):
        rows, projected, matrix, *fp8 = ctx.saved_tensors
        width, height, rank = rows.shape[2], sum(ctx.sizes), sum(ctx.ranks)
        parts = [_one_batch(grad) for grad in grads]
        scaled = torch.cat(_through_b(ctx, parts, matrix, width), 2)[0, :, :rank]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = fp8_product(*quantized(parts), *fp8, rows.dtype)
            add_product(grad_x, scaled, matrix[height : height + rank, :width])
            grad_x = grad_x.view(*grads[0].shape[:-1], width)
        all_a = _product(scaled.t(), rows[0], ctx.dtype)
        gradients, column = [], 0
        for part, r, scaling in zip(parts, ctx.ranks, ctx.scalings, strict=True):
            gradients.append(all_a[column : column + r])
            own = projected[0, :, column : column + r]
            gradients.append(_product(part[0].t(), own, ctx.dtype) * scaling)
            column += r
        return grad_x, None, None, None, None, None, None, *gradients


def _equal_runs(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(start, sizes) of neighbours of equal size."""
    runs, start = [], 0
    for _, run in itertools.groupby(sizes):
        run = list(run)
        runs.append((start, run))
        start += sum(run)
    return runs


def _through_b(ctx, parts, matrix, width: int) -> list[torch.Tensor]:
    """(1, n, r) each: gradient times sB of its projection; the last one fills up to R with zeros."""
    products, row, column = [], 0, 0
    for place, (part, size, rank) in enumerate(zip(parts, ctx.sizes, ctx.ranks, strict=True)):
        end = column + rank if place + 1 < len(parts) else matrix.shape[1] - width
        block = matrix[row : row + size, width + column : width + end]
        products.append(_small_product(part, block))
        row, column = row + size, end
    return products


def _one_batch(x: torch.Tensor) -> torch.Tensor:
    """(…, n) as (1, rows, n)."""
    return x if x.dim() == 3 and x.shape[0] == 1 else x.reshape(1, -1, x.shape[-1])


def _small_product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(1, n, k) @ (k, r), as a batch of one.

    The compiler turns a plain `bmm` of one into `mm` of a view, and a tensor that is viewed gets a place
    of its own before it is concatenated: a copy of all rows, 4% of a step. It leaves `out_dtype` alone.
    """
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(rows, matrix.unsqueeze(0), out_dtype=rows.dtype)
    return torch.bmm(rows, matrix.unsqueeze(0))


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in `dtype`; CUDA keeps its fp32 sums instead of rounding them first."""
    if a.is_cuda and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(dtype)


# -----------------------------------------------------------------------------
# Adapters into the matrices


class AdapterCopies:
    """Writes the masters of all layers into their matrices; on CUDA in one kernel, without a wait."""

    def __init__(self, groups: Sequence[JoinedProjections]) -> None:
        self._copies = [copy for group in groups for copy in group.copies()]
        self._table: torch.Tensor | None = None
        self._addresses: list[int] = []

    @torch.no_grad()
    def write(self) -> None:
        """Bring the matrices up to date; before a forward pass, after any change of the masters."""
        if self._copies and self._in_one_kernel():
            self._launch()
            return
        for master, place, scaling in self._copies:
            place.copy_(master if scaling == 1 else master * scaling)

    def _in_one_kernel(self) -> bool:
        from torch.utils._triton import has_triton

        master, place, _ = self._copies[0]
        plain = type(master) is torch.Tensor and all(c[0].is_contiguous() for c in self._copies)
        fp32 = all(c[0].dtype == torch.float32 for c in self._copies)
        return place.is_cuda and plain and fp32 and has_triton()

    def _launch(self) -> None:
        """One program for each piece of each tensor, by a table of addresses."""
        from finetuning.model.triton_kernels import copy_scaled

        addresses = [master.data_ptr() for master, *_ in self._copies]
        if addresses != self._addresses:
            self._addresses, self._table = addresses, _copy_table(self._copies)
        largest = max(master.numel() for master, *_ in self._copies)
        copy_scaled(self._table, largest, self._copies[0][1])


def _copy_table(copies: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> torch.Tensor:
    """(copies, 6) int64: both addresses, elements, columns, the place's row stride, bits of the scale."""
    rows = [
        (
            master.data_ptr(),
            place.data_ptr(),
            master.numel(),
            master.shape[1],
            place.stride(0),
            torch.tensor(scaling, dtype=torch.float32).view(torch.int32).item(),
        )
        for master, place, scaling in copies
    ]
    return torch.tensor(rows, dtype=torch.int64).to(copies[0][1].device)
