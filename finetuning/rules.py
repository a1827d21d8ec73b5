"""What the value of a setting must be: a condition, and its words in an error."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be, as a function and in words."""

    holds: Callable[[Any], bool]
    wanted: str


def finite(value: float) -> bool:
    """Neither infinite nor NaN."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


ABOVE_ZERO = Rule(lambda value: finite(value) and value > 0, "finite and above 0")
FROM_ZERO = Rule(lambda value: finite(value) and value >= 0, "finite, 0 or more")
FROM_ONE = Rule(lambda value: value >= 1, "at least 1")
BELOW_ONE = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
SHARE = Rule(lambda value: 0 <= value <= 1, "between 0 and 1")
NOT_EMPTY = Rule(bool, "not empty")
AUTO_OR_ABOVE_ZERO = Rule(
    lambda value: value == "auto" or (finite(value) and value > 0), "auto, or above 0 and finite"
)
LOWEST_TEMPERATURE = 0.01  # scores divided by much less are no numbers any more
TEMPERATURE = Rule(
    lambda value: value == 0 or (finite(value) and value >= LOWEST_TEMPERATURE),
    f"0, or {LOWEST_TEMPERATURE} or more",
)
AUTO_OR_TEMPERATURE = Rule(
    lambda value: value == "auto" or TEMPERATURE.holds(value),
    f"auto, 0, or {LOWEST_TEMPERATURE} or more",
)
STEPS = Rule(
    lambda value: value == "auto" or (isinstance(value, int) and value >= 0), "auto, or 0 or more"
)

LENGTH = Rule(
    lambda value: value == "auto" or (isinstance(value, int) and value >= 16),
    "auto, or at least 16",
)
LOGGING = Rule(
    lambda value: value == "auto" or (isinstance(value, int) and value >= 1), "auto, or 1 or more"
)
# Names of files on every system; digits up to the end or a _ number the runs of one second.
RUN_NAME = Rule(
    lambda value: re.fullmatch(r"(?!\d+(?:_|$))[\w.=+-]{0,60}", value) and not value.endswith("."),
    "at most 60 letters of any language, digits and . _ = + -, not digits alone or digits before a _",
)
