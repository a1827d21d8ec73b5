"""The plan before the run: decisions and estimates that follow the settings, and nothing written.

uv run pytest tests/training/test_forecast.py
"""

import dataclasses
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from direct_finetuning_with_existing_modules import main
from finetuning.config import LoraSettings, OutputSettings
from finetuning.model.flops import forward_flops
from finetuning.training import forecast as training_forecast
from finetuning.training import memory_estimate
from finetuning.training.forecast import EvaluationPass, steps_between_evaluations
from finetuning.training.memory_estimate import (
    Placement,
)
from tests.helpers import traced_step
from tests.helpers.settings import step_plan, up_to
from tests.helpers.units import GIB

SPEED = training_forecast.Speed(1e12, 2e12, "as the test says")
GPU = torch.device("cuda")  # by its name: nothing is asked of one


# -----------------------------------------------------------------------------
# Decisions


def forecast(shape, tmp_path: Path, **changes) -> training_forecast.RunForecast:
    lengths = np.full(40, 500)
    plan = step_plan(lengths, lengths // 2, data=up_to(2048), num_epochs=2)
    options = {
        "device": torch.device("cpu"),
        "free": 8 * GIB,
        "dtype": torch.float32,
        "gradient_checkpointing": "auto",
    }
    work = {
        "plan": plan,
        "lengths": lengths,
        "num_targets": 40 * 250,
        "held_out": EvaluationPass(lengths[:4], 1000),
        "general": EvaluationPass(),
        "eval_steps": 5,
        "answer_tokens": 0,
        "anchored": False,
    }
    output = {
        "save_steps": 7,
        "save_total_limit": 2,
        "output_dir": str(tmp_path / "not" / "there"),
    }
    for values in (options, work, output):
        values |= {name: changes[name] for name in values if name in changes}
    return training_forecast.forecast(
        shape,
        Placement(options["device"].type, 4),
        training_forecast.Workload(**work),
        output=OutputSettings(**output),
        **options,
    )


def needed(shape, tmp_path: Path, recomputed: int) -> float:
    """Bytes of a step on a GPU with so many layers recomputed."""
    return forecast(shape, tmp_path, device=GPU).memory.estimates[recomputed].total


def test_checkpointing_is_turned_on_where_memory_is_short(qwen3_4b, tmp_path, monkeypatch):
    monkeypatch.setattr(training_forecast, "device_speed", lambda *_: SPEED)
    most, some, least = (needed(qwen3_4b, tmp_path, n) for n in (0, 12, 36))
    for free, setting, expected in (
        (1.2 * most, "auto", "off"),
        (1.09 * some, "auto", "12 of 36 layers"),
        (0.9 * least, "auto", "on"),
        (1.2 * least, "off", "off"),
        (9.0 * most, "on", "on"),
    ):
        options = {"device": GPU, "free": int(free), "gradient_checkpointing": setting}
        result = forecast(qwen3_4b, tmp_path, **options)
        texts = dict(result.rows())
        assert texts["gradient checkpointing"] == expected, (free, setting)
        assert ("memory as planned" in texts) is (expected not in ("on", "off"))
        assert result.largest_batches[1] >= result.largest_batches[0]
    texts = dict(forecast(qwen3_4b, tmp_path, free=GIB).rows())
    assert "does not fit" in texts["memory with checkpointing"]
    assert texts["largest batch_size that fits"].startswith("none")


def test_counts_of_a_plan(qwen3_4b, tmp_path, monkeypatch):
    monkeypatch.setattr(training_forecast, "device_speed", lambda *_: SPEED)
    result = forecast(qwen3_4b, tmp_path)
    texts = dict(result.rows())
    assert texts["steps"] == "20 (10 an epoch)" and texts["epochs"] == "2"
    assert texts["checkpoints"].startswith("3;")  # steps 7, 14 and 20
    assert texts["evaluations"] == "5, every 5 steps"  # before the first step, at 5, 10, 15 and 20
    texts = dict(forecast(qwen3_4b, tmp_path, save_steps="auto").rows())
    assert texts["checkpoints"].startswith("up to 1;")
    for rare in (0, 40):
        texts = dict(forecast(qwen3_4b, tmp_path, eval_steps=rare).rows())
        assert texts["evaluations"] == "2, first and last"
    texts = dict(forecast(qwen3_4b, tmp_path, held_out=EvaluationPass()).rows())
    assert texts["evaluations"].startswith("none")
    assert "an estimate" in texts["training and evaluation"]
    weights = 4 * qwen3_4b.trainable
    assert result.disk_needed == 4 * 3 * weights + 3 * weights


def test_more_arithmetic_takes_more_time(qwen3_4b, tmp_path, monkeypatch):
    monkeypatch.setattr(training_forecast, "device_speed", lambda *_: SPEED)
    once, again = (
        forecast(qwen3_4b, tmp_path, device=GPU, gradient_checkpointing=setting).seconds
        for setting in ("off", "on")
    )
    for way in (once, again):
        assert way[1] == pytest.approx(2 * way[0], rel=0.01)  # at half the speed
    assert 1.3 * once[1] < again[1] < 1.5 * once[1]
    free = int(1.09 * needed(qwen3_4b, tmp_path, 12))
    partly = forecast(qwen3_4b, tmp_path, device=GPU, free=free).seconds[1]
    assert partly - once[1] == pytest.approx((again[1] - once[1]) / 3), "a third of the layers"


@pytest.mark.parametrize(("lora_r", "close"), [(0, 1e-9), (16, 0.02)])
def test_a_forward_pass_is_two_operations_a_weight_and_token(tmp_path, lora_r, close):
    """Counted by hand; adapters are counted together with what they are added to."""
    config = traced_step.qwen3_4b()
    config.save_pretrained(tmp_path)
    shape = memory_estimate.model_shape(tmp_path, LoraSettings(lora_r=lora_r))
    lengths, targets = [300, 500, 200], 600
    queries, keys = 32 * 128, 8 * 128
    layer = 2560 * (2 * queries + 2 * keys + 3 * 9728)
    products = 2 * 36 * layer * sum(lengths) + 2 * 2560 * config.vocab_size * targets
    attention = 2 * 36 * queries * sum(n * n for n in lengths)  # both products, half of the pairs
    found = training_forecast.forward_flops(shape, lengths, targets)
    assert found == pytest.approx(products + attention, rel=close)


def test_answers_take_time(qwen3_4b, tmp_path, monkeypatch):
    """Each token of them as long as 40 of training, on every rank."""
    monkeypatch.setattr(training_forecast, "device_speed", lambda *_: SPEED)
    silent, few, many = (
        forecast(qwen3_4b, tmp_path, answer_tokens=tokens).seconds[1] for tokens in (0, 100, 200)
    )
    assert many - few == pytest.approx(few - silent)
    trained = 2 * 40 * 500  # tokens in two epochs
    without = forecast(qwen3_4b, tmp_path, held_out=EvaluationPass()).seconds[1]
    assert few - silent == pytest.approx(without * 5 * 100 * 40 / trained, rel=0.05)


def test_general_text_and_the_base_take_time(qwen3_4b, tmp_path, monkeypatch):
    """Each by its arithmetic, at the speed that is known."""
    monkeypatch.setattr(training_forecast, "device_speed", lambda *_: SPEED)
    lengths, targets, dims = np.full(40, 500), 40 * 250, qwen3_4b.dims

    def seconds(**changes) -> float:
        return forecast(qwen3_4b, tmp_path, gradient_checkpointing="off", **changes).seconds[1]

    plain = seconds()
    base = forward_flops(dims, lengths, targets)
    anchored = seconds(anchored=True) - plain
    assert anchored == pytest.approx(2 * base / SPEED.lowest)  # two epochs
    assert 0.4 < anchored / plain < 0.5, "an update of frozen weights is twice a forward pass"
    text = EvaluationPass(lengths[:8], 2000)
    general = seconds(general=text) - plain
    evaluations = 5  # before the first step, at 5, 10, 15 and 20
    once = training_forecast.forward_flops(qwen3_4b, lengths[:8], 2000)
    assert general == pytest.approx(evaluations * once / SPEED.lowest)
    half = dataclasses.replace(text, compared=0.5)
    heads = 0.5 * 2 * 2 * dims.hidden * dims.vocab * 2000  # the logits of both once more
    before = 0.5 * forward_flops(dims, lengths[:8], 0)  # the base's states
    more = seconds(general=half) - plain - general
    assert more == pytest.approx((evaluations * heads + before) / SPEED.lowest)
    nothing = {"held_out": EvaluationPass(), "general": text}
    texts = dict(forecast(qwen3_4b, tmp_path, **nothing).rows())
    assert texts["evaluations"] == "5, every 5 steps", "though nothing is held out"


def steps_between(samples: int, held_out: int, answer_tokens: int = 0, **changes) -> tuple:
    """(steps between evaluations, how many there are, what they add to the training)"""
    lengths = np.full(samples, 500)
    plan = step_plan(lengths, lengths // 2, data=up_to(2048), num_epochs=3)
    options = {"device_type": "cpu", "lora": True} | changes
    steps = steps_between_evaluations(plan, 500 * held_out, answer_tokens, **options)
    number = training_forecast.number_of_evaluations(plan.num_steps, steps, held_out)
    cost = 500 * held_out / (2 if options["lora"] else 3)
    cost += answer_tokens * (40 if options["device_type"] == "cpu" else 250)
    return steps, number, number * cost / (3 * 500 * samples)


def test_evaluations_add_a_fifth_to_the_training_at_most():
    for samples, held_out, answer_tokens, changes in (
        (20_000, 1_000, 256, {}),
        (20_000, 1_000, 1_000, {"device_type": "cuda"}),
        (20_000, 2_000, 0, {"lora": False}),
        (3_000, 150, 256, {}),
    ):
        steps, number, share = steps_between(samples, held_out, answer_tokens, **changes)
        assert steps > 40 and 5 < number < 51
        one = share / number
        assert 0.2 - 2 * one < share <= 0.2, "and one more would be too many"


def test_evaluations_are_neither_too_few_nor_too_many():
    _, number, share = steps_between(20_000, 100_000)
    assert number == 1 + 4 and share > 1, "though they cost more than the training"
    _, number, share = steps_between(1_000_000, 1_000)
    assert number == 1 + 50 and share < 0.2
    steps, number, _ = steps_between(100, 10)
    assert steps == 40 and number == 3, "never closer than 40 steps"
    steps, _, _ = steps_between(20_000, 0)
    assert 1 + training_forecast.number_of_checkpoints(3 * 5_000, steps) == 51, (
        "only adapters are looked at"
    )


def test_every_rank_writes_all_answers():
    lengths = np.full(20_000, 500)
    one, two = (
        steps_between_evaluations(
            step_plan(
                lengths,
                lengths,
                data=up_to(2048),
                gradient_accumulation_steps=2 // ranks,
                world_size=ranks,
            ),
            0,
            200,
            device_type="cuda",
            lora=True,
        )
        for ranks in (1, 2)
    )
    assert 1.9 * one < two < 2.2 * one


def test_an_unknown_architecture_has_a_plan_without_memory(tmp_path):
    shape = memory_estimate.ModelShape(None, 1000, 900, 10, True)
    result = forecast(shape, tmp_path)
    texts = dict(result.rows())
    assert "not estimated" in texts["memory"] and "training and evaluation" not in texts
    assert result.memory.text == "off" and result.memory.fits and result.short_rows()
    again = forecast(shape, tmp_path, gradient_checkpointing="on").memory
    assert again.text == "on" and again.recomputed == again.layers


def test_the_matrix_product_is_measured(qwen3_4b):
    dims = dataclasses.replace(qwen3_4b.dims, hidden=64, intermediate=64)
    assert training_forecast.matmul_rate(torch.device("cpu"), dims, torch.float32) > 1e6


def test_waiting_for_a_processor_is_not_counted():
    """A neighbour that takes the processor away shows in wall time only."""
    assert training_forecast.seconds_of(lambda: time.sleep(0.3), torch.device("cpu")) < 0.1
    end = time.process_time() + 0.2
    busy = training_forecast.seconds_of(
        lambda: [None for _ in iter(lambda: time.process_time() < end, False)], torch.device("cpu")
    )
    assert busy * torch.get_num_threads() == pytest.approx(0.2, rel=0.2)


# -----------------------------------------------------------------------------
# The command


def test_plan_says_it_all_and_writes_nothing(tmp_path, tiny_model, tiny_data, cache_dir, capfd):
    out = tmp_path / "out"
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    places = ["--output-dir", str(out), "--cache-dir", str(cache_dir)]
    length = ["--max-seq-length", "768", "--max-steps", "4000"]
    assert main(["--plan", *inputs, *places, *length, "--quiet"]) == 0
    said = capfd.readouterr().out
    every = re.search(r"evaluations\s+\d+, every (\d+) steps", said)
    assert 80 <= int(every[1]) <= 1000, "from four to fifty evaluations"
    for part in ("samples", "checkpoints", "memory: weights", "largest batch_size", "disk"):
        assert part in said, part
    assert not out.exists()


def test_plan_of_bad_input_is_an_error(tmp_path, tiny_model, capfd):
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tmp_path / "absent.jsonl")]
    assert main(["--plan", *inputs]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_plan_says_that_it_is_for_the_demonstration_model(tmp_path, cache_dir, tiny_data, capfd):
    """Whose memory and time are no measure of those of the model that a user has in mind."""
    places = ("--output-dir", str(tmp_path / "out"), "--cache-dir", str(cache_dir))
    told = ["--plan", "--model-name", "embedded", "--data-path", str(tiny_data), *places]
    assert main([*told, "--quiet"]) == 0
    said = capfd.readouterr().out
    assert "DEMONSTRATION MODEL, not Qwen3" in said and "Why: it was asked for by name." in said
