"""How undamaged a text is, in [0, 1], from components that each see one kind of damage.

Chinese is judged by all of them; Traditional Chinese by its own character set and without a
dictionary, which is of simplified words; a text without Chinese, such as English, by what damages any
text. A text of kana, Hangul, Cyrillic and the like is not judged: it has no component.

A component is a raw measure mapped by a linear ramp to [0, 1]. The total is the weighted geometric
mean, so that one ruined property is not averaged away. It says that a text is readable, not that it
is right; swapped words are invisible to it. Ramps were set on Q&A about Chinese standards.
"""

import math
import re
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from finetuning.analysis.crypto_terms import load_terms
from finetuning.common.ngrams import code_points, gram_hashes

if TYPE_CHECKING:
    import rjieba

TERM_FREQUENCY = 20_000  # keeps 95% of the terms whole; jieba's own suggestion keeps 94%
FLOOR = 0.02  # a component of 0 pulls the total down but not to 0
OTHER_SCRIPTS = (
    0.2  # share of kana, Hangul, Cyrillic … among the letters above which a text is not judged
)
FEW, OTHER_SET = 5, 0.05  # characters that only Traditional has; simplified ones for each of them
WEIGHTS = {
    "segmentation": 2.0,
    "garbling": 2.0,
    "charset": 1.5,
    "script_mix": 1.0,
    "cjk_share": 1.0,
    "repetition": 1.0,
    "sentence_repetition": 1.0,
    "punctuation": 1.0,
    "punctuation_width": 1.0,
    "terminal": 1.5,
    "clause_length": 0.5,
    "brackets": 0.5,
    "length": 0.5,
}
# A chain of thought may stop at a list.
THINKING_WEIGHTS = {name: weight for name, weight in WEIGHTS.items() if name != "terminal"}
# A question may be short and need not end with a full stop.
QUESTION_WEIGHTS = {
    name: weight
    for name, weight in WEIGHTS.items()
    if name not in ("terminal", "length", "clause_length", "punctuation")
}
_SENTENCE_END = re.compile(r"[。！？!?；;\n]+")
_MARKS = "，。、；：？！“”‘’（）《》〈〉【】「」『』〔〕…—～·,.;:?!()[]{}<>\"'/-|*#`=+"
_TERMINAL = "。！？!?.…；;：:”’\"'）)】]》」』}`|>~～*"
_PAIRS = ("（）", "()", "《》", "【】", "[]", "“”", "「」", "{}")
_NUMBERING = re.compile(r"(?:^|[\s。；;，,])[0-9a-zA-Z一二三四五六七八九十]{1,2}[)）]")
_WORD = re.compile("[A-Za-z]{4,}")
_RESULT = re.compile(r"[：:=≈≡][^：:=≈≡。，\n]{1,40}$")  # "最终答案：5.06" needs no full stop
_GARBLED_RUNS = ("锟斤拷", "烫烫", "屯屯")

# Classes of a character, as bits.
(
    HANZI,
    GB2312,
    TRADITIONAL,
    SIMPLIFIED,
    MARK,
    HALF_MARK,
    FULL_MARK,
    SPACE,
    BROKEN,
    LATIN_1,
    LETTER,
    DIGIT,
    FOREIGN,
    BIG5,
) = (1 << bit for bit in range(14))


@cache
def _classes() -> np.ndarray:
    """Class bits (0x110000,) uint16 of every code point."""
    table = np.zeros(0x110000, np.uint16)
    for first, last in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)):
        table[first : last + 1] |= HANZI
    simplified, traditional = _codec_hanzi("gb2312"), _codec_hanzi("big5")
    table[list(simplified)] |= GB2312
    table[list(traditional)] |= BIG5
    # What only one of the two character sets can write tells the scripts apart.
    table[list(simplified - traditional)] |= SIMPLIFIED
    table[list(traditional - simplified)] |= TRADITIONAL
    for marks, bit in ((_MARKS, MARK), (",;:?!.", HALF_MARK), ("，；：？！。", FULL_MARK)):
        table[[ord(mark) for mark in marks]] |= bit
    table[[0x20, 0x09, 0x0A, 0x0D, 0x3000, 0xA0]] |= SPACE
    table[[*range(0x09), *range(0x0B, 0x0D), *range(0x0E, 0x20), *range(0x7F, 0xA0)]] |= BROKEN
    table[[0xFFFD, 0xFEFF, *range(0x200B, 0x2010), *range(0x2060, 0x2065)]] |= BROKEN
    table[0xD800:0xF900] |= BROKEN  # surrogates and private use
    table[[*range(0x41, 0x5B), *range(0x61, 0x7B)]] |= LETTER
    table[0x30:0x3A] |= DIGIT
    # Cyrillic to Arabic, kana, Hangul; Greek is left out, as formulas use it.
    for first, last in ((0x100, 0x24F), (0x400, 0x6FF), (0x3040, 0x30FF), (0xAC00, 0xD7AF)):
        table[first : last + 1] |= FOREIGN
    # UTF-8 read as Latin-1 or Windows-1252: runs of these. × ° ± · ² ³ µ stand alone in good text.
    table[0x80:0x100] |= LATIN_1
    table[[ord(c) for c in "‚ƒ„†‡ˆ‰Š‹ŒŽ™š›œžŸ¤¥¦"]] |= LATIN_1
    table[[ord(c) for c in "×÷°±·²³¹µ«»§"]] = 0
    return table


