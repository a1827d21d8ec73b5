"""Readers: every form of data in, exact counts, and everything broken named by file and line."""

import codecs
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning.common.errors import UserError
from finetuning.data.split import weighted_indices
from finetuning.readers import dataset, files, formats
from finetuning.readers.dataset import ArrowSamples, SampleSet, read_samples
from finetuning.readers.sample import BrokenSample, Sample

ROOT = Path(__file__).resolve().parents[2]


def read(tmp_path: Path, name: str, content: str | bytes, **options) -> SampleSet:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_samples([str(path)], **options)


def only(tmp_path: Path, name: str, content: str | bytes, **options) -> Sample:
    found = read(tmp_path, name, content, **options)
    assert not found.broken
    assert len(found.samples) == 1
    return found.samples[0]


def texts(sample: Sample) -> tuple[str, str, str]:
    return sample.question, sample.thinking, sample.answer


# ---- real files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "thinking"),
    [
        ("crypto_qa/enhanced_QA1.md", 9, 9),
        ("crypto_qa/enhanced_QA2.md", 10, 10),
        ("crypto_qa/enhanced_QA3.md", 11, 11),
        ("crypto_qa/enhanced_QA4.md", 18, 18),
        ("formats/alpaca_zh_1000.json", 1000, 0),
        ("formats/sharegpt_toolcall_zh_100.json", 100, 0),
        ("formats/messages_parts_100.jsonl", 100, 0),
        ("formats/messages_reasoning_parts_50.jsonl", 50, 50),
    ],
)
def test_counts_of_real_files(shared_data, name, count, thinking):
    found = read_samples([str(shared_data / name)])
    assert list(found.samples_per_file.values()) == [count]
    assert found.broken == ()
    assert sum(bool(sample.thinking) for sample in found.samples) == thinking
    assert all(sample.line > 0 for sample in found.samples)


def test_inputs_of_real_instructions(shared_data):
    path = shared_data / "formats/alpaca_zh_1000.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    found = read_samples([str(path)]).samples
    with_input = 0
    for record, sample in zip(records, found, strict=True):
        assert record["instruction"].strip() in sample.question
        assert record["input"].strip() in sample.question
        assert sample.answer == record["output"].strip()
        with_input += sample.question != record["instruction"].strip()
    assert with_input == 139


def test_turns_of_real_conversations(shared_data):
    found = read_samples([str(shared_data / "formats/sharegpt_toolcall_zh_100.json")])
    messages = [message for sample in found.samples for message in sample.messages()]
    roles = [message["role"] for message in messages]
    calls = [message for message in messages if message.get("tool_calls")]
    assert (roles.count("user"), len(calls), roles.count("tool")) == (233, 77, 77)
    assert roles.count("assistant") - len(calls) == 233

    found = read_samples([str(shared_data / "formats/messages_reasoning_parts_50.jsonl")])
    turns = [m for s in found.samples for m in s.messages() if m["role"] == "assistant"]
    assert len(turns) == 112
    assert all(turn["reasoning_content"] for turn in turns)


def test_real_markdown_equals_an_independent_reading(shared_data):
    """The answers by a plain scan of these files' lines, whose markers all stand at line starts."""
    for path in sorted((shared_data / "crypto_qa").glob("*.md")):
        answers, inside = [], False
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.startswith("A") and ":" in line and line[1 : line.index(":")].isdigit():
                answers.append([line.split(":", 1)[1]])
                inside = True
            elif line.startswith("#"):
                inside = False
            elif inside:
                answers[-1].append(line)
        expected = ["\n".join(lines).strip() for lines in answers]
        assert [sample.answer for sample in read_samples([str(path)]).samples] == expected


# ---- Markdown ---------------------------------------------------------------------------------

PLAIN = "### Q1: 问\n\n<thinking>\n想一\n\n想二\n</thinking>\n\nA1: 答\n"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.rstrip("\n"),
        PLAIN.replace("Q1: ", "Q1：").replace("A1: ", "A1："),
        PLAIN.replace("Q1: ", "Q1:"),
        PLAIN.replace("### Q1", "###Q1"),
        PLAIN.replace("### Q1", "#### Q1"),
        PLAIN.replace("### Q1", "## Q1"),
        PLAIN.replace("### Q1: 问", "### **Q1: 问**").replace("问**", "问"),
        PLAIN.replace("Q1: 问", "Q1:\n问"),
        PLAIN.replace("thinking>", "think>"),
        PLAIN.replace("thinking>", "Thinking>"),
        PLAIN.replace("A1: ", ""),
        PLAIN.replace("A1: ", "**A1:** "),
        PLAIN.replace("A1: ", "A: "),
        PLAIN.replace("A1: ", "答："),
        PLAIN.replace("A1: 答", "A1:\n\n答"),
        PLAIN.replace("<thinking>", "A1: <thinking>").replace("\nA1: 答", "\n答"),
        "# 标题\n\n说明\n\n## 一类\n\n" + PLAIN + "\n## 二类\n",
        PLAIN + "\n---\n\n# 尾\n",
    ],
)
def test_markdown_variations(tmp_path, text):
    assert texts(only(tmp_path, "a.md", text)) == ("问", "想一\n\n想二", "答")


def test_markdown_without_thinking(tmp_path):
    text = "### Q1: 一\n\nA1: 甲\n\n乙\n\n### Q2: 二\nA2: 丙\n\n### Q3: 三\n丁\n"
    found = read(tmp_path, "a.md", text)
    assert [texts(s) for s in found.samples] == [
        ("一", "", "甲\n\n乙"),
        ("二", "", "丙"),
        ("三", "", "丁"),
    ]
    assert [sample.line for sample in found.samples] == [1, 7, 10]
    assert [(r.line, r.text) for r in found.remarks] == [(10, "Q3 has no answer marker A3:")]


def test_markdown_glued_heading_with_question_on_the_next_line(tmp_path):
    text = PLAIN.rstrip() + "### Q2:\n问二\n\n<thinking>\n思\n</thinking>\n\nA2: 答二"
    found = read(tmp_path, "a.md", text)
    assert [texts(s)[2] for s in found.samples] == ["答", "答二"]
    assert found.samples[1].question == "问二"
    assert "not on a line of its own" in found.remarks[0].text


