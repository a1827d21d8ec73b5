"""The two ways to put adapters into FP8 products that a benchmark compares: what they give is right.

uv run pytest tests/model/test_fp8_candidates.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.candidates import fp8_group
from benchmarks.candidates import further_columns as columns
from finetuning.model.fp8_products import quantized

ROOT = Path(__file__).parents[2]
SIZES = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]  # of an adapter's B beside W


def run(program: str, cache: Path, **environment: str) -> None:
    """In a process of its own, as Triton's interpreter has to be chosen before the import."""
    settings = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), **environment}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_one_kernel_gives_what_is_added(tmp_path):
    """Groups of Qwen3's shape, ranks 8 to 64, rows and columns that fill no block, in fp32 and fp16."""
    pytest.importorskip("triton")
    program = """
import torch
from benchmarks.candidates.fp8_group import directions
from benchmarks.candidates.one_kernel import Tile, one_kernel
from finetuning.model.fp8_products import quantized
torch.manual_seed(0)
tiles = Tile(32, 32, 32, 4, 2), Tile(16, 64, 64, 4, 2)
for inputs, sizes in ((80, (128, 48, 48)), (128, (80,)), (80, (112, 112)), (112, (80,))):
    x, gradient = torch.randn(70, inputs), torch.randn(70, sum(sizes))
    weights = torch.randn(sum(sizes), inputs).split(sizes)
    for rank, kind, error in ((8, torch.float32, 1e-6), (16, torch.float16, 1e-3), (64, torch.float32, 1e-6)):
        for group in directions(x, gradient, weights, rank).values():
            (small, scale), (matrix, other) = (quantized([m[None]]) for m in (group.x, group.weight))
            u, b = (group.x @ group.a.t()).to(kind), group.b.to(kind)
            exact = (small.double() * scale) @ (matrix.double() * other).t() + u.double() @ b.double()
            for tile in tiles:
                for out, ranks in group.parts:
                    part = matrix[out], other[out].t()
                    got = one_kernel((small, scale), part, u[:, ranks], b[ranks, out], tile)
                    assert got.dtype == kind and got.shape == exact[:, out].shape
                    assert (got - exact[:, out]).norm() < error * exact[:, out].norm()
"""
    run(program, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_one_kernel_fits_hopper(tmp_path):
    """Compiled without a GPU: its tensor cores multiply e4m3, and a multiprocessor holds every tile."""
    pytest.importorskip("triton")
    program = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.candidates.one_kernel import TILES, _one_kernel
names = _one_kernel.arg_names
for tile in TILES[0], max(TILES, key=lambda tile: tile.stages * (tile.rows + tile.columns)):
    blocks = (f"tensordesc<fp8e4nv[{rows},{tile.depth}]>" for rows in (tile.rows, tile.columns))
    types = (*blocks, *["*fp32"] * 2, *["*bf16"] * 3, *["i32"] * 7, *["constexpr"] * 5)
    fixed = dict(zip(names[-5:], (*tile[:3], 32, 16)))
    whole = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(types) if kind[0] in "*i"}
    source = ASTSource(_one_kernel, dict(zip(names, types)), fixed, whole)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= 227 * 1024
    assert "k32.f32.e4m3.e4m3" in made.asm["ptx"] and "cp.async.bulk.tensor" in made.asm["ptx"]
