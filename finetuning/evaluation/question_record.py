"""What an evaluation found on each held-out question, for the comparison of the base with the tuned model.

Plain values, bounded: so many questions, so many characters of a text.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetuning.common.bounds import QUESTIONS_KEPT
from finetuning.data.training_data import DataPart
from finetuning.evaluation.generation import Completion, EvalPrompt, answer_score
from finetuning.evaluation.hardest_samples import loss_rows

QUESTION, TEXT = 300, 2_000  # characters


def losses_of(
    part: DataPart, documents: Sequence[int], per_document: np.ndarray
) -> list[dict[str, Any]]:
    """Loss, tokens and question of held-out documents, of many `QUESTIONS_KEPT` evenly spread ones, always
    the same. per_document: (D, segments, 3)."""
    count = len(documents)
    kept = np.linspace(0, count - 1, min(count, QUESTIONS_KEPT.limit)).round().astype(int)
    documents, per_document = np.asarray(documents)[kept], per_document[kept]
    rows = loss_rows(documents, per_document)
    tokens = dict(zip(documents.tolist(), per_document[:, 1:, 2].sum(1).tolist(), strict=True))
    return [
        {
            "place": part.place(row[2]),
            "question": part.sample(row[2]).question[:QUESTION],
            "loss": row[3],
            "tokens": int(tokens[row[2]]),
        }
        for row in rows
        if math.isfinite(row[3])
    ]


def answers_of(
    probes: Sequence[EvalPrompt], completions: Sequence[Completion], most: int
) -> list[dict[str, Any]]:
    """Question, reference, answer and score of each probe; the score is null where nothing can be told, as
    the answer was cut at `most` tokens and its reference would have been, too."""
    found = []
    for probe, completion in zip(probes, completions, strict=True):
        judged = completion.ended or probe.reference_tokens <= most
        sample = probe.sample
        found.append(
            {
                "place": f"{sample.source}:{sample.line} ({sample.id})",
                "question": sample.question[:QUESTION],
                "reference": sample.answer[:TEXT],
                "thinking": completion.thinking[:TEXT],
                "answer": completion.answer[:TEXT],
                "score": answer_score(sample.answer, completion) if judged else None,
            }
        )
    return found
