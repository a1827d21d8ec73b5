"""Cryptographic terms and standards in a text, and how demanding they make it.

`data/terms/crypto_terms.tsv` holds the terms (level 1 basic vocabulary, 2 practitioner's core,
3 specialist, 4 research and attacks) and their aliases, `data/terms/crypto_standards.tsv` the
standards with words of which at least one belongs to a text that cites them.
"""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ahocorasick_rs import AhoCorasick, Implementation, MatchKind

TERMS_FOLDER = Path(__file__).parents[2] / "data" / "terms"
LEVEL_WEIGHTS = {1: 0.0, 2: 1.0, 3: 2.5, 4: 5.0}
# Longer matches that are no cryptographic term and must not count as the one inside them.
_DECOYS = ("mac地址", "mac 地址", "mac层", "资格证书", "毕业证书", "荣誉证书", "培训证书", "ip地址")
_FULL_WIDTH = re.compile("[\uff10-\uff5a]")
_CITATION = re.compile(
    r"(?<![A-Za-z0-9])(GM|GB)\s*+/?\s*+([TZ])?[\s—-]*+(\d{4,5})(?!\d)", re.IGNORECASE
)
_FORMULA = re.compile(r"[=≡≠≈≤≥∈⊕⊗∑∏√×÷±∞∘∀∃^→⇒]|\bmod\b", re.IGNORECASE)
# 4 analysis or design, 3 procedure or comparison, 2 enumeration, 1 definition; first match wins.
_QUESTION_TYPES = (
    (4, re.compile("分析|设计|为什么|为何|平衡|权衡|评价|论证|证明|推导|优化|策略|应对|挑战")),
    (3, re.compile("如何|怎样|怎么|区别|差异|比较|对比|关系|步骤|流程|实现|计算")),
    (2, re.compile("哪些|哪几|哪个|几种|几个|多少|列举|包括|组成|是否|作用|用途|特点")),
)


@dataclass(frozen=True, slots=True)
class Term:
    """A cryptographic term of the list."""

    name: str
    category: str
    level: int  # 1 to 4
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Standard:
    """A standard, and words of which at least one belongs to a text that cites it."""

    number: str  # "GM/T 0002"
    years: tuple[str, ...]
    subject: str
    keywords: tuple[str, ...]  # empty: an umbrella standard, fits every subject
    equivalent: str