"""
    run(program, tmp_path, TRITON_INTERPRET="0")


def random_adapter(size: float, backward: bool, outlier: float) -> tuple[torch.Tensor, ...]:
    """x (n, k), W (out, k), A (r, k) and B (out, r) in bf16; on the way back the small one comes first."""
    torch.manual_seed(0)
    n, k, out, rank = 128, 2560, 768, 16
    x, weight = torch.randn(n, k), 0.025 * torch.randn(out, k)
    x[:, :3] *= outlier
    first, last = torch.randn(rank, k), torch.randn(out, rank)
    a = 0.025 * size * first if backward else first / (3 * k) ** 0.5
    b = last / (3 * out) ** 0.5 if backward else 0.025 * size * last
    return x.bfloat16(), weight.bfloat16(), a.bfloat16(), b.bfloat16()


def by_columns(x, weight, a, b) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, out) in fp64: what further columns make of u = x @ aᵀ and b, and what bf16 numbers make."""
    u, scale = x @ a.t(), quantized([weight[None]])[1].t()
    factor, rise = columns.factors(a.abs().float().sum(1), b, scale)
    row_scale = columns.raised_rows(x, rise)[1]
    behind = torch.cat(columns.columns_of_rows(u, row_scale, factor), 1)
    beside = torch.cat(columns.columns_of_matrix(b, scale, factor), 1)
    assert behind.shape[1] == beside.shape[1] == 48
    product = (behind.double() @ beside.double().t()) * row_scale * scale
    return product, u.double() @ b.double().t()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("outlier", [1.0, 30.0])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_further_columns_err_less_than_bf16_rounds(size, backward, outlier):
    """Of the adapters' product; beside W's own error in FP8, 4%, that of the smallest is none either."""
    x, weight, a, b = random_adapter(size, backward, outlier)
    product, expected = by_columns(x, weight, a, b)
    rounding = relative(expected, x.double() @ a.double().t() @ b.double().t())  # u is in bf16
    assert 0.0014 < rounding < 0.0018
    assert 0.0005 < relative(product, expected) < (2.7 if size == 1e-5 else 0.9) * rounding


@pytest.mark.parametrize("size", SIZES)
def test_no_row_is_too_large_for_its_further_columns(size):
    """The largest u that a row can have, and a row of zeros."""
    x, weight, a, b = random_adapter(size, False, 1.0)
    x[0], x[1] = a[0].sign(), 0
    product, expected = by_columns(x, weight, a, b)
    assert product[1].eq(0).all() and relative(product[0], expected[0]) < 0.005


def test_adapters_of_zero():
    """As training begins: B is zero, on the way there and back."""
    x, weight, a, b = random_adapter(0, False, 1.0)
    assert by_columns(x, weight, a, b)[0].eq(0).all()
    x, weight, a, b = random_adapter(0, True, 1.0)
    assert by_columns(x, weight, a, b)[0].eq(0).all()


def test_rows_make_room_for_a_large_adapter_without_a_loss():
    x, weight, a, b = random_adapter(1.0, False, 1.0)
    _, rise = columns.factors(a.abs().float().sum(1), b, quantized([weight[None]])[1].t())
    assert rise > 16 and rise.log2() % 1 == 0
    errors = [
        relative(small.double() * scale, x.double())
        for small, scale in (columns.raised_rows(x, torch.ones(())), columns.raised_rows(x, rise))
    ]
    assert errors[1] < 1.01 * errors[0]


def test_a_wrong_variant_is_named_and_not_timed(monkeypatch, capsys):
    torch.manual_seed(0)
    monkeypatch.setattr(fp8_group.Fp8Group, "_by_one_kernel", lambda *_: [])
    x, gradient = torch.randn(64, 128).bfloat16(), torch.randn(64, 96).bfloat16()
    weights = torch.randn(96, 128).bfloat16().split((64, 16, 16))
    for group in fp8_group.directions(x, gradient, weights, 16).values():
        named = [name for name, _ in fp8_group.compared(group, "q, k, v")]
        assert named == ["alone", "added", "further columns, 16", "further columns, 128"]
    assert not capsys.readouterr().out
    monkeypatch.setattr(columns, "_BETWEEN", 0.0)
    assert [name for name, _ in fp8_group.compared(group, "q, k, v")] == ["alone", "added"]
    assert "q, k, v, further columns, 16: WRONG, " in capsys.readouterr().out


def test_a_step_takes_the_sum_of_its_products():
    figures = [
        *(("o", 8, "added", 5.0), ("o", 8, "one kernel, a", 7.0), ("o", 8, "one kernel, b", 4.0)),
        *(("down", 8, "alone", 2.0), ("down", 8, "added", 3.0), ("down", 8, "one kernel, a", 9.0)),
    ]
    (line,) = fp8_group.step_times(figures, 1000)
    assert line.endswith(
        "ms: added 8.00, alone inf, one kernel 13.00, the best for each shape 7.00"
    )
