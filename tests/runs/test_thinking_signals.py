"""Thinking apart from answer: exact against hand-made logits, and the same however a step is cut.

uv run pytest -m "not long" tests/runs/test_thinking_signals.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen3ForCausalLM

from direct_finetuning_with_existing_modules import main
from finetuning.data.packing import build_batch
from finetuning.data.token_table import Segment, TokenizedSample
from finetuning.data.tokenization import tokenize_samples
from finetuning.evaluation.loss_metrics import LossMetrics
from finetuning.events.reading import read_metrics
from finetuning.model.loss import packed_loss
from finetuning.model.packed_model import PackedLossModel
from finetuning.readers.dataset import read_samples
from tests.helpers.ranks import on_ranks, results_of
from tests.helpers.read_events import read_texts
from tests.helpers.settings import up_to

CLOSE, END, VOCAB = 1, 2, 8
GROUPS = ("Training/By_", "Thinking/", "Answer/", "Boundary/", "Training/Loss", "Training/Token")


def metrics_of(parts, truncation: LossMetrics) -> dict[str, float]:
    """Metrics of (documents, LossSums) pairs, as a step collects them."""
    vector = truncation.zeros()
    for documents, sums in parts:
        arrays = (sums.per_document, sums.thinking_buckets, sums.premature_close)
        vector += truncation.vector(documents, *(array.numpy() for array in arrays))
    return truncation.training_metrics(vector)


def recombined(metrics: dict[str, float], counts: np.ndarray) -> float:
    """Mean over the segments' losses, weighted by their tokens (5,)."""
    losses = [metrics[tag] for tag in ("Thinking/Loss", "Boundary/Close_Loss")]
    losses += [metrics[tag] for tag in ("Answer/Loss", "Boundary/EOS_Loss")]
    return float(np.dot(losses, counts[1:]) / counts[1:].sum())


# -----------------------------------------------------------------------------
# Hand-made logits


def document(thinking: int, answer: int) -> TokenizedSample:
    segments = [Segment.PROMPT] * 2 + [Segment.THINKING] * thinking + [Segment.CLOSE]
    segments += [Segment.ANSWER] * answer + [Segment.END]
    ids = [3, 4] + [5] * thinking + [CLOSE] + [6] * answer + [END]
    return TokenizedSample(np.array(ids, np.int32), np.array(segments, np.uint8), 0)


def hand_made(documents: list[TokenizedSample], probabilities) -> dict[str, float]:
    """Metrics where `probabilities(document, label position)` is the distribution that predicts a label.

    The head is the identity, so the hidden states are the logits.
    """
    batch = build_batch(documents, range(len(documents)))
    hidden = torch.zeros(batch.input_ids.shape[1], VOCAB)
    start = 0
    for number, piece in enumerate(documents):
        for position in range(1, len(piece.ids)):
            hidden[start + position - 1] = torch.tensor(probabilities(number, position)).log()
        start += len(piece.ids)
    _, sums = packed_loss(
        hidden,
        torch.eye(VOCAB),
        target_positions=batch.target_positions,
        labels=batch.labels,
        segments=batch.segments,
        document=batch.document,
        num_documents=len(documents),
        thinking_bucket=batch.thinking_bucket,
        close_id=CLOSE,
        num_targets=len(batch.labels),
    )
    truncation = LossMetrics({"By_Difficulty_": (("1", "2"), np.arange(len(documents)) % 2)})
    return metrics_of([(range(len(documents)), sums)], truncation)


def spread(given: dict[int, float]) -> list[float]:
    """The given probabilities, the rest shared by the other tokens."""
    rest = (1 - sum(given.values())) / (VOCAB - len(given))
    return [given.get(token, rest) for token in range(VOCAB)]


