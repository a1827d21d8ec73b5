"""What of an answer must be exact: numbers, formulas and cited standards; and how sure a rate is."""

import math
import re
import unicodedata
from collections.abc import Sequence

Z = 1.96  # of an interval of 95%

_STANDARD = re.compile(
    r"\b(?:GB|GM|GB/Z|GM/Z|YD|JR|ISO|IEC|ISO/IEC|RFC|FIPS|NIST|SP|PKCS|ANSI|X\d{0,3})"
    r"(?:/[TYZ])?[ \-#]{0,2}(?:PUB |SP |IR )?\d+(?:[.\-]\d+)*[A-Z]?\b",
    re.IGNORECASE | re.ASCII,
)
_SIDE = r"[A-Za-z0-9_'()\[\]^+*/⊕×·,.|-]{1,60}"
_FORMULA = re.compile(r"\$([^$\n]{3,200})\$|" + _SIDE + r"[=≡][^\s，。；、:：]{1,60}")
_NUMBER = re.compile(
    r"(?<![\w.])(?:0x[0-9a-f]+|\d[\d,]*(?:\.\d+)?)(?![\w])", re.IGNORECASE | re.ASCII
)


def exact_facts(text: str) -> set[str]:
    """Standards, formulas and numbers of two digits or more, each in one form; a number within one of the
    others does not count by itself."""
    text = unicodedata.normalize("NFKC", text)
    found = set()
    for pattern in (_STANDARD, _FORMULA):
        found |= {_form(match[0]) for match in pattern.finditer(text)}
        text = pattern.sub(" ", text)
    numbers = (_form(match[0]).replace(",", "") for match in _NUMBER.finditer(text))
    return found | {number for number in numbers if len(number) > 1}


def fact_recall(reference: str, answer: str) -> float | None:
    """Share of the reference's facts that the answer has exactly; None without any."""
    wanted = exact_facts(reference)
    return len(wanted & exact_facts(answer)) / len(wanted) if wanted else None


def wilson(count: float, of_all: int) -> tuple[float, float]:
    """The interval of 95% of a rate (Wilson 1927)."""
    rate, extra = count / of_all, Z * Z / of_all
    middle = (rate + extra / 2) / (1 + extra)
    half = Z / (1 + extra) * math.sqrt(rate * (1 - rate) / of_all + extra / (4 * of_all))
    return max(0.0, middle - half), min(1.0, middle + half)


def with_interval(tag: str, outcomes: Sequence[float]) -> dict[str, float]:
    """The mean of outcomes from 0 to 1, and the ends of its interval: that of a rate, which is rather too
    wide where outcomes lie between 0 and 1, as they vary less."""
    low, high = wilson(sum(outcomes), len(outcomes))
    return {tag: sum(outcomes) / len(outcomes), f"{tag}_Low": low, f"{tag}_High": high}


def _form(text: str) -> str:
    return re.sub(r"[\s$`{}\\]+", "", text).strip(".,;").lower()
