"""A tokenizer that computes for ever, or fills the memory, on samples as they are is refused.

uv run pytest -m "not long" tests/data/test_tokenizer_probe.py
"""

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from finetuning.common.bounds import TOKENIZER_CPU, TOKENIZER_MEMORY
from finetuning.common.errors import UserError
from finetuning.data import tokenizer_probe
from finetuning.data.tokenizer_probe import check_tokenizer
from finetuning.readers.sample import Sample
from tests.helpers.qwen3_tokenizer import qwen3_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="no resource limits on Windows"),
]
SAMPLES = [Sample("问" * 20, "想一想", "答")] * 30


def saying(text: str) -> SimpleNamespace:
    return SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: text))


def hurried(monkeypatch, **limits: object) -> None:
    monkeypatch.setattr(
        tokenizer_probe, "LIMITS", dataclasses.replace(tokenizer_probe.LIMITS, **limits)
    )


def test_the_real_one_passes_and_is_tried_once(monkeypatch):
    check_tokenizer(qwen3_tokenizer(), SAMPLES)
    monkeypatch.setattr(tokenizer_probe, "run_limited", None)
    check_tokenizer(qwen3_tokenizer(), SAMPLES)


def test_one_in_python_is_not_tried():
    check_tokenizer(SimpleNamespace(), SAMPLES)


def test_one_that_never_ends_is_refused(monkeypatch):
    """A tokenizer whose expression goes back and forth: each letter more takes twice as long."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    hurried(monkeypatch, cpu=dataclasses.replace(TOKENIZER_CPU, limit=1))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?:(?:a|aa)+)+\\1?(?<=b)c"), "isolated")
    samples = [Sample("a" * 60, "", "a" * 60)]
    with pytest.raises(UserError, match="does not encode 1 of the samples"):
        check_tokenizer(saying(tokenizer.to_str()), samples)


def test_one_that_fills_the_memory_is_refused(monkeypatch):
    hurried(monkeypatch, memory=dataclasses.replace(TOKENIZER_MEMORY, limit=100 * 2**20))
    with pytest.raises(UserError, match="does not encode"):
        check_tokenizer(saying("x" * 150 * 2**20), SAMPLES)
