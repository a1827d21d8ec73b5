"""No expression takes more than linear time: every compiled pattern of the program is tried, in the way in
which the program uses it, on texts that are made for it.

The texts are long runs of each part of it that may repeat, and of pairs of them, so that what matches in two
ways is found; a text four times as long may take no more than eight times as long.
"""

import importlib
import inspect
import pkgutil
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from re import _constants as code
from re import _parser as parser

import pytest

import finetuning

LENGTHS = (800, 3200, 12_800)  # the first one tells what is worse than quadratic before it hangs
REPEATS = (code.MAX_REPEAT, code.MIN_REPEAT, code.POSSESSIVE_REPEAT)
SLOW = 0.003  # CPU seconds; a linear expression takes less than a tenth of it
USES = {
    "finditer": r"\.(?:search|finditer|findall|sub|split)\b",
    "match": r"\.match\b",
    "fullmatch": r"\.fullmatch\b",
}


def patterns() -> dict[str, tuple[re.Pattern, tuple[str, ...]]]:
    """Place to (pattern, the ways in which it is used) of all that modules hold."""
    found = {}
    for info in pkgutil.walk_packages(finetuning.__path__, f"{finetuning.__name__}."):
        if info.ispkg:  # they are empty
            continue
        module = importlib.import_module(info.name)
        source = inspect.getsource(module)
        for name, value in vars(module).items():
            for i, pattern in enumerate(held(value)):
                uses = [way for way, form in USES.items() if re.search(name + form, source)]
                place = f"{info.name}.{name}[{i}]"
                if isinstance(pattern.pattern, str):
                    found.setdefault((pattern, tuple(uses or USES)), place)
    return {place: key for key, place in found.items()}


def held(value: object) -> Iterator[re.Pattern]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, (list, tuple, set, frozenset, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from held(item)


def examples(part: parser.SubPattern, most: int = 4) -> list[str]:
    """Some texts that a part of an expression matches: one for each of its ways, if there are few."""
    found = [""]
    for op, argument in part:
        found = [text + more for text in found for more in of_item(op, argument, most)][:most]
    return found


def of_item(op: object, argument: object, most: int) -> list[str]:
    if op is code.LITERAL:
        return [chr(argument)]
    if op is code.NOT_LITERAL or (op is code.IN and argument[0][0] is code.NEGATE):
        refused = [(code.LITERAL, argument)] if op is code.NOT_LITERAL else argument[1:]
        return [letter for letter in "x1 \n密'" if not is_of(letter, refused)][:2]
    if op is code.IN:
        return [text for item in argument for text in of_item(*item, most)][:most] or ["x"]
    if op is code.RANGE:
        return [chr(argument[0])]
    if op is code.BRANCH:
        found = [text for branch in argument[1] for text in examples(branch, most)]
        twice = [text for text, times in Counter(found).items() if times > 1]
        return [*twice, *found][: 2 * most]
    if op is code.SUBPATTERN:
        return examples(argument[3], most)
    if op is code.ATOMIC_GROUP:
        return examples(argument, most)
    if op in REPEATS:
        return [text * max(1, argument[0]) for text in examples(argument[2], most)]
    if op is code.CATEGORY:
        return [{code.CATEGORY_SPACE: " ", code.CATEGORY_DIGIT: "1"}.get(argument, "a")]
    return ["x"] if op is code.ANY else [""]


def is_of(letter: str, items: list) -> bool:
    """Whether a letter is of a class of letters."""
    pattern = parser.SubPattern(parser.State(), [(code.IN, items)])
    return re._compiler.compile(pattern).match(letter) is not None


def repeated(part: parser.SubPattern, before: str = "") -> Iterator[tuple[str, str]]:
    """(a text that matches what stands before it, a text that it matches) of every part that repeats, and of
    what stands between two of them: such a text may be taken for either of the two."""
    between = ""
    for op, argument in part:
        repeats = op in REPEATS and argument[1] > 1
        if repeats and between:
            yield before.removesuffix(between), between
        between = "" if repeats else between + (of_item(op, argument, 1) or [""])[0]
        inner = {
            code.MAX_REPEAT: lambda a: [a[2]], code.MIN_REPEAT: lambda a: [a[2]],
            code.POSSESSIVE_REPEAT: lambda a: [a[2]], code.SUBPATTERN: lambda a: [a[3]],
            code.BRANCH: lambda a: a[1], code.ATOMIC_GROUP: lambda a: [a],
        }.get(op, lambda a: [])(argument)  # fmt: skip
        if op in REPEATS:
            yield from ((before, text) for text in examples(argument[2], 6) if text)
        for branch in inner:
            yield from repeated(branch, before)
        before += (of_item(op, argument, 1) or [""])[0]


def texts(pattern: re.Pattern, length: int) -> Iterator[str]:
    """In the same order for every length: of the longer text the run is longer, not what stands before it."""
    parsed = parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)
    pumps = list(dict.fromkeys([*repeated(parsed), ("", " "), ("", "\n"), ("", "密")]))[:12]
    whole = examples(parsed, 3)
    for before, text in pumps:
        run = text * (length // len(text))
        for end in ("", "\0", text + "\n\0", before):
            yield before + run + end
        for _, other in pumps:
            yield before + (text + other) * (length // len(text + other)) + "\0"
    for text in filter(None, whole):
        yield text * (length // len(text))
        yield text[:-1] * (length // len(text))


def seconds(pattern: re.Pattern, uses: tuple[str, ...], text: str) -> float:
    start = time.process_time()
    for way in uses:
        found = getattr(pattern, way)(text)
        if way == "finditer":
            deque(found, maxlen=0)  # a list of them all costs more than linear time of its own
    return time.process_time() - start


PATTERNS = patterns()


@pytest.mark.parametrize("place", PATTERNS)
def test_an_expression_is_linear(place):
    pattern, uses = PATTERNS[place]
    runs = zip(*(texts(pattern, length) for length in LENGTHS), strict=True)
    for short, text, long in dict.fromkeys(runs):
        quick = any(
            seconds(pattern, uses, short) < 5 * SLOW for _ in range(3)
        )  # a machine stumbles
        assert quick, (short[:9], short[-4:])
        if seconds(pattern, uses, long) > SLOW:
            spent = min(seconds(pattern, uses, text) for _ in range(3))
            longer = min(seconds(pattern, uses, long) for _ in range(2))
            assert longer < 8 * spent, (text[:20], text[-4:], spent, longer)


def test_a_way_that_is_there_twice_is_tried():
    """Behind more branches than are tried of others."""
    words = [f"{letter}{number}" for number, letter in enumerate("abcdefghijkl")]
    part = parser.parse("(?:" + "|".join([*words, words[-1]]) + ")*")
    assert ("", words[-1]) in repeated(part)


@pytest.mark.parametrize(
    "form", [r"[ \t]*\d*[ \t]*x", r"(?:\n-+[ \t]*)+\Z", r"a*b?a*c", r"{[^{}]*loss\s*:[^{}]*}"]
)
def test_an_expression_that_is_not_linear_is_found(form):
    pattern = re.compile(form)
    runs = zip(*(texts(pattern, length) for length in (400, 1600)), strict=True)
    spent = ([seconds(pattern, ("finditer",), text) for text in pair] for pair in runs)
    assert any(longer > max(0.001, 8 * once) for once, longer in spent)
