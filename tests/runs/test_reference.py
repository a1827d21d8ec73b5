"""A run's numbers equal those of plain transformers, peft and torch, computed one sample at a time.

See `tests/helpers/reference.py`. Here a run is one process; `test_reference_on_ranks.py` has several.

uv run pytest -m "not long" tests/runs/test_reference.py
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3_5TextConfig

from finetuning.config import DirectTrainingConfig
from tests.helpers.reference import PlainTraining, Reference
from tests.helpers.sessions import (
    BETAS,
    CLIP,
    CLOSE_TO,
    DECAY,
    EPSILON,
    WARMUP,
    Run,
    assert_curve,
    assert_epochs_and_counters,
    assert_hardest,
    assert_same_adapter,
    assert_same_gradients,
    by_step,
    do,
    settings,
    stop_at,
    train,
)
from tests.helpers.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the data lie and runs are done: a weight's draw depends on how a file is named."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def config(folder: Path, tiny_model: Path, cache_dir: Path) -> DirectTrainingConfig:
    return settings(folder, tiny_model, cache_dir)


@pytest.fixture(scope="module")
def run(config: DirectTrainingConfig, folder: Path) -> Run:
    return do(config, folder)


@pytest.fixture(scope="module")
def reference(config: DirectTrainingConfig, folder: Path, run: Run) -> Reference:
    return PlainTraining(config, folder).train(run.steps())


def test_the_steps_are_worth_a_comparison(run: Run, reference: Reference):
    """Odd numbers of micro-batches, a last step of an epoch that is smaller, and norms on both sides."""
    plan = run.plan
    micro_batches = [plan[n].num_micro_batches for n in range(1, plan.num_steps + 1)]
    assert set(micro_batches) >= {3} and len(set(micro_batches)) > 1, micro_batches
    assert plan.num_steps == 2 * plan.steps_per_epoch >= 6
    assert sum(norm > 1.1 * CLIP for norm in reference.norms) >= 2, reference.norms
    assert sum(norm < CLIP for norm in reference.norms) >= 1, reference.norms
    assert WARMUP * plan.num_steps % 1 > 0.05, "the warmup must be no whole number of steps"


def test_an_epoch_shows_each_source_by_its_weight(run: Run):
    for epoch in range(2):
        first = epoch * run.plan.steps_per_epoch
        steps = run.steps()[first : first + run.plan.steps_per_epoch]
        shown = Counter(sample for step in steps for sample in step)
        twice = {sample: n for sample, n in shown.items() if sample[0] == "twice.jsonl"}
        half = {sample: n for sample, n in shown.items() if sample[0] == "half.jsonl"}
        assert twice == {("twice.jsonl", line): 2 for line in range(1, 10)}
        assert len(half) == 5 and set(half.values()) == {1}


def test_losses_of_every_step_by_part(run: Run, reference: Reference):
    tags = {
        "Training/Loss": (),
        "Thinking/Loss": ("thinking",),
        "Answer/Loss": ("answer",),
        "Boundary/Close_Loss": ("close",),
        "Boundary/EOS_Loss": ("end",),
    }
    for tag, parts in tags.items():
        assert_curve(run, tag, by_step([sums.mean(*parts) for sums in reference.steps]))
    for i in range(1, 11):
        tenth = [sums.mean(f"tenth {i}") for sums in reference.steps]
        assert_curve(run, f"Thinking/Loss_By_Position_{i:02d}", by_step(tenth))
    perplexity = [math.exp(sums.mean()) for sums in reference.steps]
    assert_curve(run, "Training/Perplexity", by_step(perplexity), rel=1e-4)


def test_losses_of_every_step_by_source(
    config: DirectTrainingConfig, run: Run, reference: Reference
):
    seen = dict(enumerate(reference.steps, start=1))
    for name in config.data_path:
        losses = {n: sums.mean(name) for n, sums in seen.items() if sums.count[name]}
        assert_curve(run, f"Training/By_Source/{name}", losses)


def test_accuracies_and_shares_of_every_step(run: Run, reference: Reference):
    tags = {
        "Training/Token_Accuracy": (),
        "Thinking/Accuracy": ("thinking",),
        "Answer/Accuracy": ("answer",),
    }
    for tag, parts in tags.items():
        least = min(sums.count[p] for sums in reference.steps for p in parts or ("thinking",))
        accuracies = by_step([sums.accuracy(*parts) for sums in reference.steps])
        assert_curve(run, tag, accuracies, abs=1.01 / least, rel=0)  # one tie may fall otherwise
        assert max(accuracies.values()) > 2 / least, "nothing to see"
    for part, tag in (("thinking", "Thinking"), ("answer", "Answer")):
        shares = [100 * sums.count[part] / sums.targets for sums in reference.steps]
        assert_curve(run, f"{tag}/Tokens_Percent", by_step(shares))
    closing = [sums.closing / sums.count["thinking"] for sums in reference.steps]
    assert_curve(run, "Thinking/Premature_Close_Probability", by_step(closing))


def test_gradients_and_their_norms_are_those_before_clipping(run: Run, reference: Reference):
    assert_curve(run, "Training/Gradient_Norm", by_step(reference.norms), rel=1e-4)
    assert_curve(run, "Training/Gradient_Norm_Max", by_step(reference.norms), rel=1e-4)
    assert_same_gradients(run.session.updates, reference.training)


def test_the_optimizer_uses_the_rate_that_is_logged(run: Run, reference: Reference):
    used = [update.options["lr"] for update in run.session.updates]
    assert used == pytest.approx(reference.rates, rel=1e-9)
    assert_curve(run, "Training/Learning_Rate", by_step(reference.rates), rel=1e-9)
    for update in run.session.updates:
        options = update.options
        assert (options["betas"], options["eps"]) == (BETAS, EPSILON)
        assert options["weight_decay"] == DECAY


def test_the_trained_adapter(run: Run, reference: Reference):
    assert_same_adapter(run, reference)


def test_epochs_and_counters(run: Run, reference: Reference):
    assert_epochs_and_counters(run, reference)
    assert_hardest(run, reference)


def test_held_out_losses(run: Run, reference: Reference):
    tags = {
        "Eval/Loss": (),
        "Eval/Thinking_Loss": ("thinking",),
        "Eval/Answer_Loss": ("answer",),
        "Eval/Close_Loss": ("close",),
        "Eval/EOS_Loss": ("end",),
    }
    for tag, parts in tags.items():
        assert_curve(run, tag, {n: s.mean(*parts) for n, s in reference.held_out.items()})
    accuracies = {n: s.accuracy() for n, s in reference.held_out.items()}
    tokens = reference.held_out[0].targets
    assert_curve(run, "Eval/Token_Accuracy", accuracies, abs=1.01 / tokens, rel=0)


def test_the_numbers_at_the_end(run: Run, reference: Reference):
    held_out = {n: s.mean() for n, s in reference.held_out.items()}
    last = run.plan.num_steps
    final = {
        "Training/Final_Loss": reference.steps[-1].mean(),
        "Final_Model/First_Eval_Loss": held_out[0],
        "Final_Model/Last_Eval_Loss": held_out[last],
        "Final_Model/Best_Eval_Loss": min(held_out.values()),
    }
    for tag, value in final.items():
        assert_curve(run, tag, {last: value})
    training = run.statistics["training"]
    assert training["final_loss"] == pytest.approx(final["Training/Final_Loss"], **CLOSE_TO)
    assert training["best_step"] == min(held_out, key=held_out.get)
    assert training["epochs"] == 2


def test_longer_intervals_are_the_means_of_their_steps(config, folder, run, reference):
    """With a point every second step: token-weighted means, the highest norm, the last rate."""
    other = do(replace(config, logging_steps=2, output_dir="other"), folder)
    logged = range(2, run.plan.num_steps + 1, 2)
    pairs = {n: reference.steps[n - 2] + reference.steps[n - 1] for n in logged}
    assert_curve(other, "Training/Loss", {n: sums.mean() for n, sums in pairs.items()})
    assert_curve(other, "Thinking/Loss", {n: s.mean("thinking") for n, s in pairs.items()})
    highest = {n: max(reference.norms[n - 2 : n]) for n in logged}
    assert_curve(other, "Training/Gradient_Norm_Max", highest, rel=1e-4)
    for tag in ("Training/Gradient_Norm", "Training/Learning_Rate", "Throughput/Tokens_Seen"):
        assert other.points[tag] == {n: run.points[tag][n] for n in logged}
    for tag in ("Epoch/Average_Loss", "Eval/Loss"):
        assert other.points[tag] == run.points[tag]
    for n, sums in pairs.items():
        one, two = (
            run.points["Training/Loss"][m] * reference.steps[m - 1].targets for m in (n - 1, n)
        )
        assert other.points["Training/Loss"][n] == pytest.approx((one + two) / sums.targets)


def test_a_run_in_three_sessions_has_the_numbers_of_one(config, folder, reference):
    """Stopped in the first epoch and in the second: nothing is lost, and nothing is counted twice."""
    config = replace(config, output_dir="stopped")
    train(config, folder, before_update=stop_at(2))
    train(config, folder, resume="latest", before_update=stop_at(3))
    run = do(config, folder, resume="latest")
    resumes = run.points["Monitoring/Resume_Count"]
    assert list(resumes.values()) == [0] * 3 + [1] * 4 + [2] * 3
    assert_curve(run, "Training/Loss", by_step([sums.mean() for sums in reference.steps]))
    assert_curve(run, "Training/Gradient_Norm", by_step(reference.norms), rel=1e-4)
    assert_curve(run, "Training/Learning_Rate", by_step(reference.rates), rel=1e-9)
    assert_curve(run, "Eval/Loss", {n: s.mean() for n, s in reference.held_out.items()})
    first = {run.plan.num_steps: reference.held_out[0].mean()}
    assert_curve(run, "Final_Model/First_Eval_Loss", first)
    assert_epochs_and_counters(run, reference)
    assert_same_adapter(run, reference)


# -----------------------------------------------------------------------------
# A model for which packed rows are wrong


def test_a_model_with_linear_attention_is_trained_as_if_nothing_was_packed(
    config: DirectTrainingConfig, folder: Path, capfd
):
    """Rows of several documents, two of them a micro-batch, in training and evaluation."""
    hybrid = make_tiny_model(
        folder / "hybrid",
        kind=Qwen3_5TextConfig,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    config = replace(config, model_name=str(hybrid), batch_size=2, output_dir="hybrid_out")
    run = do(config, folder)
    shown = capfd.readouterr().err
    assert shown.count("one document a forward pass") == 1 and "see each other" in shown
    assert "no adapter is in linear_attn of 1 layers (" in shown and "out_proj" in shown
    assert max(len(documents) for n in (1, 2) for documents in run.plan[n].micro_batches) > 2
    reference = PlainTraining(config, folder).train(run.steps())
    assert_curve(run, "Training/Loss", by_step([sums.mean() for sums in reference.steps]))
    assert_curve(run, "Training/Gradient_Norm", by_step(reference.norms), rel=1e-4)
    assert_curve(run, "Eval/Loss", {n: sums.mean() for n, sums in reference.held_out.items()})
    for name, expected in reference.adapter.items():
        torch.testing.assert_close(run.adapter[name], expected, rtol=1e-3, atol=2e-6)
