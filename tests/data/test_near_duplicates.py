"""Near duplicates against a brute-force Jaccard join, and a split without leaks."""

import random

import numpy as np
import pytest

from finetuning.common.errors import UserError
from finetuning.common.ngrams import gram_hashes, normalized
from finetuning.data import near_duplicates
from finetuning.data.near_duplicates import jaccard, near_duplicate_clusters
from finetuning.data.split import split_held_out
from finetuning.readers.sample import Sample


def _texts(count: int, seed: int, changed: int = 0) -> list[str]:
    """Random Chinese texts, and `changed` lightly edited copies of the first of them."""
    rng = random.Random(seed)
    alphabet = [chr(c) for c in range(0x4E00, 0x4E00 + 2000)]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(20, 200))) for _ in range(count)]
    for text in texts[:changed]:
        letters = list(text)
        for _ in range(max(1, len(letters) // rng.choice([30, 60, 120]))):
            letters[rng.randrange(len(letters))] = rng.choice(alphabet)
        texts.append("".join(letters))
    rng.shuffle(texts)
    return texts


def _grams(text: str) -> set[str]:
    text = normalized(text)
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def _brute_force(texts: list[str], threshold: float) -> np.ndarray:
    """Components by comparing every pair of 5-gram sets (strings, no hashes)."""
    sets = [_grams(text) for text in texts]
    labels = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            common = len(sets[i] & sets[j])
            if common / (len(sets[i]) + len(sets[j]) - common) >= threshold - 1e-9:
                low, high = sorted((labels[i], labels[j]))
                labels = [low if label == high else label for label in labels]
    return np.array(labels)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("exact_limit", [10_000, 0], ids=["exact", "minhash"])
def test_clusters_equal_brute_force(threshold, exact_limit):
    texts = _texts(200, seed=1, changed=100)
    expected = _brute_force(texts, threshold)
    assert len(set(expected.tolist())) < len(texts) - 20  # there is something to find
    found = near_duplicate_clusters(texts, threshold, exact_limit=exact_limit)
    np.testing.assert_array_equal(found, expected)


def test_real_questions_exact_and_minhash_agree(shared_data):
    texts = [p.read_text("utf-8") for p in sorted((shared_data / "crypto_qa").glob("*.md"))]
    pairs = [block for text in texts for block in text.split("###")]
    exact = near_duplicate_clusters(pairs, 0.5)
    np.testing.assert_array_equal(exact, _brute_force(pairs, 0.5))
    np.testing.assert_array_equal(exact, near_duplicate_clusters(pairs, 0.5, exact_limit=0))


def test_equal_after_normalization_is_one_cluster():
    texts = ["SM4 是什么？", "ｓｍ４是什么", "sm4，是什么!", "SM3 是什么？", ""]
    assert near_duplicate_clusters(texts).tolist() == [0, 0, 0, 3, 4]


def test_order_does_not_change_the_clusters():
    texts = _texts(150, seed=2, changed=60)
    order = np.random.default_rng(0).permutation(len(texts))
    labels = near_duplicate_clusters(texts)
    shuffled = near_duplicate_clusters([texts[i] for i in order])
    same = labels[order][:, None] == labels[order][None, :]
    np.testing.assert_array_equal(same, shuffled[:, None] == shuffled[None, :])


def test_a_large_family_is_one_cluster():
    head, tail = _texts(2, seed=3)
    body = (head + tail) * 3
    family = [f"{body[:80]}{i:04d}{body[80:]}" for i in range(700)]
    assert len(set(near_duplicate_clusters(family, exact_limit=0).tolist())) == 1
    assert len(set(near_duplicate_clusters(family).tolist())) == 1


def test_empty_and_single():
    assert near_duplicate_clusters([]).shape == (0,)
    assert near_duplicate_clusters(["密钥"]).tolist() == [0]
    assert near_duplicate_clusters(["密钥"], exact_limit=0).tolist() == [0]


def test_jaccard_of_known_texts():
    assert jaccard("abcdefg", "ABC-defg") == 1.0
    assert jaccard("abcdefg", "abcdefh") == pytest.approx(2 / 4)
    assert jaccard("abcde", "vwxyz") == 0.0


def _samples(questions: list[str]) -> list[Sample]:
    return [Sample(question=q, thinking="", answer=f"答{q[::-1]}") for q in questions]


def test_split_is_a_partition_without_leaks():
    samples = _samples(_texts(300, seed=4, changed=150))
    train, held_out = split_held_out(samples, 0.1)
    assert train.dtype == held_out.dtype == np.int64
    assert sorted([*train, *held_out]) == list(range(len(samples)))
    assert 0.04 * len(samples) < len(held_out) < 0.2 * len(samples)
    for i in held_out:
        for j in train:
            assert jaccard(samples[i].question, samples[j].question) < 0.8


def test_split_links_samples_by_question_alone():
    questions = _texts(40, seed=5)
    samples = _samples(questions) + [
        Sample(question=q, thinking="", answer="完全不同的回答" + str(i) * 30)
        for i, q in enumerate(questions)
    ]
    _, held_out = split_held_out(samples, 0.3)
    assert {i % 40 for i in held_out if i < 40} == {i % 40 for i in held_out if i >= 40}


def test_split_stays_when_data_grow_or_move():
    old, new = _texts(200, seed=6), _texts(200, seed=7)
    chosen = {old[i] for i in split_held_out(_samples(old), 0.1)[1]}
    grown = new[:100] + old[::-1] + new[100:]
    again = {grown[i] for i in split_held_out(_samples(grown), 0.1)[1]}
    assert again & set(old) == chosen


@pytest.mark.parametrize("seed", range(8))
def test_split_of_few_samples_holds_out_at_least_one(seed):
    train, held_out = split_held_out(_samples(_texts(10, seed=seed)), 0.01)
    assert len(held_out) >= 1 and len(train) >= 7


def test_split_of_few_samples_keeps_most_for_training():
    """Hashes alone would hold out up to 4 of these 10."""
    sizes = [len(split_held_out(_samples(_texts(10, seed=s)), 0.1)[1]) for s in range(60)]
    assert min(sizes) == 1 and max(sizes) == 2


def test_split_never_holds_out_a_dominating_cluster():
    body = _texts(1, seed=8)[0] * 3
    samples = _samples([f"{body}{i}" for i in range(20)] + _texts(10, seed=9))
    for fraction in (0.05, 0.2, 0.25):
        train, _ = split_held_out(samples, fraction)
        assert set(range(20)) <= set(train.tolist())


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(UserError, match="fraction"):
        split_held_out(_samples(["问题一"]), 1.5)
    body = _texts(1, seed=10)[0] * 3
    with pytest.raises(UserError, match="near duplicates"):
        split_held_out(_samples([f"{body}{i}" for i in range(12)]), 0.1)
    assert len(split_held_out(_samples(["问题一"]), 0)[1]) == 0


def test_band_width_keeps_the_recall():
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        rows = near_duplicates._rows_per_band(threshold)
        assert 1 - (1 - threshold**rows) ** (near_duplicates._NUM_PERM // rows) >= 0.999


@pytest.mark.parametrize("width", range(1, 17))
def test_gram_hashes_are_equal_where_the_grams_are(width):
    text = "".join(random.Random(width).choices("密码钥ab", k=300))
    grams = [text[i : i + width] for i in range(len(text) - width + 1)]
    hashes = gram_hashes(text, width)
    assert hashes.shape == (len(grams),) and hashes.dtype == np.uint64
    assert len(set(zip(grams, hashes.tolist(), strict=True))) == len(set(grams))
    assert len(set(hashes.tolist())) == len(set(grams))
    assert gram_hashes("密" * (width - 1), width).shape == (0,)


@pytest.mark.parametrize(
    "text, expected",
    [("ＳＭ４，算法_2！", "sm4算法2"), ("A b\nC", "abc"), ("①㎝", "1"), ("。", ""), ("", "")],
)
def test_normalized(text, expected):
    assert normalized(text) == expected


def test_short_texts_are_cut_into_shingles_once(monkeypatch):
    """Questions of one pattern meet in many bands; cut anew each time they took five times as long."""
    made, cut = [], near_duplicates.shingles

    def counted(text):
        made.append(text)
        return cut(text)

    texts = [
        f"请说明密码应用方案第{i * 7919}号系统在第{i % 7}层面的密评要求与高风险判定"
        for i in range(300)
    ]
    expected = near_duplicate_clusters(texts)
    monkeypatch.setattr(near_duplicates, "shingles", counted)
    near_duplicate_clusters(texts, exact_limit=0)
    assert len(made) == 300
    monkeypatch.setattr(near_duplicates, "_SHORT", 10)
    made.clear()
    labels = near_duplicate_clusters(texts, exact_limit=0)
    assert len(made) > 300, "longer ones are made anew"
    np.testing.assert_array_equal(labels, expected)


def test_of_many_samples_no_more_are_held_out_than_asked():
    """Those with the lowest hashes, so that a smaller limit takes some of the larger one's."""
    samples = _samples(_texts(400, seed=11))
    everything = set(split_held_out(samples, 0.2)[1].tolist())
    some = {n: set(split_held_out(samples, 0.2, at_most=n)[1].tolist()) for n in (1, 10, 40, 9999)}
    assert some[1] < some[10] < some[40] < everything == some[9999]
    assert [len(some[n]) for n in (1, 10, 40)] == [1, 10, 40]
