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
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from finetuning.common import language
from finetuning.common.errors import UserError

FLAG = "--language"
HELP = {"-h", "--help"}
_WIDE = "10000"  # columns; a line of a message is a line
_TYPES = {int: "整数", float: "数", str: "文本", Path: "路径", tuple: "一个或多个"}


def parsed(program: str, kind: Callable, arguments: Sequence[str] | None = None) -> Any:
    """The options of a program: an object of the dataclass `kind`, or, of a function, the call that is asked
    for. Its options in Chinese are in docs/options_zh.tsv. Raises UserError."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = _without_language(words)
    if language.current() == "zh" and HELP & set(words):
        print(help_text(program, kind))
        sys.exit(0)
    about = (inspect.getdoc(kind) or "").partition("\nArgs:")[0].strip()
    about += f"\n\n{FLAG} auto|zh|en: of all that is shown; auto: that of the locale."
    taken = kind if dataclasses.is_dataclass(kind) else _call_of(kind)
    with errors_in_a_line(words):
        return tyro.cli(taken, args=words, prog=program, description=about, use_underscores=False)


def _without_language(words: list[str]) -> list[str]:
    """The other words; what is shown from now on is in this language."""
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


def _call_of(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Callable:
        return functools.partial(function, *arguments, **named)

    return call


@contextmanager
def errors_in_a_line(words: Sequence[str]) -> Iterator[None]:
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
        fault = _fault(said.getvalue())
        raise UserError(f"command line: {fault}; --help lists all options") from end
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width


def _fault(box: str) -> str:
    """What tyro's message says, in a line."""
    lines = [line.strip("│").rstrip() for line in box.splitlines()[1:-1]]
    ruled = itertools.groupby(lines, lambda line: not line.strip(" ─-"))  # "-": not on UTF-8
    told, *rest = [list(part) for is_rule, part in ruled if not is_rule]
    others = [line.strip() for part in rest for line in part]
    first = " ".join(map(str.strip, told))
    if first.startswith("Missing from"):
        names = [line.split()[0] for line in told if re.match(r" {4,5}\S", line)]
        return f"missing: {', '.join(names)}"
    unknown = first.removeprefix("Unrecognized options: ")
    if unknown != first:
        near = next((line.partition(",")[0] for line in others if line.startswith("--")), "")
        meant = f" (did you mean {near.split()[0]!r}?)" if near else ""
        return f"unknown option {unknown.partition(',')[0]!r}{meant}"
    return first.rstrip(".")


def help_text(program: str, kind: Callable) -> str:
    """The page of a program in Chinese: every option with its values, its default and what it is for."""
    hints = get_type_hints(kind, include_extras=True)
    named = inspect.signature(kind).parameters
    meant = language.meanings("options_zh.tsv")
    stem = program.removesuffix(".py")
    words = [name for name in named if _is_positional(hints[name])]
    usage = " ".join(f"[{word}]" for word in words)
    lines = [
        f"用法：{program} {usage} [选项]".replace("  ", " "),
        "",
        meant.get(stem, ""),
        "",
        "选项：",
    ]
    for name, option in named.items():
        flag = f"[{name}]" if name in words else f"--{name.replace('_', '-')}"
        lines.append(f"  {flag}{_values(hints[name], option.default)}")
        lines.append(f"      {meant.get(f'{stem}.{name}', '')}")
    lines.append(f"  {FLAG} {{auto|zh|en}}（默认 auto）")
    lines.append("      所显示内容的语言；auto：按系统区域设置")
    return "\n".join(lines)


def _is_positional(hint: Any) -> bool:
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def _values(hint: Any, default: Any) -> str:
    """What an option takes, and its default."""
    while hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    if hint is bool:
        return "（默认打开）" if default else "（默认关闭）"
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    if get_origin(hint) is tuple:
        kinds = [tuple]
    choices = kinds if get_origin(hint) is Literal else [_TYPES[kind] for kind in kinds]
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    given = (
        "必填"
        if default is inspect.Parameter.empty
        else f"默认 {'空' if shown in (None, '') else shown}"
    )
    return f" {{{'|'.join(choices)}}}（{given}）"
