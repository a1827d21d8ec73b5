"""What of an answer must be exact: numbers, formulas and cited standards; and how sure a rate is."""

import math
import re
from collections.abc import Iterator, Sequence

from finetuning.evaluation.notation import plain

Z = 1.96  # of an interval of 95%

_STANDARD = re.compile(
    r"(?<![\w/])(?<!\d )(?P<family>(?:GB|GM|YD|JR)/[TYZ]|(?-i:GB|GM|YD|JR)|ISO(?:/IEC)?|IEC|RFC|FIPS|PKCS"
    r"|(?:NIST )?SP(?=[ -]?\d{3}-)|NIST(?: IR)?|(?:ANSI )?(?-i:X)(?=\.?\d{3}(?!\d)|9\.\d)|ANSI)"
    r"[ \-#.]{0,2}(?:PUB )?(?P<number>\d+(?:[.\-]\d+)*[A-Z]?)(?:(?!\w)|(?=v\d))",
    re.IGNORECASE | re.ASCII,
)
# Signs of private use stay where they are: nobody knows what they mean.
_SIDE = r"[A-Za-z0-9α-ωΑ-Ω\ue000-\uf8ff_'()\[\]^+*/⊕⊗×±.,‖<>≤≥∈!%-]+"
_RUN = re.compile(rf"(?<!{_SIDE[:-1]}){_SIDE}(?:[=≡≠]{_SIDE})+")
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.^\ue000-\uf8ff])(?:(?<![)\]-])-)?"
    r"(?P<digits>0x[0-9a-f]+|\d+(?:\.\d+)?)(?P<power>\^-?\d+)?[%‰]?"
    r"(?:(?![\w\ue000-\uf8ff^]|\.\d)|(?=(?:bits?|bytes?|[kMGT]i?B|m?s|[kMG]?Hz)(?!\w)))",
    re.IGNORECASE | re.ASCII,
)


def exact_facts(text: str) -> set[str]:
    """Standards, formulas with a sign of equality, numbers of two digits or more and powers, each in one form
    (see `notation`); a number within one of the others does not count by itself."""
    text = plain(text)
    found = {_standard(match) for match in _STANDARD.finditer(text)}
    rest = _closed_up(_STANDARD.sub(" ", text))
    formulas: set[str] = set()

    def without_formulas(match: re.Match[str]) -> str:
        left = []
        for piece in _pieces(match[0]):
            formula = _formula(piece)
            left += [re.sub("[=≡≠]", " ", piece)] if formula is None else []
            formulas.update([formula] if formula else [])
        return f" {' '.join(left)} "

    rest = _RUN.sub(without_formulas, rest)
    numbers = (_number(match) for match in _NUMBER.finditer(rest) if _tells(match))
    return found | formulas | set(numbers)


def fact_recall(reference: str, answer: str) -> float | None:
    """Share of the reference's facts that the answer has exactly; None without any."""
    wanted = exact_facts(reference)
    return len(wanted & exact_facts(answer)) / len(wanted) if wanted else None


def wilson(count: float, of_all: int) -> tuple[float, float]:
    """The interval of 95% of a rate (Wilson 1927)."""
    rate, extra = count / of_all, Z * Z / of_all
    middle = (rate + extra / 2) / (1 + extra)
    half = Z / (1 + extra) * math.sqrt(rate * (1 - rate) / of_all + extra / (4 * of_all))
    # Exact at its ends, where rounding would leave 3e-17.
    low = max(0.0, middle - half) if count > 0 else 0.0
    return low, min(1.0, middle + half) if count < of_all else 1.0


def with_interval(tag: str, outcomes: Sequence[float]) -> dict[str, float]:
    """The mean of outcomes from 0 to 1, and the ends of its interval: that of a rate, which is rather too
    wide where outcomes lie between 0 and 1, as they vary less."""
    low, high = wilson(sum(outcomes), len(outcomes))
    return {tag: sum(outcomes) / len(outcomes), f"{tag}_Low": low, f"{tag}_High": high}


def _standard(match: re.Match[str]) -> str:
    family = match["family"].lower().removeprefix("ansi ")
    family = family.removeprefix("nist ") if family.endswith("sp") else family
    return (family + match["number"]).replace(" ", "").lower()


def _closed_up(text: str) -> str:
    """No spaces around what joins two sides, so that a formula is one run; mod is written %."""
    text = re.sub(r"\( ?mod ([^() ]{1,40}) ?\)", r" mod \1", text)
    text = re.sub(r" +mod (?=[A-Za-z0-9(α-ωΑ-Ω])", "%", text)
    text = re.sub(r"\( ?(%[^() ]{1,40}) ?\)", r"\1", text)
    text = re.sub(r" ?([=≡≠]) ?", r"\1", text)
    text = re.sub(r"\([^()\n]{1,99}\)", lambda match: match[0].replace(", ", ","), text)
    joins = r"[+\-×/^⊕⊗±‖<>≤≥∈%]"
    return re.sub(rf"(?<=\S) ({joins}) (?=\S)", r"\1", text)


def _pieces(run: str) -> Iterator[str]:
    """The run cut at commas that are in no brackets."""
    depth, start = 0, 0
    for place, character in enumerate(run):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth <= 0:
            yield run[start:place]
            start = place + 1
    yield run[start:]


def _formula(text: str) -> str | None:
    """Without what belongs to the sentence, both sides of an equation in one order; None for no formula, or
    for a part of one."""
    text = text.strip(".,")
    for opened, closed in ("()", "[]"):
        if text.startswith(opened) and text.count(opened) > text.count(closed):
            text = text[1:]
        if text.endswith(closed) and text.count(opened) < text.count(closed):
            text = text[:-1]
        if text.count(opened) != text.count(closed):
            return None
    if re.fullmatch(r"\([^()]+\)", text):
        text = text[1:-1]
    sides = re.split("[=≡≠]", text)
    if len(sides) < 2 or not all(re.search("[^()]", side) for side in sides):
        return None
    return (
        "=".join(sorted(sides))
        if text.count("=") == 1 == len(sides) - 1 and "%" not in text
        else text
    )


def _tells(match: re.Match[str]) -> bool:
    """Whether a number is not said by chance: one digit often is."""
    return bool(match["power"]) or len(match["digits"]) > 1


def _number(match: re.Match[str]) -> str:
    """As it is written, without the zeros behind its last decimal."""
    text = match[0].lower()
    if "." in match["digits"]:
        digits = match["digits"].rstrip("0").rstrip(".")
        text = text.replace(match["digits"], digits, 1)
    return text
