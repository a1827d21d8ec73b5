"""The plan before the run: known counts, estimates that follow the settings, and nothing written.

uv run pytest tests/test_run_plan.py
"""

import dataclasses
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import traced_step
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import run_plan
from direct_finetuning_with_existing_modules import main
from errors import UserError
from packing import StepPlan
from run_plan import (
    Placement,
    activation_bytes,
    estimate_memory,
    largest_batch,
    model_shape,
    steps_between_evaluations,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GIB, KIB = 2**30, 2**10
CUDA = Placement("cuda", 2)
SPEED = run_plan.Speed(1e12, 2e12, "as the test says")


@pytest.fixture(scope="module")
def qwen3_4b(tmp_path_factory) -> run_plan.ModelShape:
    """The published shape of Qwen3-4B; there are no weights."""
    folder = tmp_path_factory.mktemp("qwen3-4b")
    traced_step.qwen3_4b().save_pretrained(folder)
    return model_shape(folder, lora_r=16, target_modules=PROJECTIONS)


# -----------------------------------------------------------------------------
# Counting


def test_the_published_numbers_of_qwen3_4b(qwen3_4b):
    assert qwen3_4b.parameters == 4_022_468_096
    assert qwen3_4b.linear_parameters == 3_633_315_840
    assert qwen3_4b.trainable == 33_030_144


@pytest.mark.parametrize(
    ("targets", "pattern", "dora"),
    [
        (PROJECTIONS, {}, False),
        (("q_proj", "down_proj"), {"layers.0.self_attn.q_proj": 3}, False),
        (("all-linear",), {}, True),
    ],
)
def test_adapters_are_counted_as_peft_makes_them(tiny_model: Path, targets, pattern, dora):
    shape = model_shape(
        tiny_model, lora_r=8, target_modules=targets, rank_pattern=pattern, use_dora=dora
    )
    wanted = "all-linear" if targets == ("all-linear",) else list(targets)
    config = LoraConfig(
        r=8, target_modules=wanted, rank_pattern=pattern, use_dora=dora, task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    assert shape.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.total == sum(p.numel() for p in model.parameters()), "as the run says it"


def test_full_fine_tuning_and_a_saved_adapter(tiny_model: Path, tmp_path: Path):
    full = model_shape(tiny_model, lora_r=0, target_modules=PROJECTIONS)
    assert full.trainable == full.parameters == full.total and not full.lora
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "adapter_model.safetensors")
    started = model_shape(
        tiny_model, lora_r=16, target_modules=PROJECTIONS, init_adapter=str(tmp_path)
    )
    assert started.trainable == 22


def test_what_cannot_be_counted_is_one_clear_error(tiny_model: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}', encoding="utf-8")
    with pytest.raises(UserError, match="can't be built"):
        model_shape(tmp_path, lora_r=16, target_modules=PROJECTIONS)
    with pytest.raises(UserError, match="target_modules: nothing"):
        model_shape(tiny_model, lora_r=16, target_modules=("q_proj", "nothing"))
    with pytest.raises(UserError, match="rank_pattern"):
        model_shape(tiny_model, lora_r=16, target_modules=PROJECTIONS, rank_pattern={"(": 2})
    with pytest.raises(UserError, match="init_adapter"):
        model_shape(
            tiny_model, lora_r=16, target_modules=PROJECTIONS, init_adapter=str(tmp_path / "no")
        )


# -----------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    ("placement", "kib"),
    [
        (CUDA, 146),
        (Placement("cuda", 2, compiled=True), 78),
        (Placement("cuda", 2, fused_lora=False), 146 + 104 - 29),
    ],
)
def test_activations_of_a_token_and_layer(qwen3_4b, placement, kib):
    assert activation_bytes(qwen3_4b.dims, placement) / KIB == kib


def test_all_weights_trained_in_bf16_take_16_bytes_each_and_copies_of_what_is_used(qwen3_4b):
    """fp32 weights, gradients and moments, shared by the ranks; bf16 copies of parts, on every rank."""
    full = dataclasses.replace(qwen3_4b, lora=False, trainable=qwen3_4b.parameters)
    parts = [
        estimate_memory(full, Placement("cuda", 2, shards=n), 8192, checkpointing=True)
        for n in (1, 8)
    ]
    state = [p.weights + p.gradients + p.optimizer for p in parts]
    assert state == [16 * full.parameters, 2 * full.parameters]
    assert parts[0].gathered == parts[1].gathered > 0
    exact = estimate_memory(full, Placement("cuda", 4), 8192, checkpointing=True)
    assert exact.weights == parts[0].weights and exact.gathered == 0


