"""Two ranks give the numbers of one process of plain transformers, peft and torch, from gradient to adapter.

The reference (`tests/helpers/reference.py`) sees the whole global batch, one sample at a time. The ranks
share it: odd numbers of micro-batches, rows of different supervised tokens, fillers, and steps in which a
rank has nothing but a filler.

uv run pytest -m "not long" tests/runs/test_reference_on_ranks.py
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from finetuning.config import DirectTrainingConfig
from tests.helpers.ranks import modules_at_start, on_ranks, results_of
from tests.helpers.reference import PlainTraining, Reference
from tests.helpers.sessions import (
    CLIP,
    Run,
    Session,
    assert_curve,
    assert_epochs_and_counters,
    assert_hardest,
    assert_same_adapter,
    assert_same_gradients,
    by_step,
    do_on_ranks,
    kill_at,
    settings,
    stop_at,
    train_on_ranks,
    write,
)

pytestmark = pytest.mark.slow

DROPOUT, ROW_TOKENS = 0.25, 390
LOW_CLIP = 0.105  # the sums of six rows have smaller norms than those of two


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def config(folder: Path, tiny_model: Path, cache_dir: Path) -> DirectTrainingConfig:
    """Nine rows in an epoch and three held out: an odd number, which two ranks can't share evenly."""
    held_out = write(folder / "seven.jsonl", "签名", 7)
    changes = {"max_seq_length": ROW_TOKENS, "eval_path": (held_out,)}
    return settings(folder, tiny_model, cache_dir, **changes)


@pytest.fixture(scope="module")
def reference_of(config: DirectTrainingConfig, folder: Path) -> Callable[[Run, float], Reference]:
    """The reference for a run without dropout and its largest norm: one for all with the same steps."""

    @cache
    def train(steps: tuple, clip: float) -> Reference:
        return PlainTraining(replace(config, max_grad_norm=clip), folder).train(steps)

    return lambda run, clip=CLIP: train(tuple(map(tuple, run.steps())), clip)


@pytest.fixture(scope="module", params=["ddp-3", "ddp-1", "fsdp-3", "fsdp-1"])
def pair(request, config: DirectTrainingConfig, folder: Path, reference_of):
    """A run of two ranks by its accumulated micro-batches, each rank's session, and the reference."""
    mode, _, accumulation = request.param.partition("-")
    changes = {"parallel": mode, "gradient_accumulation_steps": int(accumulation)}
    changes["max_grad_norm"] = clip = LOW_CLIP if accumulation == "3" else CLIP
    changed = replace(config, output_dir=request.param, **changes)
    run, sessions = do_on_ranks(2, changed, folder)
    return run, sessions, reference_of(run, clip)


# -----------------------------------------------------------------------------
# Two ranks and one process


def test_a_rank_begins_with_everything_imported():
    assert results_of(on_ranks(2, modules_at_start)) == [True, True]


def test_the_steps_are_worth_a_comparison(pair):
    """A rank with a filler beside its rows or alone, ranks of different weights, norms on both sides."""
    run, sessions, reference = pair
    plans = [[s.plan[n] for n in range(1, s.plan.num_steps + 1)] for s in sessions]
    assert [step.num_padding_batches for step in plans[0]] == [0] * len(plans[0])
    fillers = [step for step in plans[1] if step.num_padding_batches]
    alone = [step for step in fillers if len(step.micro_batches) == 1]
    if run.plan.rows_per_step == 2:
        assert len(alone) == 2, "nothing but a filler at the end of each epoch"
    else:
        assert len(fillers) == 2 and not alone, "one row and one filler at the end of each epoch"
        assert {step.num_micro_batches for step in plans[1]} == {6, 3}
    for step, planned, others in zip(reference.training, *plans, strict=True):
        targets = {sample: sums.targets for sample, sums in step.samples}
        own = [
            sum(targets[run.session.texts[d]] for m in part.micro_batches for d in m)
            for part in (planned, others)
        ]
        assert own[0] != own[1] or others in alone, "a mean of the ranks' means would be right too"
    clipped = [step.clipped[0].equal(step.gradients[0]) for step in reference.training]
    assert len(set(clipped)) == 2, reference.norms


def test_every_sample_of_a_step_belongs_to_one_rank(pair):
    run, sessions, _ = pair
    for number in range(1, run.plan.num_steps + 1):
        planned = [session.plan[number] for session in sessions]
        own = [s.micro_batches[: len(s.micro_batches) - s.num_padding_batches] for s in planned]
        dealt = [document for part in own for documents in part for document in documents]
        assert sorted(dealt) == sorted(planned[0].documents) == sorted(planned[1].documents)


def test_gradients_of_every_rank_are_those_of_the_global_batch(pair):
    _, sessions, reference = pair
    for session in sessions:
        assert_same_gradients(session.updates, reference.training)


