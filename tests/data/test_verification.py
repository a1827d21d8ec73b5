"""Every character of a sample is in the text that is trained on, or the sample is listed as broken.

Records of every shape through templates of many manners and through damaged ones, with the real
tokenizer; what is checked is the text of the tokens, by other means than the program's own.

uv run pytest -m "not long" tests/data/test_verification.py
"""

import copy
import functools
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetuning.common.errors import UserError
from finetuning.data import chat_template, verification
from finetuning.data.chat_template import CLOSE, OPEN, chat_format, encode_prompt
from finetuning.data.rendering import Renderer
from finetuning.data.token_table import Segment, TokenizedSamples
from finetuning.data.tokenization import tokenize_samples
from finetuning.readers.sample import NothingLeftError, Sample
from tests.helpers.qwen3_tokenizer import qwen3_tokenizer
from tests.helpers.settings import up_to
from tests.helpers.templates import CLOSING, DAMAGED, FAMILIES, WHOLE
from tests.helpers.tokenized import LONG, SAMPLE

pytestmark = pytest.mark.usefixtures("trusted")
CONTROL_TEXTS = ["<|im_end|>", "</think>", "<think>", "<|im_start|>user\n", "<tool_call>"]


@pytest.fixture
def trusted(monkeypatch):
    """These templates come to an end: no child process tries each of them first."""
    monkeypatch.setattr(chat_template, "check_template", lambda text: None)


