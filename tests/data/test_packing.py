"""The plan is a pure function, loses no document, and is the same work for any number of ranks.

uv run pytest tests/data/test_packing.py
"""

import hashlib
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch

from finetuning.data.packing import StepPlan, build_batch, pack_rows, split_micro_batch
from finetuning.data.token_table import Segment, TokenizedSamples, TruncationReport
from tests.helpers.settings import step_plan, up_to


def random_lengths(n: int = 200, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 300, n)


def make_plan(lengths: np.ndarray, **options: object) -> StepPlan:
    defaults = {"data": up_to(512), "gradient_accumulation_steps": 2, "seed": 3}
    return step_plan(lengths, lengths - 5, **(defaults | options))


def table(*documents: list[tuple[int, int]]) -> TokenizedSamples:
    """A table of documents given as lists of (token, segment)."""
    pairs = [np.array(d) for d in documents]
    lengths = [len(p) for p in pairs]
    return TokenizedSamples(
        ids=np.concatenate(pairs)[:, 0].astype(np.int32),
        segments=np.concatenate(pairs)[:, 1].astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        sample_index=np.arange(len(documents)),
        num_targets=np.array([int((p[:, 1] > 0).sum()) for p in pairs]),
        truncation=TruncationReport(),
        close_id=7,
        end_id=8,
        max_seq_length=64,
    )


def test_rows_hold_every_document_once_and_never_overflow():
    lengths = random_lengths()
    rows = pack_rows(lengths, np.arange(len(lengths)), 512)
    assert Counter(d for row in rows for d in row.tolist()) == Counter(range(len(lengths)))
    assert max(lengths[row].sum() for row in rows) <= 512
    # Best-fit decreasing: within 11/9 of the lower bound, plus one.
    assert len(rows) <= 11 / 9 * np.ceil(lengths.sum() / 512) + 1


def test_a_row_is_filled_up_to_its_tokens_and_a_longer_document_is_alone():
    lengths = np.array([700, 90, 80, 60, 300, 40, 120, 100])
    data = up_to(1024, tokens_per_row=200)
    plan = make_plan(lengths, data=data, gradient_accumulation_steps=1, num_epochs=1)
    rows = [plan[step].micro_batches[0] for step in range(1, len(plan) + 1)]
    assert sorted(d for row in rows for d in row) == list(range(8))
    for row in rows:
        assert len(row) == 1 or lengths[list(row)].sum() <= 200
    assert (0,) in rows and (4,) in rows
    assert len(plan) > len(make_plan(lengths, data=up_to(1024), gradient_accumulation_steps=1))
    # By hand: 1490 tokens in rows of 700, 300 and three of 200.
    assert len(plan) == 5 and plan.efficiency == pytest.approx(1490 / 1600)
    assert plan.constant_tokens == 704 and plan.constant_shape["max_length"] == 704
    wide = make_plan(lengths, data=up_to(1024, tokens_per_row=4096), num_epochs=1)
    assert wide.row_tokens == 1024, "a row never holds more than the longest sample may have"


def test_every_epoch_shows_every_document_once():
    plan = make_plan(random_lengths(), num_epochs=3)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch + 1, (epoch + 1) * plan.steps_per_epoch + 1)
        seen = Counter(d for step in steps for d in plan[step].documents)
        assert seen == Counter(range(200)), f"epoch {epoch}"
    assert plan[1].documents != plan[plan.steps_per_epoch + 1].documents, "epochs share an order"


def test_a_share_of_an_epoch_is_no_step_longer_for_rounding():
    lengths = np.full(200, 500)
    plan = make_plan(lengths, num_epochs=0.07)
    assert plan.steps_per_epoch == 100 and 0.07 * 100 > 7, "a float's error, or nothing is tested"
    assert len(plan) == 7 and len(make_plan(lengths, num_epochs=0.071)) == 8