def test_positions_premature_close_and_segments_have_exact_values():
    """Ten tokens of thinking: closing has 1% at the first and 10% at the last."""

    def probabilities(_: int, position: int) -> list[float]:
        k = position - 2  # 0..9 in the thinking, 10 at the close, then answer and end
        if k < 10:
            return spread({5: 0.5 if k < 5 else 0.25, CLOSE: (k + 1) / 100})
        if k == 10:
            return spread({CLOSE: 0.125})
        return spread({6: 0.0625, END: 0.5})

    metrics = hand_made([document(thinking=10, answer=3)], probabilities)
    ln2 = np.log(2)
    for k in range(10):
        expected = ln2 if k < 5 else 2 * ln2
        assert metrics[f"Thinking/Loss_By_Position_{k + 1:02d}"] == pytest.approx(
            expected, rel=1e-6
        )
    assert metrics["Thinking/Premature_Close_Probability"] == pytest.approx(0.055, rel=1e-6)
    assert metrics["Thinking/Loss"] == pytest.approx(1.5 * ln2, rel=1e-6)
    assert metrics["Boundary/Close_Loss"] == pytest.approx(3 * ln2, rel=1e-6)
    assert metrics["Answer/Loss"] == pytest.approx(4 * ln2, rel=1e-6)
    assert metrics["Boundary/EOS_Loss"] == pytest.approx(ln2, rel=1e-6)
    assert metrics["Training/Loss"] == pytest.approx((15 + 3 + 12 + 1) * ln2 / 15, rel=1e-6)
    assert metrics["Thinking/Accuracy"] == 1.0 and metrics["Answer/Accuracy"] == 0.0
    assert metrics["Thinking/Tokens_Percent"] == pytest.approx(1000 / 15)
    assert metrics["Answer/Tokens_Percent"] == pytest.approx(300 / 15)


def test_an_empty_position_and_an_empty_segment_are_absent():
    def uniform(_: int, __: int) -> list[float]:
        return spread({})

    short = hand_made([document(thinking=3, answer=2)], uniform)
    found = sorted(tag[-2:] for tag in short if "By_Position" in tag)
    assert found == ["01", "04", "07"], "three tokens lie in three of ten tenths"
    none = hand_made([document(thinking=0, answer=2)], uniform)
    assert not [tag for tag in none if tag.startswith("Thinking/") and "Percent" not in tag]
    assert none["Training/Loss"] == pytest.approx(np.log(VOCAB))
    assert "Training/By_Difficulty_2" not in none


def test_a_long_chain_of_thought_weighs_by_its_tokens():
    def probabilities(number: int, _: int) -> list[float]:
        share = 0.5 if number == 0 else 0.25
        return spread({5: share, CLOSE: share / 2, 6: share / 4})

    metrics = hand_made([document(20, 1), document(40, 1)], probabilities)
    ln2 = np.log(2)
    assert metrics["Thinking/Loss"] == pytest.approx((20 * ln2 + 40 * 2 * ln2) / 60, rel=1e-6)
    assert metrics["Thinking/Premature_Close_Probability"] == pytest.approx((20 / 4 + 40 / 8) / 60)
    assert metrics["Thinking/Loss_By_Position_03"] == pytest.approx(5 * ln2 / 3, rel=1e-6)


# -----------------------------------------------------------------------------
# However a step is cut


@pytest.fixture(scope="module")
def tokens(tiny_model: Path, tiny_data: Path):
    samples = read_samples([str(tiny_data)]).samples
    return tokenize_samples(samples, AutoTokenizer.from_pretrained(tiny_model), up_to(768))


def test_packed_alone_accumulated_and_padded_agree(tiny_model, tokens):
    """Eight documents in one row, one by one, in four micro-batches, and padded through transformers."""
    model = Qwen3ForCausalLM.from_pretrained(tiny_model).eval()
    truncation = LossMetrics({"By_Source/": (("a", "b"), np.arange(len(tokens)) % 2)})
    packed = PackedLossModel(model, tokens.close_id)

    def measured(size: int) -> dict[str, float]:
        cuts = [tuple(range(start, start + size)) for start in range(0, 8, size)]
        with torch.no_grad():
            parts = [(cut, packed(build_batch(tokens, cut), 1)[1]) for cut in cuts]
        return metrics_of(parts, truncation)

    whole = measured(8)
    counts = np.bincount(np.concatenate([tokens[d].segments for d in range(8)]), minlength=5)
    assert recombined(whole, counts) == pytest.approx(whole["Training/Loss"], rel=1e-5)
    for size in (1, 2, 4):
        other = measured(size)
        assert other.keys() == whole.keys()
        assert all(other[tag] == pytest.approx(whole[tag], rel=1e-5) for tag in whole)
    losses, segments = padded_losses(model, tokens, range(8))
    reference = {
        "Training/Loss": losses.mean(),
        "Thinking/Loss": losses[segments == Segment.THINKING].mean(),
        "Answer/Loss": losses[segments == Segment.ANSWER].mean(),
        "Boundary/Close_Loss": losses[segments == Segment.CLOSE].mean(),
        "Boundary/EOS_Loss": losses[segments == Segment.END].mean(),
    }
    assert all(whole[tag] == pytest.approx(float(v), rel=1e-5) for tag, v in reference.items())


