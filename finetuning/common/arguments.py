"""Command lines of the programs: `--language`, and `--help` and faults in the reader's language."""

import dataclasses
import functools
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import tyro

from finetuning.common import language
from finetuning.common.chinese_help import help_text
from finetuning.common.errors import UserError
from finetuning.common.language import FLAG

HELP = {"-h", "--help"}
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")
_KINDS = {"INT": "a whole number", "FLOAT": "a number", "STR": "a text", "PATH": "a path"}
SHELLS = ("bash", "zsh", "fish")  # tyro needs another library for a fourth
_WIDE = "10000"  # columns; a line of a message is a line


def parsed(program: str, kind: Callable, arguments: Sequence[str] | None = None) -> Any:
    """The options of a program: an object of the dataclass `kind`, or, of a function, the call that is asked
    for. Raises UserError."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return options_of(program, kind, without_language(words))


def without_language(words: Sequence[str]) -> list[str]:
    """The other words; what is shown from now on is in the language that they ask for. Raises UserError."""
    left, chosen = [], "auto"
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != FLAG:
            left.append(word)
            continue
        chosen = value if equals else next(rest, "")
        if chosen not in ("auto", *language.LANGUAGES):
            raise UserError(f"command line: {FLAG} is {chosen!r}, must be 'auto', 'zh' or 'en'")
    language.use(chosen)
    return left


def options_of(program: str, kind: Callable, words: Sequence[str], **options: Any) -> Any:
    """What `parsed` gives, of words without a language. options: of `tyro.cli`."""
    if language.current() == "zh" and HELP & set(words):
        print(help_text(program, kind))
        sys.exit(0)
    about = (inspect.getdoc(kind) or "").partition("\nArgs:")[0].strip()
    about += f"\n\n{FLAG} auto|zh|en: of all that is shown; auto: that of the system."
    taken = kind if dataclasses.is_dataclass(kind) else _call_of(kind)
    with _errors_in_a_line(words):
        _check_completion(words)
        return tyro.cli(
            taken, args=words, prog=program, description=about, use_underscores=False, **options
        )


def _check_completion(words: Sequence[str]) -> None:
    """tyro takes the shell as it is."""
    flag, shell = (*words[:2], "", "")[:2]
    if flag in COMPLETION and shell and shell not in SHELLS:
        raise UserError(
            f"command line: {flag} is {shell!r}, must be {' or '.join(map(repr, SHELLS))}"
        )


def _call_of(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Callable:
        return functools.partial(function, *arguments, **named)

    return call


@contextmanager
def _errors_in_a_line(words: Sequence[str]) -> Iterator[None]:
    """While it lasts, what tyro has against the words of a command line is a UserError and no box."""
    if HELP & set(words):
        yield
        return
    said, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDE
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as end:
        if not end.code:  # completions were printed
            raise
        fault = _fault(said.getvalue(), words)
        raise UserError(f"command line: {fault}; --help lists all options") from end
    except OSError as error:  # of the file for completions
        raise UserError(
            f"{words[0]} {error.filename}: can't be written ({error.strerror})"
        ) from error
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width


def _fault(box: str, words: Sequence[str]) -> str:
    """What tyro's message says, in a line."""
    lines = [line.strip("│").rstrip() for line in box.splitlines()[1:-1]]
    ruled = itertools.groupby(lines, lambda line: not line.strip(" ─-"))  # "-": not on UTF-8
    told, *rest = [list(part) for is_rule, part in ruled if not is_rule]
    others = [line.strip() for part in rest for line in part]
    first = " ".join(map(str.strip, told))
    if first.startswith("Missing from"):
        names = [line.split()[0] for line in told if re.match(r" {4,5}\S", line)]
        return f"missing: {', '.join(names)}"
    unread = re.match(r"Error parsing (--[\w-]+): ", first)
    usage = next((line.split(" ", 1) for line in others if line.startswith("--")), [""])
    if unread and usage[0] == unread[1]:
        given = _given(usage[0], words, several="..." in usage[1])
        return f"{usage[0]} is {given!r}, must be {_wanted(usage[1])}"
    unknown = first.removeprefix("Unrecognized options: ")
    if unknown != first:
        near = next((line.partition(",")[0] for line in others if line.startswith("--")), "")
        meant = f" (did you mean {near.split()[0]!r}?)" if near else ""
        return f"unknown option {unknown.partition(',')[0]!r}{meant}"
    return first.rstrip(".")


def _given(flag: str, words: Sequence[str], *, several: bool) -> str:
    """The value of an option in a command line; `several`: all words up to the next option."""
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            end = len(words) if several else number + 2
            behind = itertools.takewhile(
                lambda word: not word.startswith("--"), words[number + 1 : end]
            )
            return value if equals else " ".join(behind)
    return ""


def _wanted(usage: str) -> str:
    """What an option takes, in words: of FLOAT|{auto}, of [STR INT [STR INT ...]]."""
    parts = re.findall(r"[^\[\]\s]+", usage)
    unit = parts[: len(parts) // 2] if "..." in parts else parts
    kinds = [
        " or ".join(_kind(part) for part in alternatives.split("|") if part != "{None}")
        for alternatives in unit
    ]
    if len(kinds) == 2:
        return f"pairs of {kinds[0]} and {kinds[1]}"
    return f"{kinds[0]}, or several" if len(parts) > 1 else kinds[0]


def _kind(part: str) -> str:
    return _KINDS.get(part) or " or ".join(map(repr, part.strip("{}").split(",")))