def test_the_activations_are_what_autograd_keeps(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    """Counted tensor by tensor in a real forward pass on the CPU."""
    from fast_lora import enable_fast_lora
    from model_loading import load_model, load_tokenizer, resolve_model
    from packed_model import PackedLossModel
    from packing import build_batch
    from training_data import prepare_data, read_data, split_samples

    resolved = resolve_model(str(tiny_model), "cpu")
    tokenizer = load_tokenizer(resolved)
    split = split_samples(*read_data([str(tiny_data)]))
    data = prepare_data(split, tokenizer, 768, workers=1, cache_dir=tmp_path)
    model = load_model(resolved, tokenizer, device="cpu", lora_r=4)
    enable_fast_lora(model)
    packed = PackedLossModel(model, data.train.tokens.close_id).train()
    batch = build_batch(data.train.tokens, range(8))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        packed(batch, len(batch.labels))
    shape = model_shape(tiny_model, lora_r=4, target_modules=PROJECTIONS)
    tokens = batch.input_ids.shape[1]
    expected = activation_bytes(shape.dims, Placement("cpu", 4)) * shape.dims.layers * tokens
    assert sum(kept.values()) == pytest.approx(expected, rel=0.15)


def test_memory_follows_the_settings(qwen3_4b):
    def total(placement: Placement, tokens: int = 8192, checkpointing: bool = False) -> float:
        return estimate_memory(qwen3_4b, placement, tokens, checkpointing=checkpointing).total

    assert 45 * GIB < total(CUDA) < 55 * GIB
    assert total(CUDA, checkpointing=True) < 14 * GIB
    assert total(Placement("cuda", 2, quantized=True)) < total(CUDA) - 4 * GIB
    beside = total(Placement("cuda", 2, fp8=True)) - total(CUDA)  # two copies of a byte a weight
    assert beside == 2 * qwen3_4b.linear_parameters
    assert total(Placement("cuda", 2, shards=4)) < total(CUDA) - 4 * GIB
    assert total(CUDA, tokens=4096) < total(CUDA, tokens=8192)
    estimate = estimate_memory(qwen3_4b, CUDA, 8192, checkpointing=False)
    smaller = min(estimate.logits, estimate.workspace)  # they are not there at the same time
    assert estimate.total == sum(vars(estimate).values()) - smaller
    captured = Placement("cuda", 2, captured=True)  # an evaluation finds what the graph holds taken
    assert total(captured) - total(CUDA) == max(estimate.logits, estimate.workspace)
    sharded = estimate_memory(qwen3_4b, Placement("cuda", 2, shards=8), 8192, checkpointing=False)
    assert 0.9 * GIB < sharded.gathered < 1.2 * GIB, "embedding and two layers"
    assert estimate.optimizer == 2 * estimate.adapter == 2 * 4 * qwen3_4b.trainable


def test_the_largest_batch_fits_and_one_more_does_not():
    for free in (0, 99, 100, 1234, 10**9):
        rows = largest_batch(lambda rows: 100.0 * rows, free, limit=1000, usable=1.0)
        assert rows * 100 <= free or rows == 0
        assert rows == 1000 or (rows + 1) * 100 > free


def test_a_container_leaves_less_than_the_host(monkeypatch):
    monkeypatch.setattr(run_plan, "_container_room", lambda: [12345])
    assert run_plan.free_memory(torch.device("cpu")) == 12345
    assert run_plan.free_memory(torch.device("cpu"), ranks=3) == 4115, (
        "the ranks of a host share it"
    )


# -----------------------------------------------------------------------------
# Decisions


def forecast(shape, tmp_path: Path, **changes) -> run_plan.RunForecast:
    lengths = np.full(40, 500)
    plan = StepPlan(lengths, lengths // 2, row_tokens=2048, num_epochs=2)
    options = {
        "device": torch.device("cpu"),
        "free": 8 * GIB,
        "dtype": torch.float32,
        "plan": plan,
        "lengths": lengths,
        "num_targets": 40 * 250,
        "eval_lengths": lengths[:4],
        "eval_targets": 1000,
        "batch_size": 1,
        "eval_steps": 5,
        "answer_tokens": 0,
        "gradient_checkpointing": "auto",
        "save_steps": 7,
        "save_total_limit": 2,
        "output_dir": tmp_path / "not" / "there",
    }
    return run_plan.forecast(shape, Placement("cpu", 4), **(options | changes))


def test_checkpointing_is_turned_on_where_memory_is_short(qwen3_4b, tmp_path, monkeypatch):
    monkeypatch.setattr(run_plan, "device_speed", lambda *_: SPEED)
    needed = forecast(qwen3_4b, tmp_path).estimates
    cases = [
        (1.2 * needed[False].total, "auto", False),
        (1.01 * needed[False].total, "auto", True),  # fits, but without any air
        (1.2 * needed[True].total, "auto", True),
        (1.2 * needed[True].total, "off", False),
        (9.0 * needed[False].total, "on", True),
    ]
    for free, setting, expected in cases:
        result = forecast(qwen3_4b, tmp_path, free=int(free), gradient_checkpointing=setting)
        assert result.checkpointing is expected, (free, setting)
        assert result.largest_batches[True] >= result.largest_batches[False]
    texts = dict(forecast(qwen3_4b, tmp_path, free=GIB).rows())
    assert "does not fit" in texts["memory with checkpointing"]
    assert texts["largest batch_size that fits"].startswith("none")


def test_counts_of_a_plan(qwen3_4b, tmp_path, monkeypatch):
    monkeypatch.setattr(run_plan, "device_speed", lambda *_: SPEED)
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
    texts = dict(forecast(qwen3_4b, tmp_path, eval_lengths=[], eval_targets=0).rows())
    assert texts["evaluations"].startswith("none")
    assert "an estimate" in texts["training and evaluation"]
    weights = 4 * qwen3_4b.trainable
    assert result.disk_needed == 4 * 3 * weights + 3 * weights


def test_more_arithmetic_takes_more_time(qwen3_4b, tmp_path, monkeypatch):
    monkeypatch.setattr(run_plan, "device_speed", lambda *_: SPEED)
    once = forecast(qwen3_4b, tmp_path, gradient_checkpointing="off").seconds
    again = forecast(qwen3_4b, tmp_path, gradient_checkpointing="on").seconds
    for way in (once, again):
        assert way[1] == pytest.approx(2 * way[0], rel=0.01)  # at half the speed
    assert 1.3 * once[1] < again[1] < 1.5 * once[1]


def test_answers_take_time(qwen3_4b, tmp_path, monkeypatch):
    """Each token of them as long as 40 of training, on every rank."""
    monkeypatch.setattr(run_plan, "device_speed", lambda *_: SPEED)
    silent, few, many = (
        forecast(qwen3_4b, tmp_path, answer_tokens=tokens).seconds[1] for tokens in (0, 100, 200)
    )
    assert many - few == pytest.approx(few - silent)
    trained = 2 * 40 * 500  # tokens in two epochs
    without = forecast(qwen3_4b, tmp_path, eval_lengths=[], eval_targets=0).seconds[1]
    assert few - silent == pytest.approx(without * 5 * 100 * 40 / trained, rel=0.05)


def steps_between(samples: int, held_out: int, answer_tokens: int = 0, **changes) -> tuple:
    """(steps between evaluations, how many there are, what they add to the training)"""
    lengths = np.full(samples, 500)
    plan = StepPlan(lengths, lengths // 2, row_tokens=2048, num_epochs=3)
    options = {"device_type": "cpu", "lora": True} | changes
    steps = steps_between_evaluations(plan, 500 * held_out, answer_tokens, **options)
    number = run_plan.number_of_evaluations(plan.num_steps, steps, held_out)
    cost = 500 * held_out / (2 if options["lora"] else 3)
    cost += answer_tokens * (40 if options["device_type"] == "cpu" else 500)
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
    assert 1 + run_plan.number_of_checkpoints(3 * 5_000, steps) == 51, "only adapters are looked at"


def test_every_rank_writes_all_answers():
    lengths = np.full(20_000, 500)
    one, two = (
        steps_between_evaluations(
            StepPlan(lengths, lengths, row_tokens=2048, accumulation=2 // ranks, world_size=ranks),
            0,
            100,
            device_type="cuda",
            lora=True,
        )
        for ranks in (1, 2)
    )
    assert 1.9 * one < two < 2.2 * one


def test_an_unknown_architecture_has_a_plan_without_memory(tmp_path):
    shape = run_plan.ModelShape(None, 1000, 900, 10, True)
    result = forecast(shape, tmp_path)
    texts = dict(result.rows())
    assert "not estimated" in texts["memory"] and "training and evaluation" not in texts
    assert not result.checkpointing and result.short_rows()


def test_the_matrix_product_is_measured(qwen3_4b):
    dims = dataclasses.replace(qwen3_4b.dims, hidden=64, intermediate=64)
    assert run_plan.matmul_rate(torch.device("cpu"), dims, torch.float32) > 1e6


def test_waiting_for_a_processor_is_not_counted():
    """A neighbour that takes the processor away shows in wall time only."""
    assert run_plan.seconds_of(lambda: time.sleep(0.3), torch.device("cpu")) < 0.1
    end = time.process_time() + 0.2
    busy = run_plan.seconds_of(
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
