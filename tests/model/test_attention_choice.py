"""Kernels of packages that torch can switch to: tried, refused where wrong, kept where they are fast.

uv run pytest tests/model/test_attention_choice.py
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import _registry, current_flash_attention_impl
from transformers import AutoModelForCausalLM

from finetuning.common.distributed import init_distributed
from finetuning.common.terminal import Terminal
from finetuning.config import DirectTrainingConfig
from finetuning.model import attention
from finetuning.model.attention_choice import (
    CLOSE,
    OWN,
    AttentionChoice,
    AttentionRow,
    _difference,
    _Trial,
    choose_attention,
    measured_choice,
)
from finetuning.runs import build
from finetuning.runs.plan import plan_run
from finetuning.runs.summary import versions
from tests.model.test_attention import reference_kernel

ROW = AttentionRow(heads=4, kv_heads=2, head_dim=16, bounds=(0, 9, 30, 48), longest=24, window=8)
CPU, SLOW = torch.device("cpu"), 0.02  # seconds of a pass


class Handle:
    """What torch keeps of kernels that are switched on."""

    def remove(self) -> None:
        pass


@pytest.fixture
def kernels(monkeypatch) -> dict[str, Callable]:
    """Name -> what it makes of torch's own output, which takes long; the registry is torch's own too."""
    made: dict[str, Callable] = {}
    registered: dict[str, Callable] = {}
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", registered)

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        out = reference_kernel(q, k, v, cu_q, scale)
        name = current_flash_attention_impl()
        if name is None:
            time.sleep(SLOW)
            return out
        return made[name](out, window_size)

    class Kernels(dict):
        def __setitem__(self, name: str, change: Callable) -> None:
            made[name] = change
            registered[name] = Handle

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    names = frozenset({"window_size", "enable_gqa"})
    monkeypatch.setattr(attention, "_VARLEN_PARAMETERS", names)
    yield Kernels()
    _registry.restore_flash_attention_impl(_raise_warn=False)


def as_it_is(out: torch.Tensor, _: tuple) -> torch.Tensor:
    return out


def slower(out: torch.Tensor, _: tuple) -> torch.Tensor:
    time.sleep(3 * SLOW)
    return out


def test_the_fastest_kernels_that_are_right_are_switched_on_and_kept(kernels, tmp_path: Path):
    kernels["fast"], kernels["slow"] = as_it_is, slower
    kernels["wrong"] = lambda out, _: 1.1 * out
    chosen = choose_attention(ROW, CPU, tmp_path)
    assert chosen.name == "fast" == current_flash_attention_impl() == versions()["attention"]
    assert set(chosen.milliseconds) == {OWN, "fast", "slow"}
    assert chosen.milliseconds["fast"] < 1000 * SLOW < chosen.milliseconds[OWN]
    assert chosen.refused == {"wrong": "its results are 10.0% off"}
    assert chosen.text().startswith("attention by fast; milliseconds of a row: torch ")

    _registry.restore_flash_attention_impl()
    kernels["fast"] = pytest.fail  # a second start measures nothing
    assert choose_attention(ROW, CPU, tmp_path) == chosen
    assert current_flash_attention_impl() == "fast"


def test_torchs_own_stay_where_they_are_the_fastest(kernels, tmp_path: Path):
    kernels["slow"] = slower
    assert choose_attention(ROW, CPU, tmp_path).name == OWN
    assert current_flash_attention_impl() is None and "attention" not in versions()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda out, window: out if window[0] == -1 else -out, "off"),
        (lambda out, _: out * float("nan"), "nan% off"),
        (lambda out, _: out.detach().requires_grad_(), "unused|graph"),
        (lambda out, _: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_is_wrong_anywhere_is_refused(kernels, change: Callable, reason: str):
    """With a window only, in no number, in the gradient, or by an error."""
    kernels["odd"] = change
    choice = measured_choice(["odd"], ROW, CPU)
    assert choice.name == OWN and list(choice.refused) == ["odd"]
    assert any(part in choice.refused["odd"] for part in reason.split("|")), choice.refused
    assert "odd was refused" in choice.text()


def test_a_token_that_was_left_out_is_noticed(kernels):
    """Of a long document's last ones a tensor's norm shows nothing; rounding is no fault."""
    results = _Trial(AttentionRow(4, 2, 16, (0, 4096), 4096), CPU).results()
    wrong = [tensor.clone() for tensor in results]
    wrong[0][-2:] = 0
    assert (wrong[0] - results[0]).norm() < CLOSE * results[0].norm()
    assert _difference(wrong, results).startswith("a token's results are ")
    assert _difference([tensor.bfloat16() for tensor in results], results) == ""


def test_a_trial_that_is_none_leaves_torchs_own(kernels, monkeypatch, tmp_path: Path):
    kernels["fast"] = as_it_is

    def fails(self: _Trial) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as full:
        full.setattr(_Trial, "milliseconds", fails)
        choice = choose_attention(ROW, CPU, tmp_path)
    assert choice.name == OWN and "fast was refused (no trial: CUDA out of memory)" in choice.text()
    assert choose_attention(ROW, CPU, tmp_path).name == "fast", "another time there is room"


def test_a_lack_of_memory_is_no_fault_of_the_kernels(kernels, tmp_path: Path):
    def full(out: torch.Tensor, _: tuple) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernels["large"] = full
    assert "no trial" in choose_attention(ROW, CPU, tmp_path).refused["large"]
    kernels["large"] = as_it_is
    assert choose_attention(ROW, CPU, tmp_path).name == "large"


def test_other_documents_of_the_same_row_need_no_other_trial(kernels, tmp_path: Path):
    kernels["fast"] = as_it_is
    first = choose_attention(ROW, CPU, tmp_path)
    assert choose_attention(replace(ROW, bounds=(0, 12, 24, 48)), CPU, tmp_path) == first
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_packages_that_are_not_there_are_not_spoken_of(tmp_path: Path):
    """torch's real switches: FlashAttention 3 and 4 are not among what is installed here."""
    choice = choose_attention(ROW, CPU, tmp_path)
    assert choice.name == OWN and choice.text() == "" and not list(tmp_path.iterdir())