def _rows(name: str) -> list[dict[str, str]]:
    with open(TERMS_FOLDER / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _parts(cell: str, separator: str = "|") -> tuple[str, ...]:
    return tuple(part for part in cell.split(separator) if part)


@cache
def load_terms() -> dict[str, Term]:
    """Every term by its name."""
    rows = _rows("crypto_terms.tsv")
    return {
        r["term"]: Term(r["term"], r["category"], int(r["level"]), _parts(r["aliases"]))
        for r in rows
    }


@cache
def load_standards() -> dict[str, Standard]:
    """Every known standard by its number without year and part."""
    return {
        r["number"]: Standard(
            r["number"],
            _parts(r["years"], "/"),
            r["subject"],
            _parts(r["keywords"]),
            r["equivalent"],
        )
        for r in _rows("crypto_standards.tsv")
    }


def categories() -> list[str]:
    """The categories in the order of the term file."""
    return list(dict.fromkeys(term.category for term in load_terms().values()))


@cache
def _matcher() -> tuple[AhoCorasick, tuple[str, ...], tuple[bool, ...]]:
    """Automaton over all lower-case surfaces and, per surface, its term ("" for a decoy) and
    whether it begins or ends with ASCII."""
    surfaces = dict.fromkeys(_DECOYS, "")
    for term in load_terms().values():
        surfaces |= {surface.lower(): term.name for surface in (term.name, *term.aliases)}
    automaton = AhoCorasick(
        list(surfaces),
        matchkind=MatchKind.LeftmostLongest,
        implementation=Implementation.DFA,
    )
    edges = tuple(surface[0].isascii() or surface[-1].isascii() for surface in surfaces)
    return automaton, tuple(surfaces.values()), edges


def find_terms(text: str) -> Counter[str]:
    """Occurrences per term: leftmost-longest over names and aliases, letter case ignored.

    An ASCII letter or digit at the edge of a match must not touch another one: "CA" is not in
    "CAST", nor "SM4" in "SM40".
    """
    if _FULL_WIDTH.search(text):
        text = unicodedata.normalize("NFKC", text)
    text = text.lower()
    automaton, names, has_ascii_edge = _matcher()
    found: Counter[str] = Counter()
    for index, start, end in automaton.find_matches_as_indexes(text):
        if not has_ascii_edge[index] or _bounded(text, start, end):
            found[names[index]] += 1
        else:
            found.update(_inside(text, start, end))
    del found[""]
    return found


def _bounded(text: str, start: int, end: int) -> bool:
    return not (_joins(text, start) or _joins(text, end))


def _joins(text: str, at: int) -> bool:
    """Whether two ASCII letters or digits meet at this position."""
    pair = text[at - 1 : at + 1] if at > 0 else ""
    return len(pair) == 2 and pair.isascii() and pair.isalnum()


def _inside(text: str, start: int, end: int) -> list[str]:
    """Shorter terms within a match that ran into a letter: "IPSec" in "IPSec VPNs"."""
    automaton, names, _ = _matcher()
    for stop in range(end - 1, start, -1):
        if _joins(text, stop):
            continue
        spans = automaton.find_matches_as_indexes(text[start:stop])
        return [names[i] for i, a, b in spans if _bounded(text, start + a, start + b)]
    return []


def complexity(terms: Iterable[str]) -> float:
    """Term complexity S / (S + 8) in [0, 1): S sums the level weights of the distinct terms."""
    known = load_terms()
    total = sum(LEVEL_WEIGHTS[known[name].level] for name in set(terms))
    return total / (total + 8)


def question_type(question: str) -> int:
    """1 what is it, 2 which ones, 3 how or how different, 4 why, analyse, design."""
    return next((kind for kind, pattern in _QUESTION_TYPES if pattern.search(question)), 1)


def difficulty_score(question: str, answer: str, terms: Iterable[str]) -> float:
    """Heuristic difficulty in [0, 1]: question type, term complexity, formulas, citations, length.

    A guess from surface features: it orders whole files well, but agrees only weakly (rank
    correlation .3) with levels that an author gave to single questions. So an explicit
    difficulty in the data always wins over it.
    """
    citations = len(set(cited_standards(answer)))
    score = (
        0.7 * (question_type(question) - 1) / 3
        + 1.2 * complexity(terms)
        + 0.3 * min(1.0, len(_FORMULA.findall(answer)) / 6)
        + 0.2 * min(1.0, citations / 3)
        + 1.0 * min(1.0, len(answer) / 800)
    )
    return score / 3.4


def difficulty_level(score: float) -> int:
    """1 to 4: boundaries .25, .42, .52 of `difficulty_score`."""
    return 1 + sum(score >= boundary for boundary in (0.25, 0.42, 0.52))


def cited_standards(text: str) -> list[str]:
    """Numbers of the GM/T, GM/Z, GB/T, GB/Z and GB standards cited, in order, as "GM/T 0002"."""
    # A leading \b would miss most: Chinese characters are word characters too.
    return [
        f"{body.upper()}{'/' + kind.upper() if kind else ''} {number}"
        for body, kind, number in _CITATION.findall(text)
        if kind or body.upper() == "GB"
    ]


def citation_conflicts(text: str) -> list[Standard]:
    """Known standards that the text cites although none of their subject words occurs in it."""
    known, lowered, conflicts = load_standards(), "", []
    for number in dict.fromkeys(cited_standards(text)):
        standard = known.get(number)
        if standard is None or not standard.keywords:
            continue
        lowered = lowered or text.lower()
        if not any(word.lower() in lowered for word in standard.keywords):
            conflicts.append(standard)
    return conflicts
