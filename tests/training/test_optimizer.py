"""The schedule, clipping, and an update that never lets a bad gradient through.

uv run pytest tests/training/test_optimizer.py
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from finetuning.config import OptimizerSettings
from finetuning.training.optimizer import (
    build_optimizer,
    clip_gradients,
    is_compiler_error,
    is_out_of_memory,
    learning_rate_at,
    update_weights,
)

COSINE = OptimizerSettings(lr_schedule="cosine", warmup_ratio=0.1)


def rates(num_steps: int, **options: object) -> list[float]:
    settings = replace(COSINE, **options)
    return [learning_rate_at(step, num_steps, 1.0, settings) for step in range(1, num_steps + 1)]


def test_warmup_starts_above_zero_and_reaches_the_peak():
    course = rates(100)
    assert course[0] == pytest.approx(0.1)
    assert course[9] == course[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(course[10:]))
    assert 0 < course[-1] < 0.001, "the last update must not be lost"
    assert course[54 + 1] == pytest.approx(0.5, abs=0.01)


def test_short_runs_have_a_learning_rate(subtests):
    for num_steps in [1, 2, 3]:
        for warmup_ratio in [0.0, 0.05, 0.9]:
            with subtests.test(num_steps=num_steps, warmup_ratio=warmup_ratio):
                assert all(0 < rate <= 1 for rate in rates(num_steps, warmup_ratio=warmup_ratio))


def test_other_schedules_and_a_floor():
    assert rates(10, lr_schedule="constant", warmup_ratio=0.0) == [1.0] * 10
    assert rates(4, lr_schedule="linear", warmup_ratio=0.0) == [1.0, 0.75, 0.5, 0.25]
    assert min(rates(200, min_lr_ratio=0.1)[20:]) == pytest.approx(0.1, abs=0.001)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("num_steps", "warmup_ratio"), [(10, 0.0), (10, 0.25), (7, 0.3), (40, 0.1)]
)
def test_each_step_has_the_rate_of_the_formula(schedule: str, num_steps: int, warmup_ratio: float):
    """A share that is no whole number of steps is rounded up; the course ends at the lowest rate."""
    lowest, warmup = 0.2, -(-round(warmup_ratio * num_steps * 1000) // 1000)
    courses = {
        "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
        "linear": lambda share: 1 - share,
        "constant": lambda share: 1.0,
    }
    expected = [(step + 1) / warmup for step in range(warmup)]
    for step in range(num_steps - warmup):
        course = courses[schedule](step / (num_steps - warmup))
        expected.append(lowest + (1 - lowest) * course)
    got = rates(num_steps, lr_schedule=schedule, warmup_ratio=warmup_ratio, min_lr_ratio=lowest)
    assert got == pytest.approx(expected, abs=1e-12)


def test_the_norm_is_the_one_before_clipping():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([weight], 1.0).item() == 5.0
    assert weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([weight], 0).item() == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_changes_neither_weights_nor_moments(bad: float):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)

    def step(*gradient: float, skip: bool = False) -> None:
        weight.grad = torch.tensor(gradient)
        update_weights(optimizer, clip_gradients([weight], 1.0), skip=skip)

    step(1.0, 1.0, 1.0)
    before = weight.detach().clone()
    moments = {k: v.clone() for k, v in optimizer.state[weight].items()}
    step(1.0, bad, 1.0)
    step(1.0, 1.0, 1.0, skip=True)
    assert torch.equal(weight.detach(), before)
    assert all(torch.equal(v, moments[k]) for k, v in optimizer.state[weight].items())
    step(1.0, 1.0, 1.0)
    assert not torch.equal(weight.detach(), before), "the optimizer stopped working"
    assert weight.grad is None


def test_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    )
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(RuntimeError("CUDA driver error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))


def test_what_the_compiler_raises_is_told_from_other_errors():
    def broken(graph, inputs):
        raise ValueError("no C compiler")

    torch._dynamo.reset()
    for function in (
        torch.compile(lambda x: x + 1, backend=broken),
        torch.compile(lambda x: print(x) or x, backend="eager", fullgraph=True),
    ):
        with pytest.raises(RuntimeError) as caught:
            function(torch.ones(2))
        assert is_compiler_error(caught.value) and not is_out_of_memory(caught.value)
    assert not is_compiler_error(RuntimeError("size mismatch"))


def test_norms_and_biases_do_not_decay():
    matrix, norm = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(
        [norm, matrix], learning_rate=0.1, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.5
    )
    for parameter in (matrix, norm):
        parameter.grad = torch.zeros_like(parameter)
    update_weights(optimizer, torch.zeros(()))
    assert norm.tolist() == [1, 1], "no gradient and no decay"
    assert matrix.flatten().tolist() == pytest.approx([1 - 0.1 * 0.5] * 4)