def test_markdown_answer_keeps_lines_that_only_look_like_markers(tmp_path):
    text = "### Q7: 选哪个？\nA: RSA\nB: SM2\n\nA7: 选 B\nA类: 说明\nAES: 分组密码\n"
    sample = only(tmp_path, "a.md", text)
    assert sample.question == "选哪个？\nA: RSA\nB: SM2"
    assert sample.answer == "选 B\nA类: 说明\nAES: 分组密码"


def test_markdown_headings(tmp_path):
    """A comment in a code fence ends no answer, a heading in the reasoning neither."""
    text = (
        "### Q1: 一\n<think>\n## 分析\n想\n</think>\nA1: 甲\n```sh\n# 注释\nls\n```\n### 小结\n乙\n"
        "## 第二类\n\n散落的文字\n\n### Q2: 二\nA2: 丙\n```\n# 未闭合\n"
    )
    found = read(tmp_path, "a.md", text)
    assert found.samples[0].thinking == "## 分析\n想"
    assert found.samples[0].answer == "甲\n```sh\n# 注释\nls\n```\n### 小结\n乙"
    assert found.samples[1].answer == "丙\n```"
    assert any("第二类" in remark.text for remark in found.remarks)


def test_markdown_difficulty(tmp_path):
    text = (
        "## 难度 2 对称\n\n### Q1: 一\nA1: 甲\n\n### Q2: 二\n难度：4\nA2: 乙\n\n## 难度3\n"
        "### Q3: 三\nA3: 丙\n\n## 其他\n### Q4: 四\nA4: 丁\n"
    )
    found = read(tmp_path, "a.md", text)
    assert [sample.difficulty for sample in found.samples] == [2, 4, 3, None]
    assert found.samples[1].question == "二"


def test_markdown_of_line_separators_and_other_characters_is_untouched(tmp_path):
    answer = "甲\u2028乙\u0085丙\u200b\u202e丁\x0b戊\x0c己\u3000庚"
    assert only(tmp_path, "a.md", f"### Q1: 问\nA1: {answer}\n").answer == answer


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<thinking>\n想\n\nA2: 答", "<thinking> is never closed"),
        ("想\n</thinking>\n\nA2: 答", "stray </thinking>"),
        ("<think>\n<think>\n想\n</think>\n\nA2: 答", "<think> inside a <think> block"),
        ("<think>\n想\n</think>\n</think>\nA2: 答", "stray </think> after"),
        ("<think>想</thinking>\n\nA2: 答", "<think> is closed by </thinking>"),
        ("<think>想</think><think>再想</think>\n\nA2: 答", "stray <think> after"),
        ("<think>想</think>\n\nA2:\n", "empty answer"),
        ("<think>想</think>\n", "empty answer"),
        ("A2: \n\n## 下一类\n", "empty answer"),
        ("A2: 先答<think>想</think>", "text before <think>"),
        ("A2: 答\0案", "NUL"),
    ],
)
def test_broken_markdown_is_listed(tmp_path, body, reason):
    text = f"### Q1: 一\nA1: 甲\n\n### Q2: 二\n\n{body}\n\n### Q3: 三\nA3: 丙\n"
    found = read(tmp_path, "a.md", text)
    assert [sample.answer for sample in found.samples] == ["甲", "丙"]
    (broken,) = found.broken
    assert (broken.source, broken.line) == (str(tmp_path / "a.md"), 4)
    assert reason in broken.reason


def test_empty_thinking_and_wrong_number_are_remarked(tmp_path):
    text = "### Q1: 一\n<think>\n\n</think>\nA1: 甲\n\n### Q2: 二\nA3: 乙\n"
    found = read(tmp_path, "a.md", text)
    assert len(found.samples) == 2
    assert [r.text for r in found.remarks] == [
        "Q1 has an empty thinking block",
        "Q2 is answered by A3",
    ]


def remarks(found: SampleSet) -> list[tuple[int, str]]:
    return [(remark.line, remark.text) for remark in found.remarks]


@pytest.mark.parametrize(
    ("heading", "marker"),
    [
        ("### q2: ", "a2: "),
        ("### 问题2: ", "答案2: "),
        ("### 问题2：", "答2："),
        ("### 问2 ", "**答案2：**"),
        ("### **问题 2：** ", "答："),
        ("## 问题2: ", "<thinking>\n想\n</thinking>\n答: "),
        ("# 第二章\n\n### 问题1: ", "答："),
    ],
)
def test_markdown_questions_of_other_names(tmp_path, heading, marker):
    text = f"### Q1: 甲\nA1: 答甲\n\n{heading}乙\n{marker}答乙\n\n### Q3: 丙\nA3: 答丙\n"
    found = read(tmp_path, "a.md", text)
    thinking = "想" if "想" in marker else ""
    pairs = [("甲", "", "答甲"), ("乙", thinking, "答乙"), ("丙", "", "答丙")]
    assert [texts(sample) for sample in found.samples] == pairs
    assert [sample.line for sample in found.samples[:2]] == [1, 6 if "章" in heading else 4]
    assert not found.broken and not found.remarks


def test_markdown_of_other_names_alone(tmp_path):
    text = (
        "# 一\n### 问题1：甲\n答案1：答甲\n### 问题2：乙\n答：答乙\n# 二\n### 问题1：丙\n答：答丙\n"
    )
    found = read(tmp_path, "a.md", text)
    assert [texts(s)[::2] for s in found.samples] == [
        ("甲", "答甲"),
        ("乙", "答乙"),
        ("丙", "答丙"),
    ]
    assert not found.remarks


@pytest.mark.parametrize(
    ("part", "line", "shown"),
    [
        ("### 问题1：现状\n密钥硬编码", 4, "### 问题1：现状"),  # no reply follows
        ("```\n### 问题8：现状\n答：甲\n```\nA8: 乙", 8, "A8: 乙"),
        ("### 问题1：现状\n答：密钥硬编码", 4, "### 问题1：现状 答：密钥硬编码"),  # counted anew
        ("### 8. 丙\n回答：答丙", 4, "### 8. 丙 回答：答丙"),
        ("乙\n\n### 3 \n丙", 6, "### 3"),
        ("**Q8: 丙？**\n丙", 4, "**Q8: 丙？**"),
        ("A8: 答丙", 4, "A8: 答丙"),
        ("### 1. 丙\n答：答丙", 4, "### 1. 丙 答：答丙"),
    ],
)
def test_what_an_answer_swallows_is_told(tmp_path, part, line, shown):
    found = read(tmp_path, "a.md", f"### Q7: 甲\nA7: 答甲\n\n{part}\n\n### Q9: 丁\nA9: 答丁\n")
    assert [sample.question for sample in found.samples] == ["甲", "丁"]
    assert found.samples[0].answer.endswith(part)
    assert remarks(found) == [(line, f"“{shown}” is read as part of the answer to Q7")]


