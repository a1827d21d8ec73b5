"""The loss mask shown token by token; `token_table.carries_loss` decides it."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from finetuning.common.language import translated
from finetuning.common.text import clean, fenced
from finetuning.data.token_table import Segment, TokenizedSample, TokenizedSamples, carries_loss

_LEGEND = (
    "`+` = carries loss, `-` = carries none; the number is the position of a line's first token; "
    "`│` separates tokens; `\\n` is a line break."
)
_AUDIT_RUN = 400  # tokens of one segment that are shown whole; of longer ones both ends


def mask_audit(tokens: TokenizedSamples, tokenizer: Any, count: int = 3) -> str:
    """Markdown: every token of `count` documents with its segment and whether it carries loss.

    The documents are spread evenly over the table. `│` separates tokens, a `+` marks lines with loss.
    """
    chosen = np.unique(np.linspace(0, len(tokens) - 1, min(count, len(tokens))).astype(int))
    parts = [translated(_LEGEND)]
    for number in chosen.tolist():
        document = tokens[number]
        targets = int(tokens.num_targets[number])
        told = (
            f"**Document {number}** (sample {document.index}): {len(document.ids)} tokens, "
            f"{targets} carry loss"
        )
        parts.append(translated(told))
        parts.append(fenced("\n".join(_audit_lines(document, tokenizer))))
    return "\n\n".join(parts)


def _audit_lines(document: TokenizedSample, tokenizer: Any, per_line: int = 16) -> Iterator[str]:
    edges = np.flatnonzero(np.diff(document.segments)) + 1
    bounds = [0, *edges.tolist(), len(document.ids)]
    for start, stop in itertools.pairwise(bounds):
        segment = Segment(int(document.segments[start]))
        sign = "+" if carries_loss(segment) else "-"
        spans = [(start, stop)]
        if stop - start > _AUDIT_RUN:
            spans = [(start, start + _AUDIT_RUN // 2), (stop - _AUDIT_RUN // 2, stop)]
        for number, (first, last) in enumerate(spans):
            if number:
                left_out = f"… {first - spans[0][1]} tokens of {segment.name} not shown"
                yield f"      {translated(left_out)}"
            for at in range(first, last, per_line):
                ids = document.ids[at : min(at + per_line, last)].tolist()
                shown = "│".join(_shown(token, tokenizer) for token in ids)
                yield f"{at:6d} {sign} {segment.name:<8} {shown}"


def _shown(token: int, tokenizer: Any) -> str:
    """A token as text on one line; half a character is shown by its id."""
    text = tokenizer.decode([token])
    if "\ufffd" in text or not text:
        return f"⟨{token}⟩"
    text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return clean(text) or f"⟨{token}⟩"
