"""The table of token ids and segments: selection, counts, and a mapped file that stays out of memory."""

import sys
from pathlib import Path

import pytest

from finetuning.data.tokenization import tokenize_samples
from finetuning.readers.sample import Sample
from tests.helpers.settings import up_to
from tests.helpers.tokenized import HOSTILE, LONG, SAMPLE, generated_samples


def test_table(qwen3):
    samples = [*generated_samples(20), HOSTILE[0], SAMPLE]
    tokens = tokenize_samples(samples, qwen3, LONG)
    assert tokens.sample_index.tolist() == [*range(20), 21]
    assert tokens.lengths.tolist() == [len(document.ids) for document in tokens]
    assert tokens.segment_counts.sum(1).tolist() == tokens.lengths.tolist()
    assert (tokens.segment_counts[:, 1:].sum(1) == tokens.num_targets).all()
    assert tokens.documents_of([21, 20, 3]).tolist() == [20, 3]
    assert tokens.documents_of([]).tolist() == []
    assert tokens[-1].ids.tolist() == tokens[20].ids.tolist()
    with pytest.raises(IndexError):
        tokens[21]


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssFile:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are counted from /proc")
def test_documents_of_a_mapped_table_do_not_stay_in_memory(tmp_path, qwen3):
    """A whole epoch may look at each document, and the table may be larger than memory."""
    samples = [
        Sample(question=f"问{i}", thinking="想和做" * 1000, answer="答") for i in range(1500)
    ]
    tokens = tokenize_samples(samples, qwen3, up_to(8192), cache_dir=tmp_path)
    size = tokens.ids.nbytes + tokens.segments.nbytes
    before, seen = resident_file_bytes(), 0
    for document in tokens:
        seen += len(document.ids) + int(document.ids[-1] == document.segments[-1])
    assert seen >= len(tokens.ids)
    assert size > 2**22
    assert resident_file_bytes() - before < size / 4