@pytest.mark.parametrize(
    "part",
    [
        "### 1. 背景\n甲\n### 2. 做法\n乙\n### 8. 结语",
        "### 问题描述\n甲\n### 第一步\n乙",
        "```\n### 8. 注释\nA8: 注释\n```",
        "因此\n答案: B\na8: 首项\n### 选项\nA: RSA",
    ],
)
def test_parts_of_an_answer_are_its_own(tmp_path, part):
    found = read(tmp_path, "a.md", f"### Q7: 甲\nA7: 答甲\n\n{part}\n")
    assert found.samples[0].answer == f"答甲\n\n{part}"
    assert not found.remarks


def test_questions_of_other_names_inside_the_reasoning_or_before_the_first(tmp_path):
    thinking = "## 分析\n### 问题8：一\n答：甲\n### 问题9：二\n答：乙"
    text = f"# 题\n### 3. 丢\n答：失\n\n### Q7: 问\n<think>\n{thinking}\n</think>\nA7: 答\n"
    found = read(tmp_path, "a.md", text)
    assert [texts(sample) for sample in found.samples] == [("问", thinking, "答")]
    assert remarks(found) == [(2, "“### 3. 丢 答：失” is not read as a question")]


def test_lower_case_and_bare_markers_cut_no_question(tmp_path):
    text = "### Q7: 数列\na1: 2\na2: 3\nA: 选项\n答：和为5\n\nA9: 别的\n"
    sample = read(tmp_path, "a.md", text).samples[0]
    assert texts(sample)[::2] == ("数列\na1: 2\na2: 3\nA: 选项", "和为5\n\nA9: 别的")


@pytest.mark.parametrize("answer", ["A1: 答甲", "答甲"])
def test_tags_in_the_next_section_are_not_the_answers(tmp_path, answer):
    for section in ("说明<think>标签", "<think>\n想\n</think>\n答: 乙", "</thinking>"):
        text = f"### Q1: 甲\n{answer}\n\n# 第二章\n{section}\n\n### Q2: 乙\nA2: 答乙\n"
        found = read(tmp_path, "a.md", text)
        assert [texts(s) for s in found.samples] == [("甲", "", "答甲"), ("乙", "", "答乙")]
        assert not any("empty thinking" in text for _, text in remarks(found))
        assert remarks(found)[-1] == (1, "text under “# 第二章” belongs to no question")


# ---- records ----------------------------------------------------------------------------------

TOOL_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "问", "input": "", "output": "<think>\n想\n</think>\n\n答"},
        {"instruction": "", "input": "问", "output": "答", "thinking": "想"},
        {"question": "问", "reasoning": "想", "answer": "答"},
        {"Question": "问", "Complex_CoT": "想", "Response": "答"},
        {"question": "问", "reasoning_content": "<think>想</think>", "answer": "答"},
        {"prompt": "问", "completion": "<thinking>想</thinking>答"},
        {"prompt": [{"role": "user", "content": "问"}], "completion": "<think>想</think>答"},
        {
            "prompt": [{"role": "user", "content": "问"}],
            "completion": [{"role": "assistant", "content": "答", "reasoning_content": "想"}],
        },
        {
            "messages": [
                {"role": "user", "content": "问"},
                {"role": "assistant", "content": "答", "reasoning_content": "想"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "问"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "想"},
                        {"type": "text", "value": "答"},
                    ],
                },
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "问"},
                {"from": "gpt", "value": "<think>想</think>答"},
            ]
        },
    ],
)
def test_forms_of_records(tmp_path, record):
    sample = only(tmp_path, "a.jsonl", json.dumps(record))
    assert texts(sample) == ("问", "想", "答")
    assert sample.id == Sample("问", "想", "答").id
    assert sample.messages() == [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答", "reasoning_content": "想"},
    ]


def test_alpaca_input_system_and_history(tmp_path):
    record = {
        "instruction": "译",
        "input": "key",
        "output": "密钥",
        "system": "你是译者",
        "history": [["你好", "<think>礼貌</think>您好"]],
        "difficulty": 3,
    }
    sample = only(tmp_path, "a.json", json.dumps([record]))
    assert (sample.question, sample.system, sample.difficulty) == ("译\nkey", "你是译者", 3)
    assert sample.history == (
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "您好", "reasoning_content": "礼貌"},
    )


@pytest.mark.parametrize("form", ["sharegpt", "messages", "parts"])
def test_tool_conversations(tmp_path, form):
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    tools = json.dumps([{"name": "f"}])
    turns = {
        "sharegpt": [
            {"from": "human", "value": "一"},
            {"from": "gpt", "value": "甲"},
            {"from": "human", "value": "二"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "乙"},
        ],
        "messages": [
            {"role": "user", "content": "一"},
            {"role": "assistant", "content": "甲"},
            {"role": "user", "content": "二"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "乙"},
        ],
        "parts": [
            {"role": "user", "content": "一"},
            {"role": "assistant", "content": [{"type": "text", "value": "甲"}]},
            {"role": "user", "content": "二"},
            {"role": "assistant", "content": [{"type": "tool_call", "value": call}]},
            {"role": "tool", "content": [{"type": "text", "value": "3"}]},
            {"role": "assistant", "content": "乙"},
        ],
    }[form]
    sample = only(tmp_path, "a.jsonl", json.dumps({"messages": turns, "tools": tools}))
    assert (sample.question, sample.answer, sample.tools) == ("二", "乙", tools)
    assert [m["content"] for m in sample.history] == ["一", "甲"]
    assert sample.tool_turns == (
        {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]},
        {"role": "tool", "content": "3"},
    )