def padded_losses(model, tokens, documents) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and segment of every supervised token, from a padded batch and the full logits."""
    pieces = [tokens[d] for d in documents]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(p.ids.astype(np.int64)) for p in pieces], batch_first=True
    )
    segments = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(p.segments.astype(np.int64)) for p in pieces], batch_first=True
    )
    mask = torch.zeros_like(ids)
    for row, piece in zip(mask, pieces, strict=True):
        row[: len(piece.ids)] = 1
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    segments = segments[:, 1:].flatten()
    return losses[segments != Segment.PROMPT], segments[segments != Segment.PROMPT]


# -----------------------------------------------------------------------------
# The real script on one and on two ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, tiny_data, cache_dir) -> dict[str, Path]:
    """The same steps as 4 rows at once, 4 micro-batches, and 2 micro-batches on each of 2 ranks."""
    cuts = {"at once": (4, 1, 1), "accumulated": (1, 4, 1), "two ranks": (1, 2, 2)}
    folder = tmp_path_factory.mktemp("runs")
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data), "--device", "cpu"]
    length = ["--max-steps", "4", "--logging-steps", "2", "--eval-steps", "2", "--quiet"]
    more = ["--max-seq-length", "256", "--num-probes", "2", "--probe-max-new-tokens", "6"]
    for name, (rows, accumulation, ranks) in cuts.items():
        places = ["--output-dir", str(folder / name), "--cache-dir", str(cache_dir)]
        step = ["--batch-size", str(rows), "--gradient-accumulation-steps", str(accumulation)]
        arguments = [*inputs, *places, *step, *length, *more]
        if ranks == 1:
            assert main(arguments) == 0
        else:
            assert results_of(on_ranks(ranks, main, arguments)) == [0] * ranks
    return {name: folder / name for name in cuts}


def signals_of(output: Path) -> dict[int, dict[str, float]]:
    (logs,) = (output / "training_logs").iterdir()
    steps: dict[int, dict[str, float]] = {}
    for record in read_metrics(logs / "metrics.jsonl"):
        steps.setdefault(record["step"], {}).update(record["metrics"])
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["accumulated", "two ranks"])
def test_signals_are_the_same_however_a_step_is_cut(runs, cut):
    reference, other = signals_of(runs["at once"]), signals_of(runs[cut])
    assert reference.keys() == other.keys() == {0, 2, 4}
    for step, metrics in reference.items():
        tags = [tag for tag in metrics if tag.startswith((*GROUPS, "Eval/", "LoRA/"))]
        assert len(tags) > (40 if step else 15)
        for tag in tags:
            # Gradients and ranks pass through sums in another order and AdamW's square root.
            close = 1e-3 if tag.startswith("LoRA/") else 1e-5
            assert other[step][tag] == pytest.approx(metrics[tag], rel=close, abs=1e-9), (step, tag)


@pytest.mark.slow
def test_the_hardest_of_both_ranks_are_in_one_table(runs):
    tables = []
    for output in (runs["at once"], runs["two ranks"]):
        (run,) = (output / "tensorboard_logs").iterdir()
        tables.append(dict(read_texts(run)["Training/Hardest_Samples"])[4])
    samples = [[line.split(" | ")[1] for line in t.splitlines()[2:12]] for t in tables]
    assert len(set(samples[0])) == 10 and samples[0] == samples[1]