def _codec_hanzi(encoding: str) -> set[int]:
    """Code points of the Chinese characters that a two-byte encoding can write."""
    pairs = bytes(b for lead in range(0xA1, 0xFA) for t in range(0x40, 0xFF) for b in (lead, t))
    chunks = (pairs[i : i + 2].decode(encoding, "ignore") for i in range(0, len(pairs), 2))
    return {ord(c) for c in chunks if len(c) == 1 and 0x4E00 <= ord(c) <= 0x9FFF}


def user_words() -> list[str]:
    """Names and aliases of the terms that the segmenters get as a user dictionary."""
    surfaces = (s for term in load_terms().values() for s in (term.name, *term.aliases))
    return [s for s in surfaces if len(s) > 1 and all("\u4e00" <= c <= "\u9fff" for c in s)]


@cache
def _segmenter() -> "rjieba.Jieba":
    import rjieba  # its dictionary takes longer to load than all other imports of this module

    segmenter = rjieba.Jieba()
    for word in user_words():
        segmenter.add_word(word, TERM_FREQUENCY, "n")
    return segmenter


def segment(text: str) -> list[str]:
    """Words by jieba's dictionary and the terms, without HMM; the same tokens as jieba's own."""
    return _segmenter().cut(text, False)


def character_classes(text: str) -> np.ndarray:
    """Class bits (len(text),) uint16."""
    return _classes()[code_points(text)]


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _count(classes: np.ndarray, bit: int) -> int:
    return int(np.count_nonzero(classes & bit))


def quality_components(text: str) -> dict[str, float]:
    """The components of `WEIGHTS`, each in [0, 1]; one that the text gives no ground for is absent.

    An empty text has none, nor has one in a script that is not judged. Cost is linear in the length.
    """
    text = text.strip()
    if not text:
        return {}
    classes = character_classes(text)
    hanzi = _count(classes, HANZI)
    visible = max(1, len(classes) - _count(classes, SPACE))
    words = sum(map(len, _WORD.findall(text)))
    other_scripts = int(np.count_nonzero((classes & (FOREIGN | LATIN_1)) == FOREIGN))
    if other_scripts > OTHER_SCRIPTS * (hanzi + words + other_scripts):
        return {}
    result = {
        "garbling": _garbling(text, classes),
        "repetition": _repetition(text),
        "sentence_repetition": _sentence_repetition(text),
        "terminal": _terminal(text),
        "brackets": _brackets(text),
    }
    if hanzi > 0.02 * visible:  # otherwise the text isn't Chinese
        # Formulas and numbers are of no language; words are, and letters of other scripts.
        foreign = _count(classes, FOREIGN | LATIN_1) + words
        result["cjk_share"] = _ramp(hanzi / (hanzi + foreign), 0.05, 0.30)
        result |= _hanzi_components(text, classes, hanzi, visible)
    return result


def _hanzi_components(text: str, classes: np.ndarray, hanzi: int, visible: int):
    """The components that only make sense where there are Chinese characters."""
    traditional, simplified = _count(classes, TRADITIONAL), _count(classes, SIMPLIFIED)
    is_traditional = traditional > FEW and simplified <= OTHER_SET * traditional
    in_words = None if is_traditional else _in_words(text, classes)
    marks = classes & (MARK | SPACE)
    result = {
        "charset": _ramp(_count(classes, BIG5 if is_traditional else GB2312) / hanzi, 0.95, 1.0),
        "punctuation": _punctuation_density(_count(classes, MARK) / visible, hanzi),
        "clause_length": 1.0 - _ramp(_longest_run(marks), 60, 160),
        "length": _ramp(visible, 8, 30),
    }
    if in_words is not None:
        result["segmentation"] = _ramp(in_words, 0.50, 0.74)
    if traditional + simplified:
        share = min(traditional, simplified) / (traditional + simplified)
        result["script_mix"] = _ramp(1 - 2 * share, 0.7, 0.99)
    after_hanzi = classes[1:][(classes[:-1] & HANZI) > 0]
    full, half = _count(after_hanzi, FULL_MARK), _count(after_hanzi, HALF_MARK)
    if full + half:
        result["punctuation_width"] = _ramp(full / (full + half), 0.3, 0.95)
    return result