def test_conversation_that_ends_with_a_tool_call(tmp_path):
    turns = [
        {"from": "human", "value": "问"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    sample = only(tmp_path, "a.json", json.dumps([{"conversations": turns}]))
    assert (sample.answer, sample.tool_calls) == ("", (TOOL_CALL,))
    assert sample.messages()[-1]["tool_calls"] == [TOOL_CALL]


def test_columns(tmp_path):
    record = json.dumps({"q": "问", "why": "想", "a": "答", "extra": 1})
    columns = {"question": "q", "thinking": "why", "answer": "a"}
    assert texts(only(tmp_path, "a.jsonl", record, columns=columns)) == ("问", "想", "答")
    with pytest.raises(UserError, match="no column 'nope'; there is: q, why, a, extra"):
        read(tmp_path, "a.jsonl", record, columns={"question": "nope", "answer": "a"})
    with pytest.raises(UserError, match="unknown field 'quest'"):
        read(tmp_path, "a.jsonl", record, columns={"quest": "q"})


def test_columns_overlay_what_is_found_without(tmp_path):
    record = {"问题": "问", "thinking": "想", "answer": "答", "input": "多"}
    found = read(tmp_path, "a.jsonl", json.dumps(record), columns={"question": "问题"})
    assert [texts(sample) for sample in found.samples] == [("问", "想", "答")]
    assert remarks(found) == [
        (1, "not used: input; --columns says which columns are meant (first here)")
    ]
    # The named column is none under its own name, and goes before what else there is.
    record = {"instruction": "问", "input": "想", "output": "答", "messages": []}
    columns = {"question": "instruction", "thinking": "input"}
    assert texts(only(tmp_path, "a.jsonl", json.dumps(record), columns=columns)) == (
        "问",
        "想",
        "答",
    )


TURNS = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]


@pytest.mark.parametrize(
    ("record", "expected", "unused"),
    [
        ({"prompt": "译", "input": "问", "response": "答"}, ("译\n问", "", "答"), ""),
        ({"messages": TURNS, "thinking": "<think>想</think>"}, ("问", "想", "答"), ""),
        ({"prompt": TURNS[:1], "completion": "答", "cot": "想"}, ("问", "想", "答"), ""),
        ({"messages": TURNS, "reasoning": "on"}, ("问", "", "答"), "reasoning"),
        ({"messages": TURNS, "thinking": True}, ("问", "", "答"), "thinking"),
        ({"conversations": TURNS, "history": [["一", "二"]]}, ("问", "", "答"), "history"),
        ({"instruction": "扮", "question": "问", "output": "答"}, ("问", "", "答"), "instruction"),
        ({"question": "问", "input": "多", "cot": "", "answer": "答"}, ("问", "", "答"), "input"),
        (
            {"problem": "问", "solution": "解", "answer": "答", "thinking": "想", "cot": "思"},
            ("问", "想", "答"),
            "solution, cot",
        ),
        ({"prompt": "问", "answer": " 答", "messages": TURNS, "system": ""}, ("问", "", "答"), ""),
    ],
)
def test_columns_are_used_or_told(tmp_path, record, expected, unused):
    line = json.dumps(record) + "\n"
    found = read(tmp_path, "a.jsonl", f"{GOOD}\n{line}{line}")
    assert [texts(sample) for sample in found.samples[1:]] == [expected] * 2
    told = [(2, f"not used: {unused}; --columns says which columns are meant (first here)")]
    assert remarks(found) == (told if unused else [])


def test_reasoning_beside_a_conversation_that_has_its_own(tmp_path):
    earlier = [TURNS[0], {"role": "assistant", "content": "<think>早</think>答"}]
    record = {"messages": [*earlier, *TURNS], "thinking": "想"}
    found = read(tmp_path, "a.jsonl", json.dumps(record))
    assert found.samples[0].thinking == ""
    assert "not used: thinking" in found.remarks[0].text


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (
            {"messages": [{"role": "system", "content": c} for c in "一二"] + TURNS},
            "a system message among the turns",
        ),
        ({"messages": [TURNS[1], *TURNS]}, "begins with a turn of the assistant"),
        (
            {"question": "问", "answer": "答", "history": [[None, "一"]]},
            "user in the history is empty",
        ),
        (
            {"question": "问", "answer": "＜think＞想＜/think＞答"},
            "＜think＞ with full-width brackets",
        ),
        (
            {"question": "问", "thinking": "＜/thinking＞", "answer": "答"},
            "＜think＞ with full-width",
        ),
    ],
)
def test_what_is_read_as_it_stands_is_told(tmp_path, record, told):
    found = read(tmp_path, "a.jsonl", f"{GOOD}\n{json.dumps(record)}\n{json.dumps(record)}\n")
    assert len(found.samples) == 3
    ((line, text),) = remarks(found)
    assert line == 2 and told in text


def test_full_width_tags_in_markdown_are_told(tmp_path):
    found = read(tmp_path, "a.md", PLAIN.replace("<", "＜").replace(">", "＞"))
    assert "Q1: ＜think＞ with full-width brackets" in found.remarks[0].text


