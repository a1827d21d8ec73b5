"""Character n-grams of a text as 64-bit hashes: for repetition, copying and likeness."""

import re
import unicodedata
from functools import lru_cache

import numpy as np

_NOT_A_LETTER = re.compile(r"[\W_]+")
_MULTIPLIER = 0xD6E8FEB86659FD93


@lru_cache(maxsize=8)  # an answer is compared in several ways, one after the other
def normalized(text: str) -> str:
    """The form in which texts are compared: letters and digits only, lower case, NFKC."""
    text = _NOT_A_LETTER.sub("", text).lower()
    if text.isascii() or unicodedata.is_normalized("NFKC", text):
        return text
    return _NOT_A_LETTER.sub("", unicodedata.normalize("NFKC", text)).lower()


def code_points(text: str) -> np.ndarray:
    """(len(text),) uint32; lone surrogates pass."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def gram_hashes(text: str, width: int) -> np.ndarray:
    """Hash of every n-gram of `width` characters, (len(text) - width + 1,) uint64; short text: (0,).

    Equal grams have equal hashes; different ones collide with a probability near 2**-64.
    """
    values = code_points(text).astype(np.uint64) + np.uint64(1)
    result, done, span = None, 0, 1  # `values` covers `span` characters, `result` covers `done`
    while span <= width:
        if width & span:
            result = values if result is None else _joined(result, values, done)
            done += span
        values = _joined(values, values, span)
        span *= 2
    return result


def _joined(left: np.ndarray, right: np.ndarray, left_width: int) -> np.ndarray:
    """Hashes of grams made of a gram of `left_width` characters and the one that follows it."""
    right = right[left_width:]
    count = min(len(left), len(right))
    mixed = left[:count] * np.uint64(_MULTIPLIER) + right[:count]
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(32))
