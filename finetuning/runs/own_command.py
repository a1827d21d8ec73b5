"""The command line of a recorded run, with some settings changed."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields

from finetuning.common.text import REDACTED
from finetuning.config import PARTLY_SHOWN, DirectTrainingConfig
from finetuning.runs.recorded import RecordedRun

PROGRAM = "uv run python direct_finetuning_with_existing_modules.py"


def command(run: RecordedRun, **changes: object) -> str:
    """The run's own command line with some settings changed; commands of alerts are not recorded.

    What was left to the program is left to it again: the next run may be longer, or be made elsewhere.
    """
    settings = {**run.as_set, **changes}
    if settings.get("max_steps"):
        settings.pop("num_epochs", None)  # it follows from the steps
    default = DirectTrainingConfig()
    words = [PROGRAM]
    for field in fields(DirectTrainingConfig):
        value = settings.get(field.name, getattr(default, field.name))
        value = tuple(value) if isinstance(value, list) else value
        hidden = field.name in PARTLY_SHOWN or REDACTED in str(value)
        if not hidden and value != getattr(default, field.name):
            words += option(field.name, value)
    return " ".join(words)


def option(name: str, value: object) -> list[str]:
    """The words of a shell that set a setting.

    A value that begins with "-" would be taken for an option: the first is joined to its name by "=", of
    several paths the others get "./" in front.
    """
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    first, *others = list(_texts(value)) or [""]
    if name.endswith("_path"):
        others = [f"./{text}" if text.startswith("-") else text for text in others]
    start = [f"{flag}={first}"] if first.startswith("-") else [flag, *[first] * bool(first)]
    return [shlex.quote(word) for word in (*start, *others)]


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (str(text) for pair in value.items() for text in pair)
    elif isinstance(value, tuple):
        yield from map(_text, value)
    else:
        yield _text(value)


def _text(value: object) -> str:
    """A number is as short as it can be read again without loss."""
    short = f"{value:g}" if isinstance(value, float) else ""
    return short if short and float(short) == value else str(value)