GOOD = '{"question": "问", "answer": "答"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "问", "answer": "答"', "broken JSON at column"),
        ('{"question": "问", "answer": "答"} {}', "text after the value"),
        ('{"question": "问", "answer": ""}', "empty answer"),
        ('{"question": "  ", "answer": "答"}', "empty question"),
        ('{"question": "问"}', "no column for the answer; there is: question"),
        ('{"q": "问", "a": "答"}', "no column for the question"),
        ('{"question": "问", "answer": 3}', "answer must be text, not a number"),
        ('{"question": ["问"], "answer": "答"}', "a turn must be an object, not text"),
        ('{"question": "问", "answer": "答", "x": NaN}', "NaN is not JSON"),
        ('{"question": "问", "answer": "答", "x": -Infinity}', "-Infinity is not JSON"),
        ('{"question": "问", "answer": "答", "x": 1e999}', "too large"),
        ('{"question": "问", "answer": "答", "answer": "错"}', "duplicate key 'answer'"),
        ('{"question": "问", "answer": "\\ud800"}', "lone surrogate"),
        ('{"question": "问", "answer": "a\\u0000b"}', "NUL"),
        ('{"question": "问", "answer": "a\0b"}', "broken JSON"),
        (
            '{"question": "问", "answer": "答", "x": ' + "9" * 5000 + "}",
            "an integer of 5000 digits",
        ),
        ("[" * 100_000 + "]" * 100_000, "JSON nested too deeply"),
        ('"text"', "a record must be an object, not text"),
        ("[1, 2]", "a record must be an object, not a list"),
        ("null", "a record must be an object, not null"),
        ('{"question": "问", "answer": "<think>想"}', "<think> is never closed"),
        ('{"question": "问", "answer": "想</think>答"}', "stray </think>"),
        ('{"question": "问", "thinking": "想", "answer": "<think>想</think>答"}', "given twice"),
        ('{"messages": []}', "a conversation must be a list of turns"),
        ('{"messages": [{"role": "user", "content": "问"}]}', "does not end with a turn"),
        ('{"messages": [{"role": "assistant", "content": "答"}]}', "no turn of the user"),
        ('{"messages": [{"role": "alien", "content": "答"}]}', "unknown role 'alien'"),
        ('{"messages": [{"content": "答"}]}', "a turn without role"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "type 'image'"),
        (
            '{"conversations": [{"from": "function_call", "value": "{"}]}',
            "is text that is not JSON",
        ),
        ('{"conversations": [{"from": "function_call", "value": "{}"}]}', "must have a name"),
        ('{"question": "问", "answer": "答", "tools": "{}"}', "tools must be a list"),
        ('{"question": "问", "answer": "答", "history": [1]}', "history must be a list of"),
        (
            '{"question": "问", "answer": "答", "tools": ' + '[{"a":' * 80 + "1" + "}]" * 80 + "}",
            "nested deeper than 64",
        ),
    ],
)
def test_broken_lines_are_listed(tmp_path, line, reason):
    found = read(tmp_path, "a.jsonl", f"{GOOD}\n{line}\n\n{GOOD}\n")
    assert [sample.line for sample in found.samples] == [1, 4]
    (broken,) = found.broken
    assert (broken.source, broken.line) == (str(tmp_path / "a.jsonl"), 2)
    assert reason in broken.reason
    assert str(broken).startswith(f"{tmp_path / 'a.jsonl'}:2: ")


def test_broken_elements_of_an_array(tmp_path):
    text = f'[\n{GOOD},\n{{"question": "问", "answer": NaN}},\n3,\n{GOOD}\n]\n'
    found = read(tmp_path, "a.json", text)
    assert [sample.line for sample in found.samples] == [2, 5]
    assert [broken.line for broken in found.broken] == [3, 4]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f"[{GOOD},\n{GOOD}", ":2:"),
        (f"[{GOOD},\n {GOOD[:-1]}]", ":2:"),
        (f"[{GOOD}\n{GOOD}]", ":2:"),
        (f"[{GOOD}]\n\nx", ":3:"),
        ("[" * 100_000, ":1:"),
        ("{", ":1:"),
    ],
)
def test_broken_json_document(tmp_path, text, place):
    with pytest.raises(UserError, match="broken JSON") as error:
        read(tmp_path, "a.json", text)
    assert f"{tmp_path / 'a.json'}{place}" in str(error.value)


@pytest.mark.parametrize("text", [f"{GOOD}\n{GOOD}\n", f'{{"data": [{GOOD},{GOOD}]}}'])
def test_json_that_is_no_array(tmp_path, text):
    assert len(read(tmp_path, "a.json", text).samples) == 2


def test_long_elements_cross_the_window(tmp_path):
    records = [{"question": f"问{i}", "answer": "长" * 400_000} for i in range(5)]
    found = read(tmp_path, "a.json", json.dumps(records, ensure_ascii=False, indent=1))
    assert [s.question for s in found.samples] == [f"问{i}" for i in range(5)]
    assert [s.line for s in found.samples] == [2, 6, 10, 14, 18]


def test_overlong_line_is_skipped(tmp_path):
    long = '{"question": "' + "x" * (files.MAX_RECORD * 2) + '", "answer": "答"}'
    found = read(tmp_path, "a.jsonl", f"{GOOD}\n{long}\n{GOOD}\n")
    assert [sample.line for sample in found.samples] == [1, 3]
    assert found.broken == (BrokenSample(str(tmp_path / "a.jsonl"), 2, "line longer than 16 MiB"),)


def test_line_separators_inside_a_line(tmp_path):
    record = {"question": "问", "answer": "a\u2028b\u2029c\u0085d\x0be"}
    line = json.dumps(record, ensure_ascii=False).replace("\\u000b", "\\u000B")
    found = read(tmp_path, "a.jsonl", f"{line}\r\n{line}")
    assert [s.answer for s in found.samples] == [record["answer"]] * 2


# ---- encodings --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.md", PLAIN),
        ("a.jsonl", '{"question": "问", "thinking": "想一\\n\\n想二", "answer": "答"}\n'),
        ("a.json", '[{"question": "问", "thinking": "想一\\n\\n想二", "answer": "答"}]'),
        ("a.csv", 'question,thinking,answer\n问,"想一\n\n想二",答\n'),
    ],
)
def test_byte_order_marks(tmp_path, name, text, encoding):
    sample = only(tmp_path, name, text.encode(encoding))
    assert texts(sample) == ("问", "想一\n\n想二", "答")


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_BE, codecs.BOM_UTF16_LE])
def test_both_orders_of_utf16(tmp_path, mark):
    encoding = "utf-16-be" if mark == codecs.BOM_UTF16_BE else "utf-16-le"
    assert only(tmp_path, "a.md", mark + PLAIN.encode(encoding)).question == "问"


@pytest.mark.parametrize("name", ["a.md", "a.json", "a.csv"])
def test_wrong_encoding_is_refused_with_its_place(tmp_path, name):
    good = "### Q1: a\nA1: b\n" if name == "a.md" else "[\n" if name == "a.json" else "a,b\n1,2\n"
    content = good.encode() + "密码".encode("gb18030")
    with pytest.raises(UserError) as error:
        read(tmp_path, name, content)
    line = good.count("\n") + 1
    assert f"{name}:{line}: byte 0xc3 at offset {len(good)} is not UTF-8" in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.md", "a.jsonl", "a.json", "a.csv"])
def test_utf16_without_a_mark_is_named(tmp_path, name, encoding):
    text = {"a.md": PLAIN, "a.csv": "问题,回答\n" + "什么是分组密码,一类密码\n" * 20}.get(
        name, GOOD
    )
    with pytest.raises(UserError) as error:
        read(tmp_path, name, text.encode(encoding))
    assert f"{name} begins with NUL bytes, as UTF-16 without" in str(error.value)
    assert "GB18030" not in str(error.value)


