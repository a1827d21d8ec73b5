"""A template that behaves for the probe and not for a sample ends the run with the sample's place.

uv run pytest tests/data/test_template_limits.py
"""

import copy
import dataclasses
import resource
import signal
import time

import pytest

from finetuning.common.bounds import TEMPLATE_CPU, TEMPLATE_MEMORY
from finetuning.common.errors import UserError
from finetuning.config import DataSettings
from finetuning.data import template_limits
from finetuning.data.chat_template import chat_format
from finetuning.data.template_limits import within_limits
from finetuning.data.tokenization import tokenize_samples
from finetuning.readers.sample import Sample
from tests.helpers.qwen3_tokenizer import qwen3_tokenizer

KNOWS_THE_DATA = "{% if '这一题' in messages[0].content %}HARM{% endif %}"
ENDLESS = (
    "{% for i in range(90000) %}{% for j in range(90000) %}{{ i * j }}{% endfor %}{% endfor %}"
)
SAMPLES = [Sample("问", "想", "答"), Sample("这一题是什么？", "想", "答", source="b.jsonl", line=7)]


@pytest.fixture
def harmed():
    """The real tokenizer with a template that does harm to one question only."""

    def make(harm: str):
        tokenizer = copy.copy(qwen3_tokenizer())
        tokenizer.chat_template = KNOWS_THE_DATA.replace("HARM", harm) + tokenizer.chat_template
        assert chat_format(tokenizer).reasoning == "field", "the probe sees nothing"
        return tokenizer

    return make


def refused(tokenizer) -> str:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError) as error:
        tokenize_samples(SAMPLES, tokenizer, DataSettings(max_seq_length=512))
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    return str(error.value)


def test_a_sample_that_never_ends(harmed, monkeypatch):
    monkeypatch.setattr(template_limits, "TEMPLATE_CPU", dataclasses.replace(TEMPLATE_CPU, limit=1))
    began = time.process_time()
    said = refused(harmed(ENDLESS))
    assert time.process_time() - began < 8
    assert said.startswith(
        "b.jsonl:7: the model's chat template takes more than 1 seconds or 1,024 MiB"
    )


@pytest.mark.parametrize(
    "harm", ["{{ 'x' * 3000000000 }}", "{% set x = messages|length * 9 ** 7 %}{{ x ** x ** 9 }}"]
)
def test_a_sample_that_fills_the_memory(harmed, harm, monkeypatch):
    monkeypatch.setattr(template_limits, "TEMPLATE_CPU", dataclasses.replace(TEMPLATE_CPU, limit=2))
    began = time.process_time()
    assert "b.jsonl:7: the model's chat template takes more than" in refused(harmed(harm))
    assert time.process_time() - began < 8


def test_the_limits_are_for_the_template_alone():
    before = resource.getrlimit(resource.RLIMIT_AS)
    assert within_limits(lambda: resource.getrlimit(resource.RLIMIT_AS)) != before
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
    with pytest.raises(KeyError):
        within_limits(lambda: {}["absent"])
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    held = bytearray(TEMPLATE_MEMORY.limit // 4)
    assert within_limits(lambda: len(bytearray(TEMPLATE_MEMORY.limit // 2))) and held


def test_their_price_is_small():
    """A few microseconds beside the hundred that a conversation takes."""
    count, began = 2000, time.process_time()
    for _ in range(count):
        within_limits(lambda: None)
    assert (time.process_time() - began) / count < 50e-6
