"""The samples with the highest loss: a ranking that keeps only its top, and its table.

In training the loss falls while an epoch goes by, so a sample is ranked by how far its loss lies above
the level of the steps around it; else the first steps would fill the table.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from finetuning.common.language import translated
from finetuning.common.text import fenced, table_cell
from finetuning.data.training_data import DataPart

SHOWN = 10
EXCERPT = 400  # characters
LEVEL_DECAY = 0.9  # per step: the level is that of about ten steps
SEGMENTS = ("thinking", "close", "answer", "end")

# [loss above the level, step, document, loss, then by segment]; None where there is no such token.
# Plain lists, because they travel between ranks and in checkpoints.
Row = list


def loss_rows(
    documents: Sequence[int], per_document: np.ndarray, *, step: int = 0, level: float = 0.0
) -> list[Row]:
    """One row for each document that has supervised tokens.

    per_document: (D, segments, 3) loss sum, correct count and token count.
    """
    by_segment = np.asarray(per_document, dtype=np.float64)[:, 1:, ::2]  # (D, 4, [sum, count])
    table = np.concatenate([by_segment.sum(axis=1, keepdims=True), by_segment], axis=1)
    return [
        [losses[0] - level, step, int(document), *losses]
        for document, losses in zip(documents, map(_means, table.tolist()), strict=True)
        if losses[0] is not None
    ]


def _means(cells: Iterable[Sequence[float]]) -> list[float | None]:
    return [total / count if count else None for total, count in cells]


def hardest(rows: Iterable[Row], count: int = SHOWN) -> list[Row]:
    """The `count` hardest, each document once; a loss that is not a number comes before all."""
    best: dict[int, Row] = {}
    for row in sorted(rows, key=_order):
        best.setdefault(row[2], row)
    return list(best.values())[:count]


def _order(row: Row) -> tuple[float, int, int]:
    above = row[0]  # a checkpoint has None for what is no number
    return (-math.inf if above is None or math.isnan(above) else -above, row[2], row[1])


def hardest_text(part: DataPart, rows: Sequence[Row], *, training: bool = False) -> str:
    """Markdown: place and id, loss by segment, and an excerpt of each in a code fence."""
    names = ["#", "sample", *(["step", "above level"] if training else []), "loss", *SEGMENTS]
    lines = [f"| {' | '.join(map(translated, names))} |", "| --- " * len(names) + "|"]
    excerpts = []
    for rank, (above, step, document, *losses) in enumerate(rows, start=1):
        moment = [str(step), "–" if above is None else f"{above:+.3f}"] if training else []
        numbers = ["–" if x is None else f"{x:.3f}" for x in losses]
        cells = [str(rank), table_cell(part.place(document)), *moment, *numbers]
        lines.append(f"| {' | '.join(cells)} |")
        sample = part.sample(document)
        text = f"{sample.question}\n---\n{sample.thinking}\n---\n{sample.answer}"
        excerpts.append(f"**{rank}**\n\n{fenced(text[:EXCERPT])}")
    return "\n".join(lines) + "\n\n" + "\n\n".join(excerpts)
