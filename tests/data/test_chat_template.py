"""The chat template: which are refused, how a prompt is encoded and a reply is taken apart."""

import numpy as np
import pytest

from finetuning.common.errors import UserError
from finetuning.data.chat_template import chat_format, encode_prompt, parse_completion
from finetuning.data.tokenization import tokenize_samples
from finetuning.readers.sample import Sample
from tests.helpers.tokenized import (
    END,
    LONG,
    PLAIN_TEMPLATE,
    SAMPLE,
    START,
    THINK,
    controls,
    small_tokenizer,
)


def test_prompt_never_holds_a_control_token_of_its_user(qwen3):
    ids = np.array(encode_prompt(qwen3, [{"role": "user", "content": "<|im_end|>问</think>"}]))
    assert controls(ids) == [START, END, START, THINK]
    assert "<|im_end|>问</think>" in qwen3.decode(ids)


def test_a_turn_ends_as_its_template_says():
    """Not with the `eos_token`, which in a base model is another one."""
    tokenizer = small_tokenizer(PLAIN_TEMPLATE)
    tokenizer.eos_token = "<|im_start|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat_format(tokenizer).end_id == end
    tokens = tokenize_samples([SAMPLE], tokenizer, LONG)
    assert tokens[0].ids[-1] == tokens.end_id == end
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("<|im_end|>", "")
    assert chat_format(tokenizer).end_id == tokenizer.eos_token_id, "a template without an end"


def test_markup_of_a_user_is_no_control_token(qwen3):
    """Qwen3's <tool_call> is an added token, and not a special one."""
    for text in ("<tool_call>", "</think>", "<|fim_prefix|>"):
        assert chat_format(qwen3).control.search(f"问{text}答")
        assert (
            qwen3.convert_tokens_to_ids(text)
            not in encode_prompt(qwen3, [{"role": "user", "content": f"问{text}答"}])[:-3]
        )


def test_unusable_templates():
    with pytest.raises(UserError, match="no chat template"):
        tokenize_samples([SAMPLE], small_tokenizer(""), LONG)
    refusing = (
        "{%- if messages[0].role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}"
        + PLAIN_TEMPLATE
    )
    sample = Sample("问", "想", "答", system="系", source="a.md", line=3)
    with pytest.raises(UserError, match=r"a.md:3: the chat template refuses it: no system role"):
        tokenize_samples([sample], small_tokenizer(refusing), LONG)


def test_parse_completion(subtests):
    for text, expected in [
        ("想\n</think>\n\n答<|im_end|>", ("想", "答", True)),
        ("<think>\n想\n</think>\n\n答<|im_end|>\n<|endoftext|>", ("想", "答", True)),
        ("<thinking>想</thinking>答", ("想", "答", True)),
        ("想到一半", ("想到一半", "", False)),
        ("想<|im_end|>", ("想", "", False)),
        ("\n</think>\n\n答</think>", ("", "答</think>", True)),
        ("", ("", "", False)),
    ]:
        with subtests.test(text=text):
            assert parse_completion(text) == expected
