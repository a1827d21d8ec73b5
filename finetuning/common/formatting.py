"""Numbers, sizes and durations as people read them."""

from collections.abc import Mapping
from typing import Any

UNKNOWN = "–"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them: 1:02:03, 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size_text(number: float) -> str:
    """Bytes for people, in GiB or MiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def shown(value: Any, unknown: str = UNKNOWN) -> str:
    """A value for people: four digits of a float, all of an integer or a text."""
    return four_digits(value, unknown) if isinstance(value, float | None) else str(value)


def four_digits(value: Any, unknown: str = UNKNOWN) -> str:
    """Four digits of any number, integers too; a text as it is."""
    if value is None:
        return unknown
    return value if isinstance(value, str) else f"{value:.4g}"


def two_digits(value: float) -> float:
    """The nearest number of two digits, as a setting is written."""
    return float(f"{value:.2g}")


def grouped(value: float | None, digits: int = 2) -> str:
    """With commas between thousands; a number that is not whole with so many decimals."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.{digits}f}"


def percent(value: float) -> str:
    """One decimal and the sign."""
    return f"{value:.1f} %"


def axis_number(value: float) -> str:
    """As short as the number of a tick can be: 0.5, 20000, 1e-5, 2.5e6."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


def due(step: int, every: int) -> bool:
    """True at every `every`-th step; never for 0."""
    return every > 0 and step % every == 0


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to one level, names joined by dots; lists become text."""
    rows: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = (
                ", ".join(map(str, value)) if isinstance(value, (list, tuple, Mapping)) else value
            )
    return rows
