"""A tokenizer that computes for ever, or fills the memory, on samples as they are is refused.

uv run pytest -m "not long" tests/data/test_tokenizer_probe.py
"""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest

from finetuning.common.bounds import TOKENIZER_CPU, TOKENIZER_MEMORY, TOKENIZER_TEXT
from finetuning.common.errors import UserError
from finetuning.common.limited import Ended
from finetuning.data import tokenizer_probe
from finetuning.data.tokenizer_probe import check_tokenizer
from finetuning.readers.sample import Sample
from tests.helpers.qwen3_tokenizer import qwen3_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="no resource limits on Windows"),
]
LITTLE = 160 * 2**20  # bytes of address space: enough for Python and a tokenizer without words
SAMPLES = [Sample("问" * 20, "想一想", "答")] * 30


def saying(text: str) -> SimpleNamespace:
    return SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: text))


@pytest.fixture
def tried_once() -> None:
    """Here every trial is real."""


def hurried(monkeypatch, **limits: object) -> None:
    monkeypatch.setattr(
        tokenizer_probe, "LIMITS", dataclasses.replace(tokenizer_probe.LIMITS, **limits)
    )


def test_the_real_one_passes_and_is_tried_once_with_the_same_texts(monkeypatch):
    check_tokenizer(qwen3_tokenizer(), SAMPLES)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_probe, "run_limited", None)
        check_tokenizer(qwen3_tokenizer(), SAMPLES)
    tried = []
    monkeypatch.setattr(
        tokenizer_probe,
        "run_limited",
        lambda *_, **given: tried.append(json.loads(given["given"])["texts"]) or Ended(0, "", ""),
    )
    held_out = [Sample(f"第{i}问", "想一想", "答") for i in range(100)]
    check_tokenizer(qwen3_tokenizer(), held_out)
    ((texts,),) = [tried]
    assert len(texts) == tokenizer_probe.TRIED and "第0问" in texts[0] and "第99问" in texts[-1]


def test_of_long_samples_a_beginning_is_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(
        tokenizer_probe,
        "run_limited",
        lambda *_, **given: tried.append(json.loads(given["given"])["texts"]) or Ended(0, "", ""),
    )
    check_tokenizer(saying("long"), [Sample("问", "", "答" * 2 * TOKENIZER_TEXT.limit)])
    assert [len(text) for text in tried[0]] == [TOKENIZER_TEXT.limit]


def test_one_in_python_is_not_tried():
    check_tokenizer(SimpleNamespace(), SAMPLES)


def test_one_that_never_ends_is_refused(monkeypatch):
    """A tokenizer whose expression goes back and forth: each letter more takes twice as long."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    hurried(monkeypatch, cpu=dataclasses.replace(TOKENIZER_CPU, limit=3))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?:(?:a|aa)+)+\\1?(?<=b)c"), "isolated")
    check_tokenizer(saying(tokenizer.to_str()), [Sample("b" * 60, "", "b" * 60)])  # in time
    samples = [Sample("a" * 60, "", "a" * 60)]
    with pytest.raises(UserError, match="does not encode 1 of the samples"):
        check_tokenizer(saying(tokenizer.to_str()), samples)


def test_one_that_fills_the_memory_is_refused(monkeypatch):
    """The real one passes with the memory of the table, and a small one passes with little."""
    from tokenizers import Tokenizer, models

    samples = [Sample("记" * 20, "", "忆")]
    check_tokenizer(qwen3_tokenizer(), samples)
    tokenizer_probe._PASSED.clear()
    hurried(monkeypatch, memory=dataclasses.replace(TOKENIZER_MEMORY, limit=LITTLE))
    check_tokenizer(saying(Tokenizer(models.BPE()).to_str()), samples)
    with pytest.raises(UserError, match="does not encode 1 of the samples"):
        check_tokenizer(qwen3_tokenizer(), samples)
