"""What must be exact of an answer, by its meaning, and the interval of a rate.

uv run pytest tests/evaluation/test_exactness.py
"""

import random
import time
import unicodedata

import pytest

from finetuning.evaluation.exactness import exact_facts, fact_recall, wilson, with_interval
from finetuning.evaluation.notation import number, plain

DASHES = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) == "Pd"]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("依据GB/T 39786-2021与 GM/T 0054", {"gb/t39786-2021", "gm/t0054"}),
        ("见RFC 8446、ISO/IEC 18033-3和FIPS 197", {"rfc8446", "iso/iec18033-3", "fips197"}),
        ("密钥 128 比特，共 32 轮，第 1 步", {"128", "32"}),
        ("约1,024字节，１２８位", {"1024", "128"}),
        ("由 $c = m^e mod n$ 得", {"c=m^e%n"}),
        ("所以 d·e=1 成立", {"1=d×e"}),
        ("取n=35, 128位", {"35=n", "128"}),
        ("TLS 1.3，版本 1.2.3，5%，50%", {"1.3", "50%"}),
        ("由C=E(计数器)和（n=35）得", {"35=n"}),
        ("没有可核对的内容", set()),
    ],
)
def test_facts_are_found_in_one_form(text, facts):
    assert exact_facts(text) == facts


SAME = [
    *[("GB/T 39786-2021", f"GB/T 39786{dash}2021") for dash in DASHES],
    ("GB/T 39786-2021", "ＧＢ／Ｔ　３９７８６－２０２１"),
    ("FIPS 197", "FIPS-197", "FIPS PUB 197", "fips197"),
    ("NIST SP 800-38D", "SP 800-38D", "SP800\u201138d"),
    ("X.509 证书", "X509证书", "X.509v3"),
    ("RFC 8446", "RFC8446", "RFC\u00a08446", "RFC-8446"),
    ("1,024 字节", "1024字节", "1\u202f024 字节", "１，０２４字节", "1024.0", "**1024**"),
    ("2^55 = 36 028 797 个", "$2^{55} = 36028797$", "2⁵⁵＝36,028,797"),
    ("密钥128位", "密钥\u200b12\u200b8\ufe0f位", "密钥`128`位", "密钥**128**bit", "128bits"),
    ("2^128", "2¹²⁸", "$2^{128}$", "2**128", "2^(128)", "\\(2^{128}\\)"),
    ("c = m^e mod n", "c=m^e mod n", "$c = m^{e} \\bmod n$", "c＝m^e (mod n)。"),
    ("d·e=1成立", "d·e = 1 成立", "$d \\cdot e = 1$", "d×e=1，", "1 = d * e", "d ⋅ e=1"),
    ("a ≡ b (mod n)", "$a \\equiv b \\pmod{n}$", "a≡b mod n"),
    ("φ(n) = 24", "$\\varphi(n)=24$", "\\phi(n) = 24", "ϕ(n)=24"),
    ("y = x₁ + x₂", "y = x_1 + x_2", "$y = x_{1} + x_{2}$", "y=x1+x2"),
    ("结果为 -12", "结果为−12", "结果为\u201312"),
    ("H(K, m) = 12", "H(K，m)=12", "$H(K,m) = 12$"),
    ("a ⊕ b = 12", "$a \\oplus b = 12$"),
    ("4 x 32", "4×32", "4 × 32"),
]
DIFFERENT = [
    ("y = x1", "y = ×1"),
    ("y = 3x1", "y = 3×1"),
    ("2^128", "2128", "128", "2^64"),
    ("x² = 4", "x2 = 4"),
    ("第 1,2,3 步", "123"),
    ("128，256", "128256"),
    ("12 345 两个", "12345"),
    ("128 192 256 三种", "128192256"),
    ("12", "-12", "12%", "1.2"),
    ("①128 位", "1128 位"),
    ("11½ 轮", "111/2"),
    ("1\ue0002", "12"),
    ("\uf02d12", "12"),
    ("x = a\ue000b", "x = ab", "x = a\ue001b"),
    ("2^{1}0", "2^10"),
    ("Q = d·P", "q = d·p"),
    ("GM/T 0054-2018", "GM/T 0054-2023"),
    ("SP 800-38A", "SP 800-38D"),
    ("340282366920938463463374607431768211456", "340282366920938463463374607431768211457"),
    ("0101", "101"),
]


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: ascii(spellings)[:40])
def test_one_fact_in_many_spellings_is_the_same(spellings):
    facts = {frozenset(exact_facts(f"得{text}")) for text in spellings}
    assert len(facts) == 1 and facts != {frozenset()}


@pytest.mark.parametrize("texts", DIFFERENT, ids=lambda texts: ascii(texts)[:40])
def test_different_facts_are_never_the_same(texts):
    facts = [exact_facts(f"得{text}") for text in texts]
    for place, found in enumerate(facts):
        for other in facts[place + 1 :]:
            assert not found & other, (found, other)


def test_variables_and_signs_are_no_standards():
    assert not exact_facts("变量 x1 和 x 12、内存 16 GB 都不是标准") - {"16", "12"}


def test_any_text_has_facts_in_a_moment():
    """Characters of every kind, long runs of those that have a meaning here."""
    chance = random.Random(0)
    alphabet = "0123456789,.-—^_{}()[]$\\*x×=≡%|'ab \ue000¹₂①½，。\n模"
    begun = time.monotonic()
    for _ in range(300):
        text = "".join(chance.choice(alphabet) for _ in range(400))
        text += "".join(chr(chance.randrange(1, 0xD800)) for _ in range(50))
        assert fact_recall(text, text) in (1.0, None)
    for one in alphabet:
        exact_facts(one * 20_000)
    assert time.monotonic() - begun < 10


def test_a_fact_counts_where_it_stands_exactly():
    reference = "GM/T 0054 要求 256 比特，共 64 轮"
    assert fact_recall(reference, "GM/T 0054：２５６ 比特，63 轮") == pytest.approx(2 / 3)
    assert fact_recall(reference, "GM/T 0055，2560 比特，640 轮") == 0.0
    assert fact_recall("无", "64") is None


def test_numbers_have_values_without_rounding():
    assert number("3.50") == number("3.5") and number("0x1F") == 31
    big = 2**200
    assert number(str(big)) == big != number(str(big + 1))
    for text in ("nan", "inf", "1_000", "1e9", "１", "", "1.2.3"):
        assert number(text) is None, text
    assert plain("１，０２４ ≤ 2²⁰") == "1024 ≤ 2^20"


def test_an_interval_of_a_rate_is_wilsons():
    # Newcombe (1998), table I: 81 of 263 is 0.2553 to 0.3662.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert {(wilson(0, n)[0], wilson(n, n)[1]) for n in range(1, 300)} == {(0.0, 1.0)}, "exactly"
    found = with_interval("Rate", [1.0, 0.0, 1.0, 1.0])
    assert found["Rate"] == 0.75 and found["Rate_Low"] < 0.75 < found["Rate_High"]
