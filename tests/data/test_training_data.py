"""Data in the order a run needs them: texts for the demonstration model, groups of documents.

uv run pytest -m "not long" tests/data/test_training_data.py
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetuning.analysis import sample_groups
from finetuning.analysis import statistics as analysis_statistics
from finetuning.analysis.facts import difficulty
from finetuning.analysis.sample_groups import groups_of
from finetuning.analysis.statistics import describe
from finetuning.common.errors import UserError
from finetuning.config import DataSettings, bundled_data
from finetuning.data import near_duplicates
from finetuning.data.split import split_samples
from finetuning.data.training_data import (
    DataPart,
    TrainingData,
    general_part,
    prepare_data,
    read_data,
)
from finetuning.readers import arrow_samples, dataset
from finetuning.readers.dataset import SampleSet
from finetuning.readers.sample import NothingLeftError
from tests.helpers.qwen3_tokenizer import qwen3_tokenizer
from tests.helpers.settings import up_to


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
    monkeypatch.setattr(dataset, "LARGE_DATA", large_data)
    paths = [write(tmp_path / "a.jsonl", 30, "SM4"), write(tmp_path / "b.jsonl", 20, "数字证书")]
    settings = up_to(120, data_path=tuple(paths), eval_fraction=0.2)
    read, _ = read_data(settings, cache_dir=tmp_path / "cache")
    split = split_samples(read, settings)
    data = prepare_data(split, qwen3, settings, cache_dir=tmp_path / "cache")
    assert isinstance(data, TrainingData)
    tokens = data.train.tokens
    assert len(tokens) == 40, "the long ones are left out"
    for document in range(len(tokens)):
        sample = data.train.sample(document)
        of = {stem: names[labels[document]] for stem, (names, labels) in groups_of(data)[0].items()}
        assert of["By_Source/"] == sample.source.lstrip("/")
        assert of["By_Difficulty_"] == str(difficulty(sample))
        assert data.train.place(document) == f"{sample.source}:{sample.line} ({sample.id})"
    categories, labels = groups_of(data)[0]["By_Category/"]
    assert len({categories[i] for i in labels}) > 1
    assert not set(data.train.documents) & set(data.held_out.documents)
    assert len(data.train) + len(data.held_out) == 40


def test_facts_and_groups_of_large_data_are_made_once(tmp_path, monkeypatch, qwen3):
    monkeypatch.setattr(dataset, "LARGE_DATA", 1)
    looked_at = []
    for module, name in ((analysis_statistics, "observe_span"), (sample_groups, "label_span")):
        look = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *span, n=name, f=look: looked_at.append(n) or f(*span)
        )
    path, cache = write(tmp_path / "a.jsonl", 30, "SM4"), tmp_path / "cache"

    def outcome(workers: int = 1) -> tuple[dict, dict]:
        settings = up_to(120, data_path=(path,))
        split = split_samples(read_data(settings, cache_dir=cache)[0], settings)
        data = prepare_data(split, qwen3, settings, workers=workers, cache_dir=cache)
        groups = {stem: labels.tolist() for stem, (_, labels) in groups_of(data)[0].items()}
        return describe(data).to_json(), groups

    first = outcome()
    assert sorted(looked_at) == ["label_span", "observe_span"]
    assert outcome() == first and len(looked_at) == 2
    (labels,) = cache.glob("loss_groups/*/labels.npy")
    for kept in (-9, 0):
        looked_at.clear()
        labels.write_bytes(labels.read_bytes()[:kept])
        assert outcome() == first and looked_at == ["label_span"], "what is damaged is made anew"
    looked_at.clear()

    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    harder = [row | {"difficulty": 4} for row in rows]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in harder)
    Path(path).write_text(text, encoding="utf-8")
    statistics, groups = outcome()
    assert set(groups["By_Difficulty_"]) == {3}, "the same texts, and so the same fingerprint"
    assert statistics["difficulty_4_count"] == 30 and sorted(looked_at) == [
        "label_span",
        "observe_span",
    ]


@pytest.mark.slow
def test_worker_processes_label_the_same(tmp_path, monkeypatch, qwen3):
    for name, value in (("LARGE_DATA", 1), ("SPAN", 7)):
        monkeypatch.setattr(dataset, name, value)
    monkeypatch.setattr(arrow_samples, "_ROWS", 5)
    read = dataset.read_samples([write(tmp_path / "a.jsonl", 30, "SM4")])
    sources, every = list(read.samples_per_file), np.arange(30)
    alone = sample_groups.loss_groups(read, every, sources)
    monkeypatch.setattr(sample_groups, "_POOL_FROM", 1)
    together = sample_groups.loss_groups(read, every, sources, workers=2)
    for stem, (names, labels) in alone.items():
        assert together[stem][0] == names
        np.testing.assert_array_equal(together[stem][1], labels)


def test_the_demonstration_model_learns_from_a_bounded_number_of_texts(tmp_path):
    read = dataset.read_samples([write(tmp_path / "a.jsonl", 30, "SM4")])
    split = split_samples(read, DataSettings(eval_fraction=0))
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
        settings = up_to(120, data_path=(path,), eval_fraction=0.2)
        read, _ = read_data(settings, cache_dir=cache)
        split = split_samples(read, settings, cache_dir=cache)
        data = prepare_data(split, qwen3, settings, cache_dir=cache)
        return split.held_out.tolist(), describe(data).to_json()

    first = outcome()
    assert searches == [30, 30], "questions, and questions with answers"
    assert outcome() == first and searches == [30, 30]
    (labels,) = cache.glob("near_duplicates/*/pairs/labels.npy")
    labels.write_bytes(labels.read_bytes()[:-10])
    assert outcome() == first and searches == [30, 30, 30], "what is damaged is made anew"
    write(tmp_path / "a.jsonl", 31, "SM4")
    assert outcome() != first and searches[3:] == [31, 31]


def test_leaks_into_held_out_files_are_counted(tmp_path, qwen3):
    train, fresh = (
        write(tmp_path / "a.jsonl", 20, "SM4"),
        write(tmp_path / "b.jsonl", 4, "随机数检测"),
    )
    lines = [Path(p).read_text(encoding="utf-8").splitlines(keepends=True) for p in (train, fresh)]
    (tmp_path / "c.jsonl").write_text("".join(lines[0][:3] + lines[1]), encoding="utf-8")
    for name, leaks in (("a.jsonl", 20), ("b.jsonl", 0), ("c.jsonl", 3)):
        settings = up_to(512, data_path=(train,), eval_path=(str(tmp_path / name),))
        read, eval_read = read_data(settings)
        data = prepare_data(split_samples(read, settings, eval_read), qwen3, settings)
        assert describe(data).scalars()["Dataset/Train_Eval_Leaks"] == leaks, name
        findings = describe(data).to_json()["findings"]["train_eval_leaks"]
        assert [f["line"] for f in findings] == list(range(1, leaks + 1))
        assert bool(leaks) == (
            "(nearly) repeat training samples" in describe(data).summary_markdown()
        )


def test_data_that_are_all_held_out_are_refused(tmp_path):
    read = dataset.read_samples([write(tmp_path / "a.jsonl", 5, "SM4")])
    with pytest.raises(UserError, match="all of 5 samples are held out; lower --eval-fraction"):
        split_samples(read, DataSettings(eval_fraction=0.9999))


def test_what_is_said_of_nothing_left_is_about_the_training_part(tmp_path, qwen3):
    """Also where held-out files have their own tokens, and where some of the data are left to hold out."""
    long, fine = ({"question": f"第{i}问？", "answer": "答" * (i or 2000)} for i in (0, 5))
    for name, rows in (("a.jsonl", [long] * 9 + [fine]), ("b.jsonl", [fine])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
    settings = up_to(120, data_path=(str(tmp_path / "a.jsonl"),))
    read, _ = read_data(settings)
    split = split_samples(read, settings)
    split = replace(split, train=np.arange(9), held_out=np.array([9]))
    with pytest.raises(NothingLeftError, match="9 longer than 120 tokens, 1 held out") as error:
        prepare_data(split, qwen3, settings)
    assert sum(finding.kind == "dropped" for finding in error.value.findings) == 9
    settings = replace(settings, eval_path=(str(tmp_path / "b.jsonl"),))
    with pytest.raises(NothingLeftError, match="no sample is left of 9: 9 longer than 120 tokens"):
        only = SampleSet(read.samples[:9], (), read.samples_per_file, "")
        prepare_data(split_samples(only, settings, read_data(settings)[1]), qwen3, settings)
    with pytest.raises(NothingLeftError, match=r"^--eval-path \S+b\.jsonl: no sample is left of 9"):
        own = read_data(replace(settings, data_path=settings.eval_path))[0]
        prepare_data(split_samples(own, settings, only), qwen3, settings)


def test_a_second_start_finds_the_tokens_of_general_text(tmp_path, qwen3, monkeypatch):
    """Those of the same text at the same place: what is said of a text names where it is."""

    def part(name: str) -> DataPart:
        path, cache = tmp_path / name, tmp_path / "cache"
        path.write_text(json.dumps({"question": "问？", "answer": "答"}), encoding="utf-8")
        return general_part([str(path)], qwen3, up_to(64), pytest.fail, cache_dir=cache)

    first = part("a.jsonl")
    made = []
    monkeypatch.setattr("finetuning.data.tokenization.check_tokenizer", lambda *_: made.append(1))
    assert np.array_equal(part("a.jsonl").tokens[0].ids, first.tokens[0].ids) and not made
    assert len(part("b.jsonl")) and made


def test_what_is_left_out_of_general_text_is_told(tmp_path, qwen3):
    rows = [{"question": f"第{i}问？", "甲": "答" * n} for i, n in enumerate((5, 3000, *[5] * 8))]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines) + "{\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(lines[1], encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("".join(lines) + "{\n" * 3, encoding="utf-8")
    settings, told = up_to(120, columns={"answer": "甲"}), []

    def part(name: str, *most: int) -> DataPart:
        paths = [str(tmp_path / name)]
        return general_part(paths, qwen3, settings, told.append, *most, option="--probe-path")

    assert len(part("a.jsonl")) == 9
    out = "left out of 11 texts: 1 that can't be read, 1 longer than 1024 tokens"
    assert told == [f"--probe-path {tmp_path / 'a.jsonl'}: {out}"]
    assert len(part("a.jsonl", 5)) == 1, "one at least, however long"
    with pytest.raises(
        NothingLeftError, match=r"^--probe-path \S+b\.jsonl: no sample is left of 1: 1"
    ):
        part("b.jsonl")
    with pytest.raises(UserError, match=r"^--probe-path \S+c\.jsonl: 3 of 13 samples are broken"):
        part("c.jsonl")
    bundled = general_part([bundled_data("general")], qwen3, settings, pytest.fail)
    assert len(bundled), "its columns are the program's own"
