"""Terms by longest match, difficulty, and citations that do not fit their text."""

import re
from collections import Counter

import pytest

from finetuning.analysis import crypto_terms
from finetuning.analysis.crypto_terms import (
    citation_conflicts,
    cited_standards,
    complexity,
    difficulty_level,
    difficulty_score,
    find_terms,
    load_standards,
    load_terms,
    question_type,
)


def test_term_file_is_sound():
    rows = crypto_terms._rows("crypto_terms.tsv")
    surfaces = [s.lower() for t in load_terms().values() for s in (t.name, *t.aliases)]
    assert len(rows) == len(load_terms()) >= 400
    assert [s for s, n in Counter(surfaces).items() if n > 1] == []
    assert {t.level for t in load_terms().values()} == {1, 2, 3, 4}
    assert all(t.category and s.strip() == s for t in load_terms().values() for s in t.aliases)
    assert not set(crypto_terms._DECOYS) & set(surfaces)


def test_standards_file_is_sound():
    standards = load_standards()
    assert len(standards) == len(crypto_terms._rows("crypto_standards.tsv")) >= 77
    for number, standard in standards.items():
        assert re.fullmatch(r"G[BM](/[TZ])? \d{4,5}", number)
        assert all(re.fullmatch(r"(19|20)\d\d", year) for year in standard.years)
        if standard.equivalent:
            assert standards[standard.equivalent].equivalent == number


def test_every_surface_finds_its_term():
    for term in load_terms().values():
        for surface in (term.name, *term.aliases):
            assert find_terms(f"（{surface}）") == {term.name: 1}, surface


def test_longest_match_and_boundaries(subtests):
    for text, expected in [
        ("SM4算法与ＳＭ３和sm2", {"SM4": 1, "SM3": 1, "SM2": 1}),
        ("密钥管理系统管理密钥", {"密钥管理系统": 1, "密钥": 1}),
        ("祖冲之算法即ZUC", {"ZUC": 2}),
        ("CAST、SM40、RSAX、XRSA、1RSA", {}),
        ("CA机构签发", {"CA": 1}),
        ("用CA签", {"CA": 1}),
        ("IPSec VPNs", {"IPSec": 1}),
        ("MAC地址不是MAC", {"消息鉴别码": 1}),
        ("AES-256-GCM", {"AES": 1, "GCM": 1}),
        ("无关的话", {}),
        ("", {}),
    ]:
        with subtests.test(text=text):
            assert dict(find_terms(text)) == expected


def test_matches_equal_a_slow_search():
    """Leftmost-longest by regular expression, on text made of surfaces glued at random."""
    import random

    rng = random.Random(3)
    names = {s.lower(): t.name for t in load_terms().values() for s in (t.name, *t.aliases)}
    names |= dict.fromkeys(crypto_terms._DECOYS, "")
    surfaces = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, surfaces)))
    for _ in range(300):
        pieces = rng.choices(surfaces, k=6)
        text = "".join(p + rng.choice(["，", "的", "", " "]) for p in pieces)
        slow = Counter()
        for match in pattern.finditer(text):
            if crypto_terms._bounded(text, *match.span()):
                slow[names[match[0]]] += 1
            else:
                slow.update(crypto_terms._inside(text, *match.span()))
        del slow[""]
        assert find_terms(text) == slow


def test_complexity_is_by_distinct_terms_and_level():
    assert complexity([]) == 0.0
    assert complexity(["密钥"]) == 0.0  # level 1
    assert complexity(["SM4", "SM4"]) == pytest.approx(1 / 9)  # level 2
    assert complexity(["SM4", "SM9", "同态加密"]) == pytest.approx(8.5 / 16.5)


def test_question_types(subtests):
    for question, kind in [
        ("什么是机密性？", 1),
        ("密码功能有哪些？", 2),
        ("如何使用SM4？", 3),
        ("SM2与RSA的区别是什么？", 3),
        ("为什么不能重用随机数？", 4),
        ("请设计一套密钥管理方案", 4),
    ]:
        with subtests.test(question=question):
            assert question_type(question) == kind


def test_difficulty_rises_with_what_makes_it_hard():
    easy_question, hard_question = (
        "什么是密钥？",
        "分析SM9双线性对的安全性，为什么需要嵌入次数足够大？",
    )
    easy = "密钥是控制密码变换的参数。"
    hard = "设e: G1×G2→GT为双线性对，安全性依据离散对数，嵌入次数与MOV攻击有关；" * 6
    low = difficulty_score(easy_question, easy, find_terms(easy))
    high = difficulty_score(hard_question, hard, find_terms(hard))
    assert 0 <= low < 0.25 < 0.52 < high <= 1
    assert (difficulty_level(low), difficulty_level(high)) == (1, 4)
    assert [difficulty_level(s) for s in (0.24, 0.25, 0.42, 0.52)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("question", "answer", "terms", "expected"),
    [
        ("什么是它？", "", (), 0.0),
        ("为什么是它？", "", (), 0.7),
        ("什么是它？", "甲" * 400, (), 0.5),
        ("什么是它？", "甲" * 900, (), 1.0),
        ("什么是它？", "", ("SM9", "SM9"), 1.2 * complexity(["SM9"])),
    ],
)
def test_each_part_of_the_difficulty_has_its_weight(question, answer, terms, expected):
    assert difficulty_score(question, answer, terms) == pytest.approx(expected / 3.4)


def test_citations(subtests):
    for text, expected in [
        ("依据GB/T 39786-2021和GM/T0002—2012", ["GB/T 39786", "GM/T 0002"]),
        ("gm/t 0003.2、GM/Z 4001、GB 35114", ["GM/T 0003", "GM/Z 4001", "GB 35114"]),
        ("内存12GB 3200MHz，ISO/IEC 15843，GM 0002", []),
        ("GB/T 397860123", []),
    ]:
        with subtests.test(text=text):
            assert cited_standards(text) == expected


def test_citation_conflicts(subtests):
    for text, conflicts in [
        ("ZUC算法由GM/T 0002-2012规定", ["GM/T 0002"]),
        ("SM4算法由GM/T 0002-2012规定", []),
        ("合同的时间戳应符合GM/T 0032", ["GM/T 0032"]),
        ("基于角色的访问控制应符合GM/T 0032", []),
        ("任何系统都应符合GB/T 39786-2021与GM/T 0115", []),  # umbrella standards
        ("依据GM/T 9999", []),  # unknown
        ("用RFID的GM/T 0045，再引GM/T 0045", ["GM/T 0045"]),
    ]:
        with subtests.test(text=text):
            assert [standard.number for standard in citation_conflicts(text)] == conflicts


def test_real_data_cites_without_conflict(shared_data):
    for path in (shared_data / "crypto_qa").glob("*.md"):
        assert citation_conflicts(path.read_text("utf-8")) == []


def test_real_data_has_terms(shared_data):
    from finetuning.readers.dataset import read_samples

    samples = read_samples([str(shared_data / "crypto_qa")]).samples
    found = [find_terms(f"{s.question}\n{s.answer}") for s in samples]
    assert len(samples) == 48 and sum(bool(terms) for terms in found) >= 46
