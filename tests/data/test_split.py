"""Training and held-out samples: no near duplicate crosses the split; weights of sources."""

from types import SimpleNamespace

import numpy as np
import pytest

from finetuning.common.errors import UserError
from finetuning.config import DataSettings
from finetuning.data.near_duplicates import jaccard
from finetuning.data.split import (
    Split,
    replay_text,
    split_held_out,
    split_samples,
    weighted_by_tokens,
    weighted_indices,
)
from finetuning.readers.dataset import SampleSet, read_samples
from finetuning.readers.sample import Sample
from tests.helpers.similar_texts import similar_texts


def test_weighted_indices():
    data = [Sample(f"q{i}", "", "a", source="a.md" if i < 10 else "d/b.md") for i in range(30)]
    indices = np.arange(30)
    picked = weighted_indices(data, indices, {"a.md": 2.5, "*b.md": 0.25}, seed=1)
    counts = np.bincount(picked, minlength=30)
    assert picked.dtype == np.int64
    assert sorted(counts[:10]) == [2] * 5 + [3] * 5
    assert sorted(counts[10:]) == [0] * 15 + [1] * 5
    assert (np.diff(picked) >= 0).all()
    assert (picked == weighted_indices(data, indices, {"a.md": 2.5, "*b.md": 0.25}, seed=1)).all()
    assert (picked != weighted_indices(data, indices, {"a.md": 2.5, "*b.md": 0.25}, seed=2)).any()
    assert (weighted_indices(data, [3, 1, 20], {}, seed=1) == [3, 1, 20]).all()
    for weights, reason in [
        ({"a.md": -1}, "is -1"),
        ({"a.md": float("nan")}, "is nan"),
        ({"x.md": 1}, "nothing was read from x.md"),
        ({"*": 0}, "leave no sample"),
    ]:
        with pytest.raises(UserError, match=reason):
            weighted_indices(data, indices, weights, seed=1)


def test_a_part_of_a_source_is_rounded_to_the_nearest_number():
    data = [Sample(f"q{i}", "", "a", source="a.md") for i in range(100)]
    for weight in (0.29, 0.57, 0.58, 1.14):  # times 100, each is a little below a whole number
        picked = weighted_indices(data, np.arange(100), {"a.md": weight}, seed=1)
        assert len(picked) == round(100 * weight), weight


def shares(picked: np.ndarray, tokens: np.ndarray, samples: list[Sample]) -> dict[str, float]:
    found = dict.fromkeys((sample.source for sample in samples), 0.0)
    for i in picked:
        found[samples[i].source] += tokens[i]
    return {name: float(n / tokens[picked].sum()) for name, n in found.items()}


def test_weights_by_tokens_are_shares_of_the_tokens():
    """Sources of unlike lengths; a folder is a source, and the largest weight is shown once."""
    data = [Sample(f"q{i}", "", "a", source="a.md" if i < 40 else "d/b.md") for i in range(200)]
    data += [Sample(f"g{i}", "", "a", source="general.jsonl") for i in range(20)]
    tokens = np.r_[np.full(40, 900), np.arange(160) + 10, np.full(20, 60)].astype(float)
    own, general = np.arange(200), np.arange(200, 220)

    def split(seed: int = 0) -> Split:
        read = SimpleNamespace(samples=data)
        return Split(read, own, own[:0], None, None, general, replayed=general, seed=seed)

    weights = {"a.md": 0.94, "d": 0.06}
    picked = weighted_by_tokens(split(), weights, 0.0, tokens)
    assert shares(picked, tokens, data)["d/b.md"] == pytest.approx(0.06, abs=0.002)
    assert np.bincount(picked, minlength=220)[:40].tolist() == [1] * 40
    again, other = (weighted_by_tokens(split(seed), weights, 0.0, tokens) for seed in (0, 1))
    assert picked.tolist() == again.tolist() != other.tolist()
    picked = weighted_by_tokens(split(), {"a.md": 0.2, "d": 0.8}, 0.0, tokens)
    assert shares(picked, tokens, data)["d/b.md"] == pytest.approx(0.8, abs=0.02)
    # Few general texts are shown again and again until they have their share.
    picked = weighted_by_tokens(split(), {}, 0.2, tokens)
    assert shares(picked, tokens, data)["general.jsonl"] == pytest.approx(0.2, abs=0.001)
    assert set(np.bincount(picked, minlength=220)[200:]) == {10, 11} and picked.dtype == np.int64
    assert np.bincount(picked, minlength=220)[:200].tolist() == [1] * 200
    picked = weighted_by_tokens(split(), weights, 0.5, tokens)
    found = shares(picked, tokens, data)
    assert found["general.jsonl"] == pytest.approx(0.5, abs=0.001)
    assert found["d/b.md"] / found["a.md"] == pytest.approx(6 / 94, abs=0.003)
    for weights, reason in [({"x.md": 1}, "nothing was read"), ({"*": 0}, "leave no sample")]:
        with pytest.raises(UserError, match=reason):
            weighted_by_tokens(split(), weights, 0.0, tokens)


