"""Numbers, sizes and durations as people read them."""

from typing import Any


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them: 1:02:03, 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size_text(number: float) -> str:
    """Bytes for people, in GiB or MiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def shown(value: Any) -> str:
    """A value for people: four digits of a float, a dash for what is not known."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def due(step: int, every: int) -> bool:
    """True at every `every`-th step; never for 0."""
    return every > 0 and step % every == 0
