"""The longest sample of a run where it is left to the program: by data, memory and model; a resume keeps it.

uv run pytest tests/runs/test_sequence_length.py
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from finetuning.common.distributed import init_distributed
from finetuning.common.errors import UserError
from finetuning.common.language import in_chinese
from finetuning.common.terminal import Terminal
from finetuning.config import NO_LIMIT, DirectTrainingConfig
from finetuning.runs.plan import plan_run
from finetuning.runs.sequence_length import SequenceLength, choose_length, fits_memory
from tests.helpers.tiny_model import make_tiny_model

MANY = np.r_[np.full(985, 700), np.full(10, 3000), np.full(5, 9001)]  # 99% have 3,000 or less


@pytest.mark.parametrize(
    ("room", "positions", "tokens", "said"),
    [
        (NO_LIMIT, NO_LIMIT, 9024, "9,001, which fits the memory"),
        (NO_LIMIT, 8000, 8000, "the model 8,000 positions, which fit the memory"),
        (9023, NO_LIMIT, 3008, "too many for the memory; 99% have no more"),
        (3007, NO_LIMIT, 2944, "no more fit the memory"),
        (100, NO_LIMIT, 2048, "too many for the memory; a row has 2,048, which may be, too"),
        (9023, 8000, 8000, "the model 8,000 positions, which fit the memory"),
        (7000, 8000, 3008, "positions, too many for the memory; 99% have no more"),
        (2500, 8000, 2496, "positions; no more fit the memory"),
    ],
)
def test_a_length_is_that_of_the_data_or_what_the_memory_takes(room, positions, tokens, said):
    chosen, reason = choose_length(MANY, positions, lambda length: length <= room)
    assert chosen == tokens and said in reason
    assert in_chinese(reason) != reason


def test_no_word_of_the_memory_where_nobody_asked_it():
    chosen, reason = choose_length(MANY, 1024, lambda _: pytest.fail("asked"))
    assert (chosen, reason) == (1024, "the longest sample has 9,001, the model 1,024 positions")
    assert in_chinese(reason) != reason


def test_short_samples_leave_the_rows_as_they_are():
    chosen, reason = choose_length(np.array([30, 2048]), NO_LIMIT, lambda _: pytest.fail("asked"))
    assert chosen == 2048 and reason == "the longest sample has 2,048"


def test_short_samples_do_not_make_a_length_beyond_the_positions():
    chosen, reason = choose_length(np.array([30, 900]), 1024, lambda _: pytest.fail("asked"))
    assert (chosen, reason) == (1024, "the longest sample has 900")


def test_where_the_memory_is_not_known_99_percent_are_kept():
    chosen, reason = choose_length(MANY, NO_LIMIT, lambda _: None)
    assert chosen == 3008 and "not known" in reason and in_chinese(reason) != reason


def test_what_was_set_counts_and_a_checkpoint_decides_the_rest():
    auto = DirectTrainingConfig()
    had = {"max_seq_length": 3008, "tokens_per_row": 2048, "seed": 7}
    assert SequenceLength.known(auto, {}) is None
    found = SequenceLength.known(auto, had)
    assert (found.max_seq_length, found.tokens_per_row) == (3008, 2048) and found.reason
    set_ = DirectTrainingConfig(max_seq_length=500, tokens_per_row=300)
    assert SequenceLength.known(set_, had) == SequenceLength(500, 300)
    assert SequenceLength.known(DirectTrainingConfig(max_seq_length=500), {}) == SequenceLength(
        500, 0
    )
    assert SequenceLength.known(auto, {**had, "max_seq_length": "x"}) is None


# ---- in a run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_data(tmp_path_factory, tiny_data: Path) -> Path:
    """Sixty short samples and one of some 3,000 tokens."""
    path = tmp_path_factory.mktemp("long") / "mine.jsonl"
    long = {"question": "长题？", "thinking": "".join(f"第{i}步算{i * 7}。" for i in range(300))}
    record = json.dumps({**long, "answer": "好。"}, ensure_ascii=False)
    path.write_text(tiny_data.read_text(encoding="utf-8") + record + "\n", encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path, tiny_model, long_data, cache_dir) -> DirectTrainingConfig:
    places = {"output_dir": str(tmp_path / "out"), "cache_dir": str(cache_dir)}
    inputs = {"model_name": str(tiny_model), "data_path": (str(long_data),)}
    options = {"eval_fraction": 0.0, "num_probes": 0, "forgetting": False, "device": "cpu"}
    return DirectTrainingConfig(**inputs, **places, **options)


def test_a_plan_takes_the_longest_sample_and_fills_rows_as_before(config):
    plan = plan_run(config, init_distributed("cpu"), Terminal(quiet=True))
    longest = int(plan.data.train.tokens.lengths.max())
    chosen = plan.settings["max_seq_length"]
    assert 2048 < longest <= chosen < longest + 64 and chosen % 64 == 0
    assert plan.settings["tokens_per_row"] == 2048 and plan.steps.row_tokens >= longest
    assert plan.data.train.tokens.max_seq_length == chosen == plan.data.max_seq_length
    assert {"max_seq_length", "tokens_per_row"} <= set(plan.automatic)
    rows = [
        sum(plan.data.train.tokens.lengths[list(plan.steps[i].documents)])
        for i in range(1, plan.steps.steps_per_epoch + 1)
    ]
    assert sorted(rows)[-2] <= 2048 < max(rows)
    assert f"{longest:,}" in plan.inputs.length.text()


@pytest.fixture(scope="module")
def with_a_table(tmp_path_factory) -> Path:
    """A model that looks 350 positions up; the samples have 151 to 268 tokens, and one of them 3,000."""
    folder = tmp_path_factory.mktemp("table") / "gpt2"
    return make_tiny_model(folder, kind=GPT2Config, max_position_embeddings=350)


def test_a_model_with_a_table_of_positions_is_read_within_it(config, with_a_table, tmp_path):
    """Samples, general text, and questions with their answers."""
    own = tmp_path / "own.jsonl"
    texts = [{"question": f"问{i}？", "answer": "密码" * (i * 30)} for i in range(1, 9)]
    own.write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    asked = {"num_probes": 2, "probe_max_new_tokens": 400, "probe_path": (str(own),)}
    measured = {"forgetting": True, "general_path": (str(own),), "max_broken_fraction": 1.0}
    target = {"model_name": str(with_a_table), "target_modules": ("all-linear",)}
    config = replace(config, **asked, **measured, **target, eval_fraction=0.1)
    plan = plan_run(config, init_distributed("cpu"), Terminal(quiet=True))
    assert plan.settings["max_seq_length"] == 350
    assert "the model 350 positions" in plan.inputs.length.text()
    assert plan.data.lengths.max() <= 350 and plan.general[0].tokens.lengths.max() <= 350
    longest = max(len(probe.prompt) for probe in plan.probing.probes)
    assert plan.probing.most == 350 - longest


def test_more_than_its_positions_end_in_one_line_with_the_length(config, with_a_table):
    config = replace(config, model_name=str(with_a_table), max_seq_length=768)
    with pytest.raises(UserError, match=r"more than 350 tokens .*; use --max-seq-length 350$"):
        plan_run(config, init_distributed("cpu"), Terminal(quiet=True))


def test_no_sample_within_the_positions_is_told_as_that(config, tmp_path):
    model = make_tiny_model(tmp_path / "short", kind=GPT2Config, max_position_embeddings=20)
    config = replace(config, model_name=str(model))
    with pytest.raises(UserError, match=r"the model has positions for 20; .* truncate_thinking"):
        plan_run(config, init_distributed("cpu"), Terminal(quiet=True))


def test_computed_positions_may_be_exceeded_and_that_is_told(config, tmp_path, capsys):
    model = make_tiny_model(tmp_path / "short", max_position_embeddings=200)
    config = replace(config, model_name=str(model), max_seq_length=1024)
    plan = plan_run(config, init_distributed("cpu"), Terminal())
    said = " ".join(capsys.readouterr().err.split())
    assert plan.data.lengths.max() > 200 and "--max-seq-length 200 stays within" in said


def test_what_does_not_fit_is_left_out_and_told(config, monkeypatch):
    dist = init_distributed("cpu")
    monkeypatch.setattr(
        "finetuning.runs.sequence_length.fits_memory", lambda *_: lambda n: n < 2100
    )
    plan = plan_run(config, dist, Terminal(quiet=True))
    assert plan.settings["max_seq_length"] == 2048
    assert "no more fit the memory" in plan.inputs.length.text()
    assert dict(plan.inputs.accounts[0].rows())["too long"].startswith("1 of 61 (1.6%)")


def test_the_estimate_of_the_memory_decides(config, tiny_model):
    model = plan_run(config, init_distributed("cpu"), Terminal(quiet=True)).inputs.model
    tight = fits_memory(config, model, init_distributed("cpu"), torch.float32, 200 * 2**20)
    assert tight(64) and not tight(10**7)
    assert not fits_memory(config, model, init_distributed("cpu"), torch.float32, 2**20)(64)


@pytest.mark.slow
def test_a_resume_keeps_the_length_though_the_memory_is_another(
    tiny_run, tmp_path, long_data, monkeypatch, capsys
):
    first = ["--max-steps", "3", "--save-steps", "2", "--num-probes", "0", "--no-forgetting"]
    data = ["--data-path", str(long_data), "--eval-fraction", "0"]
    assert tiny_run(tmp_path, *data, first=first) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "longest sample" in said and "fits the memory" in said
    monkeypatch.setattr("finetuning.runs.sequence_length.fits_memory", lambda *_: lambda _: False)
    checkpoint = str(tmp_path / "out" / "checkpoints" / "checkpoint-2")
    assert tiny_run(tmp_path, *data, "--resume", checkpoint, first=first) == 0
    assert "as in the checkpoint" in " ".join(capsys.readouterr().out.split())
