"""Quality tells good Chinese from damaged: every component its own damage, the total all of them.

The texts are not those on which the ramps were set.
"""

import functools
import json
import random
import re
from pathlib import Path

import jieba
import numpy as np
import pytest

from finetuning.analysis import text_quality
from finetuning.analysis.text_quality import WEIGHTS, quality, quality_components, segment
from finetuning.readers.dataset import read_samples

RAW = Path(__file__).parents[2] / "data" / "raw"
_TO_TRADITIONAL = dict(
    zip(
        "国学这个们来时会说对应发现实过业当经数与为关种问题门开东车长见电无书产证书签验钥码统认识",
        "國學這個們來時會說對應發現實過業當經數與為關種問題門開東車長見電無書產證書簽驗鑰碼統認識",
        strict=True,
    )
)
_HANZI = re.compile("[\u4e00-\u9fff]+")


def _is_chinese(text: str) -> bool:
    hanzi = sum(map(len, _HANZI.findall(text)))
    return 60 <= hanzi <= 1500 and hanzi > 0.6 * len(text) and text[-1] in "。！？"


@pytest.fixture(scope="session")
def crypto_texts() -> list[str]:
    """Answers of the bundled Q&A."""
    if not any(RAW.glob("*.md")):
        pytest.skip("data/raw is empty")
    answers = [s.answer for s in read_samples([str(RAW)]).samples]
    return [text for text in answers if _is_chinese(text)][:250]


@pytest.fixture(scope="session")
def general_texts(shared_data) -> list[str]:
    """Answers about anything."""
    records = json.loads((shared_data / "formats" / "alpaca_zh_1000.json").read_text("utf-8"))
    return [r["output"].strip() for r in records[400:] if _is_chinese(r["output"].strip())][:250]


def _shuffle(text, rng):
    return _HANZI.sub(lambda m: "".join(rng.sample(m[0], len(m[0]))), text)


def _swap(text, rng):
    letters = list(text)
    for i in range(len(letters) - 1):
        if rng.random() < 0.25:
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def _random_hanzi(text, rng):
    common = [chr(c) for c in range(0x4E00, 0x9FA5) if _encodable(chr(c), "gb2312")]
    return _HANZI.sub(
        lambda m: "".join(rng.choice(common) if rng.random() < 0.3 else c for c in m[0]), text
    )


def _encodable(letter: str, encoding: str) -> bool:
    return bool(letter.encode(encoding, "ignore"))


def _mojibake_gbk(text, rng):
    return text.encode().decode("gbk", "replace")


def _mojibake_latin(text, rng):
    return text.encode().decode("latin-1")


