"""What is kept of each question.

uv run pytest tests/evaluation/test_question_record.py
"""

from types import SimpleNamespace

import numpy as np

from finetuning.common.bounds import QUESTIONS_KEPT
from finetuning.data.training_data import DataPart
from finetuning.evaluation.question_record import losses_of
from finetuning.readers.sample import Sample


def part_of(count: int) -> DataPart:
    samples = [Sample(f"第{i}问", "", "答", source="a.jsonl", line=i + 1) for i in range(count)]
    tokens = SimpleNamespace(sample_index=np.arange(count))
    return DataPart(samples, tokens, np.arange(count))


def sums(count: int) -> np.ndarray:
    found = np.ones((count, 5, 3))
    found[:, 3, 0] = np.arange(count)  # the loss tells the documents apart
    return found


def test_of_many_questions_some_of_all_places_are_kept():
    count = 3 * QUESTIONS_KEPT.limit + 7
    kept = losses_of(part_of(count), np.arange(count), sums(count))
    places = [int(one["question"][1:-1]) for one in kept]
    assert len(set(places)) == QUESTIONS_KEPT.limit
    assert (places[0], places[-1]) == (0, count - 1) and max(np.diff(places)) <= 4
    assert [one["loss"] for one in kept] == [(3 + place) / 4 for place in places], "its own loss"
    assert {one["tokens"] for one in kept} == {4}
    assert kept == losses_of(part_of(count), np.arange(count), sums(count))


def test_of_few_questions_all_are_kept():
    for count in (1, 2, 22):
        kept = losses_of(part_of(count), np.arange(count), sums(count))
        assert [one["question"] for one in kept] == [f"第{i}问" for i in range(count)]