def test_wrong_encoding_far_into_a_file(tmp_path):
    good = "### Q1: 问\nA1: 答\n" * 100_000
    with pytest.raises(UserError, match=f"at offset {len(good.encode())} is not UTF-8"):
        read(tmp_path, "a.md", good.encode() + b"\xff")


def test_wrong_encoding_in_one_line(tmp_path):
    content = f"{GOOD}\n".encode() + '{"question": "问"}\n'.encode("gb18030") + GOOD.encode()
    found = read(tmp_path, "a.jsonl", content)
    assert [sample.line for sample in found.samples] == [1, 3]
    offset = len(GOOD.encode()) + 1 + len('{"question": "')
    assert found.broken[0].reason == f"byte 0xce at offset {offset} is not UTF-8"
    with pytest.raises(UserError, match=r"no sample can be read, 1 broken.*is not UTF-8"):
        read(tmp_path, "b.jsonl", GOOD.encode("gb18030"))


# ---- containers -------------------------------------------------------------------------------

RECORDS = [
    {"question": f"问题{i}", "thinking": f"想\n{i}", "answer": f"答{i}，“引号”, 逗号"}
    for i in range(7)
]
JSONL = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def test_every_container_gives_the_same_samples(tmp_path):
    table = pa.Table.from_pylist(RECORDS)
    (tmp_path / "a.jsonl").write_text(JSONL, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL.encode()))
    frames = zstandard.compress(JSONL[:100].encode()) + zstandard.compress(JSONL[100:].encode())
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "a.json.zst").write_bytes(zstandard.compress(json.dumps(RECORDS).encode()))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as w:
        w.write_table(table)
    rows = [[json.dumps(value, ensure_ascii=False) for value in r.values()] for r in RECORDS]
    quoted = [",".join('"' + json.loads(v).replace('"', '""') + '"' for v in row) for row in rows]
    (tmp_path / "a.csv").write_text("\n".join(["question,thinking,answer", *quoted]), "utf-8")
    (tmp_path / "a.tsv").write_text(
        "\n".join(["question\tthinking\tanswer", *(q.replace('","', '"\t"') for q in quoted)]),
        "utf-8",
    )
    markdown = "\n".join(
        f"### Q{i}: {r['question']}\n<think>\n{r['thinking']}\n</think>\nA{i}: {r['answer']}\n"
        for i, r in enumerate(RECORDS)
    )
    (tmp_path / "a.md").write_text(markdown, encoding="utf-8")
    found = {path.name: read_samples([str(path)]) for path in sorted(tmp_path.iterdir())}
    assert len(found) == 10
    assert {len(f.samples) for f in found.values()} == {7}
    assert len({f.fingerprint for f in found.values()}) == 1
    assert found["a.csv"].samples[1].line == 4  # a quoted line break counts as a line


@pytest.mark.parametrize("split", [False, True])
def test_saved_datasets(tmp_path, split):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(RECORDS)
    if split:
        data = datasets.DatasetDict({"train": data, "test": data.select([0])})
    data.save_to_disk(str(tmp_path / "saved"))
    found = read_samples([str(tmp_path / "saved")])
    assert [s.question for s in found.samples] == [r["question"] for r in RECORDS]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.md.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_damaged_containers(tmp_path, name):
    with pytest.raises(UserError, match=r"can't be read|no sample"):
        read(tmp_path, name, b"PAR1 this is no archive")


def test_cut_archive(tmp_path):
    whole = gzip.compress(JSONL.encode() * 100)
    with pytest.raises(UserError, match="can't be read to its end"):
        read(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2])


def test_csv_faults(tmp_path):
    found = read(tmp_path, "a.csv", "question,answer\n问,答\n问,答,多\n问\n")
    assert [(b.line, b.reason[:20]) for b in found.broken] == [
        (3, "more fields than the"),
        (4, "no column for the an"),
    ]
    with pytest.raises(UserError, match="two columns are called 'answer'"):
        read(tmp_path, "b.csv", "question,answer,answer\n问,答,错\n")