def test_a_step_does_not_depend_on_what_was_asked_before():
    lengths = random_lengths()
    forward = make_plan(lengths, num_epochs=3)
    steps = [forward[s] for s in range(1, forward.num_steps + 1)]
    backward = make_plan(lengths, num_epochs=3)
    assert [backward[s] for s in range(backward.num_steps, 0, -1)] == steps[::-1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_step_of_one_rank(world_size: int):
    lengths = random_lengths(150)
    alone = make_plan(lengths, gradient_accumulation_steps=8, num_epochs=2)
    ranks = [
        make_plan(
            lengths,
            gradient_accumulation_steps=8 // world_size,
            num_epochs=2,
            rank=r,
            world_size=world_size,
        )
        for r in range(world_size)
    ]
    for step in range(1, alone.num_steps + 1):
        parts = [plan[step] for plan in ranks]
        own = [
            d
            for p in parts
            for m in p.micro_batches[: len(p.micro_batches) - p.num_padding_batches]
            for d in m
        ]
        assert Counter(own) == Counter(alone[step].documents)
        assert {p.num_targets for p in parts} == {alone[step].num_targets}
        assert len({len(p.micro_batches) for p in parts}) == 1, (
            "ranks go through the model unequally"
        )


def test_the_last_partial_accumulation_counts():
    lengths = np.full(7, 500)
    plan = make_plan(lengths, gradient_accumulation_steps=4)
    assert plan.steps_per_epoch == 2
    assert [plan[s].num_samples for s in (1, 2)] == [4, 3]
    assert plan[2].num_targets == 3 * 495


def test_max_steps_wins_over_epochs_and_goes_on_into_further_epochs():
    plan = make_plan(np.full(4, 500), gradient_accumulation_steps=1, num_epochs=1, max_steps=11)
    assert plan.num_steps == 11
    assert plan[11].epoch == 2


def test_only_chosen_documents_are_planned_and_repeats_repeat():
    plan = make_plan(
        random_lengths(20), documents=np.array([3, 3, 5, 9]), gradient_accumulation_steps=99
    )
    assert Counter(plan[1].documents) == Counter({3: 2, 5: 1, 9: 1})


def test_without_packing_a_row_is_a_document():
    plan = make_plan(
        random_lengths(9),
        data=up_to(512, packing=False),
        batch_size=2,
        gradient_accumulation_steps=1,
    )
    assert [len(plan[s].micro_batches[0]) for s in range(1, plan.num_steps + 1)] == [2, 2, 2, 2, 1]


def test_batch_restarts_positions_and_predicts_from_the_token_before():
    P, T, C, A, E = Segment
    tokens = table(
        [(1, P), (2, P), (3, T), (4, T), (7, C), (5, A), (8, E)],
        [(1, P), (6, A), (8, E)],
    )
    batch = build_batch(tokens, (1, 0))
    assert batch.input_ids.tolist() == [[1, 6, 8, 1, 2, 3, 4, 7, 5, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 6]]
    assert batch.cu_seqlens.tolist() == [0, 3, 10]
    assert batch.labels.tolist() == [6, 8, 3, 4, 7, 5, 8]
    assert batch.target_positions.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert batch.segments.tolist() == [A, E, T, T, C, A, E]
    assert batch.document.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert batch.thinking_bucket.tolist() == [-1, -1, 0, 5, -1, -1, -1]
    assert batch.documents == (1, 0)


def test_padding_is_documents_without_targets():
    tokens = table([(1, 0), (2, 3)], [(3, 0), (4, 3)])
    plain = build_batch(tokens, (0, 1))
    padded = build_batch(tokens, (0, 1), pad_to=9, pad_documents=6, max_length=3)
    assert padded.input_ids.shape == padded.position_ids.shape == (1, 9)
    assert padded.lengths == (2, 2, 3, 2)
    assert padded.cu_seqlens.tolist() == [0, 2, 4, 7, 9, 9, 9]
    assert padded.max_length == 3
    assert torch.equal(padded.labels, plain.labels)
    assert padded.documents == plain.documents


def test_every_micro_batch_fits_the_constant_shape():
    lengths = random_lengths()
    plan = make_plan(lengths, batch_size=3, num_epochs=2)
    tokens = table(*([(1, 0)] * (n - 1) + [(2, 3)] for n in lengths.tolist()))
    shape = plan.constant_shape
    for step in range(1, plan.num_steps + 1):
        for documents in plan[step].micro_batches:
            batch = build_batch(tokens, documents, **shape)
            assert batch.input_ids.shape == (1, shape["pad_to"])
            assert batch.cu_seqlens.shape == (shape["pad_documents"] + 1,)
            assert max(batch.lengths) <= batch.max_length == shape["max_length"]
            assert batch.labels.shape == batch.document.shape == (shape["pad_targets"],)
            own = batch.document < shape["pad_documents"]
            assert own.sum() == sum(tokens.num_targets[d] for d in documents)


def test_the_attention_kernel_is_told_of_no_longer_and_no_more_documents_than_there_are():
    """Each 128 tokens that there could be cost it a block that has nothing to do."""
    lengths = np.array([300] * 20 + [20] * 3)
    plan = make_plan(lengths, data=up_to(4096), max_steps=1)
    assert plan.num_rows == 2
    assert plan.constant_shape["max_length"] == 384
    documents = [
        len(row) + math.ceil((plan.constant_tokens - lengths[row].sum()) / 384)
        for row in (plan._rows[0], plan._rows[1])
    ]
    assert plan.constant_shape["pad_documents"] == max(documents)
    assert make_plan(np.array([100, 60]), data=up_to(160)).constant_shape["max_length"] == 128
    assert make_plan(np.array([100, 60]), data=up_to(100)).constant_shape["max_length"] == 100


@pytest.mark.parametrize(
    ("longest", "rows", "packing"), [(100, 1, False), (512, 3, True), (40, 4, True)]
)
def test_the_constant_shape_is_no_larger_than_the_fullest_rows(longest, rows, packing):
    """Short documents without packing, or all data in less than a row, would else be mostly padding."""
    lengths = np.random.default_rng(3).integers(1, longest + 1, 30)
    plan = make_plan(lengths, batch_size=rows, data=up_to(512, packing=packing))
    fullest = np.sort([sum(lengths[d] for d in plan._rows[r]) for r in range(plan.num_rows)])
    needed = fullest[-rows:].sum()
    assert needed <= plan.constant_tokens <= min(needed + 63, rows * 512)
    padded = math.ceil(plan.num_rows / rows) * plan.constant_tokens
    assert plan.constant_efficiency == pytest.approx(lengths.sum() / padded)
    tokens = table(*([(1, 0)] * (n - 1) + [(2, 3)] for n in lengths.tolist()))
    for step in range(1, plan.num_steps + 1):
        for documents in plan[step].micro_batches:
            batch = build_batch(tokens, documents, **plan.constant_shape)
            assert batch.input_ids.shape == (1, plan.constant_tokens)
            assert batch.cu_seqlens.shape == (plan.constant_shape["pad_documents"] + 1,)


def test_tokens_of_very_many_rows_are_counted_part_by_part():
    lengths = random_lengths(150_000)  # more than two parts of 2^16 rows
    plan = make_plan(lengths, data=up_to(512, packing=False))
    assert (plan._rows.tokens(lengths) == lengths).all()
    packed = make_plan(lengths)
    expected = [lengths[packed._rows[r]].sum() for r in range(packed.num_rows)]
    assert (packed._rows.tokens(lengths) == expected).all()


def test_halves_keep_the_order_and_all_documents():
    lengths = np.array([100, 10, 10, 10, 70])
    first, second = split_micro_batch((0, 1, 2, 3, 4), lengths)
    assert first + second == (0, 1, 2, 3, 4)
    assert abs(lengths[list(first)].sum() - lengths[list(second)].sum()) <= 20
    assert split_micro_batch((2,), lengths) == [(2,)]


def test_the_plan_of_given_arguments_stays_what_it_was():
    """A checkpoint holds a step number only: another plan would show other samples on resume."""
    lengths = np.random.default_rng(7).integers(1, 513, 3000)
    chosen = np.random.default_rng(8).integers(0, 3000, 2000)
    plans = [
        make_plan(lengths, batch_size=3, num_epochs=2.5, rank=1, world_size=2),
        make_plan(lengths, documents=chosen, data=up_to(600)),
        make_plan(lengths, documents=chosen, data=up_to(600, packing=False)),
    ]
    digests = []
    for plan in plans:
        steps = [plan[step] for step in range(1, plan.num_steps + 1)]
        facts = (steps, plan.efficiency, plan.num_rows)
        text = repr(facts).replace("num_padding_batches", "num_fillers")  # its name at that time
        digests.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    assert digests == ["490f280ba03ae6c7", "1984e825e400bd18", "b380c1923df99986"]


def test_a_plan_holds_few_bytes_a_document_and_leaves_the_choice_alone():
    lengths = random_lengths(50_000)
    documents = np.arange(50_000)
    tracemalloc.start()
    plan = make_plan(lengths, documents=documents)
    assert plan[1].documents
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 16 * 50_000
    assert (documents == np.arange(50_000)).all()


@pytest.mark.parametrize(
    ("rows", "epochs"), [(1, 15), (9, 15), (10, 15), (40, 4), (50, 3), (400, 3)]
)
def test_automatic_epochs_make_150_updates_of_few_data(rows: int, epochs: int):
    """15 at most, 3 at least; 40 rows four times are 160 updates."""
    options = {"gradient_accumulation_steps": 1, "num_epochs": "auto"}
    assert len(make_plan(np.full(rows, 500), **options)) == rows * epochs
