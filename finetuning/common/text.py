"""Text that is safe to show: without control characters, secrets and stray markup."""

import os
import re
from itertools import groupby
from typing import Any
from urllib.parse import quote, unquote

# C0 and C1 controls except tab and newline, and the line separators that split a log line in two.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# Characters that reorder or hide text: bidi embeddings, overrides, isolates and marks, zero-width, BOM.
INVISIBLE = re.compile("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")

_SECRET_KEY = re.compile(
    r"(?i)(?:token|secret|passw(?:or)?d|api[_-]?key|credential|access[_-]?key)$"
)
_SECRET_SHAPE = re.compile(
    r"(?<![A-Za-z0-9_])(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|ms-[0-9a-f-]{30,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abpr]-[A-Za-z0-9-]{10,}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,})"
)
_URL_USERINFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")
# Addresses by which a robot of a chat is written to: who knows one may write. By the form of the key that
# the service makes, as libraries show the path alone, and an ordinary path may hold the same words.
_KEY = r"(?=[A-Za-z-]*+\d)[0-9A-Za-z-]{8,}+(?!\.\w)"
_ROBOT = re.compile(
    rf"(/bot/v2/hook/(?={_KEY})|/services/(?=T[A-Z0-9]*+/B[A-Z0-9]*+/{_KEY})|/webhook/send\?(?=key=))"
    r"[^\s\"'<>]+"
)
_KEY_VALUE = (
    re.compile(  # begins where a word does, else a long word would be tried from each letter
        r"(?i)(?<![\w-])"
        r"([\w-]*(?:token|secret|passw(?:or)?d|api[_-]?key|credential|access[_-]?key)\s*[=:]\s*)"
        r"([^\s,;&\"']{6,})"
    )
)
REDACTED = "[redacted]"
SHORTEST_SECRET = 6  # characters; a shorter word is too common to be searched for
PIECE = 8  # of a word, as it may be that of a longer one
PIECE_OF_SECRET = 4  # of what is a secret and nothing else
SHOWN = 300  # characters of what others say


def clean(text: str, limit: int | None = None) -> str:
    """Drop ANSI sequences, controls and bidi marks; keep tab and newline; cut to `limit` characters."""
    text = INVISIBLE.sub("", CONTROLS.sub("", _ANSI.sub("", text)))
    if limit is not None and len(text) > limit:
        return text[:limit] + "…"
    return text


def clean_line(text: str, limit: int | None = None) -> str:
    """`clean` on one line: runs of white space become one space."""
    return clean(" ".join(text.split()), limit)


def redact(text: str) -> str:
    """Text cleaned and without secrets: by shape, under a telling name, in a URL, or of the environment.

    Cleaned first: a character that nobody sees would otherwise split a secret and hide it from the search.
    """
    text = _URL_USERINFO.sub(REDACTED, clean(text))
    text = _SECRET_SHAPE.sub(REDACTED, text)
    text = _ROBOT.sub(lambda match: match[1] + REDACTED, text)
    text = _KEY_VALUE.sub(lambda match: match[1] + REDACTED, text)
    for name, value in os.environ.items():
        if _SECRET_KEY.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, REDACTED)
    return text


def without(text: str, *secrets: str, piece: int = PIECE) -> str:
    """`redact` on one line, and no word of a secret is in it, nor `piece` characters of one in a row, as it
    is or as an address writes it: others may cut one anywhere, at each `/` for example."""
    plain = {form for secret in secrets for form in (secret, unquote(secret))}
    forms = plain | {quote(form, safe="") for form in plain}
    words = {word for form in forms for word in (form, *re.split(r"[^\w.-]+", form))}
    pieces = {word for word in words if len(word) >= SHORTEST_SECRET}
    pieces |= {form[i : i + piece] for form in forms for i in range(len(form) - piece + 1)}
    text = clean(text)[: 10 * SHOWN]  # the rest is not shown, whatever is hidden before it
    hidden = [False] * len(text)
    for length in {len(found) for found in pieces}:
        for i in range(len(text) - length + 1):
            if text[i : i + length] in pieces:
                hidden[i : i + length] = [True] * length
    runs = groupby(zip(hidden, text, strict=True), key=lambda pair: pair[0])
    shown = (REDACTED if hides else "".join(letter for _, letter in run) for hides, run in runs)
    return clean_line(redact("".join(shown)), SHOWN)


def redact_values(value: Any, key: str = "") -> Any:
    """`redact` every string of a nested structure, and every value under a telling key."""
    if isinstance(value, dict):
        return {k: redact_values(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_values(v, key) for v in value]
    if isinstance(value, str):
        return REDACTED if value and _SECRET_KEY.search(key) else redact(value)
    return value


def fenced(text: str) -> str:
    """`text` in a Markdown code fence that is longer than any run of backticks inside.

    Redacted before they are counted: what is taken out between two backticks makes one run of them.
    """
    text = redact(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def table_cell(text: str, limit: int | None = None) -> str:
    """`text` as one cell of a Markdown table, or in a line: on one line, and none of it is markup."""
    shown = clean_line(redact(text), limit)
    # A backslash does not make these plain in every renderer, a character reference does.
    shown = re.sub("[&<>~]", lambda match: f"&#{ord(match[0])};", shown)
    return re.sub(r"([\\|`*_\[\]!])|(?<!&)#", lambda match: "\\" + match[0], shown)


def table_cell_of_lines(text: str, limit: int | None = None) -> str:
    """The same of a text whose lines stay lines."""
    cut = text if limit is None or len(text) <= limit else text[:limit] + "…"
    return "<br>".join(table_cell(line) for line in cut.splitlines())