@pytest.mark.parametrize("mark", [",", "\t", ";"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_csv_by_the_separator_of_its_header(tmp_path, name, mark):
    text = "question,thinking,answer\n问,想,答\n".replace(",", mark)
    assert texts(only(tmp_path, name, text)) == ("问", "想", "答")


def test_csv_with_a_comma_in_its_header_is_separated_by_commas(tmp_path):
    text = "question,answer;\tnote,answer\n问;\t一,多,答\n"
    assert texts(only(tmp_path, "a.csv", text)) == ("问;\t一", "", "答")


def test_csv_as_excel_leaves_it(tmp_path):
    text = "question,answer,,\n问,答,,\n,,,\n\n ,,,\n问,答,,多\n问,答,,又\n问,答,,,\n问,答,,,余\n"
    found = read(tmp_path, "a.csv", text)
    assert [sample.line for sample in found.samples] == [2, 6, 7, 8]
    assert [(b.line, b.reason) for b in found.broken] == [(9, "more fields than the header has")]
    told = "not used: column 4, which has no name in the header (first here)"
    assert remarks(found) == [(6, told)]


def test_row_numbers_of_pandas_are_not_remarked(tmp_path):
    found = read(tmp_path, "a.csv", ",question,answer\n0,问,答\n1,问,答\n")
    assert len(found.samples) == 2 and not found.remarks


# ---- paths ------------------------------------------------------------------------------------


def test_folder_glob_and_repetition(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text(PLAIN, encoding="utf-8")
    (tmp_path / "sub" / "a.jsonl").write_text(JSONL, encoding="utf-8")
    (tmp_path / "README.md").write_text("# about this folder", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not data", encoding="utf-8")
    (tmp_path / ".hidden.md").write_text("x", encoding="utf-8")
    found = read_samples([str(tmp_path), str(tmp_path / "*.md"), str(tmp_path / "b.md")])
    folder = tmp_path.as_posix()
    assert found.samples_per_file == {f"{folder}/b.md": 1, f"{folder}/sub/a.jsonl": 7}


def test_lock_files_of_office_are_no_data(tmp_path):
    (tmp_path / "a.md").write_text(PLAIN, encoding="utf-8")
    (tmp_path / "~$a.md").write_bytes(b"\x00\x01lock")
    for path in (tmp_path, tmp_path / "*.md"):
        assert [*read_samples([str(path)]).samples_per_file] == [f"{tmp_path.as_posix()}/a.md"]


def test_paths_that_give_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path, reason in [
        ("missing.md", "there is no missing.md"),
        ("data/missing", "there is no data/missing"),
        ("data", "holds no"),
        ("*.md", "no data file matches"),
        ("a\0b", "is no path"),
        ("", "is no path"),
        ("x" * 5000, "can't look at"),
    ]:
        with pytest.raises(UserError, match=reason):
            read_samples([path])
    with pytest.raises(UserError, match="no data path given"):
        read_samples([])
    for name, content, reason in [
        ("a.md", "", "is empty"),
        ("b.md", "只有文字\n", "holds no sample"),
        ("c.jsonl", "\n\n", "holds no sample"),
        ("d.json", "[]", "holds no sample"),
        ("e.csv", "question,answer\n", "holds no sample"),
        ("f.txt", "x", "readable are .md"),
        (
            "g.jsonl",
            "{}\n{}\n",
            "no sample can be read, 2 broken; the first: .*g.jsonl:1: no column",
        ),
    ]:
        with pytest.raises(UserError, match=reason):
            read(tmp_path, name, content)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX special files")
def test_hostile_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe.md")
    os.symlink("/dev/zero", tmp_path / "zero.md")
    os.symlink(tmp_path / "loop.md", tmp_path / "loop.md")
    for name in ("pipe.md", "zero.md"):
        with pytest.raises(UserError, match="no regular file"):
            read_samples([str(tmp_path / name)])
    with pytest.raises(UserError, match="can't look at"):
        read_samples([str(tmp_path / "loop.md")])
    with pytest.raises(UserError):
        read_samples([str(tmp_path)])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.md").write_text(PLAIN, encoding="utf-8")
    os.symlink(folder, folder / "self")
    assert len(read_samples([str(folder)]).samples) == 1


# ---- large data -------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """Two files that count as large data, in chunks of a few kilobytes, one record broken."""
    monkeypatch.setattr(dataset, "LARGE_DATA", 1)
    monkeypatch.setattr(formats, "CHUNK", 4000)
    monkeypatch.setattr(formats, "_BLOCK", 1000)
    folder = tmp_path / "large"
    folder.mkdir()
    tool_turn = {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]}
    records = [
        {
            "messages": [
                {"role": "system", "content": "系统"},
                {"role": "user", "content": f"问{i}"},
                tool_turn,
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": f"答{i}", "reasoning_content": "想" * (i % 50)},
            ],
            "difficulty": i % 4 + 1,
        }
        for i in range(300)
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    lines[200] = lines[200][:-1]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "b.md").write_text(PLAIN + "### Q2: 二\nA2: 乙### Q3: 三\nA3: 丙", encoding="utf-8")
    return folder


def test_large_data_equal_small(large, tmp_path, monkeypatch):
    seen = []
    found = read_samples(
        [str(large)], cache_dir=tmp_path / "cache", progress=lambda *x: seen.append(x)
    )
    monkeypatch.setattr(dataset, "LARGE_DATA", 2**30)
    small = read_samples([str(large)])
    assert isinstance(found.samples, ArrowSamples)
    assert isinstance(small.samples, list)
    assert list(found.samples) == small.samples
    assert [found.samples[i] for i in range(len(found.samples))] == small.samples
    assert found.samples[-1] == small.samples[-1]
    assert found.samples[3:9:2] == small.samples[3:9:2]
    assert found.samples[37:245] == small.samples[37:245]
    assert found.samples[5:5] == found.samples[9:3] == []
    for name in ("broken", "samples_per_file", "fingerprint", "remarks"):
        assert getattr(found, name) == getattr(small, name)
    assert found.broken[0].line == 201
    assert list(found.samples.sources()) == [sample.source for sample in small.samples]
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    with pytest.raises(IndexError):
        found.samples[len(found.samples)]


def test_large_texts_make_smaller_batches(large, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_BATCH_CHARACTERS", 500)
    found = read_samples([str(large)], cache_dir=tmp_path / "cache").samples
    monkeypatch.setattr(dataset, "LARGE_DATA", 2**30)
    assert max(batch.num_rows for batch in found._batches) < 20
    assert list(found) == read_samples([str(large)]).samples


LIGHT = """
import sys
import torch_of_the_program

if __name__ == "__main__":
    from finetuning.analysis.facts import observe_span
    from finetuning.common.workers import in_order
    from finetuning.readers.sample import Sample

    samples = [Sample(question="问", thinking="想", answer="答")]
    jobs = [(samples, 0, 1)]
    (facts,) = in_order(observe_span, jobs, 1)
    assert facts.counts["samples"] == 1
    names = ("torch", "transformers", "torch_of_the_program", "pandas", "scipy", "matplotlib")
    found = f"[n for n in {names} if n in __import__('sys').modules]"
    (there,) = in_order(eval, [(f"(__import__('finetuning.analysis.facts'), {found})[1]",)], 1)
    assert there == [], there
    main = sys.modules["__main__"]
    assert main.__file__ == sys.argv[0] and main.__spec__ is None
"""


def test_workers_import_neither_the_program_nor_torch(tmp_path):
    (tmp_path / "torch_of_the_program.py").write_text("")
    (tmp_path / "program.py").write_text(LIGHT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr


def test_large_data_need_no_pandas(large, tmp_path):
    program = (
        "import sys, pathlib; from finetuning.readers import dataset as samples; samples.LARGE_DATA = 1; "
        f"read = samples.read_samples([{str(large)!r}], cache_dir=pathlib.Path({str(tmp_path)!r})); "
        "assert len(list(read.samples)) == len(read.samples) > 300; "
        "assert type(read.samples).__name__ == 'ArrowSamples' and read.samples[5]; "
        "assert 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are counted from /proc")
def test_samples_taken_one_by_one_do_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "LARGE_DATA", 1)
    record = json.dumps({"question": "问", "thinking": "想" * 2000, "answer": "答"})
    (tmp_path / "a.jsonl").write_text((record + "\n") * 5000, encoding="utf-8")
    found = read_samples([str(tmp_path / "a.jsonl")], cache_dir=tmp_path / "cache").samples
    before = resident_file_bytes()
    for i in range(0, 5000, 2):
        assert found[i].question == "问"
    assert resident_file_bytes() - before < 5000 * 6000 / 4


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssFile:")[2].split()[0])


def test_workers_change_nothing(large, tmp_path):
    one = read_samples([str(large)], cache_dir=tmp_path / "one")
    two = read_samples([str(large)], cache_dir=tmp_path / "two", workers=2)
    assert list(one.samples) == list(two.samples)
    assert (one.broken, one.fingerprint) == (two.broken, two.fingerprint)
    parts = [sorted(p.name for p in (tmp_path / n / "samples").glob("*/*")) for n in ("one", "two")]
    assert parts[0] == parts[1]
    assert len(parts[0]) > 5


def test_remarks_of_records_are_told_once_a_file(large, tmp_path, monkeypatch):
    line = json.dumps({"prompt": "问", "query": "多", "answer": "长" * 50})
    for name in ("c.jsonl", "d.jsonl"):
        (large / name).write_text(f"{GOOD}\n" + f"{line}\n" * 500, encoding="utf-8")
    found = read_samples([str(large)], cache_dir=tmp_path / "cache", workers=2)
    assert len(list((tmp_path / "cache").glob("samples/*/*.arrow"))) > 10
    told = [r for r in found.remarks if r.text.startswith("not used: query")]
    assert [(Path(r.source).name, r.line) for r in told] == [("c.jsonl", 2), ("d.jsonl", 2)]
    monkeypatch.setattr(dataset, "LARGE_DATA", 2**30)
    assert read_samples([str(large)]).remarks == found.remarks


def test_cache(large, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = read_samples([str(large)], cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_write_part", None)  # a second reading needs no writing
        again = read_samples([str(large)], cache_dir=cache)
    assert list(again.samples) == list(first.samples)
    (part,) = cache.glob("samples/*/part-00002.arrow")
    damaged = part.read_bytes()[:100]
    part.unlink()  # and not in place, since `first` has the file mapped
    part.write_bytes(damaged)
    assert list(read_samples([str(large)], cache_dir=cache).samples) == list(first.samples)
    with open(large / "b.md", "a", encoding="utf-8") as file:
        file.write("### Q4: 四\nA4: 丁")
    assert len(read_samples([str(large)], cache_dir=cache).samples) == len(first.samples) + 1
    assert not list(cache.glob("samples/.building*"))


def test_unwritable_cache(large, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="can't write the cache"):
        read_samples([str(large)], cache_dir=tmp_path / "file")


def test_import_is_cheap():
    heavy = ("pyarrow", "datasets", "torch", "zstandard")
    code = f"import sys, samples; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---- weights ----------------------------------------------------------------------------------


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


def test_id_depends_on_content_alone():
    sample = Sample("q", "t", "a", source="x", line=3, difficulty=2)
    assert sample.id == Sample("q", "t", "a").id
    assert len(sample.id) == 16
    for other in (
        Sample("q", "t", "b"),
        Sample("q", "ta", ""),
        Sample("q", "t", "a", system="s"),
        Sample("q", "t", "a", history=({"role": "user", "content": "x"},)),
        Sample("q", "t", "a", tool_turns=({"role": "user", "content": "x"},)),
    ):
        assert other.id != sample.id


# ---- fuzz -------------------------------------------------------------------------------------

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))

CHAT = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "问"},
            {"role": "assistant", "content": [{"type": "reasoning", "value": "想"}]},
            {"role": "assistant", "content": "<think>想</think>答", "tool_calls": [TOOL_CALL]},
        ],
        "tools": [{"name": "f"}],
    }
)
SEEDS = {
    ".md": [
        PLAIN.encode(),
        ("## 难度 2\n" + PLAIN + "### Q2：二\n难度: 3\n```\n# x\n```\n").encode(),
    ],
    ".json": [json.dumps(RECORDS).encode(), f"[{CHAT}, {GOOD}]".encode()],
    ".jsonl": [JSONL.encode(), f"{CHAT}\n{GOOD}\n".encode(), f"{CHAT}\n".encode("utf-16")],
    ".csv": ['question,answer\n问,"答\n案"\n'.encode(), b"messages,tools\n[],[]\n"],
    ".jsonl.gz": [gzip.compress(JSONL.encode())],
    ".jsonl.zst": [zstandard.compress(JSONL.encode())],
}
SPLICES = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"NaN", b"1e999",
    b"<think>", b"</think>", b"<thinking>", b"</thinking>", b"### Q1:", b"A1:", b"## ", b"```",
    "### 问题2: ".encode(), "答1：".encode(), b"### 3.", b'"input":', b'"history":', b"\t", b";",
    b"\r", b"\xe2\x80\xa8", b"{", b"}", b"[", b"]", b'"', b",", b"null", b"9" * 5000, b"[" * 3000,
    b'{"role":', b'"from"', b'"content":', b'"value":', b"\n", b"true", b"\\", b"-",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    suffix = draw(st.sampled_from(sorted(SEEDS)))
    data = bytearray(draw(st.sampled_from(SEEDS[suffix])))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 20))
        kind = draw(st.sampled_from(["splice", "random", "cut", "copy"]))
        if kind == "copy":
            source = draw(st.integers(0, len(data)))
            data[at : at + length] = data[source : source + 200]
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "splice":
            data[at : at + length] = draw(st.sampled_from(SPLICES))
        else:
            data[at : at + length] = draw(st.binary(max_size=20))
    return suffix, bytes(data)


@given(mutated())
@settings(
    max_examples=FUZZ_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_mutated_inputs_give_a_result_or_a_clear_error(tmp_path, mutation):
    """FUZZ_EXAMPLES=2000 runs it longer."""
    suffix, data = mutation
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(data)
    try:
        found = read_samples([str(path)])
    except UserError as error:
        assert "\n" not in str(error)
        assert path.name in str(error)
        return
    assert len(found.samples) == sum(found.samples_per_file.values()) > 0
    for sample in found.samples:
        assert len(sample.id) == 16
        assert sample.question
        assert sample.answer or sample.tool_calls
        json.dumps(sample.messages(), ensure_ascii=False).encode()
    for item in found.broken:
        assert item.line > 0
        assert item.reason
