"""`--help` in Chinese: every option with its values, its default and what it is for.

What a program and its options are for stands in docs/options_zh.tsv, settings and their groups in
docs/settings_zh.tsv.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro

from finetuning.common.language import FLAG, LANGUAGES, meanings

_TYPES = {
    int: "整数", float: "数", str: "文本", Path: "路径", tuple: "一个或多个", dict: "名字 值 …",
}  # fmt: skip
_NO_DEFAULT = (dataclasses.MISSING, inspect.Parameter.empty)


class Option(NamedTuple):
    """Of a command line."""

    name: str
    hint: Any
    default: Any

    @property
    def settings(self) -> type | None:
        """The dataclass whose fields are the options; None for a single one."""
        kind = _plain(self.hint)
        return kind if dataclasses.is_dataclass(kind) else None

    @property
    def is_positional(self) -> bool:
        return tyro.conf.Positional in getattr(self.hint, "__metadata__", ())


def help_text(program: str, kind: Callable) -> str:
    """The whole page. program: as it is started; kind: the dataclass, or the function, of its options; a
    field that is a dataclass itself has a section for each of its bases."""
    stem = program.split(" ")[-1].removesuffix(".py")
    meant = meanings("settings_zh.tsv") | meanings("options_zh.tsv")
    options = _options(kind)
    own = [option for option in options if not option.settings]
    usage = [f"[{option.name}]" for option in own if option.is_positional]
    parts = [" ".join([f"用法：{program}", *usage, "[选项]"]), meant.get(stem, "")]
    parts.append("\n".join(["选项：", *_lines(own, stem, meant), *_of_language()]))
    for settings in filter(None, (option.settings for option in options)):
        for group in reversed(settings.__bases__):
            title = f"{meant.get(group.__name__, '')}："
            parts.append("\n".join([title, *_lines(_options(group), stem, meant)]))
    return "\n\n".join(parts)


def _options(kind: Callable) -> list[Option]:
    hints = get_type_hints(kind, include_extras=True)
    if not dataclasses.is_dataclass(kind):
        named = inspect.signature(kind).parameters
        return [Option(name, hints[name], option.default) for name, option in named.items()]
    return [
        Option(
            field.name,
            hints[field.name],
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory(),
        )
        for field in dataclasses.fields(kind)
    ]


def _lines(options: list[Option], stem: str, meant: dict[str, str]) -> Iterator[str]:
    """meant: by `program.option`, or by a setting's name alone."""
    for option in options:
        flag = f"--{option.name.replace('_', '-')}"
        yield f"  {f'[{option.name}]' if option.is_positional else flag}{_values(option)}"
        yield f"      {meant.get(f'{stem}.{option.name}', meant.get(option.name, ''))}"


def _of_language() -> Iterator[str]:
    yield f"  {FLAG} {{auto|{'|'.join(reversed(LANGUAGES))}}}（默认 auto）"
    yield "      终端、报警、报告和图表说明所用的语言；auto：按系统语言"


def _values(option: Option) -> str:
    """What an option takes, and its default."""
    if _plain(option.hint) is bool:
        no = f", --no-{option.name.replace('_', '-')}（默认打开）"
        return no if option.default else "（默认关闭）"
    choices, default = "|".join(_kinds(_plain(option.hint))), option.default
    if default in _NO_DEFAULT:
        return f" {{{choices}}}（必填）"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f" {{{choices}}}（默认 {'空' if shown in (None, '', {}) else shown}）"


def _kinds(hint: Any) -> Iterator[str]:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for part in get_args(hint):
            yield from _kinds(part)
    elif origin is Literal:
        yield from get_args(hint)
    elif hint is not NoneType:
        yield _TYPES[origin or hint]


def _plain(hint: Any) -> Any:
    """Without what `Annotated` adds."""
    while hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    return hint
