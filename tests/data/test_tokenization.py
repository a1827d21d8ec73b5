"""Exact tokens with the real Qwen3 tokenizer, and with templates of other model families."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from finetuning.common.errors import UserError
from finetuning.config import DataSettings
from finetuning.data import tokenization
from finetuning.data.chat_template import chat_format, encode_prompt, parse_completion
from finetuning.data.token_table import Segment
from finetuning.data.tokenization import tokenize_samples
from finetuning.readers.dataset import read_samples
from finetuning.readers.sample import NothingLeftError, Sample
from tests.helpers.settings import up_to
from tests.helpers.tokenized import (
    CLOSE,
    END,
    HOSTILE,
    LONG,
    PLAIN_TEMPLATE,
    SAMPLE,
    START,
    THINK,
    controls,
    generated_samples,
    small_tokenizer,
)

STRIPPING_TEMPLATE = PLAIN_TEMPLATE.replace(
    "message.content", "message.content.split('</think>')[-1].lstrip()"
).replace("assistant\\n' -}}{%- endif", "assistant\\n<think>\\n' -}}{%- endif")


def text_of(tokens, i, tokenizer, *segments) -> str:
    document = tokens[i]
    return tokenizer.decode(document.ids[np.isin(document.segments, segments)])


# ---- the real tokenizer -----------------------------------------------------------------------


def test_tokenizer_is_qwen3s(qwen3):
    assert len(qwen3) == 151_669
    ids = qwen3.convert_tokens_to_ids(["<think>", "</think>", "<|im_start|>", "<|im_end|>"])
    assert ids == [THINK, CLOSE, START, END]
    assert qwen3("你好").input_ids == [108386]
    form = chat_format(qwen3)
    assert (form.reasoning, form.opens, form.close_id, form.end_id) == ("field", True, CLOSE, END)


def test_one_turn_is_exact(qwen3):
    tokens = tokenize_samples([SAMPLE], qwen3, LONG)
    document = tokens[0]
    text = (
        "<|im_start|>system\n你是专家<|im_end|>\n<|im_start|>user\n什么是 SM4？<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n先想密钥长度。\n再想分组。\n</think>\n\n"
        "SM4 是分组密码。<|im_end|>"
    )
    assert document.ids.tolist() == qwen3(text).input_ids
    prompt = encode_prompt(qwen3, SAMPLE.messages()[:-1])
    assert document.ids[: len(prompt)].tolist() == prompt
    assert (document.segments[: len(prompt)] == Segment.PROMPT).all()
    assert (document.segments[len(prompt) :] != Segment.PROMPT).all()
    assert qwen3.decode(prompt).endswith("<|im_start|>assistant\n<think>\n")
    assert text_of(tokens, 0, qwen3, Segment.THINKING) == SAMPLE.thinking + "\n"
    assert text_of(tokens, 0, qwen3, Segment.CLOSE) == "</think>"
    assert text_of(tokens, 0, qwen3, Segment.ANSWER) == "\n\n" + SAMPLE.answer
    assert text_of(tokens, 0, qwen3, Segment.END) == "<|im_end|>"
    assert tokens.num_targets.tolist() == [len(document.ids) - len(prompt)]
    assert (document.ids.dtype, document.segments.dtype) == (np.int32, np.uint8)


def test_round_trip_of_a_thousand_samples(qwen3):
    samples = generated_samples(1000)
    tokens = tokenize_samples(samples, qwen3, LONG)
    assert len(tokens) == 1000
    for i, sample in enumerate(samples):
        ids, segments = tokens[i].ids, tokens[i].segments
        prompt = encode_prompt(qwen3, sample.messages()[:-1])
        assert ids[: np.count_nonzero(segments == Segment.PROMPT)].tolist() == prompt
        assert np.count_nonzero(ids == CLOSE) == np.count_nonzero(segments == Segment.CLOSE) == 1
        assert np.flatnonzero(segments == Segment.END).tolist() == [len(ids) - 1]
        assert ids[-1] == END
        assert (np.diff(segments.astype(int)) >= 0).all()
        completion = qwen3.decode(ids[segments != Segment.PROMPT])
        # The tokenizer's NFC normalisation is the only change; the texts here are in NFC.
        assert parse_completion(completion) == (sample.thinking, sample.answer, True)


def test_round_trip_of_real_samples(qwen3, shared_data):
    samples = read_samples([str(shared_data / "crypto_qa"), str(shared_data / "formats")]).samples
    tokens = tokenize_samples(samples, qwen3, replace(LONG, empty_thinking="train"))
    assert len(tokens) + len(tokens.truncation.control_tokens) == len(samples) == 1298
    assert len(tokens.truncation.control_tokens) == 2  # two stray </think> in typed text parts
    for document in tokens:
        completion = qwen3.decode(document.ids[document.segments != Segment.PROMPT])
        sample = samples[document.index]
        thinking, answer, closed = parse_completion(completion)
        answer, *calls = answer.split("<tool_call>")
        assert (thinking, answer.rstrip(), closed) == (sample.thinking, sample.answer, True)
        assert len(calls) == len(sample.tool_calls)


def test_sample_without_thinking(qwen3):
    """The template writes an empty block, which carries no loss unless it is asked to."""
    sample = Sample("问", "", "答")
    found = {}
    for way in ("mask", "train", "drop"):
        settings = replace(LONG, empty_thinking=way)
        found[way] = tokenize_samples([sample, SAMPLE], qwen3, settings)
    for way, learnt in (("mask", ""), ("train", "\n</think>")):
        tokens = found[way]
        assert text_of(tokens, 0, qwen3, Segment.THINKING, Segment.CLOSE) == learnt
        assert text_of(tokens, 0, qwen3, Segment.ANSWER) == "\n\n答"
        assert tokens.truncation.without_thinking == (sample.id,)
        assert not tokens.truncation.empty_thinking
    masked, trained = found["mask"], found["train"]
    assert masked[0].ids.tolist() == trained[0].ids.tolist(), "the model reads the same"
    assert text_of(masked, 0, qwen3, Segment.PROMPT).endswith("<think>\n\n</think>")
    assert masked.num_targets[0] == trained.num_targets[0] - 2
    assert masked[1].segments.tolist() == trained[1].segments.tolist()
    assert found["drop"].sample_index.tolist() == [1]
    assert found["drop"].truncation.empty_thinking == (sample.id,)


# ---- several turns ----------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "查", "arguments": {"词": "SM9"}}}
CONVERSATION = Sample(
    question="再查 SM9",
    thinking="结果有了",
    answer="标识密码",
    history=(
        {"role": "user", "content": "什么是 SM2"},
        {"role": "assistant", "content": "椭圆曲线", "reasoning_content": "旧的思考"},
    ),
    tool_turns=(
        {"role": "assistant", "content": "", "reasoning_content": "要查", "tool_calls": [CALL]},
        {"role": "tool", "content": "SM9: 标识"},
    ),
    tools='[{"name": "查"}]',
)


def test_last_turn_of_a_conversation(qwen3):
    tokens = tokenize_samples([CONVERSATION], qwen3, LONG)
    prompt = text_of(tokens, 0, qwen3, Segment.PROMPT)
    assert "旧的思考" not in prompt
    assert '{"name": "查"}' in prompt
    assert '<tool_call>\n{"name": "查", "arguments": {"词": "SM9"}}\n</tool_call>' in prompt
    assert "<tool_response>\nSM9: 标识\n</tool_response>" in prompt
    assert text_of(tokens, 0, qwen3, Segment.ANSWER) == "\n\n标识密码"
    assert (tokens.truncation.assistant_turns, tokens.truncation.learnt_turns) == (3, 1)
    tools = json.loads(CONVERSATION.tools)
    ids = encode_prompt(qwen3, CONVERSATION.messages()[:-1], tools)
    assert tokens[0].ids[: len(ids)].tolist() == ids


def test_all_turns_of_a_conversation(qwen3):
    tokens = tokenize_samples([SAMPLE, CONVERSATION], qwen3, replace(LONG, loss_on="all_turns"))
    assert tokens.sample_index.tolist() == [0, 1, 1, 1]
    assert [text_of(tokens, i, qwen3, Segment.THINKING) for i in (1, 2, 3)] == [
        "旧的思考\n",
        "要查\n",
        "结果有了\n",
    ]
    assert "</tool_call>" in text_of(tokens, 2, qwen3, Segment.ANSWER)
    messages, tools = CONVERSATION.messages(), json.loads(CONVERSATION.tools)
    for i, turn in ((1, 1), (2, 3), (3, 5)):
        prompt = encode_prompt(qwen3, messages[:turn], tools)
        assert tokens[i].ids[: len(prompt)].tolist() == prompt
    assert tokens.documents_of([1, 0, 1]).tolist() == [1, 2, 3, 0, 1, 2, 3]


def test_a_turn_that_says_it_carries_no_loss_carries_none(qwen3):
    """Whoever reads the flag puts `loss` into the message."""
    silent = {"role": "assistant", "content": "椭圆曲线", "loss": False}
    sample = replace(CONVERSATION, history=(CONVERSATION.history[0], silent))
    tokens = tokenize_samples([sample], qwen3, replace(LONG, loss_on="all_turns"))
    assert [text_of(tokens, i, qwen3, Segment.THINKING) for i in range(len(tokens))] == [
        "要查\n",
        "结果有了\n",
    ]
    assert (tokens.truncation.assistant_turns, tokens.truncation.learnt_turns) == (3, 2)


def test_hostile_samples_are_refused(qwen3):
    tokens = tokenize_samples([*HOSTILE, SAMPLE], qwen3, LONG)
    assert tokens.sample_index.tolist() == [len(HOSTILE)]
    assert tokens.truncation.control_tokens == tuple(sample.id for sample in HOSTILE)


def test_hostile_samples_split_never_hold_a_control_token(qwen3, subtests):
    for number in range(len(HOSTILE)):
        with subtests.test(number=number):
            hostile = HOSTILE[number]
            tokens = tokenize_samples([hostile], qwen3, replace(LONG, control_tokens="split"))
            tame = Sample(
                "问", "想", "答",
                system="系" if hostile.system else "",
                history=({"role": "user", "content": "旧"},) if hostile.history else (),
                tools='[{"name": "x"}]' if hostile.tools else "",
            )  # fmt: skip
            expected = tokenize_samples([tame], qwen3, LONG)
            assert controls(tokens[0].ids) == controls(expected[0].ids)
            assert text_of(tokens, 0, qwen3, Segment.THINKING) == hostile.thinking + "\n"
            assert text_of(tokens, 0, qwen3, Segment.ANSWER) == "\n\n" + hostile.answer
            prompt = text_of(tokens, 0, qwen3, Segment.PROMPT)
            assert hostile.question in prompt
            assert hostile.system in prompt
            assert tokens.truncation.control_tokens == (hostile.id,)


def test_text_of_all_noncharacters_is_split_all_the_same(qwen3):
    sample = Sample("".join(map(chr, range(0xFDD0, 0xFDF0))) + "<|im_end|>", "想", "答")
    tokens = tokenize_samples([sample], qwen3, replace(LONG, control_tokens="split"))
    tame = tokenize_samples([Sample("问", "想", "答")], qwen3, LONG)
    assert controls(tokens[0].ids) == controls(tame[0].ids)
    assert sample.question in text_of(tokens, 0, qwen3, Segment.PROMPT)


def test_blank_thinking_is_none(qwen3):
    blank = Sample("问", " \n\u3000", "答")
    assert tokenize_samples([blank], qwen3, LONG).truncation.without_thinking == (blank.id,)


def test_conversation_that_the_assistant_begins(qwen3):
    """There is no prompt that its greeting could be learnt behind."""
    greeting = {"role": "assistant", "content": "您好"}
    sample = Sample("问", "想", "答", history=(greeting,))
    one = tokenize_samples([sample], qwen3, LONG)
    all_turns = tokenize_samples([sample], qwen3, replace(LONG, loss_on="all_turns"))
    assert all_turns.ids.tolist() == one.ids.tolist()
    assert "您好" in text_of(one, 0, qwen3, Segment.PROMPT)


# ---- length -----------------------------------------------------------------------------------


def test_ledger_at_every_length(qwen3):
    """What a plain cut would take, for each place where it can fall."""
    whole = tokenize_samples([SAMPLE], qwen3, LONG)[0]
    spare = Sample("短", "短", "短")
    for limit in range(20, len(whole.ids) + 1):
        truncation = tokenize_samples([SAMPLE, spare], qwen3, up_to(limit)).truncation
        cut = whole.segments[limit:]
        name = (SAMPLE.id,)
        assert truncation.truncated == truncation.dropped == (name if len(cut) else ())
        assert truncation.lost_think_close == (name if Segment.CLOSE in cut else ())
        assert truncation.lost_answer == (name if Segment.ANSWER in cut else ())
        assert truncation.lost_eos == (name if Segment.END in cut else ())


LONG_THOUGHT = Sample(
    "问", "".join(f"第{i}步：考虑密钥{i}。\n" for i in range(60)) + "完", "最后的答"
)


def test_truncate_thinking_keeps_close_and_answer(qwen3, subtests):
    for limit in [60, 100, 257, 400]:
        with subtests.test(limit=limit):
            tokens = tokenize_samples(
                [LONG_THOUGHT], qwen3, up_to(limit, over_length="truncate_thinking")
            )
            assert limit * 0.6 < len(tokens[0].ids) <= limit
            assert text_of(tokens, 0, qwen3, Segment.CLOSE, Segment.ANSWER, Segment.END) == (
                "</think>\n\n最后的答<|im_end|>"
            )
            thinking = text_of(tokens, 0, qwen3, Segment.THINKING)
            lines = thinking.rstrip("\n").split("\n")
            assert set(lines) <= set(LONG_THOUGHT.thinking.split("\n"))  # whole lines, in order
            assert (lines[0], lines[-1]) == ("第0步：考虑密钥0。", "完")
            assert tokens.truncation.shortened == tokens.truncation.truncated == (LONG_THOUGHT.id,)
            assert tokens.truncation.dropped == ()


def test_truncate_thinking_cuts_no_character(qwen3):
    sample = Sample("问", "𠮷𡃁🔐" * 200, "答")
    for limit in range(60, 90):
        tokens = tokenize_samples([sample], qwen3, up_to(limit, over_length="truncate_thinking"))
        assert len(tokens[0].ids) <= limit
        assert "\ufffd" not in text_of(tokens, 0, qwen3, Segment.THINKING)


def test_characters_of_several_tokens_do_not_take_all_thinking_along(qwen3, subtests):
    """A cut is clean between two of them, although neither token beside it is text by itself."""
    for character in ["🫠", "𓀀", "ꙮ", "𪚥", "🧿🪬", "𠮷𡈽"]:
        for limit in [60, 61, 62]:
            with subtests.test(character=character, limit=limit):
                sample = Sample("问", character * 300, "答")
                tokens = tokenize_samples(
                    [sample], qwen3, up_to(limit, over_length="truncate_thinking")
                )
                kept = text_of(tokens, 0, qwen3, Segment.THINKING)
                assert limit - 8 <= len(tokens[0].ids) <= limit
                assert "\ufffd" not in kept
                assert set(kept) <= {*character, "\n"}


def test_truncate_thinking_drops_what_cannot_fit(qwen3):
    samples = [Sample("问", "想" * 50, "答" * 300), SAMPLE]
    tokens = tokenize_samples(samples, qwen3, up_to(64, over_length="truncate_thinking"))
    assert tokens.sample_index.tolist() == [1]
    assert tokens.truncation.dropped == (samples[0].id,)


def test_a_reasoning_is_not_cut_down_to_nothing(qwen3):
    """Sixteen tokens of it have to stay: what is less teaches to close the block at once."""
    long = Sample("问" * 30, LONG_THOUGHT.thinking, "答")
    whole = tokenize_samples([long], qwen3, LONG)[0]
    others = int(np.count_nonzero(whole.segments != Segment.THINKING))
    cut = [
        tokenize_samples(
            [long, Sample("短", "短", "短")], qwen3, up_to(limit, over_length="truncate_thinking")
        )
        for limit in (others + 15, others + 16)
    ]
    assert [tokens.truncation.dropped for tokens in cut] == [(long.id,), ()]
    assert np.count_nonzero(cut[1][0].segments == Segment.THINKING) >= 8


def test_lengths_of_what_is_too_long_are_known(qwen3):
    tokens = tokenize_samples([LONG_THOUGHT, SAMPLE], qwen3, up_to(100))
    assert tokens.truncation.long_lengths == tuple(
        tokenize_samples([LONG_THOUGHT], qwen3, LONG).lengths
    )


def test_over_length_error(qwen3):
    sample = Sample("问", "想" * 500, "答", source="a.md", line=7)
    with pytest.raises(UserError, match=r"^a.md:7: \d+ tokens, but max_seq_length is 32"):
        tokenize_samples([sample], qwen3, up_to(32, over_length="error"))


def test_nothing_left(qwen3):
    found = (
        r"no sample is left of 2: 1 longer than 16 tokens, 1 with control tokens in the text\. What"
    )
    with pytest.raises(UserError, match=found):
        tokenize_samples([SAMPLE, HOSTILE[0]], qwen3, up_to(16))
    with pytest.raises(
        NothingLeftError, match=r"left of 1: 1 without thinking\. What helps: use --e"
    ) as no:
        tokenize_samples([Sample("问", "", "答")], qwen3, replace(LONG, empty_thinking="drop"))
    assert [finding.kind for finding in no.value.findings] == ["empty thinking"]


# ---- other families of models -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "way", "opens"),
    [(PLAIN_TEMPLATE, "inline", False), (STRIPPING_TEMPLATE, "composed", True)],
)
def test_templates_without_reasoning_field(template, way, opens):
    tokenizer = small_tokenizer(template)
    form = chat_format(tokenizer)
    assert (form.reasoning, form.opens, form.close_id) == (way, opens, -1)
    tokens = tokenize_samples([SAMPLE, Sample("问", "", "答")], tokenizer, LONG)
    completion = "" if opens else "<think>\n"
    assert text_of(tokens, 0, tokenizer, Segment.THINKING) == completion + SAMPLE.thinking + "\n"
    assert text_of(tokens, 0, tokenizer, Segment.CLOSE) == "</think>"
    assert text_of(tokens, 0, tokenizer, Segment.ANSWER) == "\n\n" + SAMPLE.answer
    assert tokens[0].ids[-1] == tokenizer.eos_token_id
    assert tokens[0].segments[-1] == Segment.END
    prompt = encode_prompt(tokenizer, SAMPLE.messages()[:-1])
    assert tokens[0].ids[: len(prompt)].tolist() == prompt
    assert text_of(tokens, 1, tokenizer, Segment.ANSWER).strip() == "答"
    assert text_of(tokens, 1, tokenizer, Segment.THINKING, Segment.CLOSE) == ""
    trained = tokenize_samples(
        [SAMPLE, Sample("问", "", "答")], tokenizer, replace(LONG, empty_thinking="train")
    )
    everything = text_of(trained, 1, tokenizer, Segment.THINKING, Segment.CLOSE)
    assert everything == ("\n</think>" if opens else "")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"over_length": "cut"}, "must be 'drop' or 'truncate_thinking' or 'error'"),
        ({"loss_on": "none"}, "must be 'last_turn' or 'all_turns'"),
        ({"control_tokens": "keep"}, "must be 'refuse' or 'split'"),
        ({"max_seq_length": 0}, "must be auto, or at least 16"),
    ],
)
def test_impossible_options(option, said):
    with pytest.raises(UserError, match=said):
        DataSettings(**option)


# ---- workers and the cache --------------------------------------------------------------------


def same(left, right) -> bool:
    arrays = ("ids", "segments", "offsets", "sample_index", "num_targets")
    equal = all(np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays)
    return equal and left.truncation == right.truncation


@pytest.mark.slow
def test_workers_and_chunks_change_nothing(monkeypatch):
    tokenizer = small_tokenizer(PLAIN_TEMPLATE)
    samples = [*generated_samples(50), *HOSTILE]
    options = {"over_length": "truncate_thinking", "control_tokens": "split"}
    expected = tokenize_samples(samples, tokenizer, up_to(500, **options))
    monkeypatch.setattr(tokenization, "_CHUNK", 7)
    monkeypatch.setattr(tokenization, "_POOL_FROM", 1)
    seen = []
    tokens = tokenize_samples(
        samples, tokenizer, up_to(500, **options), workers=2, progress=lambda *x: seen.append(x)
    )
    assert same(tokens, expected)
    assert seen[-1] == (len(samples), len(samples))
    assert len(seen) == 9


def test_cache(tmp_path, monkeypatch):
    tokenizer = small_tokenizer(PLAIN_TEMPLATE)
    samples = [*generated_samples(30), HOSTILE[0]]
    expected = tokenize_samples(samples, tokenizer, LONG)
    assert same(tokenize_samples(samples, tokenizer, LONG, cache_dir=tmp_path), expected)
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "_tokenize_range", None)  # a second time needs no work
        again = tokenize_samples(samples, tokenizer, LONG, cache_dir=tmp_path)
    assert isinstance(again.ids, np.memmap)
    assert same(again, expected)
    assert len([p for p in tmp_path.glob("tokens/*") if p.is_dir()]) == 1

    other = small_tokenizer(PLAIN_TEMPLATE + "\n")
    tokenize_samples(samples, other, LONG, cache_dir=tmp_path)
    tokenize_samples(samples, tokenizer, up_to(300), cache_dir=tmp_path)
    tokenize_samples(samples[:-1], tokenizer, LONG, cache_dir=tmp_path)
    assert len([p for p in tmp_path.glob("tokens/*") if p.is_dir()]) == 4

    for path in tmp_path.glob("tokens/*/ids.npy"):
        damaged = path.read_bytes()[:1000]
        path.unlink()
        path.write_bytes(damaged)
    assert same(tokenize_samples(samples, tokenizer, LONG, cache_dir=tmp_path), expected)


def test_ranks_that_start_together_tokenize_once(tmp_path, monkeypatch):
    """Each would else do it all, and take away the folder that a faster one is reading."""
    written, write = [], tokenization.write_tokens
    monkeypatch.setattr(
        tokenization, "write_tokens", lambda *a: written.append(1) or time.sleep(0.3) or write(*a)
    )
    tokenizer = small_tokenizer(PLAIN_TEMPLATE)
    some = [Sample(f"问题 {i}", "", "答案") for i in range(40)]
    with ThreadPoolExecutor(8) as ranks:
        jobs = [
            ranks.submit(
                tokenize_samples, some, tokenizer, up_to(256), workers=1, cache_dir=tmp_path
            )
            for _ in range(8)
        ]
        tables = [job.result(60) for job in jobs]
    assert written == [1]
    assert all(np.array_equal(t.ids, tables[0].ids) for t in tables)
