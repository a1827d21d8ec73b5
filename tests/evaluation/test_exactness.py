"""What must be exact of an answer, and the interval of a rate.

uv run pytest tests/evaluation/test_exactness.py
"""

import pytest

from finetuning.evaluation.exactness import exact_facts, fact_recall, wilson, with_interval


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("依据GB/T 39786-2021与 GM/T 0054", {"gb/t39786-2021", "gm/t0054"}),
        ("见RFC 8446、ISO/IEC 18033-3和FIPS 197", {"rfc8446", "iso/iec18033-3", "fips197"}),
        ("密钥 128 比特，共 32 轮，第 1 步", {"128", "32"}),
        ("约1,024字节，１２８位", {"1024", "128"}),
        ("由 $c = m^e mod n$ 得", {"c=m^emodn"}),
        ("所以 d·e=1 成立", {"d·e=1"}),
        ("没有可核对的内容", set()),
    ],
)
def test_facts_are_found_in_one_form(text, facts):
    assert exact_facts(text) == facts


def test_a_fact_counts_where_it_stands_exactly():
    reference = "GM/T 0054 要求 256 比特，共 64 轮"
    assert fact_recall(reference, "GM/T 0054：２５６ 比特，63 轮") == pytest.approx(2 / 3)
    assert fact_recall(reference, "GM/T 0055，2560 比特，640 轮") == 0.0
    assert fact_recall("无", "64") is None


def test_an_interval_of_a_rate_is_wilsons():
    # Newcombe (1998), table I: 81 of 263 is 0.2553 to 0.3662.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == pytest.approx(1)
    found = with_interval("Rate", [1.0, 0.0, 1.0, 1.0])
    assert found["Rate"] == 0.75 and found["Rate_Low"] < 0.75 < found["Rate_High"]
