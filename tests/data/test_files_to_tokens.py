"""From files to tokens: the same content in any two forms of file gives the same token ids, and every
character of what was read is in them, or the sample is listed. With the real tokenizer, through templates
of every family.

FUZZ_EXAMPLES=2000 runs it longer.
"""

import os
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning.common.errors import UserError
from finetuning.data import chat_template, tokenization
from finetuning.data.token_table import TokenizedSamples
from finetuning.data.tokenization import tokenize_samples
from finetuning.readers.dataset import SampleSet
from tests.data.test_verification import tokenizer_with
from tests.helpers.generated_records import PLAIN, RECORD, outcome, written
from tests.helpers.settings import up_to
from tests.helpers.templates import FAMILIES

TABLES = ("jsonl", "json", "csv", "xlsx", "parquet", "messages", "sharegpt")
TEXTS = ("txt", "md", "docx")
FEW = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "8")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MANY = settings(FEW, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")))


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    """These templates and this tokenizer come to an end: no child process tries them for each file."""
    monkeypatch.setattr(chat_template, "check_template", lambda text: None)
    monkeypatch.setattr(tokenization, "check_tokenizer", lambda *given: None)


def tokens_of(found: SampleSet, family: str) -> TokenizedSamples | str:
    try:
        return tokenize_samples(found, tokenizer_with(FAMILIES[family]), up_to(100_000))
    except UserError as error:
        return str(error)


def check_pair(folder, records, forms, family):
    """Both forms give the same token ids and the same broken samples, and nothing of a record is lost."""
    read = [outcome(written(folder, form, records)) for form in forms]
    if isinstance(read[0], str) or isinstance(read[1], str):
        assert isinstance(read[0], str) == isinstance(read[1], str), read
        return
    assert [len(found.broken) for found in read] == [len(read[0].broken)] * 2
    one, other = (tokens_of(found, family) for found in read)
    if isinstance(one, str):
        assert isinstance(other, str)
        return
    assert np.array_equal(one.ids, other.ids) and np.array_equal(one.segments, other.segments)
    report = one.truncation
    lost = len(report.broken) + len(report.control_tokens) + len(read[0].broken)
    assert len(one) + lost == len(records)
    tokenizer = tokenizer_with(FAMILIES[family])
    for i, document in enumerate(one):
        text = tokenizer.decode(document.ids)
        sample = read[0].samples[int(one.sample_index[i])]
        for part in (sample.question, sample.thinking, sample.answer):
            assert unicodedata.normalize("NFC", part) in text


def pairs(content: st.SearchStrategy, forms: tuple[str, ...], least: int) -> tuple:
    """Records, two forms of file, and the template: what a test is given."""
    records = st.lists(content, min_size=least, max_size=60)
    two = st.lists(st.sampled_from(forms), min_size=2, max_size=2, unique=True)
    return records, two, st.sampled_from(sorted(FAMILIES))


@given(*pairs(RECORD, TABLES, 1))
@FEW
def test_any_content_gives_the_same_tokens_from_any_two_tables(tmp_path, records, forms, family):
    check_pair(tmp_path, records, forms, family)


@given(*pairs(PLAIN, TEXTS + TABLES, 1))
@FEW
def test_questions_give_the_same_tokens_from_any_two_forms(tmp_path, records, forms, family):
    check_pair(tmp_path, records, forms, family)


@pytest.mark.slow
@given(*pairs(RECORD, TABLES, 40))
@MANY
def test_thousands_of_records_give_the_same_tokens(tmp_path, records, forms, family):
    check_pair(tmp_path, records, forms, family)


@pytest.mark.slow
@given(*pairs(PLAIN, TEXTS + TABLES, 30))
@MANY
def test_thousands_of_questions_give_the_same_tokens(tmp_path, records, forms, family):
    check_pair(tmp_path, records, forms, family)
