"""The first section of a report: base against tuned, in numbers, by question, and in texts."""

import html
import math
from collections.abc import Sequence

from finetuning.common.formatting import shown
from finetuning.common.html import cell, table
from finetuning.common.language import translated
from finetuning.common.text import redact
from finetuning.runs.before_after import changes, start_name
from finetuning.runs.question_pairs import Pairs, QuestionPairs
from finetuning.runs.recorded import RecordedRun

SHOWN = 5  # questions of each kind
TEXT = 1_500  # characters of a cell


def before_and_after(run: RecordedRun) -> str:
    """HTML; empty before there are two evaluations."""
    rows = [
        (translated(change.name), *change.texts, translated(change.verdict))
        for change in changes(run.series)
    ]
    if not rows:
        return ""
    found = QuestionPairs.read(run.directory.logs)
    if found is not None:
        rows += _counts(found)
    note = _said(
        "±: twice the standard error over the samples. In brackets: intervals of 95%. Better and worse are "
        "said where chance hardly explains the difference."
    )
    start = start_name(run.configuration)
    texts = "" if found is None else _questions(found, start)
    return _table(("", start, "tuned", ""), rows) + f"<p>{note}</p>{texts}"


def _counts(found: QuestionPairs) -> list[tuple[str, ...]]:
    """How many questions got better and worse: by loss, of the held-out ones, and by answer."""
    rows = []
    mean, error = found.loss_change()
    if not math.isnan(mean):
        won, lost = found.by_loss()
        change = f"{mean:+.4g} ± {shown(2 * error)}"
        sure = abs(mean) > 2 * error
        name, kept = "held-out questions by loss", len(found.losses)
        name = f"{kept} of {found.held_out} {name}" if kept < found.held_out else name
        rows.append((*_won(len(won), len(lost), name), change, _way(-mean, sure)))
    if found.answers:
        won, lost = found.by_answer()
        same = len(found.answers) - len(won) - len(lost)
        text = translated(f"{same} alike")
        rows.append((*_won(len(won), len(lost), "questions by answer"), text, ""))
    return rows


def _won(won: int, lost: int, name: str) -> tuple[str, str]:
    return translated(name), translated(f"{won} better, {lost} worse")


def _way(gain: float, sure: bool) -> str:
    return translated(("worse", "better")[gain > 0]) if sure else ""


def _questions(found: QuestionPairs, start: str) -> str:
    """The most changed questions, with the answers of both, or with their losses. start: the first model."""
    parts = []
    for pairs, title in zip(found.by_answer(), ("Answered better", "Answered worse"), strict=True):
        rows = [
            (
                b["question"],
                b["answer"] or b["thinking"],
                a["answer"] or a["thinking"],
                b["reference"],
            )
            for b, a in pairs[:SHOWN]
        ]
        parts.append(
            _details(title, pairs, _table(("question", start, "tuned", "reference"), rows))
        )
    for pairs, title in zip(found.by_loss(), ("Loss fell most", "Loss rose most"), strict=True):
        rows = [
            (b["place"], b["question"], shown(b["loss"]), shown(a["loss"]))
            for b, a in pairs[:SHOWN]
        ]
        parts.append(_details(title, pairs, _table(("sample", "question", start, "tuned"), rows)))
    return "".join(parts)


def _details(title: str, pairs: Pairs, content: str) -> str:
    if not pairs:
        return ""
    number = f"{translated(title)} ({min(len(pairs), SHOWN)}/{len(pairs)})"
    return f"<details><summary>{html.escape(number)}</summary>{content}</details>"


def _said(text: str) -> str:
    return html.escape(translated(text))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(header, ([cell(redact(str(value)), TEXT) for value in row] for row in rows))
