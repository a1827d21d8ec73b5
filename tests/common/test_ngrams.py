"""Hashes of character n-grams are equal exactly where the n-grams are."""

import random

import numpy as np

from finetuning.common.ngrams import gram_hashes, normalized


def test_gram_hashes_are_equal_where_the_grams_are(subtests):
    for width in range(1, 17):
        with subtests.test(width=width):
            text = "".join(random.Random(width).choices("密码钥ab", k=300))
            grams = [text[i : i + width] for i in range(len(text) - width + 1)]
            hashes = gram_hashes(text, width)
            assert hashes.shape == (len(grams),) and hashes.dtype == np.uint64
            assert len(set(zip(grams, hashes.tolist(), strict=True))) == len(set(grams))
            assert len(set(hashes.tolist())) == len(set(grams))
            assert gram_hashes("密" * (width - 1), width).shape == (0,)


def test_normalized(subtests):
    for text, expected in [
        ("ＳＭ４，算法_2！", "sm4算法2"),
        ("A b\nC", "abc"),
        ("①㎝", "1"),
        ("。", ""),
        ("", ""),
    ]:
        with subtests.test(text=text):
            assert normalized(text) == expected
