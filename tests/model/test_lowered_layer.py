"""What the compiler makes of a decoder layer for a GPU: how many kernels, what is only copied or quantised.

At the published shape of Qwen3-4B and 2,048 tokens, with the pinned torch. Nothing is run, and no GPU asked.
uv run pytest -m "not long" tests/model/test_lowered_layer.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # eight seconds a layer
ROOT = Path(__file__).parents[2]
CASES = ("peft", "apart", "joined", "fp8", "joined-recomputed")
FP8 = "float8_e4m3fn"


@pytest.fixture(scope="module")
def layers() -> dict[str, list[dict]]:
    command = [sys.executable, "-m", "tests.helpers.lowered_layer", *CASES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def counts(kernels: list[dict]) -> tuple[int, int]:
    """Forward and backward."""
    backward = sum(kernel["backward"] for kernel in kernels)
    return len(kernels) - backward, backward


def results(kernels: list[dict], kind: str) -> list[tuple[str, ...]]:
    """What each kernel of the kind writes, in the order of the layer."""
    return [tuple(kernel["results"]) for kernel in kernels if kernel["kind"] == kind]


def megabytes(kernels: list[dict]) -> float:
    return sum(kernel["read"] + kernel["written"] for kernel in kernels) / 1e6


def test_kernels_of_the_ways_that_are_used_on_a_gpu(layers):
    assert counts(layers["joined"]) == (20, 38)
    assert counts(layers["fp8"]) == (22, 46)
    assert counts(layers["joined-recomputed"]) == (20, 54)
    products = {case: len(results(layers[case], "product")) for case in CASES}
    # Joined: a product for each matrix and its A, q apart from k and v; those of the backward pass besides.
    assert products == {"peft": 56, "apart": 56, "joined": 28, "fp8": 40, "joined-recomputed": 36}


def test_joined_adapters_move_the_least(layers):
    assert megabytes(layers["joined"]) < megabytes(layers["apart"]) < megabytes(layers["peft"])
    assert sum(counts(layers["joined"])) < sum(counts(layers["peft"]))


def test_whole_activations_are_copied_into_wider_rows_three_times(layers):
    """Attention's output, the gradient from the next layer, and those of queries, keys and values."""
    into_o, into_qkv = (f"bfloat16[1, 2048, {width}]" for width in (4160, 6208))
    alone = "bfloat16[1, 2048, 2560]"  # the adapter's columns beside it are another kernel's
    assert results(layers["joined"], "copy") == [(into_o,), (alone,), (into_qkv,)]
    again = [(into_o,), (alone,), (into_o,), (into_qkv,)]
    assert sorted(results(layers["joined-recomputed"], "copy")) == sorted(again)
    assert results(layers["fp8"], "copy") == []


def test_fp8_is_made_where_the_activation_is_made(layers):
    """By norms and SwiGLU; in kernels of its own around attention, and of the gradient from another layer."""
    fused = [made for made in results(layers["fp8"], "fused") if FP8 in str(made)]
    assert [max(w for w in made if FP8 in w) for made in fused] == [
        f"{FP8}[2048, 2560]",  # the norm before attention
        f"{FP8}[2048, 2560]",  # and before the MLP
        f"{FP8}[2048, 9728]",  # SwiGLU
        f"{FP8}[1, 2048, 9728]",  # gradients of gate and up
        f"{FP8}[2048, 2560]",  # of the attention's part of the sum
    ]
    scale, top = "float32[2048, 1]", "bfloat16[1, 2048, 1]"
    assert results(layers["fp8"], "quantizing") == [
        (f"{FP8}[2048, 4096]", scale),  # the attention's output
        (f"{FP8}[2048, 2560]", scale),  # the gradient from the next layer
        (top,),  # of the rows of the gradients of keys
        (top,),  # and values,
        (top, f"{FP8}[1, 2048, 4096]", scale),  # and of those of queries, which become FP8
        (f"{FP8}[1, 2048, 1024]", f"{FP8}[1, 2048, 1024]"),  # keys and values
    ]
