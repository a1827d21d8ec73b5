"""Held-out sums are exact and touch nothing; the hardest samples; best model and early stopping.

uv run pytest -m "not long" tests/evaluation/test_evaluator.py
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from direct_finetuning_with_existing_modules import DirectTrainer
from finetuning.common.distributed import Distributed
from finetuning.config import DirectTrainingConfig
from finetuning.data.packing import build_batch
from finetuning.data.token_table import Segment
from finetuning.data.tokenization import tokenize_samples
from finetuning.data.training_data import DataPart
from finetuning.evaluation.evaluator import held_out_sums
from finetuning.evaluation.hardest_samples import hardest, hardest_text, loss_rows
from finetuning.events.reading import read_metrics, read_run
from finetuning.model.packed_model import PackedLossModel
from finetuning.readers.dataset import read_samples
from finetuning.runs.recorded import read_recorded
from finetuning.training.state import TrainState
from tests.helpers.read_events import read_histograms, read_texts
from tests.helpers.settings import step_plan, up_to

ONE = Distributed(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def part(tiny_model: Path, tiny_data: Path) -> DataPart:
    samples = read_samples([str(tiny_data)]).samples
    tokens = tokenize_samples(samples, AutoTokenizer.from_pretrained(tiny_model), up_to(768))
    return DataPart(samples, tokens, np.arange(0, 24, 2))


@pytest.fixture(scope="module")
def sums(tiny_model: Path, part: DataPart) -> np.ndarray:
    model = Qwen3ForCausalLM.from_pretrained(tiny_model).train()
    tokens = part.tokens
    packed = PackedLossModel(model, tokens.close_id).train()
    plan = step_plan(tokens.lengths, tokens.num_targets, part.documents, data=up_to(768))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    sums = held_out_sums(packed, tokens, plan, ONE).documents
    assert packed.training and model.training
    assert torch.equal(torch.get_rng_state(), state)
    return sums


def test_sums_equal_the_dense_loss_of_each_document(tiny_model, part, sums):
    model = Qwen3ForCausalLM.from_pretrained(tiny_model).eval()
    for row, document in zip(sums, part.documents, strict=True):
        tokens = part.tokens[document]
        ids = torch.from_numpy(tokens.ids.astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        losses = F.cross_entropy(logits, ids[1:], reduction="none").numpy()
        for segment in Segment:
            of_segment = tokens.segments[1:] == segment
            wanted = 0.0 if segment == Segment.PROMPT else losses[of_segment].sum()
            assert row[segment, 0] == pytest.approx(wanted, rel=1e-5)
            if segment != Segment.PROMPT:
                assert row[segment, 2] == of_segment.sum()


@dataclass(frozen=True)
class OneOfTwo(Distributed):
    """A rank of two in one process: the second goes first, and leaves its sums to the first."""

    left: list[torch.Tensor] = field(default_factory=list)

    def any(self, *flags: bool) -> list[bool]:
        return list(flags)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.is_main:
            return tensor + self.left.pop()
        self.left.append(tensor.clone())
        return tensor


def test_two_ranks_that_share_the_documents_get_the_sums_of_all(tiny_model, part, sums):
    model = PackedLossModel(Qwen3ForCausalLM.from_pretrained(tiny_model), part.tokens.close_id)
    tokens, shares, left = part.tokens, [], []
    for rank in (1, 0):
        plan = step_plan(
            tokens.lengths,
            tokens.num_targets,
            part.documents,
            data=up_to(768),
            rank=rank,
            world_size=2,
        )
        dist = OneOfTwo(rank, 2, rank, torch.device("cpu"), left=left)
        shares.append(held_out_sums(model, tokens, plan, dist).documents)
    counts = [share[:, :, 2].sum() for share in (shares[0], sums)]
    assert 0 < counts[0] < counts[1], "each rank has a part of its own"
    np.testing.assert_allclose(shares[1], sums, rtol=1e-6)


# -----------------------------------------------------------------------------
# The hardest


def per_document(losses: list[float]) -> np.ndarray:
    table = np.zeros((len(losses), 5, 3))
    table[:, Segment.THINKING] = [[2 * loss, 0, 2] for loss in losses]
    table[:, Segment.END] = [[loss, 0, 1] for loss in losses]
    return table


def test_rows_are_means_by_segment_and_absent_where_there_is_no_token():
    table = per_document([1.5, 3.0])
    table[1] = 0  # nothing supervised
    assert loss_rows([7, 8], table, step=4, level=1.0) == [
        [0.5, 4, 7, 1.5, 1.5, None, None, 1.5],
    ]


def test_the_hardest_are_kept_in_bounded_memory_once_each_and_nan_first():
    rng = np.random.default_rng(0)
    losses = rng.uniform(0, 5, 10_000)
    kept: list = []
    for start in range(0, len(losses), 50):
        block = range(start, start + 50)
        kept = hardest([*kept, *loss_rows(block, per_document(losses[block].tolist()))], 10)
        assert len(kept) == 10
    assert [row[2] for row in kept] == np.argsort(-losses)[:10].tolist()
    again = hardest([*kept, *kept, *loss_rows([3], per_document([math.nan]))], 10)
    assert again[0][2] == 3 and [row[2] for row in again[1:]] == [row[2] for row in kept[:9]]


def test_the_table_holds_place_id_segments_and_a_fenced_excerpt(part):
    text = hardest_text(part, hardest(loss_rows(part.documents, per_document([1.0] * 12)), 2))
    first = part.sample(0)
    assert f"tiny.jsonl:{first.line} ({first.id})" in text.replace("\\", "")
    assert "| 1.000 | 1.000 | – | – | 1.000 |" in text
    assert text.count("```") == 4 and first.question in text


# -----------------------------------------------------------------------------
# Whole runs


def train(folder: Path, model: Path, data: Path, cache_dir: Path, **settings) -> DirectTrainer:
    defaults = {
        "model_name": str(model),
        "data_path": (str(data),),
        "output_dir": str(folder),
        "cache_dir": str(cache_dir),
        "max_seq_length": 768,
        "num_probes": 0,
        "logging_steps": 1,
    }
    trainer = DirectTrainer(DirectTrainingConfig(**{**defaults, **settings}), quiet=True)
    trainer.train()
    return trainer


def tables_of(trainer: DirectTrainer) -> dict[str, list[tuple[int, str]]]:
    return read_texts(trainer.record.run.tensorboard)


@pytest.fixture(scope="module")
def schooled_model(tmp_path_factory, tiny_model: Path, tiny_data: Path) -> Path:
    """The tiny model after a hundred steps of full training: it knows what the data look like."""
    model = Qwen3ForCausalLM.from_pretrained(tiny_model).train()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokens = tokenize_samples(read_samples([str(tiny_data)]).samples, tokenizer, up_to(768))
    packed, optimizer = PackedLossModel(model, -1), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(100):
        batch = build_batch(tokens, [(4 * step + i) % len(tokens) for i in range(4)])
        packed(batch, len(batch.labels))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("schooled")
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_planted_corrupt_samples_rank_first(tmp_path, schooled_model, tiny_data, cache_dir):
    """A model that knows the data meets one training and one held-out sample of noise."""
    held_out = tmp_path / "held_out.jsonl"
    lines = tiny_data.read_text(encoding="utf-8").splitlines()
    rng = np.random.default_rng(0)
    noise = ["".join(chr(c) for c in rng.integers(0xAC00, 0xD7A3, 40)) for _ in range(2)]
    corrupt = [
        json.dumps({"question": "求12×7 mod 5。", "thinking": n, "answer": n}) for n in noise
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join([*lines[:30], corrupt[0], *lines[30:50]]) + "\n", encoding="utf-8")
    held_out.write_text("\n".join([*lines[50:], corrupt[1]]) + "\n", encoding="utf-8")
    trainer = train(
        tmp_path / "out",
        schooled_model,
        data,
        cache_dir,
        eval_path=(str(held_out),),
        num_epochs=2,
        eval_steps=0,
        max_seq_length=1024,
    )
    tables = tables_of(trainer)
    steps = trainer.plan.steps.steps_per_epoch
    trained = dict(tables["Training/Hardest_Samples"])
    assert list(trained) == [steps, 2 * steps], "at the end of each epoch"
    for text in trained.values():
        assert "train.jsonl:31 " in text.splitlines()[2], text[:1000]
    step, text = tables["Eval/Hardest_Samples"][-1]
    assert step == 2 * steps and "held\\_out.jsonl:11 " in text.splitlines()[2]


@pytest.mark.slow
def test_groups_recombine_to_the_whole_on_training_and_held_out_data(
    tmp_path, tiny_model, tiny_data, cache_dir
):
    lines = tiny_data.read_text(encoding="utf-8").splitlines()
    for name, part in (("一.jsonl", lines[:25]), ("二.jsonl", lines[25:])):
        (tmp_path / name).write_text("\n".join(part) + "\n", encoding="utf-8")
    trainer = train(
        tmp_path / "out",
        tiny_model,
        tmp_path,
        cache_dir,
        num_epochs=1,
        logging_steps=1000,
        eval_fraction=0.3,
        eval_steps=0,
    )
    scalars = {}  # the newest of each; groups by source and category are not in TensorBoard
    for record in read_metrics(trainer.record.run.logs / "metrics.jsonl"):
        scalars |= record["metrics"]
    data, groups_of = trainer.plan.data, trainer.plan.groups
    parts = (("Training", data.train, groups_of[0]), ("Eval", data.held_out, groups_of[1]))
    for prefix, part, groups in parts:
        for stem, (names, labels) in groups.items():
            counts = np.bincount(
                labels[part.documents], part.tokens.num_targets[part.documents], len(names)
            )
            present = [i for i, count in enumerate(counts) if count]
            losses = [scalars[f"{prefix}/{stem}{names[i]}"] for i in present]
            whole = np.dot(losses, counts[present]) / counts.sum()
            assert whole == pytest.approx(scalars[f"{prefix}/Loss"], rel=1e-5), (prefix, stem)
            emitted = [tag for tag in scalars if tag.startswith(f"{prefix}/{stem}")]
            assert len(emitted) == len(present), "a group without a token has no tag"
        assert len([t for t in scalars if t.startswith(f"{prefix}/By_Source/")]) == 2


@pytest.mark.slow
def test_the_best_adapter_is_kept_and_patience_ends_the_run(
    tmp_path, tiny_model, tiny_data, cache_dir
):
    trainer = train(
        tmp_path / "out",
        tiny_model,
        tiny_data,
        cache_dir,
        max_steps=200,
        learning_rate=0.3,  # it soon gets worse
        warmup_ratio=0.0,
        eval_steps=1,
        save_steps=1,
        save_total_limit=100,
        early_stopping_patience=3,
    )
    metrics = read_metrics(trainer.record.run.logs / "metrics.jsonl")
    losses = {m["step"]: m["metrics"]["Eval/Loss"] for m in metrics if "Eval/Loss" in m["metrics"]}
    best = min(losses, key=losses.get)
    assert 0 < best < 197, "the test needs a run that gets worse"
    assert trainer.state.step == max(losses) == best + 3
    assert trainer.state.best_step == best
    weights = load_file(trainer.record.run.best_model / "adapter_model.safetensors")
    saved = load_file(
        trainer.checkpoints.directory / f"checkpoint-{best}" / "adapter_model.safetensors"
    )
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    final = load_file(trainer.record.run.final_model / "adapter_model.safetensors")
    assert any(not torch.equal(final[name], saved[name]) for name in saved)


def test_a_loss_that_is_not_a_number_is_never_the_best():
    state = TrainState()
    takes = [state.note_evaluation(i, {"Eval/Loss": x}) for i, x in enumerate((math.nan, 3.0))]
    assert takes == [False, True] and state.best_step == 1
    assert not any(state.note_evaluation(2, {"Eval/Loss": x}) for x in (math.nan, 3.0))
    assert state.evals_without_gain == 2
    assert not state.note_evaluation(3, {}) and state.evals_without_gain == 2


def test_by_answers_the_best_answers_win_and_of_equal_ones_the_lower_loss():
    state, told = TrainState(), []
    for step, (loss, score) in enumerate([(3, 0.5), (2, 0.5), (1, 0.4), (4, 0.6), (9, None)]):
        metrics = {"Eval/Loss": float(loss)} | (
            {} if score is None else {"Eval/Answer_Score": score}
        )
        told.append(state.note_evaluation(step, metrics, "answers"))
    assert told == [True, True, False, True, False]
    assert (state.best_step, state.best_eval_loss, state.best_score) == (3, 4.0, 0.6)
    assert state.evals_without_gain == 0, "where nothing was judged, nothing was worse"
    assert state.last_eval_loss == 9.0
    assert not state.note_evaluation(6, {"Eval/Loss": 1.0, "Eval/Answer_Score": 0.1}, "answers")
    assert state.evals_without_gain == 1
    by_loss = TrainState(best_eval_loss=1.0, best_step=5)  # of a session in which the loss decided
    assert by_loss.note_evaluation(6, {"Eval/Loss": 2.0, "Eval/Answer_Score": 0.1}, "answers")


def test_without_a_held_out_loss_the_answers_decide():
    state = TrainState()
    scores = [0.2, 0.5, 0.5, 0.1]
    told = [
        state.note_evaluation(i, {"Eval/Answer_Score": x}, "answers") for i, x in enumerate(scores)
    ]
    assert told == [True, True, False, False]
    assert (state.best_step, state.best_score, state.best_eval_loss) == (1, 0.5, None)
    assert state.evals_without_gain == 2
    assert not state.note_evaluation(4, {"Eval/Answer_Score": 0.9}, "loss")
    assert not state.note_evaluation(4, {}, "answers") and state.evals_without_gain == 2


@pytest.mark.slow
def test_own_questions_choose_the_model_of_a_run_without_held_out_samples(
    tiny_run, tiny_data, tmp_path, monkeypatch, capsys
):
    """The second evaluation of the training is the best by what the questions get, and the run ends early."""
    scores = iter([0.0, 0.2, 0.6, 0.5, 0.4])
    monkeypatch.setattr(
        "finetuning.evaluation.evaluator.probe_metrics",
        lambda *_: {"Eval/Answer_Score": next(scores)},
    )
    asked = ["--eval-fraction", "0", "--probe-path", str(tiny_data), "--num-probes", "2"]
    rules = ["--best-by", "answers", "--early-stopping-patience", "2", "--eval-steps", "1"]
    assert tiny_run(tmp_path, *asked, *rules, "--probe-max-new-tokens", "4") == 0
    said = " ".join(capsys.readouterr().out.split())
    out = tmp_path / "out"
    assert json.loads((out / "best_model" / "origin.json").read_text())["step"] == 2
    status = json.loads(next(out.glob("training_logs/*/status.json")).read_text())
    assert (status["status"], status["result"]) == ("stopped", "best_model")
    assert "of step 2, answer score 0.6 (" in said and "best answers: score 0.6 at step 2" in said


@pytest.mark.slow
def test_losses_are_bit_equal_with_and_without_evaluation_probes_and_health(
    tmp_path, tiny_model, tiny_data, cache_dir
):
    """Dropout draws from the generator that evaluation must leave alone."""
    common = {"max_steps": 5, "lora_dropout": 0.2, "log_weight_histograms": True}
    plain = train(
        tmp_path / "off",
        tiny_model,
        tiny_data,
        cache_dir,
        eval_fraction=0.2,
        eval_steps=0,
        **common,
    )
    probed = train(
        tmp_path / "on",
        tiny_model,
        tiny_data,
        cache_dir,
        eval_fraction=0.2,
        eval_steps=1,
        num_probes=2,
        probe_max_new_tokens=6,
        **common,
    )
    records = [read_metrics(t.record.run.logs / "metrics.jsonl") for t in (plain, probed)]
    losses = [
        [m["metrics"]["Training/Loss"] for m in of_run if "Training/Loss" in m["metrics"]]
        for of_run in records
    ]
    assert len(losses[0]) == 5 and losses[0] == losses[1]
    emitted = read_run(probed.record.run.tensorboard)
    assert [step for step, _ in emitted["Eval/Budget_Hit_Rate"]] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in tables_of(probed)["Eval/Samples"]] == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_adapter_health_is_recorded(tmp_path, tiny_model, tiny_data, cache_dir):
    trainer = train(tmp_path / "out", tiny_model, tiny_data, cache_dir, max_steps=2, eval_steps=1)
    scalars = read_recorded(trainer.record.run).series
    ratios = dict(scalars["LoRA/q_proj/Update_Ratio"])
    assert ratios[0] == 0.0 < ratios[1] < ratios[2]
    norms = dict(scalars["LoRA/Gradient_Norm"])
    assert norms.keys() == {1, 2}
    for step, total in scalars["Training/Gradient_Norm"]:
        assert norms[step] == pytest.approx(total, rel=1e-5), "before clipping, all adapters"
    assert all(1 <= rank <= 16 for _, rank in scalars["LoRA/down_proj/Effective_Rank"])
    assert len([t for t in scalars if t.startswith("LoRA/")]) == 7 * 3 + 1
    table = dict(tables_of(trainer)["LoRA/Modules"])[2]
    assert table.count("\n") == 1 + 14, "every module has its line"
    spread = read_histograms(trainer.record.run.tensorboard)["LoRA/q_proj/Update_Ratio_Histogram"]
    assert [step for step, _, _ in spread] == [0, 1, 2]
    _, counts, edges = spread[2]
    assert sum(counts) == 2, "one value a layer"
    assert edges[0] <= ratios[2] <= edges[-1]


@pytest.mark.slow
def test_own_questions_are_answered_where_nothing_is_held_out(
    tmp_path, tiny_model, tiny_data, cache_dir
):
    own = tmp_path / "own.jsonl"
    own.write_text(tiny_data.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    trainer = train(
        tmp_path / "out", tiny_model, tiny_data, cache_dir, max_steps=1, eval_fraction=0.0,
        probe_path=(str(own),), num_probes=1, probe_max_new_tokens=3,
    )  # fmt: skip
    lines = read_metrics(trainer.record.run.logs / "metrics.jsonl")
    rates = [
        r["metrics"]["Eval/Budget_Hit_Rate"]
        for r in lines
        if "Eval/Budget_Hit_Rate" in r["metrics"]
    ]
    assert len(rates) == 2 and "Eval/Samples" in tables_of(trainer)