@functools.cache
def tokenizer_with(template: str) -> Any:
    tokenizer = copy.copy(qwen3_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


# ---- generated conversations -------------------------------------------------------------------

_letters = st.text(
    st.sampled_from("密钥分组签名SM4aB<>&\"'\\/{}[]|*#_ \n\t。，！0123é🔐𠮷“”　"),
    min_size=1,
    max_size=40,
)
_hostile = st.tuples(_letters, st.sampled_from(CONTROL_TEXTS), _letters).map("".join)
texts = st.one_of(_letters, _letters, _letters, _hostile).map(str.strip).filter(bool)
values = st.recursive(
    st.one_of(texts, st.integers(-999, 999), st.booleans(), st.none(), st.floats(-9, 9)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=4,
)
calls = st.builds(
    lambda name, arguments: {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    texts,
    st.dictionaries(texts, values, max_size=2),
)
tools = st.lists(
    st.builds(
        lambda name, said, fields: {
            "type": "function",
            "function": {"name": name, "description": said, "parameters": {"properties": fields}},
        },
        texts, texts, st.dictionaries(texts, st.just({"type": "string"}), max_size=2),
    ),
    min_size=1,
    max_size=2,
)  # fmt: skip


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any conversation that the readers make."""

    def assistant(answer: str) -> dict:
        message = {"role": "assistant", "content": answer}
        if draw(st.booleans()):
            message["reasoning_content"] = draw(texts)
        return message

    history = []
    for _ in range(draw(st.sampled_from((0, 0, 1, 2)))):
        history += [{"role": "user", "content": draw(texts)}, assistant(draw(texts))]
    tool_turns, offered, last = [], "", []
    if draw(st.sampled_from((False, False, True))):
        offered = json.dumps(draw(tools), ensure_ascii=draw(st.booleans()))
        if draw(st.booleans()):
            tool_turns = [
                assistant("") | {"tool_calls": draw(st.lists(calls, min_size=1, max_size=2))},
                {"role": "tool", "content": draw(texts)},
            ]
        last = draw(st.lists(calls, max_size=2))
    return Sample(
        draw(texts),
        draw(st.one_of(st.just(""), texts, texts)),
        draw(st.one_of(st.just(""), texts)) if last else draw(texts),
        system=draw(st.one_of(st.just(""), texts)),
        history=tuple(history),
        tools=offered,
        tool_turns=tuple(tool_turns),
        tool_calls=tuple(last),
    )


# ---- what has to be there ----------------------------------------------------------------------


def bare(text: str) -> str:
    """Without white space; the tokenizer writes characters in composed form."""
    return "".join(unicodedata.normalize("NFC", text).split())


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def stands_in(value: Any, text: str) -> bool:
    """As it is, or as JSON."""
    if not isinstance(value, str):
        return bare(json.dumps(value)) in text
    return bare(value) in text or bare(json.dumps(value, ensure_ascii=False)[1:-1]) in text


def missing(sample: Sample, prompt: str, thinking: str, rest: str) -> list:
    """All of a sample's final turn, and of what it is an answer to, that is not in its place."""
    told = [sample.system, sample.question]
    of_calls = []
    for turn in (*sample.history, *sample.tool_turns):
        told.append(turn["content"])
        of_calls += [call["function"] for call in turn.get("tool_calls", ())]
    told += leaves(of_calls)
    words = ["type", "function", "name", "description", "parameters", "properties", "string"]
    told += [leaf for leaf in leaves(json.loads(sample.tools or "[]")) if leaf not in words]
    said = [sample.answer, *leaves([call["function"] for call in sample.tool_calls])]
    return [
        *(text for text in told if text != "arguments" and not stands_in(text, prompt)),
        *(text for text in said if text not in ("name", "arguments") and not stands_in(text, rest)),
        *([] if stands_in(sample.thinking, thinking) else [sample.thinking]),
    ]


def text_of(tokens: TokenizedSamples, number: int, *segments: Segment) -> str:
    document = tokens[number]
    ids = document.ids[np.isin(document.segments, segments)]
    return bare(qwen3_tokenizer().decode(ids))


def losses(read: list[Sample], template: str) -> tuple[int, int]:
    """How many samples were kept and how many are listed; fails where a kept one is not whole."""
    placed = [
        Sample(**{name: getattr(s, name) for name in Sample.__slots__} | {"source": "a", "line": i})
        for i, s in enumerate([*read, SAMPLE], 1)
    ]
    tokenizer = tokenizer_with(template)
    try:
        settings = up_to(100_000, control_tokens="split", empty_thinking="train")
        tokens = tokenize_samples(placed, tokenizer, settings)
    except NothingLeftError as refusal:
        lost = [finding for finding in refusal.findings if finding.kind == "broken"]
        assert [finding.line for finding in lost] == [*range(1, len(placed) + 1)]
        assert all("chat template" in finding.note for finding in lost)
        return 0, len(placed)
    broken = {record.line for record in tokens.truncation.broken}
    assert all(record.reason for record in tokens.truncation.broken)
    assert {int(i) + 1 for i in tokens.sample_index} == set(range(1, len(placed) + 1)) - broken
    for number, index in enumerate(tokens.sample_index.tolist()):
        sample = placed[index]
        prompt = text_of(tokens, number, Segment.PROMPT)
        thinking = text_of(tokens, number, Segment.THINKING)
        rest = text_of(tokens, number, Segment.ANSWER)
        assert not missing(sample, prompt, thinking, rest), sample
        segments = tokens[number].segments
        assert np.count_nonzero(segments == Segment.CLOSE) == 1 or not sample.thinking
        assert np.count_nonzero(segments == Segment.END) == 1 and rest
        tools_ = json.loads(sample.tools) if sample.tools else None
        ids = encode_prompt(tokenizer, sample.messages()[:-1], tools_)
        assert tokens[number].ids[segments == Segment.PROMPT].tolist() == ids
    return len(placed) - len(broken), len(broken)


many = settings(
    max_examples=25, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_a_sample_is_trained_on_or_it_is_listed(family: str):
    counts = []

    @many
    @given(st.lists(samples(), min_size=8, max_size=24))
    def holds(read: list[Sample]) -> None:
        counts.append(losses(read, FAMILIES[family]))

    holds()
    kept, listed = np.sum(counts, axis=0)
    assert kept + listed > 300 and kept
    # The templates with a place for everything lose nothing, so nothing is refused without need.
    assert not listed or family not in ("qwen3", "whole", "closing")


# ---- damaged templates -------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "查词", "arguments": {"词": "SM9", "几次": 3}}}
OTHER_CALL = {"type": "function", "function": {"name": "算", "arguments": {"式": "7*8"}}}
TOOLS = json.dumps(
    [{"name": "查词"}, {"name": "算", "description": "算一个式子"}], ensure_ascii=False
)
LONGER = "先看**定义**，再比较 <密钥> 与 K&E 的长度。\n\n然后核对  Standard 的条文。"
RICH = [
    Sample("问题是什么？" + LONGER, "想一想。" + LONGER, "回答如下。" + LONGER, system="你是专家。"),
    Sample(
        "再问一次", "再想一想，想清楚再回答", "第二个回答，比第一个长一些",
        history=(
            {"role": "user", "content": "最早的问题"},
            {"role": "assistant", "content": "最早的回答"},
            {"role": "user", "content": "后来的问题"},
            {"role": "assistant", "content": "后来的回答"},
        ),
    ),
    Sample(
        "查一查", "结果有了，可以回答", "标识密码", tools=TOOLS, tool_calls=(CALL, OTHER_CALL),
        tool_turns=(
            {"role": "assistant", "content": "", "tool_calls": [CALL, OTHER_CALL]},
            {"role": "tool", "content": "SM9 是标识密码"},
        ),
    ),
]  # fmt: skip


# Each of its texts stands elsewhere as well: what is lost of one may be found in another's place.
CHANCE = Sample(
    "0", "0", "",
    history=({"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}),
    tools=json.dumps([{"type": "function",
                       "function": {"name": "0", "description": "0", "parameters": {"properties": {}}}}]),
    tool_calls=({"type": "function", "function": {"name": "0", "arguments": {}}},),
)  # fmt: skip
NAMED = replace(
    RICH[2],
    thinking="先 查词 再 算：词 是 SM9，几次 是 3，式 是 7*8",
    answer="SM9 的 7*8",
    tool_calls=(CALL,),
)


def test_the_whole_template_loses_nothing():
    assert losses([CHANCE, NAMED], WHOLE) == (3, 0)
    assert losses(RICH, WHOLE) == (4, 0) == losses(RICH, CLOSING)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_template_is_found(damage: str):
    """Of the samples that a template harms each one is listed; the template as a whole may be refused."""
    try:
        tokens = tokenize_samples(
            [*RICH, Sample("问", "", "答")], tokenizer_with(DAMAGED[damage]), LONG
        )
    except UserError as refusal:
        assert "chat template" in str(refusal)
    else:
        assert tokens.truncation.broken
        assert all("chat template" in record.reason for record in tokens.truncation.broken)


@pytest.mark.parametrize(
    ("damage", "harmed"),
    [
        ("drops tools", [CHANCE, NAMED]),
        ("drops the calls", [CHANCE, NAMED]),
        ("drops names of calls", [CHANCE, NAMED]),
        ("drops arguments", [NAMED]),
        ("drops reasoning after history", [CHANCE, NAMED]),
    ],
)
def test_what_stands_elsewhere_by_chance_is_missed_where_it_is_dropped(damage, harmed):
    """The reasoning tells of the tool and its arguments, as reasoning does."""
    read = [replace(sample, line=line) for line, sample in enumerate([*harmed, SAMPLE], 1)]
    tokens = tokenize_samples(read, tokenizer_with(DAMAGED[damage]), LONG)
    assert [record.line for record in tokens.truncation.broken] == [*range(1, len(read))]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGED)
def test_what_a_damaged_template_keeps_is_whole(damage: str):
    @settings(many, max_examples=4)
    @example([CHANCE, *[Sample("0", "", "0")] * 7])
    @given(st.lists(samples(), min_size=8, max_size=16))
    def holds(read: list[Sample]) -> None:
        losses(read, DAMAGED[damage])

    try:
        holds()
    except UserError as refusal:
        assert "chat template" in str(refusal)


def test_every_turn_is_whole_with_loss_on_all_turns():
    @many
    @given(samples())
    def holds(sample: Sample) -> None:
        tokenizer = tokenizer_with(FAMILIES["qwen3"])
        renderer = Renderer(tokenizer, chat_format(tokenizer), all_turns=True)
        documents, turns = renderer.documents(sample, "\ufdd0")
        messages = sample.messages()
        answered = [m for m in messages if m["role"] == "assistant"]
        assert len(documents) == turns == len(answered)
        for document, message in zip(documents, answered, strict=True):
            completion = bare("".join(document.thinking))
            assert bare(message["content"]) in completion
            assert bare(message.get("reasoning_content", "")) in completion
            assert document.has_thinking == ("reasoning_content" in message)

    holds()


# ---- single rules ------------------------------------------------------------------------------


def test_a_template_that_closes_thinking_is_asked_to_open_it(subtests):
    """In training, in the prompt at inference, and told; the reasoning is in the one block."""
    for name in ("enable_thinking", "thinking"):
        with subtests.test(name=name):
            tokenizer = tokenizer_with(CLOSING.replace("enable_thinking", name))
            tokens = tokenize_samples([SAMPLE], tokenizer, LONG)
            text = tokenizer.decode(tokens[0].ids)
            assert text.count(OPEN) == text.count(CLOSE) == 1
            assert text_of(tokens, 0, Segment.THINKING) == bare(SAMPLE.thinking)
            assert tokens.asked_with == f"{name}=True"
            prompt = encode_prompt(tokenizer, SAMPLE.messages()[:-1])
            assert tokens[0].ids[: len(prompt)].tolist() == prompt
            assert tokenizer.decode(prompt).endswith("assistant\n<think>\n")
    assert tokenize_samples([SAMPLE], tokenizer_with(WHOLE), LONG).asked_with == ""


def test_a_template_that_never_thinks_takes_samples_without_reasoning():
    template = DAMAGED["closes the think block"]
    plain = Sample("问", "", "答", source="a", line=1)
    tokens = tokenize_samples([plain, RICH[0]], tokenizer_with(template), LONG)
    assert tokens.sample_index.tolist() == [0]
    (broken,) = tokens.truncation.broken
    assert "prompt closes the think block before the model writes" in broken.reason


@pytest.mark.parametrize("empty", ["<think></think>", "</think>"])
def test_an_empty_block_of_another_form_is_one_block(empty: str):
    """Some templates write it otherwise than the prompt opens it."""
    block = "{{- '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' -}}"
    assert block in WHOLE
    other = (
        f"{{%- if m.reasoning_content -%}}{block}{{%- else -%}}{{{{- '{empty}' -}}}}{{%- endif -%}}"
    )
    tokenizer = tokenizer_with(WHOLE.replace(block, other))
    tokens = tokenize_samples([Sample("问", "", "答"), SAMPLE], tokenizer, LONG)
    texts = [tokenizer.decode(tokens[i].ids) for i in range(2)]
    assert all(text.count(OPEN) == text.count(CLOSE) == 1 for text in texts)
    assert text_of(tokens, 0, Segment.ANSWER) == "答" and text_of(tokens, 0, Segment.THINKING) == ""


def test_one_sample_that_the_template_refuses_is_one_broken_sample():
    greeting = {"role": "user", "content": "先问"}
    uneven = Sample("问", "想", "答", source="a.jsonl", line=5, history=(greeting,))
    divided = "{%- if messages[0].content == 'x' -%}{{- 1 // 0 -}}{%- endif -%}" + WHOLE
    for template, sample in ((FAMILIES["alternating"], uneven), (divided, Sample("x", "想", "答"))):
        tokens = tokenize_samples(
            [SAMPLE] * 0 + [Sample("问", "想", "答"), sample], tokenizer_with(template), LONG
        )
        assert tokens.sample_index.tolist() == [0]
        (broken,) = tokens.truncation.broken
        assert (broken.source, broken.line) == (sample.source, sample.line)
        assert broken.reason.startswith("the chat template refuses it: ")


def test_a_turn_of_a_call_ends_with_its_own_end():
    """No second one behind it."""
    template = FAMILIES["headers"].replace("<|fim_pad|>", "<|vision_end|>")  # a special token
    call = Sample("查", "", "", tool_calls=(CALL,))
    tokens = tokenize_samples([call, Sample("问", "", "答")], tokenizer_with(template), LONG)
    decoded = [qwen3_tokenizer().decode(tokens[i].ids) for i in range(2)]
    assert decoded[0].endswith("<|vision_end|>") and decoded[1].endswith("<|im_end|>")
    assert "<|im_end|>" not in decoded[0].split("[assistant]")[1]


def test_a_frame_is_made_anew_where_the_template_writes_the_time(monkeypatch):
    clock = iter(range(10_000))
    tokenizer = tokenizer_with("{{- strftime_now('') -}}" + WHOLE)
    render = tokenizer.apply_chat_template

    def by_the_clock(*arguments: Any, **options: Any) -> str:
        return f"day {next(clock) // 4}: " + render(*arguments, **options)

    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda self, *a, **k: by_the_clock(*a, **k)
    )
    plain = [Sample(f"问{i}", "想", "答") for i in range(9)]
    tokens = tokenize_samples(plain, tokenizer, LONG)
    assert len(tokens) + len(tokens.truncation.broken) == 9 and len(tokens)


def test_frames_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(verification, "MOST_FRAMES", 2)
    tokens = tokenize_samples([*RICH, SAMPLE, *RICH], tokenizer_with(WHOLE), LONG)
    assert len(tokens) == 7 and not tokens.truncation.broken