def test_norms_losses_and_rates_of_every_step(pair):
    run, sessions, reference = pair
    for tag in ("Training/Gradient_Norm", "Training/Gradient_Norm_Max"):
        assert_curve(run, tag, by_step(reference.norms), rel=2e-5)
    tags = {"Training/Loss": (), "Thinking/Loss": ("thinking",), "Answer/Loss": ("answer",)}
    for tag, parts in tags.items():
        assert_curve(run, tag, by_step([sums.mean(*parts) for sums in reference.steps]))
    assert_curve(run, "Training/Learning_Rate", by_step(reference.rates), rel=1e-9)
    for session in sessions:
        used = [update.options["lr"] for update in session.updates]
        assert used == pytest.approx(reference.rates, rel=1e-9)
    for name in ("twice.jsonl", "half.jsonl"):
        seen = enumerate(reference.steps, start=1)
        losses = {n: sums.mean(name) for n, sums in seen if sums.count[name]}
        assert_curve(run, f"Training/By_Source/{name}", losses)


def test_held_out_losses_are_of_all_ranks_shares(pair):
    run, sessions, reference = pair
    tags = {"Eval/Loss": (), "Eval/Thinking_Loss": ("thinking",), "Eval/EOS_Loss": ("end",)}
    for tag, parts in tags.items():
        assert_curve(run, tag, {n: s.mean(*parts) for n, s in reference.held_out.items()})
    accuracies = {n: s.accuracy() for n, s in reference.held_out.items()}
    targets = reference.held_out[0].targets
    assert_curve(run, "Eval/Token_Accuracy", accuracies, abs=1.01 / targets, rel=0)
    plan = sessions[1].held_out
    fillers = [plan[n].num_padding_batches for n in range(1, plan.num_steps + 1)]
    assert fillers == [0, 1], "nothing to see"


