"""Records to samples: Alpaca, ShareGPT, messages and columns; a broken record is named by file and line."""

import json

import pytest

from finetuning.common.errors import UserError
from finetuning.readers.dataset import read_samples
from finetuning.readers.sample import Sample
from tests.helpers.read_text import GOOD, TOOL_CALL, only, read, remarks, texts


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


def test_forms_of_records(tmp_path, subtests):
    for record in [
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
    ]:
        with subtests.test(record=record):
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


@pytest.mark.parametrize(
    ("stated", "read"),
    [(1, 1), (4, 4), ("2", 2), (0, None), (5, None), ("5", None), (True, None), (2.0, None)],
)
def test_a_difficulty_of_another_scale_is_not_stated(tmp_path, stated, read):
    """The charts have four levels, and no fifth."""
    record = {"question": "问", "answer": "答", "difficulty": stated}
    assert only(tmp_path, "a.jsonl", json.dumps(record)).difficulty == read


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
        (1, "not used: input (“多”); --columns FIELD NAME says what a column is for")
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


def test_columns_are_used_or_told(tmp_path, subtests):
    for record, expected, unused in [
        ({"prompt": "译", "input": "问", "response": "答"}, ("译\n问", "", "答"), ""),
        ({"messages": TURNS, "thinking": "<think>想</think>"}, ("问", "想", "答"), ""),
        ({"prompt": TURNS[:1], "completion": "答", "cot": "想"}, ("问", "想", "答"), ""),
        ({"messages": TURNS, "reasoning": "on"}, ("问", "", "答"), "reasoning (“on”)"),
        ({"messages": TURNS, "thinking": True}, ("问", "", "答"), "thinking (“true”)"),
        ({"conversations": TURNS, "history": [["一", "二"]]}, ("问", "", "答"), "history (“一”)"),
        (
            {"instruction": "扮", "question": "问", "output": "答"},
            ("问", "", "答"),
            "instruction (“扮”)",
        ),
        (
            {"question": "问", "input": "多", "cot": "", "answer": "答"},
            ("问", "", "答"),
            "input (“多”)",
        ),
        (
            {"problem": "问", "solution": "解", "answer": "答", "thinking": "想", "cot": "思"},
            ("问", "想", "答"),
            "cot (“思”), solution (“解”)",
        ),
        ({"prompt": "问", "answer": " 答", "messages": TURNS, "system": ""}, ("问", "", "答"), ""),
    ]:
        with subtests.test(record=record):
            line = json.dumps(record) + "\n"
            found = read(tmp_path, "a.jsonl", f"{GOOD}\n{line}{line}")
            assert [texts(sample) for sample in found.samples[1:]] == [expected] * 2
            advice = "--columns FIELD NAME says what a column is for"
            assert remarks(found) == ([(2, f"not used: {unused}; {advice}")] if unused else [])


def test_reasoning_beside_a_conversation_that_has_its_own(tmp_path):
    earlier = [TURNS[0], {"role": "assistant", "content": "<think>早</think>答"}]
    record = {"messages": [*earlier, *TURNS], "thinking": "想"}
    found = read(tmp_path, "a.jsonl", json.dumps(record))
    assert found.samples[0].thinking == ""
    assert "not used: thinking" in found.remarks[0].text


def test_what_is_read_as_it_stands_is_told(tmp_path, subtests):
    for record, told in [
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
    ]:
        with subtests.test(record=record):
            found = read(
                tmp_path, "a.jsonl", f"{GOOD}\n{json.dumps(record)}\n{json.dumps(record)}\n"
            )
            assert len(found.samples) == 3
            ((line, text),) = remarks(found)
            assert line == 2 and told in text


def test_broken_lines_are_listed(tmp_path, subtests):
    for line, reason in [
        ('{"question": "问", "answer": "答"', "broken JSON at column"),
        ('{"question": "问", "answer": "答"} {}', "text after the value"),
        ('{"question": "问", "answer": ""}', "empty answer"),
        ('{"question": "  ", "answer": "答"}', "empty question"),
        ('{"question": "问"}', "no column for the answer; there is: question"),
        ('{"甲": "问", "answer": "答"}', "no column for the question; there is: 甲, answer"),
        ('{"question": "问", "answer": true}', "answer must be text, not true/false"),
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
        ('{"question": "问", "answer": "想</think>答</think>"}', "stray </think>"),
        ('{"question": "问", "thinking": "思", "answer": "<think>想</think>答"}', "given twice"),
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
    ]:
        with subtests.test(line=line):
            found = read(tmp_path, "a.jsonl", f"{GOOD}\n{line}\n\n{GOOD}\n")
            assert [sample.line for sample in found.samples] == [1, 4]
            (broken,) = found.broken
            assert (broken.source, broken.line) == (str(tmp_path / "a.jsonl"), 2)
            assert reason in broken.reason
            assert str(broken).startswith(f"{tmp_path / 'a.jsonl'}:2: ")
