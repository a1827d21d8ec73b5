"""The automatic learning rate of a run: what it trains with, what it says and what it records.

uv run pytest -m "not long" tests/runs/test_automatic_rate.py
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import Gemma3Config, GPT2Config, Qwen3Config, T5Config

from finetuning.common import language
from finetuning.config import BatchSettings, DataSettings, DirectTrainingConfig
from finetuning.data.packing import StepPlan
from finetuning.events.reading import read_metrics
from finetuning.model.small_config import hidden_size
from finetuning.runs import summary
from finetuning.runs.resolved_settings import automatic_rates
from tests.helpers.tiny_model import FAST

LOUD = [option for option in FAST if option != "--quiet"]
AUTO = ("--learning-rate", "auto", "--logging-steps", "1")


def record_of(out: Path) -> dict:
    (path,) = (out / "training_logs").glob("*/configuration.json")
    return json.loads(path.read_text(encoding="utf-8"))


def rates_of(out: Path) -> dict[int, float]:
    (path,) = (out / "training_logs").glob("*/metrics.jsonl")
    found = ((r["step"], r["metrics"].get("Training/Learning_Rate")) for r in read_metrics(path))
    return {step: rate for step, rate in found if rate is not None}


def own_rate(passes: float, tokens: float) -> float:
    """Of a model with a hidden size below 576."""
    often = max(0.1, (3.5 / passes) ** 1.5 * (tokens / 2000) ** 0.5)
    return float(f"{1e-3 * min(often, 2, max(1, (2000 / tokens) ** 0.7)):.2g}")


@pytest.mark.slow
def test_a_run_trains_with_the_rate_that_it_says_and_records(tmp_path, run, capsys):
    """Few updates, one of them the warmup's, so the peak is met; passes and small updates make it less."""
    more = ("--max-steps", "0", "--num-epochs", "5", "--num-probes", "0", "--eval-steps", "0")
    assert run(tmp_path, *AUTO, *more, first=LOUD) == 0
    out, said = tmp_path / "out", capsys.readouterr().out
    record = record_of(out)
    said_tokens = re.search(r"32, 5.0 passes over the data and ([0-9,]+) tokens an update\)", said)
    tokens = int(said_tokens[1].replace(",", ""))
    own = own_rate(5, tokens)
    assert record["automatic_learning_rate"] == record["config"]["learning_rate"] == own < 1e-3
    assert max(rates_of(out).values()) == pytest.approx(own)
    assert f"{own:.1e} (auto, for a hidden size of 32, 5.0 passes" in said
    assert "updates are few" not in said, "more passes would lower the rate"
    last = read_metrics(next((out / "training_logs").glob("*/metrics.jsonl")))
    seen = max(row["metrics"].get("Throughput/Tokens_Seen", 0) for row in last)
    assert tokens == round(seen / record["steps"])


def test_the_rate_of_the_user_is_kept_beside_the_programs_own(finished):
    record = record_of(finished)
    assert record["config"]["learning_rate"] == max(rates_of(finished).values()) == 3e-4
    passes = record["steps"] / record["steps_per_epoch"]
    (path,) = (finished / "training_logs").glob("*/metrics.jsonl")
    seen = max(row["metrics"].get("Throughput/Tokens_Seen", 0) for row in read_metrics(path))
    assert record["automatic_learning_rate"] == own_rate(passes, seen / record["steps"])


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_rate(tmp_path, run, capsys):
    less = (*AUTO, "--num-epochs", "4", "--max-steps", "0", "--eval-steps", "0")
    assert run(tmp_path, *less) == 0
    out = tmp_path / "out"
    record, rates = record_of(out), rates_of(out)
    (newest,) = (out / "checkpoints").glob(f"checkpoint-{record['steps']}")
    shutil.rmtree(newest)
    capsys.readouterr()
    assert run(tmp_path, *less, "--resume", "latest", first=LOUD) == 0
    assert "changed since" not in capsys.readouterr().out
    assert rates_of(out) == rates and record_of(out)["config"] == record["config"]
    assert "changes" not in record_of(out)
    shutil.rmtree(newest)
    assert run(tmp_path, *less, "--resume", "latest", "--num-epochs", "5") == 2
    assert "steps is" in capsys.readouterr().err, "another length is another run"


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (Qwen3Config(hidden_size=96), 96),
        (GPT2Config(n_embd=60, n_head=4), 60),
        (T5Config(d_model=80), 80),
        (Gemma3Config(text_config={"hidden_size": 112}), 112),
        (SimpleNamespace(n_embd=44), 44),  # code of a model's own, without a map of names
        (SimpleNamespace(hidden_size=None, d_model=[8, 8]), 0),
    ],
)
def test_the_hidden_size_of_any_configuration_is_that_of_its_text_model(config, size):
    if isinstance(config, SimpleNamespace):
        config.get_text_config = lambda decoder: config
    assert hidden_size(config) == size