def test_all_ranks_have_the_trained_adapter(pair):
    run, sessions, reference = pair
    assert_same_adapter(run, reference)
    for session in sessions:
        for one, other in zip(session.weights, reference.adapter.values(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_counters_epochs_and_the_hardest_samples(pair):
    run, _, reference = pair
    assert_epochs_and_counters(run, reference)
    assert_hardest(run, reference)


def test_rates_are_of_all_ranks(pair):
    run, _, reference = pair
    tags = {
        "Tokens": [sums.tokens for sums in reference.steps],
        "Supervised_Tokens": [sums.targets for sums in reference.steps],
        "Samples": [len(step.samples) for step in reference.training],
    }
    seconds = run.points["Throughput/Step_Seconds"]
    for name, counts in tags.items():
        rates = {n: count / seconds[n] for n, count in by_step(counts).items()}
        assert_curve(run, f"Throughput/{name}_Per_Second", rates, rel=1e-6)


# -----------------------------------------------------------------------------
# Ranks that stop, die and come back


def assert_whole(run: Run, reference: Reference, resumes: list[int]) -> None:
    """One curve over all sessions, and no step counted twice."""
    assert list(run.points["Monitoring/Resume_Count"].values()) == resumes
    assert_curve(run, "Training/Loss", by_step([sums.mean() for sums in reference.steps]))
    assert_curve(run, "Training/Gradient_Norm", by_step(reference.norms), rel=1e-4)
    assert_curve(run, "Training/Learning_Rate", by_step(reference.rates), rel=1e-9)
    assert_curve(run, "Eval/Loss", {n: s.mean() for n, s in reference.held_out.items()})
    assert_epochs_and_counters(run, reference)
    assert_hardest(run, reference)
    assert_same_adapter(run, reference)


def test_a_signal_to_one_rank_stops_all_and_they_go_on(config, folder, reference_of):
    """In the first epoch to rank 1; then, in the second one, to rank 0. The last session is one process."""
    config = replace(config, output_dir="stopped", gradient_accumulation_steps=1)
    done = results_of(train_on_ranks(2, config, folder, before_update=stop_at(2, rank=1)))
    assert [len(session.updates) for session in done] == [3, 3]
    stop = stop_at(3, rank=0)
    done = results_of(train_on_ranks(2, config, folder, before_update=stop, resume="latest"))
    assert [len(session.updates) for session in done] == [4, 4]
    alone = replace(config, gradient_accumulation_steps=2)
    run, _ = do_on_ranks(0, alone, folder, resume="latest")
    assert_whole(run, reference_of(run), [0] * 3 + [1] * 4 + [2] * 3)


def test_killed_between_checkpoints_in_both_epochs(config, folder, reference_of):
    """Rank 1, and with it rank 0, after steps that no checkpoint holds: these are done again, not lost."""
    config = replace(config, output_dir="killed", gradient_accumulation_steps=1, save_steps=3)
    first = train_on_ranks(2, config, folder, before_update=kill_at(5, rank=1))
    assert first[1].exit_code == -9 and first[0].exit_code not in (0, -9), first[0].stderr
    second = train_on_ranks(2, config, folder, before_update=kill_at(5, rank=1), resume="latest")
    assert second[1].exit_code == -9, second[1].stderr
    run, sessions = do_on_ranks(2, config, folder, resume="latest")
    assert [len(session.updates) for session in sessions] == [4, 4], "from checkpoint 6"
    assert_whole(run, reference_of(run), [0] * 3 + [1] * 3 + [2] * 4)


# -----------------------------------------------------------------------------
# Dropout


def masks_by_step(session: Session) -> dict[int, list[list[torch.Tensor]]]:
    """The masks of a rank's micro-batches, those of fillers too, in the order of the layers."""
    plan, rest = session.plan, list(session.masks)
    steps = range(1, plan.num_steps + 1)[-len(session.updates) :]
    per_pass = len(rest) // sum(len(plan[n].micro_batches) for n in steps)
    found: dict[int, list[list[torch.Tensor]]] = {n: [] for n in steps}
    for n in steps:
        for _ in plan[n].micro_batches:
            found[n].append(rest[:per_pass])
            rest = rest[per_pass:]
    assert not rest
    return found


def masks_of_samples(
    sessions: list[Session], documents: dict[tuple[str, int], object]
) -> dict[int, list[torch.Tensor]]:
    """The masks that each sample of a step met, in the order of the step's samples."""
    by_rank = [masks_by_step(session) for session in sessions]
    plan = sessions[0].plan
    found: dict[int, list[torch.Tensor]] = {}
    for n in range(1, plan.num_steps + 1):
        pieces: dict[int, list[list[torch.Tensor]]] = {}
        for session, masks in zip(sessions, by_rank, strict=True):
            planned = session.plan[n]
            own = len(planned.micro_batches) - planned.num_padding_batches
            for packed, of_pass in zip(planned.micro_batches[:own], masks[n][:own], strict=True):
                start = 0
                for document in packed:
                    end = start + len(documents[session.texts[document]].ids)
                    cut = [mask[:, start:end] for mask in of_pass]
                    pieces.setdefault(document, []).append(cut)
                    start = end
                assert start == of_pass[0].shape[1]
        found[n] = [mask for document in plan[n].documents for mask in pieces[document].pop(0)]
    return found


@pytest.fixture(scope="module")
def dropping(config: DirectTrainingConfig, folder: Path):
    """Two ranks with dropout, and the reference with the masks that each of them drew."""
    config = replace(config, output_dir="dropping", lora_dropout=DROPOUT)
    run, sessions = do_on_ranks(2, config, folder)
    training = PlainTraining(config, folder)
    masks = masks_of_samples(sessions, training.documents)
    return config, run, sessions, training.train(run.steps(), masks=masks)


def agreement(masks: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The share of draws that fell alike, over what both have drawn in one place."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(masks, others, strict=True)]
    alike = [(a[: len(b)] == b[: len(a)]).float() for a, b in pairs]
    return torch.cat(alike).mean().item()


def test_dropout_is_that_of_each_ranks_masks(dropping):
    _, run, sessions, reference = dropping
    for session in sessions:
        assert_same_gradients(session.updates, reference.training)
    assert_curve(run, "Training/Loss", by_step([sums.mean() for sums in reference.steps]))
    assert_curve(run, "Eval/Loss", {n: s.mean() for n, s in reference.held_out.items()})
    assert_same_adapter(run, reference)


def test_ranks_and_steps_drop_other_values(dropping):
    """Independent masks agree where both drop and where both keep."""
    _, _, sessions, _ = dropping
    by_chance = DROPOUT**2 + (1 - DROPOUT) ** 2
    one, two = map(masks_by_step, sessions)
    for n, masks in one.items():
        for own, others in zip(masks, two[n], strict=True):
            assert agreement(own[:1], others[:1]) == pytest.approx(by_chance, abs=0.05), n
            kept = torch.cat([mask.flatten() for mask in own]).float().mean().item()
            assert kept == pytest.approx(1 - DROPOUT, abs=0.02)
        if n > 1:
            before = one[n - 1][0]
            assert agreement(masks[0], before) == pytest.approx(by_chance, abs=0.05), n


def test_the_same_seed_would_be_noticed():
    """The control: masks of one generator begin alike, however long they are."""
    masks = []
    for length in (37, 53):
        torch.manual_seed(4)
        masks.append(torch.nn.functional.dropout(torch.ones(1, length, 32), DROPOUT) != 0)
    assert agreement(masks[:1], masks[1:]) == 1


def test_each_rank_goes_on_with_its_own_masks(dropping, folder):
    config, _, sessions, reference = dropping
    config = replace(config, output_dir="dropping-stopped")
    results_of(train_on_ranks(2, config, folder, before_update=stop_at(1, rank=1)))
    run, resumed = do_on_ranks(2, config, folder, resume="latest")
    for before, after in zip(sessions, resumed, strict=True):
        whole, rest = masks_by_step(before), masks_by_step(after)
        assert list(rest) == [3, 4]
        for n, masks in rest.items():
            for one, other in zip(masks, whole[n], strict=True):
                assert all(map(torch.equal, one, other)), n
    assert_curve(run, "Training/Loss", by_step([sums.mean() for sums in reference.steps]))
    assert_same_adapter(run, reference)
