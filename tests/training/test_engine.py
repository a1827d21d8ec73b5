"""The model in training: updates, going back to the last bit, and less memory without another result.

uv run pytest tests/training/test_engine.py
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from finetuning.common.distributed import Distributed
from finetuning.common.errors import RunStopped
from finetuning.config import OptimizerSettings
from finetuning.data.packing import StepPlan
from finetuning.data.token_table import TokenizedSamples
from finetuning.data.tokenization import tokenize_samples
from finetuning.model import packed_model
from finetuning.model.flops import dims_from_config, forward_flops, training_flops
from finetuning.model.loading import recompute_activations, separate_layers
from finetuning.model.loss import Objective
from finetuning.readers.dataset import read_samples
from finetuning.training import engine
from finetuning.training.captured_step import StaticStep
from finetuning.training.engine import Execution, TrainingEngine
from finetuning.training.state import TrainState
from finetuning.training.step_clock import StepClock
from tests.helpers.settings import step_plan, up_to
from tests.model.test_attention import use_bounds, varlen_2_12

ONE = Distributed(0, 1, 0, torch.device("cpu"))
RATE = 1e-2
Make = Callable[..., TrainingEngine]


@pytest.fixture(scope="module")
def tokens(tiny_model: Path, tiny_data: Path) -> TokenizedSamples:
    samples = read_samples([str(tiny_data)]).samples
    return tokenize_samples(samples, AutoTokenizer.from_pretrained(tiny_model), up_to(768))


@pytest.fixture(scope="module")
def plan(tokens: TokenizedSamples) -> StepPlan:
    return step_plan(tokens.lengths, tokens.num_targets, data=up_to(768), max_steps=100)


@pytest.fixture
def make(tiny_model: Path, tokens: TokenizedSamples) -> Make:
    def make(**changes) -> TrainingEngine:
        torch.manual_seed(0)
        base = Qwen3ForCausalLM.from_pretrained(tiny_model)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        if first := changes.get("recomputed_layers"):
            recompute_activations(model, first)
        warn = changes.pop("warn", lambda text: None)
        execution = Execution("ddp", torch.float32, may_recompute=True)
        return TrainingEngine(
            model,
            tokens.close_id,
            ONE,
            replace(execution, **changes),
            OptimizerSettings(learning_rate=RATE),
            warn,
        )

    return make


def gradients(model: TrainingEngine, plan: StepPlan, tokens: TokenizedSamples, state: TrainState):
    planned = plan[state.step + 1]
    sums, _ = model.forward_backward(planned, tokens, StepClock(), state, lambda: False)
    loss = sum(s.per_document[..., 0].double().sum() for _, s in sums) / planned.num_targets
    return loss.item(), [p.grad.clone() for p in model.parameters]


def train(model, plan, tokens, state, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(gradients(model, plan, tokens, state)[0])
        model.update(RATE, max_grad_norm=1.0)
        state.step += 1
    return losses


def recomputed(model: TrainingEngine) -> list[bool]:
    return [layer.gradient_checkpointing for layer in separate_layers(model.packed.model)]


def short_of_memory(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """No more than so many supervised tokens at once; recomputation alone does not help."""
    original = packed_model.packed_loss

    def small_memory(hidden, *args, **kwargs):
        if hidden.shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return original(hidden, *args, **kwargs)

    monkeypatch.setattr(packed_model, "packed_loss", small_memory)


def test_back_to_a_checkpoint_and_on_to_the_last_bit(make, plan, tokens):
    model, state = make(), TrainState()
    train(model, plan, tokens, state, 3)
    saved = {
        file: {name: tensor.clone() for name, tensor in content.items()}
        for file, content in model.tensors().items()
    }
    expected = train(model, plan, tokens, state, 3)
    for other in (model, make()):
        back = TrainState(step=3)
        other.restore(saved, back)
        assert train(other, plan, tokens, back, 3) == expected
        assert all(map(torch.equal, model.parameters, other.parameters))


def test_a_step_left_out_changes_nothing(make, plan, tokens):
    model, state = make(), TrainState()
    train(model, plan, tokens, state, 1)
    before = [p.detach().clone() for p in model.parameters]
    _, found = gradients(model, plan, tokens, state)
    norm = model.update(RATE, max_grad_norm=1.0, skip=True)
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in found]).norm().item())
    assert all(map(torch.equal, before, model.parameters))
    assert all(p.grad is None for p in model.parameters)


def test_less_memory_gives_the_same_gradients(make, plan, tokens, monkeypatch):
    loss, expected = gradients(make(), plan, tokens, TrainState())
    said: list[str] = []
    model, state = make(warn=said.append), TrainState()
    short_of_memory(monkeypatch, 300)
    less, found = gradients(model, plan, tokens, state)
    assert state.recomputes and model.recomputes_all and state.micro_batch_splits >= 1
    assert ["made again" in text for text in said] == [True] + [False] * state.micro_batch_splits
    assert less == pytest.approx(loss, rel=1e-6)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    said.clear()
    gradients(model, plan, tokens, state)
    assert not said, "what was learned is kept"


def test_where_some_layers_are_recomputed_all_of_them_come_next(make, plan, tokens, monkeypatch):
    loss, expected = gradients(make(), plan, tokens, TrainState())
    model, state = make(recomputed_layers=1), TrainState()
    assert recomputed(model) == [True, False]
    less, found = gradients(model, plan, tokens, state)
    assert less == loss and all(map(torch.equal, expected, found)) and not state.recomputes
    short_of_memory(monkeypatch, 300)
    gradients(model, plan, tokens, state)
    assert recomputed(model) == [True, True] and state.recomputes and model.recomputes_all


def test_a_resumed_run_knows_what_memory_was_left(make, plan, tokens, monkeypatch):
    model = make()
    short_of_memory(monkeypatch, 300)
    state = TrainState()
    gradients(model, plan, tokens, state)
    said: list[str] = []
    resumed = make(warn=said.append)
    resumed.restore(model.tensors(), state)
    gradients(resumed, plan, tokens, state)
    assert resumed.recomputes_all and not said


@pytest.fixture
def captures(monkeypatch) -> Iterator[list[StaticStep]]:
    """What engines capture from here on, without a GPU: the same passes, run kernel by kernel."""
    made: list[StaticStep] = []

    class Recorded(StaticStep):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            made.append(self)

    use_bounds(monkeypatch, varlen_2_12)
    monkeypatch.setattr(engine, "CapturedStep", Recorded)
    yield made
    torch.compiler.set_stance("default")  # an engine that was short of memory compiles no more


def in_one_shape(model: TrainingEngine, plan: StepPlan) -> TrainingEngine:
    """As on a GPU, where layers are compiled for one shape; here they are not."""
    model.batch_shape = plan.constant_shape
    return model


def test_steps_are_captured_once_they_are_warm_and_stay_the_same(make, plan, tokens, captures):
    model, plain = (in_one_shape(make(), plan) for _ in range(2))
    assert "CUDA" in model.not_captured
    model.not_captured = ""
    first = train(model, plan, tokens, TrainState(), 1)
    assert not captures, "kernels are compiled and chosen in the first step"
    losses = first + train(model, plan, tokens, TrainState(step=1), 3)
    assert captures == [model.captured]
    assert losses == train(plain, plan, tokens, TrainState(), 4) and plain.captured is None
    assert all(map(torch.equal, model.parameters, plain.parameters))


@pytest.mark.parametrize("found_before", [False, True], ids=["memory runs out", "a resume"])
def test_less_memory_lets_go_of_what_is_captured(
    make, plan, tokens, captures, monkeypatch, found_before
):
    model, state = in_one_shape(make(), plan), TrainState()
    model.not_captured = ""
    train(model, plan, tokens, state, 2)
    assert model.captured is not None
    if found_before:
        model.apply_memory_measures(TrainState(step=2, recomputes=True))
    else:
        short_of_memory(monkeypatch, 300)
        gradients(model, plan, tokens, state)
    assert model.captured is None and "memory was short" in model.not_captured
    train(model, plan, tokens, state, 1)
    assert len(captures) == 1, "nor is it made anew"


def test_what_the_plan_says_against_a_graph_is_told_where_one_could_be(make, monkeypatch):
    assert "CUDA" in make(no_graph="too long").not_captured
    monkeypatch.setattr(engine, "why_not_captured", lambda *_, **__: "")
    assert make(no_graph="too long").not_captured == "too long" and not make().not_captured


def test_where_there_is_no_less_the_run_ends_with_a_way_on(make, plan, tokens, monkeypatch):
    short_of_memory(monkeypatch, 0)
    with pytest.raises(RunStopped, match=r"step 8: out of memory .*injected.* --resume latest"):
        gradients(make(), plan, tokens, TrainState(step=7))
    with pytest.raises(RunStopped, match="out of memory"):
        model = make(parallel="ddp")
        model._parallel = "fsdp"  # shards can't agree in the middle of a step
        gradients(model, plan, tokens, TrainState())


def test_other_errors_are_not_taken_for_a_lack_of_memory(make, plan, tokens, monkeypatch):
    def wrong(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine, "forward_backward", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        gradients(make(), plan, tokens, TrainState())


def test_who_wants_to_stop_is_asked_after_the_passes(make, plan, tokens, monkeypatch):
    asked, forward_backward = [], engine.forward_backward

    def passes(*args, **kwargs):
        assert not asked
        return forward_backward(*args, **kwargs)

    monkeypatch.setattr(engine, "forward_backward", passes)
    for answer in (True, False):
        asked.clear()
        _, stops = make().forward_backward(
            plan[1], tokens, StepClock(), TrainState(), lambda a=answer: asked.append(1) or a
        )
        assert stops is answer and asked == [1]


def test_the_arithmetic_counts_adapters_or_all_weights(make, tiny_model, tokens):
    model = make()
    lengths = np.array([100, 200])
    assert model.num_trainable == sum(p.numel() for p in model.parameters) < model.num_parameters
    adapters = model.flops(lengths, 150)
    everything = TrainingEngine(
        Qwen3ForCausalLM.from_pretrained(tiny_model),
        tokens.close_id,
        ONE,
        Execution("ddp", torch.float32),
        OptimizerSettings(learning_rate=RATE),
        warn=print,
    )
    assert everything.num_trainable == everything.num_parameters
    dims = dims_from_config(Qwen3Config.from_pretrained(tiny_model))
    assert adapters == training_flops(dims, lengths, 150, lora_weights=model.num_trainable)
    assert everything.flops(lengths, 150) == training_flops(dims, lengths, 150, lora_weights=None)
    held = make(objective=Objective(kl_anchor=0.1))
    assert held.flops(lengths, 150) == adapters + forward_flops(dims, lengths, 150), "and the base"
