"""What holds for every input: a column is used or told, its place and its name change nothing, and the same
content in any two forms of file gives the same samples. FUZZ_EXAMPLES=2000 runs it longer."""

import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning.readers.files import DataFile
from finetuning.readers.findings import Findings
from finetuning.readers.names import meaning
from finetuning.readers.records import record_sample
from finetuning.readers.sample import LeftOutError
from tests.helpers.generated_records import NAMES, PLAIN, RECORD, SENTENCE, ids, outcome, written

MANY = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(
    st.lists(RECORD, min_size=1, max_size=40),
    st.lists(NAMES, min_size=1, max_size=6, unique=True),
    SENTENCE,
    st.sampled_from(["jsonl", "json", "csv", "xlsx", "parquet"]),
)
@MANY
def test_a_planted_text_is_used_or_told(tmp_path, records, names, text, form):
    """Whatever the columns are called; a text for each of them, so that none is told for another."""
    planted = {name: f"{text}{i}{name}" for i, name in enumerate(names)}
    found = outcome(written(tmp_path, form, [{**record, **planted} for record in records]))
    if isinstance(found, str):
        assert any(name in found for name in names) or "no sample can be read" in found
        return
    told = " ".join(remark.text for remark in found.remarks)
    untold = []
    for name, value in planted.items():
        used = [
            value in "\n".join((s.question, s.thinking, s.answer, s.system)) for s in found.samples
        ]
        if not all(used) and f"{name} (“" not in told and f"its {name} is" not in told:
            untold.append(name)
    more = sum(int(count) for count in re.findall(r"”\) and (\d+) more; ", told))
    assert len(untold) <= more or len(found.broken) == len(records), (untold, told)


@given(
    st.lists(RECORD, min_size=1, max_size=3), NAMES, SENTENCE, st.sampled_from(["chat", "parts"])
)
@MANY
def test_a_planted_key_of_a_turn_is_used_or_told(tmp_path, records, name, text, form):
    lines = []
    for record in records:
        content = (
            record["answer"] if form == "chat" else [{"type": "text", "text": record["answer"]}]
        )
        turn = {"role": "assistant", "content": content, name: text}
        lines.append({"messages": [{"role": "user", "content": record["question"]}, turn]})
    found = outcome(written(tmp_path, "jsonl", lines))
    if isinstance(found, str):
        assert "no sample can be read" in found
        return
    used = [text in s.thinking for s in found.samples]
    told = any(f"turn: {name} (“" in remark.text for remark in found.remarks)
    assert all(used) or told or len(found.broken) == len(records)


WORDS = """question 问题 prompt instruction input answer 参考答案 model_answer output thinking 解析 思维链 cot
explanation system 人设 context 选项A 选项B 备注"""
COLUMNS = st.sampled_from(WORDS.split())


ASKED = """审核 复核 数据 系统 证书 已 需 有 待 可 未 不 效 求 用 误 问题 答案 正确 有效 满足 要求 重复 返工
通过 公开"""
PARTS = st.lists(st.sampled_from(ASKED.split()), max_size=3).map("".join)


@given(PARTS, st.sampled_from(["是否", "是不是", "有没有", "能否"]), PARTS)
@settings(MANY, max_examples=5 * MANY.max_examples)
def test_a_yes_or_a_no_is_heeded_or_told_and_is_no_text(subject, asks, what):
    """Whatever a name asks: of yes and no one at least speaks against the record, or nobody knows."""
    name = f"{subject}{asks}{what}"
    silent = []
    for value in ("是", "否"):
        findings = Findings()
        try:
            reading = record_sample({"问题": "SM3？", "回复": "256比特。", name: value})
        except LeftOutError as error:
            assert str(error) == f"its {name} is {value}"
            continue
        findings.record(1, reading)
        assert (reading.sample.question, reading.sample.answer) == ("SM3？", "256比特。")
        told = findings.remarks(DataFile("", "", "json", 0, ""))
        silent += [value] if not any(name in remark.text for remark in told) else []
    assert len(silent) < 2, name


@given(st.dictionaries(COLUMNS, SENTENCE, min_size=2), st.randoms())
@MANY
def test_the_order_of_columns_changes_nothing(tmp_path, record, random):
    names = list(record)
    random.shuffle(names)
    one = outcome(written(tmp_path, "jsonl", [record]))
    other = outcome(written(tmp_path, "jsonl", [{name: record[name] for name in names}]))
    if isinstance(one, str):
        assert isinstance(other, str)
        return
    assert ids(one) == ids(other)
    assert {r.text for r in one.remarks} == {r.text for r in other.remarks}


FIELDS = ("question", "thinking", "answer", "system", "context", "input")


@given(
    st.lists(st.tuples(*[SENTENCE] * len(FIELDS)), min_size=1, max_size=40),
    st.lists(NAMES, min_size=len(FIELDS), max_size=len(FIELDS), unique=True),
    st.permutations(range(len(FIELDS))),
    st.sampled_from(["jsonl", "csv", "xlsx", "parquet"]),
)
@MANY
def test_any_names_in_any_order_will_do_with_columns(tmp_path, rows, names, order, form):
    usual = [dict(zip(FIELDS, row, strict=True)) for row in rows]
    plain = outcome(written(tmp_path, "jsonl", usual), columns={name: name for name in FIELDS})
    renamed = [{names[i]: row[i] for i in order} for row in rows]
    found = outcome(written(tmp_path, form, renamed), columns=dict(zip(FIELDS, names, strict=True)))
    assert ids(found) == ids(plain) and len(ids(found)) == len(rows)
    assert not found.broken and not any("not used" in remark.text for remark in found.remarks)


@given(st.lists(RECORD, min_size=1, max_size=30))
@MANY
def test_any_content_is_the_same_in_every_table(tmp_path, records):
    found = [
        outcome(written(tmp_path, f, records)) for f in ("jsonl", "json", "csv", "xlsx", "parquet")
    ]
    if isinstance(found[0], str):
        assert all(isinstance(other, str) for other in found)
        return
    assert len({tuple(ids(other)) for other in found}) == 1
    assert len({tuple(b.reason for b in other.broken) for other in found}) == 1


@given(st.lists(PLAIN, min_size=1, max_size=20))
@MANY
def test_questions_are_the_same_in_texts_and_tables(tmp_path, records):
    forms = ("jsonl", "xlsx", "txt", "md", "docx")
    found = [outcome(written(tmp_path, form, records)) for form in forms]
    assert len({tuple(ids(other)) for other in found}) == 1
    assert not any(other.broken for other in found)


@pytest.mark.parametrize("name", ["问题", "Q.", "模型 答案", "思考（过程）"])
def test_names_of_cases_are_understood(name):
    assert meaning(name) is not None
