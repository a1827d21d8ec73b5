"""A text within a record, however deep it lies, is used or told; options are all put below the question."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetuning.readers.sample import strings_of
from tests.helpers.generated_records import outcome, written

THOUGHT = "SM3的输出固定为256比特，与输入长短无关。"
Q, A = "SM3输出多少比特？", "256比特。"
USER, ASSISTANT = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
OPTIONS = [{"label": "A", "text": "128比特"}, {"label": "B", "text": "256比特"}]
RECORDS = {
    "answer object": {"question": Q, "answer": {"text": A}},
    "question object": {"question": {"text": Q}, "answer": A},
    "system object": {"question": Q, "answer": A, "system": {"text": "你是密码专家。"}},
    "steps": {"question": Q, "answer": A, "reasoning": [{"thought": THOUGHT}, {"text": "所以是256。"}]},
    "numbered steps": {"question": Q, "answer": A, "reasoning": {"step1": {"content": THOUGHT}}},
    "list of options": {"question": Q, "options": OPTIONS, "answer": "B"},
    "ARC": {"question": Q, "choices": {"label": ["A", "B"], "text": ["128", "256"]}, "answer": "B"},
    "history": {"question": Q, "answer": A, "history": [["SM4的分组多长？", "128比特。"]]},
    "turns of a history": {"question": Q, "answer": A, "history": [USER, ASSISTANT]},
    "messages": {"messages": [USER, ASSISTANT | {"reasoning": THOUGHT}]},
    "content object": {"messages": [USER, {"role": "assistant", "content": {"text": A}}]},
    "parts": {"messages": [USER, ASSISTANT | {"content": [{"type": "text", "text": A}]}]},
    "text of a part": {"messages": [USER, ASSISTANT | {"content": [{"type": "text", "text": {"value": A}}]}]},
    "summaries": {
        "messages": [
            USER,
            ASSISTANT
            | {
                "content": [
                    {"type": "reasoning", "text": [{"text": THOUGHT}]},
                    {"type": "text", "text": A},
                ]
            },
        ]
    },
    "pairs": {"conversation": [{"human": Q, "assistant": {"text": A}}]},
    "inner record": {"id": "7", "data": {"question": Q, "answer": A}},
    "Label Studio": {
        "data": {"question": Q},
        "annotations": [{"result": [{"from_name": "answer", "value": {"text": [A]}}]}],
    },
    "prompt and completion": {"prompt": [USER], "completion": [ASSISTANT]},
    "message as an answer": {"prompt": Q, "response": ASSISTANT},
}  # fmt: skip


def objects(value: Any) -> Iterator[dict]:
    """Every object in a value, itself included."""
    if isinstance(value, dict):
        yield value
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from objects(item)


@pytest.mark.parametrize("form", RECORDS)
def test_a_text_at_any_depth_is_used_or_told(tmp_path, form):
    record = RECORDS[form]
    assert len(outcome(written(tmp_path, "jsonl", [record])).samples) == 1
    for i in range(len(list(objects(record)))):
        planted = copy.deepcopy(record)
        where = list(objects(planted))[i]
        where["校注"] = text = f"第{i}处：一段没有人读过的长文字"
        found = outcome(written(tmp_path, "jsonl", [planted]))
        if isinstance(found, str):
            continue  # refused by name
        used = any(text in held for s in found.samples for held in strings_of(s.content))
        told = [remark.text for remark in found.remarks if f"“{text[:8]}" in remark.text]
        assert used or told or found.broken, (where, [r.text for r in found.remarks])


@pytest.mark.parametrize(
    "options",
    [
        [f"选项内容{i}" for i in range(14)],
        {"text": [f"选项内容{i}" for i in range(14)], "label": ["A", "B"]},
        {f"{i}": f"选项内容{i}" for i in range(14)},
        [{"content": f"选项内容{i}"} for i in range(14)],
        [{"选项": f"选项内容{i}", "key": i} for i in range(14)],
    ],
)
def test_all_options_are_put_below_the_question(tmp_path, options):
    found = outcome(
        written(tmp_path, "jsonl", [{"question": Q, "options": options, "answer": "B"}])
    )
    (sample,) = found.samples
    assert [f"选项内容{i}" in sample.question for i in range(14)] == [True] * 14


@pytest.mark.parametrize(
    "options",
    [
        {"A": "SM3", "B": "MD5", "C": None},
        {"A": {"text": "SM3"}, "B": {"text": "MD5"}, "C": {"text": None}},
        {"text": ["SM3", "MD5", None], "label": ["A", "B", "C"]},
        ["SM3", "MD5", None, ""],
        [
            {"label": "A", "text": "SM3"},
            {"label": "B", "text": "MD5"},
            {"label": "C", "text": None},
        ],
        [{"key": None, "value": "SM3"}, {"key": "B", "value": "MD5"}, {}],
        [{"text": f"SM{i}"} for i in range(30)],
    ],
)
def test_an_option_that_is_absent_takes_no_other_with_it(tmp_path, options):
    record = {"question": Q, "options": options, "answer": "A"}
    (sample,) = outcome(written(tmp_path, "json", [record])).samples
    lines = sample.question.split("\n")[1:]
    assert lines[:2] == (["A. SM3", "B. MD5"] if len(lines) == 2 else ["A. SM0", "B. SM1"])
    assert len(lines) == 2 or lines[-1] == "30. SM29"


@pytest.mark.parametrize(
    "options",
    [
        [{"text": "甲比特"}, {"文": "某种别的形状"}],
        ["甲", None, {"x": "某种别的形状"}],
    ],
)
def test_options_that_are_not_understood_are_told(tmp_path, options):
    found = outcome(
        written(tmp_path, "jsonl", [{"question": Q, "choices": options, "answer": "甲"}])
    )
    assert found.samples[0].question == Q
    assert "choices" in found.remarks[0].text


def test_a_numbered_question_in_bold_has_no_marks(tmp_path):
    (tmp_path / "a.md").write_text(
        f"1. **{Q}**\n\n   {A}\n\n2. **SM4的分组多长？**\n\n   128比特。\n", encoding="utf-8"
    )
    found = outcome(tmp_path / "a.md")
    assert [sample.question for sample in found.samples] == [Q, "SM4的分组多长？"]


def test_every_row_of_a_table_is_read_or_broken(tmp_path):
    rows = [[Q, A], [Q, A, THOUGHT], [Q], Q, {"question": Q, "answer": A}]
    table = {"columns": ["question", "answer"], "data": rows}
    (tmp_path / "a.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    found = outcome(tmp_path / "a.json")
    assert len(found.samples) == 1
    assert [broken.reason for broken in found.broken] == [
        "a row of 3 values below 2 columns",
        "a row of 1 values below 2 columns",
        "a row of text below 2 columns",
        "a row of an object below 2 columns",
    ]


def test_a_record_without_columns_is_called_empty(tmp_path):
    assert "a.jsonl:1: an empty record" in outcome(written(tmp_path, "jsonl", [{}]))
