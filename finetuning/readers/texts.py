"""Texts (Markdown, plain, Word) to samples and records: by headed questions, by labels, and from tables."""

import re
from collections.abc import Iterator
from typing import Any

from finetuning.readers.labelled import labelled_records
from finetuning.readers.markdown import headed_questions, markdown_samples
from finetuning.readers.names import NEUTRAL, meaning
from finetuning.readers.office import word_text
from finetuning.readers.opening import Chunk, read_text
from finetuning.readers.sample import THINK_TAG, BrokenSample, Remark, Sample
from finetuning.readers.tables import Row, is_header, table_records

_MARK = re.compile(r"<(/?)([A-Za-z][A-Za-z_]{0,30})>")
_TABLE_RULE = re.compile(r"[ \t]*+\|?(?:[ \t]*+:?-++:?[ \t]*+\|)++[ \t]*+:?-*+:?[ \t]*+")
_ANCHOR = re.compile(
    r"^[ \t]*+<a (?:name|id)=[^>\n]*+></a>[ \t]*+$", re.MULTILINE
)  # of pages that Yuque exports
_BAR = re.compile(r"(?<!\\)\|")


def text_items(chunk: Chunk) -> Iterator[tuple[int, Any] | Sample | BrokenSample | Remark]:
    """All that a text holds, in its order; what stands in tables comes last."""
    file = chunk.file
    text, tables = word_text(file) if file.kind == "word" else (read_text(file), [])
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text, marks = _usual_marks(text)
    if marks:
        yield Remark(file.source, 1, f"{marks} is read as <think>")
    text, more = _without_tables(_ANCHOR.sub("", text))
    if anchors := headed_questions(text):
        yield from markdown_samples(text, anchors, file.source)
    else:
        yield from labelled_records(text, file.source)
    for table in (*tables, *more):
        yield from table_records(table, file)


def _usual_marks(text: str) -> tuple[str, str]:
    """The text with <think> for other marks of a reasoning whose every opening has its closing."""
    if THINK_TAG.search(text):
        return text, ""
    found: dict[str, list[str]] = {}
    for match in _MARK.finditer(text):
        meant = meaning(match[2])
        if meant and meant.role == "thinking" and meant.rank < NEUTRAL:
            found.setdefault(match[2], []).append(match[1])
    whole = [name for name, ends in found.items() if ends == ["", "/"] * (len(ends) // 2)]
    for name in whole:
        text = text.replace(f"<{name}>", "<think>").replace(f"</{name}>", "</think>")
    return text, ", ".join(f"<{name}>" for name in whole)


def _without_tables(text: str) -> tuple[str, list[list[Row]]]:
    """The text without its tables of questions and answers, whose lines stay empty; and those tables."""
    if "|" not in text:
        return text, []
    lines, tables, at = text.split("\n"), [], 0
    while at + 1 < len(lines):
        if (
            "|" in lines[at]
            and _TABLE_RULE.fullmatch(lines[at + 1])
            and is_header(_cells(lines[at]))
        ):
            end = at + 2
            while end < len(lines) and "|" in lines[end]:
                end += 1
            rows = [(i + 1, _cells(lines[i])) for i in (at, *range(at + 2, end))]
            tables.append(rows)
            lines[at:end] = [""] * (end - at)
            at = end
        at += 1
    return "\n".join(lines), tables


def _cells(line: str) -> list[str]:
    cells = _BAR.split(line.strip())
    cells = cells[1:] if cells and not cells[0].strip() else cells
    cells = cells[:-1] if cells and not cells[-1].strip() else cells
    return [re.sub(r"<br ?/?>", "\n", cell.replace("\\|", "|")).strip() for cell in cells]
