"""Read samples from a text that a test writes into a file."""

import json
from pathlib import Path

from finetuning.readers.dataset import SampleSet, read_samples
from finetuning.readers.sample import Sample


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


PLAIN = "### Q1: 问\n\n<thinking>\n想一\n\n想二\n</thinking>\n\nA1: 答\n"


def remarks(found: SampleSet) -> list[tuple[int, str]]:
    return [(remark.line, remark.text) for remark in found.remarks]


TOOL_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
GOOD = '{"question": "问", "answer": "答"}'

RECORDS = [
    {"question": f"问题{i}", "thinking": f"想\n{i}", "answer": f"答{i}，“引号”, 逗号"}
    for i in range(7)
]
JSONL = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