def _samples(questions: list[str]) -> list[Sample]:
    return [Sample(question=q, thinking="", answer=f"答{q[::-1]}") for q in questions]


def test_split_is_a_partition_without_leaks():
    samples = _samples(similar_texts(300, seed=4, changed=150))
    train, held_out = split_held_out(samples, 0.1)
    assert train.dtype == held_out.dtype == np.int64
    assert sorted([*train, *held_out]) == list(range(len(samples)))
    assert 0.04 * len(samples) < len(held_out) < 0.2 * len(samples)
    for i in held_out:
        for j in train:
            assert jaccard(samples[i].question, samples[j].question) < 0.8


def test_split_links_samples_by_question_alone():
    questions = similar_texts(40, seed=5)
    samples = _samples(questions) + [
        Sample(question=q, thinking="", answer="完全不同的回答" + str(i) * 30)
        for i, q in enumerate(questions)
    ]
    _, held_out = split_held_out(samples, 0.3)
    assert {i % 40 for i in held_out if i < 40} == {i % 40 for i in held_out if i >= 40}


def test_split_stays_when_data_grow_or_move():
    old, new = similar_texts(200, seed=6), similar_texts(200, seed=7)
    chosen = {old[i] for i in split_held_out(_samples(old), 0.1)[1]}
    grown = new[:100] + old[::-1] + new[100:]
    again = {grown[i] for i in split_held_out(_samples(grown), 0.1)[1]}
    assert again & set(old) == chosen


def test_split_of_few_samples_holds_out_at_least_one(subtests):
    for seed in range(8):
        with subtests.test(seed=seed):
            train, held_out = split_held_out(_samples(similar_texts(10, seed=seed)), 0.01)
            assert len(held_out) >= 1 and len(train) >= 7


def test_split_of_few_samples_keeps_most_for_training():
    """Hashes alone would hold out up to 4 of these 10."""
    sizes = [len(split_held_out(_samples(similar_texts(10, seed=s)), 0.1)[1]) for s in range(60)]
    assert min(sizes) == 1 and max(sizes) == 2


def test_split_never_holds_out_a_dominating_cluster():
    body = similar_texts(1, seed=8)[0] * 3
    samples = _samples([f"{body}{i}" for i in range(20)] + similar_texts(10, seed=9))
    for fraction in (0.05, 0.2, 0.25):
        train, _ = split_held_out(samples, fraction)
        assert set(range(20)) <= set(train.tolist())


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(UserError, match="fraction"):
        split_held_out(_samples(["问题一"]), 1.5)
    body = similar_texts(1, seed=10)[0] * 3
    with pytest.raises(UserError, match="near duplicates"):
        split_held_out(_samples([f"{body}{i}" for i in range(12)]), 0.1)
    assert len(split_held_out(_samples(["问题一"]), 0)[1]) == 0


def test_of_many_samples_no_more_are_held_out_than_asked():
    """Those with the lowest hashes, so that a smaller limit takes some of the larger one's."""
    samples = _samples(similar_texts(400, seed=11))
    everything = set(split_held_out(samples, 0.2)[1].tolist())
    some = {n: set(split_held_out(samples, 0.2, at_most=n)[1].tolist()) for n in (1, 10, 40, 9999)}
    assert some[1] < some[10] < some[40] < everything == some[9999]
    assert [len(some[n]) for n in (1, 10, 40)] == [1, 10, 40]


def _with_general(
    samples: list[Sample], replay: float, **settings: float
) -> tuple[set[str], Split]:
    """The held-out ids of a run with this share of general text."""
    general = list(read_samples([replay_text()]).samples) if replay else []
    read = SampleSet([*samples, *general], (), {}, f"{replay}")
    split = split_samples(read, DataSettings(replay=replay, **settings))
    assert not {*split.train, *split.held_out} & set(split.replayed)
    return {read.samples[int(i)].id for i in split.held_out}, split


@pytest.mark.parametrize("count", [10, 12, 60])
def test_general_text_changes_nothing_of_what_is_held_out(count: int):
    for seed in range(5):
        samples = _samples(similar_texts(count, seed=seed, changed=count // 2))
        alone, _ = _with_general(samples, 0.0)
        beside, _ = _with_general(samples, 0.2)
        assert alone and alone == beside
        assert _with_general(samples, 0.2, max_eval_samples=1)[0] <= alone


def test_a_general_text_that_is_held_out_too_is_not_replayed():
    general = list(read_samples([replay_text()]).samples)
    others = _samples(similar_texts(30, seed=3))
    copies = [Sample(question=g.question, thinking="", answer=g.answer) for g in general]
    ids, split = _with_general([*copies, *others], 0.2, eval_fraction=0.3)
    assert ids == _with_general([*copies, *others], 0.0, eval_fraction=0.3)[0]
    held_out = {split.read.samples[int(i)].question for i in split.held_out}
    replayed = {split.read.samples[int(i)].question for i in split.replayed}
    assert held_out & {g.question for g in general} and not held_out & replayed