def quality(components: dict[str, float], weights: dict[str, float] | None = None) -> float | None:
    """Weighted geometric mean in [FLOOR, 1] of the components present; None when there are none."""
    weights = weights or WEIGHTS
    present = [(weights[name], value) for name, value in components.items() if name in weights]
    total = sum(weight for weight, _ in present)
    if total == 0:
        return None
    return math.exp(sum(w * math.log(max(FLOOR, value)) for w, value in present) / total)


def text_quality(text: str, weights: dict[str, float] | None = None) -> float | None:
    """Quality of one text, see `quality`; pass `QUESTION_WEIGHTS` for a question."""
    return quality(quality_components(text), weights)


def _in_words(text: str, classes: np.ndarray) -> float | None:
    """Share of the Chinese characters with a Chinese neighbour that belong to a word of two or
    more ("得 x 模 n" says nothing), with ten more taken for good, as a few characters tell little;
    None when none has a neighbour."""
    hanzi = (classes & HANZI) > 0
    beside = np.zeros(len(hanzi), bool)
    beside[1:] |= hanzi[:-1]
    beside[:-1] |= hanzi[1:]
    joined = character_classes("\n" + "\n".join(segment(text)) + "\n")
    breaks = (joined & SPACE) > 0
    single = np.count_nonzero((joined[1:-1] & HANZI > 0) & breaks[:-2] & breaks[2:])
    alone, total = np.count_nonzero(hanzi & ~beside), np.count_nonzero(hanzi)
    return 1 - (single - alone) / (total - alone + 10) if total > alone else None


def _terminal(text: str) -> float:
    """1 when the text comes to an end, 0.25 when it stops within a sentence."""
    is_result = text[-1].isascii() and _RESULT.search(text[-60:])
    return 1.0 if text[-1] in _TERMINAL or is_result else 0.25


def _garbling(text: str, classes: np.ndarray) -> float:
    """1 without replacement, private-use, control, zero-width characters and mojibake; 5% is 0."""
    latin = (classes & LATIN_1) > 0
    runs = np.zeros(len(latin), bool)
    runs[1:] |= latin[1:] & latin[:-1]
    runs[:-1] |= latin[1:] & latin[:-1]
    damaged = np.count_nonzero(runs | ((classes & BROKEN) > 0))
    damaged += sum(len(run) * text.count(run) for run in _GARBLED_RUNS)
    return _ramp(1 - 10 * damaged / len(text), 0.5, 1.0)


def _repetition(text: str) -> float:
    """From the share of characters in 10-grams that occurred before (as Gopher counts them)."""
    hashes = gram_hashes(text, 10)
    order = np.argsort(hashes, kind="stable")  # stable: the first of equal grams stays first
    later = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    if len(later) == 0:
        return 1.0
    starts = np.bincount(later, minlength=len(text) + 1)
    starts[10:] -= starts[:-10].copy()  # a gram covers ten characters
    covered = np.count_nonzero(np.cumsum(starts[: len(text)]))
    return _ramp(1 - covered / len(text), 0.3, 0.7)


def _sentence_repetition(text: str) -> float:
    """From distinct / all sentences of at least 6 characters."""
    sentences = [s for part in _SENTENCE_END.split(text) if len(s := part.strip()) >= 6]
    return _ramp(len(set(sentences)) / len(sentences), 0.5, 1.0) if sentences else 1.0


def _punctuation_density(density: float, hanzi: int) -> float:
    """1 between 2% and 25% of the visible characters; a short text needs none."""
    too_many = 1 - _ramp(density, 0.25, 0.5)
    return too_many if hanzi < 30 else too_many * _ramp(density, 0.0, 0.02)


def _longest_run(marks: np.ndarray) -> int:
    """Most characters in a row without punctuation or space."""
    stops = np.flatnonzero(np.concatenate([[1], marks, [1]]))
    return int(np.diff(stops).max()) - 1


def _brackets(text: str) -> float:
    """From the share of brackets and quotes that have their other half."""
    counts = [(text.count(left), text.count(right)) for left, right in _PAIRS]
    total = sum(left + right for left, right in counts)
    if total == 0:
        return 1.0
    # "1)" and "a）" number a list.
    numbering = len(_NUMBERING.findall(text))
    unmatched = sum(abs(left - right) for left, right in counts)
    unmatched, total = max(0, unmatched - numbering), max(1, total - numbering)
    return _ramp(1 - unmatched / total, 0.3, 1.0)
