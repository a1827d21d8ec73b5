"""Hashes of character n-grams are equal exactly where the n-grams are."""

import random

import numpy as np
import pytest

from finetuning.common.ngrams import gram_hashes, normalized


@pytest.mark.parametrize("width", range(1, 17))
def test_gram_hashes_are_equal_where_the_grams_are(width):
    text = "".join(random.Random(width).choices("密码钥ab", k=300))
    grams = [text[i : i + width] for i in range(len(text) - width + 1)]
    hashes = gram_hashes(text, width)
    assert hashes.shape == (len(grams),) and hashes.dtype == np.uint64
    assert len(set(zip(grams, hashes.tolist(), strict=True))) == len(set(grams))
    assert len(set(hashes.tolist())) == len(set(grams))
    assert gram_hashes("密" * (width - 1), width).shape == (0,)


@pytest.mark.parametrize(
    "text, expected",
    [("ＳＭ４，算法_2！", "sm4算法2"), ("A b\nC", "abc"), ("①㎝", "1"), ("。", ""), ("", "")],
)
def test_normalized(text, expected):
    assert normalized(text) == expected