def test_a_run_tries_its_first_row(tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    asked = []
    choice = AttentionChoice("FA4", {OWN: 0.45, "FA4": 0.31})
    monkeypatch.setattr(build, "choose_attention", lambda row, *_: asked.append(row) or choice)
    config = DirectTrainingConfig(
        model_name=str(tiny_model), data_path=(str(tiny_data),), cache_dir=str(tmp_path)
    )
    terminal, on_cpu = Terminal(), init_distributed("cpu")
    plan = plan_run(config, on_cpu, terminal)
    shape = plan.steps.constant_shape  # as compiled layers want it
    execution = replace(plan.execution, dtype=torch.bfloat16, batch_shape=shape)
    plan = replace(plan, execution=execution)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    build.choose_kernels(model, tmp_path, plan, on_cpu, terminal)
    assert not asked, "a CPU has no such kernels"
    build.choose_kernels(
        model, tmp_path, plan, replace(on_cpu, device=torch.device("cuda")), terminal
    )
    (row,) = asked
    first = list(plan.steps[1].micro_batches[0])
    lengths = np.diff(row.bounds).tolist()
    assert lengths[: len(first)] == plan.data.train.tokens.lengths[first].tolist()
    assert len(lengths) == shape["pad_documents"] and sum(lengths) == shape["pad_to"]
    assert row.longest == shape["max_length"]
    config = model.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert (row.heads, row.kv_heads, row.head_dim) == heads
    said = "attention by FA4; milliseconds of a row: torch 0.450, FA4 0.310"
    assert said in capsys.readouterr().out