@pytest.mark.parametrize("max_steps", [0, 40])
@pytest.mark.parametrize("lora_r", [0, 16])
@pytest.mark.parametrize("updates", [40, 4000])
@pytest.mark.parametrize(
    ("hidden_size", "known"), [(4096, "4,096, 0.04"), (0, "2,560, as the model's")]
)
def test_the_reason_is_told_in_both_languages(hidden_size, known, updates, lora_r, max_steps):
    plan = SimpleNamespace(
        settings={"lora_r": lora_r, "max_steps": max_steps, "learning_rate": 2.2e-4},
        automatic=("learning_rate",),
        automatic_rate=2.2e-4,
        inputs=SimpleNamespace(hidden_size=hidden_size),
        steps=SimpleNamespace(num_steps=updates, times_shown=0.04, tokens_per_update=1953.3),
    )
    text = summary.rate_text(plan)
    assert text.startswith(f"2.2e-04 (auto, for a hidden size of {known}")
    assert "0.04 passes over the data and 1,953 tokens an update" in text
    assert ("a tenth" in text) == (lora_r == 0) and ("are few" in text) == (updates == 40)
    assert not re.search("[a-z]+ [a-z]+", language.in_chinese(text).replace("--", ""))
    plan.steps.times_shown = 4.0
    assert "are few" not in summary.rate_text(plan), "more passes would lower the rate"
    plan.automatic_rate = 1e-4
    kept = summary.rate_text(plan)
    assert kept == "0.00022 (auto, as in the checkpoint)"
    assert not re.search("[a-z]+ [a-z]+", language.in_chinese(kept))
    plan.automatic = ()
    assert summary.rate_text(plan) == "0.00022"


def test_a_weight_of_ten_shows_a_sample_ten_times():
    lengths = np.full(20, 100)
    settings = {"data": DataSettings(max_seq_length=100), "batch": BatchSettings(num_epochs=1.0)}
    once = StepPlan(lengths, lengths, **settings)
    often = StepPlan(lengths, lengths, np.repeat(np.arange(20), 10), **settings)
    assert (once.times_shown, often.times_shown, often.passes) == (1.0, 10.0, 1.0)


@pytest.mark.parametrize(
    ("pinned", "kept"),
    [
        ({"learning_rate": 7.5e-4}, 7.5e-4),
        ({}, 1e-3),
        ({"learning_rate": "auto"}, 1e-3),
        ({"learning_rate": -1.0}, 1e-3),
        ({"learning_rate": float("nan")}, 1e-3),
    ],
)
def test_a_resume_keeps_the_rate_of_its_checkpoint(pinned, kept):
    """Also where an earlier version had another rule; a file that anyone may write is not believed."""
    lengths = np.full(2000, 100)
    steps = StepPlan(lengths, lengths, data=DataSettings(), batch=BatchSettings(num_epochs=1.0))
    assert automatic_rates(DirectTrainingConfig(), 64, steps, pinned) == (1e-3, kept)
