"""What a monitor remembers, as the state file of a checkpoint has it: can the monitor go on with it?

Kinds of values are not enough: numbers must also go together. So a monitor that was made from a file is tried
on a copy before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.kinds import misfit
from finetuning.common.text import clean_line

# What a monitor's arithmetic raises where numbers do not go together.
UNFIT = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check_memory(state: Mapping[str, Any], kind: type, whose: str) -> None:
    """Raise UserError where a saved memory has values of another kind. kind: a TypedDict."""
    if fault := misfit(state, kind, whose):
        raise _of_another_version(whose, fault)


def tried(trial: Callable[[], object], whose: str) -> None:
    """Raise UserError where a monitor can't go on with what it remembers."""
    try:
        trial()
    except UNFIT as error:
        raise _of_another_version(whose, repr(error)) from error


def _of_another_version(whose: str, fault: str) -> UserError:
    return UserError(
        f"--resume: what the {whose} remember in the checkpoint's state.json is of another version of this "
        f"program ({clean_line(fault, 200)}); go on with the version that wrote it, or start a new run with "
        "--init-adapter and the checkpoint's folder"
    )
