"""What holds for every input: a column is used or told, its place and its name change nothing, and the same
content in any two forms of file gives the same samples. FUZZ_EXAMPLES=2000 runs it longer."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning.common.errors import UserError
from finetuning.readers.dataset import SampleSet, read_samples
from finetuning.readers.names import meaning
from tests.helpers.reading_cases import write_file

MANY = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HANZI = "密钥算法分组杂凑签名证书验证输出比特长度标准随机数加密解密协议身份鉴别"
SENTENCE = st.text(HANZI, min_size=6, max_size=30).map(lambda text: text + "。")
# Whatever a spreadsheet, a CSV and JSON can all hold.
ANY_TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"], include_characters="\n\t"),
    min_size=1,
    max_size=40,
).filter(lambda text: text.strip() and not text.lstrip().startswith("=") and "_x" not in text)
RECORD = st.fixed_dictionaries({"question": ANY_TEXT, "thinking": ANY_TEXT, "answer": ANY_TEXT})
LINES = st.lists(SENTENCE, min_size=1, max_size=3).map("\n".join)
PLAIN = st.fixed_dictionaries({"question": SENTENCE, "thinking": LINES, "answer": LINES})
NAMES = st.one_of(
    st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12),
    st.text("甲乙丙丁戊己庚辛壬癸子丑寅卯", min_size=1, max_size=5),
).filter(lambda name: name.strip("_") and len(name.strip("_")) > 1)


def written(folder: Path, form: str, records: list[dict]) -> Path:
    """The records as a file of a form."""
    path, names = folder / f"a.{form}", list(records[0])
    records = [{name: record[name] for name in names} for record in records]
    if form == "jsonl":
        write_file(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    elif form == "json":
        write_file(path, json.dumps({"data": records}, ensure_ascii=False, indent=1))
    elif form == "csv":
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(names)
        writer.writerows(record.values() for record in records)
        write_file(path, out.getvalue())
    elif form == "xlsx":
        rows = [list(record.values()) for record in records]
        write_file(path, {"sheets": {"问答": [names, *rows]}})
    elif form == "parquet":
        write_file(path, {"rows": records})
    else:
        _write_text(path, form, records)
    return path


def _write_text(path: Path, form: str, records: list[dict]) -> None:
    if form == "docx":
        labels = {"question": "问", "thinking": "思考", "answer": "答"}
        lines = [f"{label}：{r[name]}" for r in records for name, label in labels.items()]
        write_file(path, {"paragraphs": [line for text in lines for line in text.split("\n")]})
    elif form == "txt":
        blocks = [
            f"{i}、问：{r['question']}\n思考：{r['thinking']}\n答：{r['answer']}\n"
            for i, r in enumerate(records, 1)
        ]
        write_file(path, {"text": "\r\n".join(blocks), "encoding": "gb18030"})
    else:
        blocks = [
            f"**问题{i}：{r['question']}**\n\n**思考过程**：{r['thinking']}\n\n**答案**：{r['answer']}\n\n---\n"
            for i, r in enumerate(records, 1)
        ]
        write_file(path, "# 密评\n\n" + "\n".join(blocks))


def outcome(path: Path, **options) -> SampleSet | str:
    """What is read, or the error without the names of the files."""
    try:
        return read_samples([str(path)], **options)
    except UserError as error:
        return str(error)


def ids(found: SampleSet | str) -> list[str]:
    assert not isinstance(found, str), found
    return [sample.id for sample in found.samples]


@given(
    st.lists(RECORD, min_size=1, max_size=4),
    NAMES,
    SENTENCE,
    st.sampled_from(["jsonl", "csv", "xlsx"]),
)
@MANY
def test_a_planted_text_is_used_or_told(tmp_path, records, name, text, form):
    planted = [{**record, name: text} for record in records]
    found = outcome(written(tmp_path, form, planted))
    if isinstance(found, str):
        assert name in found or "no sample can be read" in found
        return
    used = [text in "\n".join((s.question, s.thinking, s.answer, s.system)) for s in found.samples]
    told = any(f"{name} (“" in remark.text for remark in found.remarks)
    assert all(used) or told or len(found.broken) == len(records)


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


@given(
    st.lists(PLAIN, min_size=1, max_size=3), st.lists(NAMES, min_size=3, max_size=3, unique=True)
)
@MANY
def test_any_names_will_do_with_columns(tmp_path, records, names):
    columns = dict(zip(("question", "thinking", "answer"), names, strict=True))
    renamed = [{columns[field]: text for field, text in record.items()} for record in records]
    plain = outcome(written(tmp_path, "jsonl", records))
    found = outcome(written(tmp_path, "csv", renamed), columns=columns)
    assert ids(found) == ids(plain)
    assert not found.remarks and not found.broken


@given(st.lists(RECORD, min_size=1, max_size=5))
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


@given(st.lists(PLAIN, min_size=1, max_size=5))
@MANY
def test_questions_are_the_same_in_texts_and_tables(tmp_path, records):
    forms = ("jsonl", "xlsx", "txt", "md", "docx")
    found = [outcome(written(tmp_path, form, records)) for form in forms]
    assert len({tuple(ids(other)) for other in found}) == 1
    assert not any(other.broken for other in found)


@pytest.mark.parametrize("name", ["问题", "Q.", "模型 答案", "思考（过程）"])
def test_names_of_cases_are_understood(name):
    assert meaning(name) is not None
