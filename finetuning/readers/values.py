"""What a value of a record is: absent, text, a switch, or something short that no one would learn from."""

import functools
import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterator
from typing import Any

from finetuning.common.text import clean_line
from finetuning.readers.names import meaning
from finetuning.readers.sample import BrokenRecordError

# Words that programs write for an empty cell; only where they are the whole value.
_ABSENT_WORDS = {"nan", "none", "null", "nil", "n/a", "#n/a", "<na>", "nat", "undefined",
                 "<noinput>", "<none>", "<null>", "<empty>", "无输入", "無輸入"}  # fmt: skip
_LONGEST_ABSENT = 12
NOTHING = frozenset(
    ("无", "無", "空", "暂无", "无。", "没有", "/", "-", "--", "—", "——", "－", "略", "略。")
)
"""What people write into a cell that may stay empty."""
_TEXTS = ("text", "value", "content")  # keys of an object that is a text, as SQuAD's answers are
_SWITCHES = {"on", "off", "true", "false", "yes", "no", "low", "medium", "high", "minimal", "enabled",
             "disabled", "auto", "是", "否", "开", "关", "0", "1"}  # fmt: skip
# Short values that say something about a record: one word or number, an address, a date.
_PLAIN = re.compile(
    r"[!-~]{1,100}|\d{4}[-/.年]\d{1,2}[-/.月]\d{1,2}日?(?:[ T]\d{1,2}:\d\d(?::\d\d)?\S*)?"
)
_ADDRESS = re.compile(r"(?:https?|ftp|file|s3|hf)://\S+|[\w./\\~:-]+\.[a-z]{2,5}", re.IGNORECASE)
_COUNTED = re.compile(
    r"(?:step|步骤|第)?[ _-]?(?:\d{1,4}|[一二三四五六七八九十]{1,3})步?", re.IGNORECASE
)
_LEAST_WIDTH = 8  # of text, in half-width characters


def is_absent(value: Any) -> bool:
    """Whether a value stands for none: null, blank, an empty list, or a word such as nan."""
    if isinstance(value, str):
        if len(value) > _LONGEST_ABSENT:
            return value[0].isspace() and value.isspace()
        return _is_absent_text(value)
    return (
        value is None
        or value == []
        or value == {}
        or (isinstance(value, float) and math.isnan(value))
    )


@functools.lru_cache(maxsize=4096)
def _is_absent_text(value: str) -> bool:
    return not value or value.strip().casefold() in _ABSENT_WORDS or value.isspace()


def is_absent_word(value: Any) -> bool:
    """Whether a value is a word such as nan or <noinput> that stands for none."""
    short = isinstance(value, str) and 0 < len(value) <= _LONGEST_ABSENT
    return short and _is_absent_text(value) and not value.isspace()


def is_switch(value: Any) -> bool:
    """Whether a value turns something on or off, or counts: no text."""
    if isinstance(value, str):
        return len(value) <= _LONGEST_ABSENT and value.strip().casefold() in _SWITCHES
    return isinstance(value, (bool, int, float))


def is_no_switch(value: Any) -> bool:
    """Whether a value is a text, or a list or object that may hold some."""
    return not is_switch(value)


def is_text(value: str) -> bool:
    """Whether somebody may have meant a value to be read; ids, numbers, dates and addresses are not."""
    text = value.strip()
    if _PLAIN.fullmatch(text) or _ADDRESS.fullmatch(text):
        return False
    return len(text) >= _LEAST_WIDTH or width(text) >= _LEAST_WIDTH


def width(text: str) -> int:
    """Columns on a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def kind(value: Any) -> str:
    """What a value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "binary data")


def text_of(value: Any, name: str, left: dict[str, Any]) -> str:
    """A value that must be text, with line ends of one form; absent values are ''. What an object
    holds beside its text is put into `left`."""
    if type(value) is str:
        return "" if is_absent(value) else one_line_end(value)
    if isinstance(value, dict) and (key := next((k for k in _TEXTS if k in value), None)):
        left.update(others(value, (key,), name))
        value = value[key]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # as a table would have it
    if value is None or is_absent(value):
        return ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        raise BrokenRecordError(f"{name} holds {len(value)} texts; give one a record")
    if not isinstance(value, str):
        raise BrokenRecordError(f"{name} must be text, not {kind(value)}")
    return one_line_end(value)


def one_line_end(text: str) -> str:
    r"""Text whose lines end in \n, as they do in every form of file."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def parsed(value: Any, name: str) -> Any:
    """A structure that a CSV cell or a Parquet column holds as JSON text."""
    if not isinstance(value, str):
        return value
    if is_absent(value):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BrokenRecordError(f"{name} is text that is not JSON") from None


def others(value: dict, taken: Collection[str | None], name: str) -> dict[str, Any]:
    """What an object in a column holds beside what is taken of it, named as the parts of a turn are."""
    return {
        f"{name}: {key}": item
        for key, item in value.items()
        if key not in taken and not is_absent(item)
    }


def short_text(value: str | float | None) -> str:
    """A word, number or line of an option, or '' for none."""
    return "" if is_absent(value) else one_line_end(str(value)).strip()


def steps_text(value: Any, name: str, left: dict[str, Any]) -> str:
    """Reasoning as text: a text, or steps in a list, each a text or an object that holds one. What
    else an object holds is put into `left`."""
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return one_line_end(value).strip()
    if isinstance(value, str):
        return one_line_end(value).strip()
    if isinstance(value, (list, dict)):
        return "\n".join(text.strip() for text in _steps(value, name, left) if text.strip())
    raise BrokenRecordError(f"{name} must be text, not {kind(value)}")


def _steps(value: Any, name: str, left: dict[str, Any], depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        yield one_line_end(value)
    elif isinstance(value, list) and depth < 4:
        for item in value:
            yield from _steps(item, name, left, depth + 1)
    elif isinstance(value, dict) and depth < 4:
        key = _step_key(value)
        if key is not None:
            left.update(others(value, (key,), name))
            yield from _steps(value[key], name, left, depth + 1)
        elif all(_COUNTED.fullmatch(str(k)) for k in value):
            for item in value.values():
                yield from _steps(item, name, left, depth + 1)
        elif any(
            isinstance(item, (str, list, dict)) and not is_absent(item) for item in value.values()
        ):
            keys = clean_line(", ".join(map(str, value)), 100)
            raise BrokenRecordError(f"{name} holds an object without a reasoning; its keys: {keys}")
    elif not isinstance(value, (int, float, bool)) and value is not None:
        raise BrokenRecordError(f"{name} holds {kind(value)} that is no step of a reasoning")


def _step_key(step: dict) -> str | None:
    """Where an object holds its text: under a name of reasoning, else under a usual one of text."""
    filled = [key for key, value in step.items() if not is_absent(value)]
    for key in filled:
        if (m := meaning(str(key))) and m.role == "thinking" and not is_switch(step[key]):
            return key
    usual = ("text", "content", "summary", "value", "steps", "step", "内容", "步骤")
    found = [key for key in usual if key in filled and isinstance(step[key], (str, list))]
    return found[0] if found else None


def shown(value: Any, limit: int = 24) -> str:
    """The beginning of a value, for a message."""
    return clean_line(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str),
        limit,
    )