def _mojibake_in_a_tenth(text, rng):
    size = max(4, len(text) // 10)
    start = rng.randrange(len(text) - size)
    middle = text[start : start + size].encode().decode("latin-1")
    return text[:start] + middle + text[start + size :]


def _replacement_characters(text, rng):
    return "".join("\ufffd" if rng.random() < 0.03 else c for c in text[:-1]) + "\ufffd。"


def _zero_width(text, rng):
    return "\u200b".join(re.findall(".{1,12}", text, re.DOTALL))


def _twice(text, rng):
    return f"{text}\n{text}"


def _repeat_sentence(text, rng):
    sentences = re.split("(?<=[。！？\n])", text)
    longest = max(range(len(sentences)), key=lambda i: len(sentences[i]))
    return "".join(s * (5 if i == longest else 1) for i, s in enumerate(sentences))


def _cut(text, rng):
    text = text[: rng.randint(len(text) // 2, len(text) - 3)]
    return text.rstrip("。！？!?.…；;：:”’）)】》\n ")


def _half_width(text, rng):
    return text.translate(str.maketrans("，。；：？！、", ",.;:?!,"))


def _no_punctuation(text, rng):
    return re.sub(r"\W", "", text)


def _half_traditional(text, rng):
    return "".join(_TO_TRADITIONAL.get(c, c) if rng.random() < 0.5 else c for c in text)


def _traditional(text, rng):
    return "".join(_TO_TRADITIONAL.get(c, c) for c in text)


def _english_around(text, rng):
    return f"{text[:20]} {'This sentence is not in Chinese at all and goes on for long. ' * 12}。"


def _unclosed(text, rng):
    return re.sub("[）)】”》」]", "", text)


def _short(text, rng):
    return text[:7] + "。"


# damage: the components that are made for it, and whether the total must see it too
DAMAGES = [
    (_shuffle, ["segmentation"], True),
    (_swap, ["segmentation"], True),
    (_random_hanzi, ["segmentation"], True),
    (_mojibake_gbk, ["charset", "segmentation"], True),
    (_mojibake_latin, ["garbling"], True),
    (_mojibake_in_a_tenth, ["garbling"], True),
    (_replacement_characters, ["garbling"], True),
    (_zero_width, ["garbling"], True),
    (_twice, ["repetition", "sentence_repetition"], True),
    (_repeat_sentence, ["sentence_repetition"], True),
    (_cut, ["terminal"], True),
    (_half_width, ["punctuation_width"], True),
    (_no_punctuation, ["punctuation", "clause_length"], True),
    (_half_traditional, ["script_mix", "charset"], True),
    (_traditional, ["charset"], True),
    (_english_around, ["cjk_share"], True),
    (_unclosed, ["brackets"], False),
    (_short, ["length"], True),
]


def _auc(clean, damaged) -> float:
    """P(clean > damaged) + P(equal) / 2."""
    clean, damaged = np.array(clean)[:, None], np.array(damaged)[None, :]
    return float((clean > damaged).mean() + (clean == damaged).mean() / 2)


def _eligible(texts: list[str], damage) -> list[str]:
    """The texts that the damage can change at all."""
    if damage is _unclosed:
        return [t for t in texts if sum(t.count(c) for c in "）)】”》」") >= 2]
    if damage is _no_punctuation:
        return [t for t in texts if len(_no_punctuation(t, None)) > 120]
    if damage in (_half_traditional, _traditional):
        return [t for t in texts if sum(c in _TO_TRADITIONAL for c in t) >= 6]
    if damage is _repeat_sentence:
        return [t for t in texts if len(re.findall("[。！？]", t)) >= 2]
    return texts


components_of = functools.cache(quality_components)


@pytest.mark.parametrize("kind", ["crypto_texts", "general_texts"])
def test_damage_is_seen(kind, request, subtests):
    for damage, components, in_total in DAMAGES:
        with subtests.test(damage=damage.__name__):
            texts = _eligible(request.getfixturevalue(kind), damage)
            assert len(texts) >= 20
            rng = random.Random(7)
            clean = [components_of(text) for text in texts]
            damaged = [quality_components(damage(text, rng)) for text in texts]
            for name in components:
                auc = _auc(
                    [c[name] for c in clean if name in c], [c[name] for c in damaged if name in c]
                )
                assert auc >= 0.9, name
            if in_total:
                assert _auc([quality(c) for c in clean], [quality(c) for c in damaged]) >= 0.95


@pytest.mark.parametrize("kind, lowest", [("crypto_texts", 0.95), ("general_texts", 0.9)])
def test_good_text_is_rated_good(kind, lowest, request):
    rated = [text_quality.text_quality(text) for text in request.getfixturevalue(kind)]
    assert np.mean(rated) >= lowest
    assert np.mean(np.array(rated) < 0.75) < 0.03


def test_every_component_has_its_damage():
    assert {name for _, components, _ in DAMAGES for name in components} == set(WEIGHTS)


def test_rjieba_gives_the_tokens_of_jieba(request):
    """Token identity, HMM off on both, with the terms as user dictionary."""
    texts = [*request.getfixturevalue("crypto_texts")]
    shared = Path(__file__).parents[3] / "shared" / "data"
    texts += [p.read_text("utf-8") for p in sorted((shared / "crypto_qa").glob("*.md"))]
    texts += [
        "混合 ASCII 与汉字SM4-GCM，TLS1.3，GB/T 39786-2021。",
        "",
        "🔐密钥①２３\n\t末尾 ",
        "㐀𠀀龘",
    ]
    plain = jieba.Tokenizer()
    for word in text_quality.user_words():
        plain.add_word(word, text_quality.TERM_FREQUENCY)
    for text in texts:
        assert segment(text) == plain.lcut(text, HMM=False)


def test_terms_stay_whole():
    assert "零知识证明" in segment("我们用零知识证明来证实身份")
    assert "密钥派生函数" in segment("其中密钥派生函数的输入是共享秘密")


def test_geometric_mean_by_hand():
    components = {"garbling": 0.5, "segmentation": 1.0, "terminal": 0.0}
    weights = {"garbling": 2.0, "segmentation": 1.0, "terminal": 1.0}
    expected = (0.5**2 * 1.0 * text_quality.FLOOR) ** (1 / 4)
    assert quality(components, weights) == pytest.approx(expected)


def test_nothing_to_rate_has_no_quality():
    assert quality_components(" \n ") == {}
    assert text_quality.text_quality("") is None


def test_odd_texts_stay_in_range(subtests):
    for text in ["x", "。", "\ufffd", "密", "\n密\n", "a" * 5000, "\x00", "🔐"]:
        with subtests.test(text=text):
            components = quality_components(text)
            assert components.keys() <= WEIGHTS.keys()
            assert all(0 <= value <= 1 for value in components.values())
            assert 0 < quality(components) <= 1


def test_technical_text_is_not_taken_for_garbled():
    text = "误差为 ±0.5 °C，面积 3×4 m²，参见 café 与 naïve 两例；𝑎·𝑏 → «c»，密钥长度 128 位。"
    assert quality_components(text)["garbling"] == 1.0
    assert quality_components("密钥å¯†é’¥ç®¡ç†æ˜¯")["garbling"] == 0.0
    assert quality_components("锟斤拷锟斤拷密码")["garbling"] == 0.0


TRADITIONAL = (
    "SM4 分組密碼演算法採用 128 位元分組與 128 位元金鑰，共 32 輪迭代。每一輪使用一個輪金鑰，"
    "由金鑰擴展演算法產生；解密時輪金鑰的使用順序相反，其餘結構不變。實際應用中應選擇適當的工作模式，並妥善保護金鑰。"
)
ENGLISH = (
    "A block cipher maps a block of fixed length to another one under a key. Counter mode turns it into a "
    "stream cipher: the counter is encrypted, and the result is added to the plaintext. A counter must never "
    "be used twice under one key, since the difference of both plaintexts would then be visible."
)


def test_traditional_chinese_and_english_are_rated_by_what_fits_them():
    for text in (TRADITIONAL, ENGLISH, f"{ENGLISH} In Chinese it is called 分组密码."):
        assert text_quality.text_quality(text) >= 0.9
        for damage in (_twice, _zero_width):
            damaged = text_quality.text_quality(damage(text, random.Random(7)))
            assert damaged < 0.75 < text_quality.text_quality(text), damage.__name__
    assert "segmentation" not in quality_components(TRADITIONAL), (
        "the dictionary is of simplified words"
    )
    assert not {"charset", "segmentation", "cjk_share"} & quality_components(ENGLISH).keys()


def test_other_scripts_are_not_judged():
    texts = ["これは日本語の文章です。暗号鍵の長さは百二十八ビットであり、安全に保管します。"]
    texts += [
        "블록 암호는 고정된 길이의 블록을 암호화하는 알고리즘이다.",
        "Блочный шифр работает с блоками.",
    ]
    for text in texts:
        assert quality_components(text) == {} and text_quality.text_quality(text) is None
