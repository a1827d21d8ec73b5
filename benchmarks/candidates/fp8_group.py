"""One group's FP8 product with its adapters in every way that is compared, on the same numbers."""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from benchmarks.candidates import further_columns as columns
from finetuning.model.fp8_products import add_product, fp8_product, quantized
from finetuning.model.joined_lora import ALIGNMENT, _equal_runs

Outputs = list[torch.Tensor]
ALIGNMENTS = columns.ALIGNMENT, 128  # 128: rows begin at lines of the cache, and tiles are full
_TOLERANCE = 0.01  # of the outputs' norm; two results in bf16 are 0.002 apart, an adapter is 0.04


@dataclass(frozen=True)
class Fp8Group:
    """What projections make of one input, or the gradient by it: x @ weightᵀ + (x @ aᵀ) @ b.

    x (n, k), weight (out, k), a (r, k), b (r, out), which is block-diagonal where x is the input.
    parts: outputs that are tensors of their own, and the ranks that they need.
    """

    x: torch.Tensor
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    parts: Sequence[tuple[slice, slice]]

    def variants(self) -> Iterator[tuple[str, Callable[[], Outputs]]]:
        """Name and work; x is in FP8 and x @ aᵀ there before."""
        u = self.x @ self.a.t()
        rows, (matrix, scale) = quantized([self.x[None]]), quantized([self.weight[None]])
        matrices = [(matrix[out], scale[out].t().contiguous()) for out, _ in self.parts]

        def alone() -> Outputs:
            return [fp8_product(*rows, *matrix, self.x.dtype) for matrix in matrices]

        def added() -> Outputs:
            outputs = alone()
            for out, (place, _) in zip(outputs, self.parts, strict=True):
                add_product(out, u, self.b[:, place])
            return outputs

        yield "alone", alone
        yield "added", added
        for alignment in ALIGNMENTS:
            work = self._by_further_columns(u, matrix, scale.t().contiguous(), alignment)
            yield f"further columns, {alignment}", work
        if importlib.util.find_spec("triton"):
            yield from self._by_one_kernel(u, rows, matrices)

    def _by_further_columns(self, u, matrix, scale, alignment) -> Callable[[], Outputs]:
        """Those of u are made with each product, those of b where adapters are copied into the matrices."""
        factor, rise = columns.factors(self.a.abs().float().sum(1), self.b.t(), scale)
        rows, row_scale = columns.raised_rows(self.x, rise)
        inputs = rows.shape[1]
        wide = torch.cat([rows, *columns.columns_of_rows(u, row_scale, factor, alignment)], 1)
        beside = columns.columns_of_matrix(self.b.t(), scale, factor, alignment)
        matrix = torch.cat([matrix, *beside], 1)
        matrices = [(matrix[out], scale[:, out].contiguous()) for out, _ in self.parts]

        def work() -> Outputs:
            _write_columns(self.x.is_cuda)(wide[:, inputs:], u, row_scale, factor, alignment)
            return [fp8_product(wide, row_scale, *matrix, self.x.dtype) for matrix in matrices]

        return work

    def _by_one_kernel(self, u, rows, matrices) -> Iterator[tuple[str, Callable[[], Outputs]]]:
        kernel = _one_kernel(self.x.device)
        kind = u.dtype if u.is_cuda else torch.float32  # the interpreter has no products in bf16
        adapters = [(u[:, r].to(kind), self.b[r, out].to(kind)) for out, r in self.parts]
        for tile in kernel.TILES:
            name = "x".join(map(str, tile[:3])) + f", {tile.warps} warps, {tile.stages} stages"

            def work(tile=tile) -> Outputs:
                both = zip(matrices, adapters, strict=True)
                return [kernel.one_kernel(rows, matrix, *adapter, tile) for matrix, adapter in both]

            yield f"one kernel, {name}", work


def directions(
    x: torch.Tensor, gradient: torch.Tensor, weights: Sequence[torch.Tensor], rank: int
) -> dict[str, Fp8Group]:
    """Projections of x (n, in) by weights (out, in), and back; adapters so large that each is noticed."""
    inputs, sizes, ranks = x.shape[1], [len(weight) for weight in weights], rank * len(weights)
    weight = torch.cat(list(weights))
    a = torch.randn_like(x[:1].expand(ranks, -1)) / inputs**0.5
    b = torch.block_diag(*[torch.randn_like(w[:, :1].expand(-1, rank)) for w in weights])
    padded = math.ceil(ranks / ALIGNMENT) * ALIGNMENT
    beside = weight.new_zeros(len(weight), inputs + padded)[:, inputs : inputs + ranks]
    beside.copy_(b)  # with the strides that `joined_lora` gives it
    parts, done = [], 0
    for start, run in _equal_runs(sizes):
        end = done + rank * len(run)
        parts.append((slice(start, start + sum(run)), slice(done, end)))
        done = end
    everything = [(slice(0, inputs), slice(0, ranks))]
    return {
        "forward": Fp8Group(x, weight, a, beside.t(), parts),
        "backward": Fp8Group(gradient, weight.t().contiguous(), b.t(), a, everything),
    }


def difference(outputs: Outputs, expected: Outputs) -> float:
    """The largest of the outputs, of their norms."""
    pairs = zip(outputs, expected, strict=True)
    return max(((o.float() - e).norm() / e.float().norm()).item() for o, e in pairs)


def compared(group: Fp8Group, what: str) -> Iterator[tuple[str, Callable[[], Outputs]]]:
    """The variants that give what `added` gives; the others are named and left out."""
    expected: Outputs = []
    for name, work in group.variants():
        if name == "alone":
            yield name, work
            continue
        outputs = work()
        expected = expected or outputs
        if (apart := difference(outputs, expected)) < _TOLERANCE:
            yield name, work
        else:
            print(f"{what}, {name}: WRONG, {apart:.2%} from what is added", flush=True)


def step_times(figures: Sequence[tuple[str, int, str, float]], layers: int) -> Iterator[str]:
    """For rows of each length: all products of a step, ms, by each way and by the best for each shape."""
    for rows in sorted({figure[1] for figure in figures}):
        shapes: dict[str, dict[str, float]] = {}
        for what, count, variant, time in figures:
            if count == rows:
                way = variant.partition(",")[0]
                times = shapes.setdefault(what, {})
                times[way] = min(time, times.get(way, time))
        ways = {way for times in shapes.values() for way in times}
        totals = {
            way: sum(times.get(way, math.inf) for times in shapes.values()) for way in sorted(ways)
        }
        best = [min(t for way, t in times.items() if way != "alone") for times in shapes.values()]
        told = {**totals, "the best for each shape": sum(best)}
        words = ", ".join(f"{way} {layers * time / 1e3:.2f}" for way, time in told.items())
        yield f"FP8 with adapters in a step of {layers} layers and {rows:,} rows, ms: {words}"


@functools.cache
def _write_columns(compiled: bool) -> Callable[..., None]:
    def write(out, u, scale, factor, alignment) -> None:
        parts = columns.columns_of_rows(u, scale, factor, alignment)
        for place, part in zip(out.split([p.shape[1] for p in parts], 1), parts, strict=True):
            place.copy_(part)

    return torch.compile(write, dynamic=True) if compiled else write


def _one_kernel(device: torch.device) -> ModuleType:
    """The module; on a CPU for Triton's interpreter, which is chosen before a kernel is defined."""
    import triton

    if device.type != "cuda":
        triton.knobs.runtime.interpret = True
    from benchmarks.candidates import one_kernel

    return one_kernel
