"""Data in the order a run needs them: texts for the demonstration model, groups of documents.

uv run pytest tests/test_training_data.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from qwen3_tokenizer import qwen3_tokenizer

import near_duplicates
import samples
from errors import UserError
from sample_facts import difficulty
from training_data import TrainingData, prepare_data, read_data, split_samples


@pytest.fixture(scope="module")
def qwen3():
    return qwen3_tokenizer()


def write(path: Path, count: int, word: str) -> str:
    """Samples that differ in length; each fifth is too long to train on."""
    rows = [
        {
            "question": f"{word}的第{i}个参数是多少？",
            "thinking": f"先查{word}的定义。" * (100 if i % 5 == 4 else 1 + i % 3),
            "answer": f"第{i}个参数是{i * 7}，用于{word}。",
        }
        for i in range(count)
    ]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("large_data", [1, 2**30])
def test_groups_tell_what_each_document_is(tmp_path, monkeypatch, qwen3, large_data):
    monkeypatch.setattr(samples, "LARGE_DATA", large_data)
    paths = [write(tmp_path / "a.jsonl", 30, "SM4"), write(tmp_path / "b.jsonl", 20, "数字证书")]
    read, _ = read_data(paths, cache_dir=tmp_path / "cache")
    split = split_samples(read, eval_fraction=0.2)
    data = prepare_data(split, qwen3, 120, workers=1, cache_dir=tmp_path / "cache")
    assert isinstance(data, TrainingData)
    tokens = data.train.tokens
    assert len(tokens) == 40, "the long ones are left out"
    for document in range(len(tokens)):
        sample = data.train.sample(document)
        of = {stem: names[labels[document]] for stem, (names, labels) in data.train.groups.items()}
        assert of["By_Source/"] == sample.source
        assert of["By_Difficulty_"] == str(difficulty(sample))
        assert data.train.place(document) == f"{sample.source}:{sample.line} ({sample.id})"
    categories, labels = data.train.groups["By_Category/"]
    assert len({categories[i] for i in labels}) > 1
    assert not set(data.train.documents) & set(data.held_out.documents)
    assert len(data.train) + len(data.held_out) == 40


def test_the_demonstration_model_learns_from_a_bounded_number_of_texts(tmp_path):
    read, _ = read_data([write(tmp_path / "a.jsonl", 30, "SM4")])
    split = split_samples(read, eval_fraction=0)
    texts = split.training_texts()
    assert len(texts) == 30
    some = split.training_texts(at_most=7)
    assert some == [texts[i] for i in np.linspace(0, 29, 7).astype(int)]


def test_near_duplicates_are_looked_for_once(tmp_path, monkeypatch, qwen3):
    """For the split and the statistics together, and not again in another process with the cache."""
    searches, search = [], near_duplicates.near_duplicate_clusters

    def counted(texts):
        searches.append(len(texts))
        return search(texts)

    monkeypatch.setattr(near_duplicates, "near_duplicate_clusters", counted)
    path, cache = write(tmp_path / "a.jsonl", 30, "SM4"), tmp_path / "cache"

    def outcome() -> tuple[list[int], dict]:
        read, _ = read_data([path], cache_dir=cache)
        split = split_samples(read, eval_fraction=0.2, cache_dir=cache)
        data = prepare_data(split, qwen3, 120, workers=1, cache_dir=cache)
        return split.held_out.tolist(), data.statistics.to_json()

    first = outcome()
    assert searches == [30, 30], "questions, and questions with answers"
    assert outcome() == first and searches == [30, 30]
    (labels,) = cache.glob("near_duplicates/*/pairs/labels.npy")
    labels.write_bytes(labels.read_bytes()[:-10])
    assert outcome() == first and searches == [30, 30, 30], "what is damaged is made anew"
    write(tmp_path / "a.jsonl", 31, "SM4")
    assert outcome() != first and searches[3:] == [31, 31]


def test_data_that_are_all_held_out_are_refused(tmp_path):
    read, _ = read_data([write(tmp_path / "a.jsonl", 5, "SM4")])
    with pytest.raises(UserError, match="all of 5 samples are held out; lower --eval-fraction"):
        split_samples(read, eval_fraction=0.9999)
