"""Near duplicates against a brute-force Jaccard join over all pairs.

uv run pytest -m "not long" tests/data/test_near_duplicates.py
"""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetuning.common.ngrams import normalized
from finetuning.common.temporary_file import TemporaryFile
from finetuning.data import near_duplicates
from finetuning.data.near_duplicates import SampleClusters, jaccard, near_duplicate_clusters
from finetuning.readers.sample import Sample
from tests.helpers.similar_texts import similar_texts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def exact_only(monkeypatch):
    """The other join, which would find nearly the same, is not made, however many pairs are compared."""
    monkeypatch.setattr(near_duplicates, "PAIRS_A_TEXT", 1_000_000)
    monkeypatch.setattr(near_duplicates, "_MEETINGS_A_TEXT", 1_000_000)
    monkeypatch.setattr(near_duplicates, "_join_minhash", None)


@pytest.fixture
def compared(monkeypatch):
    """A one for each comparison of two texts."""
    return _counted(monkeypatch, "_similarity")


def _counted(monkeypatch, name: str) -> list[int]:
    """A one for each call of a function of near_duplicates from here on."""
    made, function = [], getattr(near_duplicates, name)

    def call(*given):
        made.append(1)
        return function(*given)

    monkeypatch.setattr(near_duplicates, name, call)
    return made


def _grams(text: str) -> set[str]:
    text = normalized(text)
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def _brute_force(texts: list[str], threshold: float) -> np.ndarray:
    """Components by comparing every pair of 5-gram sets (strings, no hashes)."""
    sets = [_grams(text) for text in texts]
    labels = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            common = len(sets[i] & sets[j])
            if common / (len(sets[i]) + len(sets[j]) - common) >= threshold - 1e-9:
                low, high = sorted((labels[i], labels[j]))
                labels = [low if label == high else label for label in labels]
    return np.array(labels)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("exact_limit", [10_000, 0], ids=["exact", "minhash"])
def test_clusters_equal_brute_force(threshold, exact_limit, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_join_minhash" if exact_limit else "_join_exact", None)
    texts = similar_texts(200, seed=1, changed=100)
    expected = _brute_force(texts, threshold)
    assert len(set(expected.tolist())) < len(texts) - 20  # there is something to find
    found = near_duplicate_clusters(texts, threshold, exact_limit=exact_limit)
    np.testing.assert_array_equal(found, expected)


def test_real_questions_exact_and_minhash_agree(shared_data):
    texts = [p.read_text("utf-8") for p in sorted((shared_data / "crypto_qa").glob("*.md"))]
    pairs = [block for text in texts for block in text.split("###")]
    exact = near_duplicate_clusters(pairs, 0.5)
    np.testing.assert_array_equal(exact, _brute_force(pairs, 0.5))
    np.testing.assert_array_equal(exact, near_duplicate_clusters(pairs, 0.5, exact_limit=0))


def test_equal_after_normalization_is_one_cluster():
    texts = ["SM4 是什么？", "ｓｍ４是什么", "sm4，是什么!", "SM3 是什么？", ""]
    assert near_duplicate_clusters(texts).tolist() == [0, 0, 0, 3, 4]


def test_order_does_not_change_the_clusters():
    texts = similar_texts(150, seed=2, changed=60)
    order = np.random.default_rng(0).permutation(len(texts))
    labels = near_duplicate_clusters(texts)
    shuffled = near_duplicate_clusters([texts[i] for i in order])
    same = labels[order][:, None] == labels[order][None, :]
    np.testing.assert_array_equal(same, shuffled[:, None] == shuffled[None, :])


def test_a_large_family_is_one_cluster():
    head, tail = similar_texts(2, seed=3)
    body = (head + tail) * 3
    family = [f"{body[:80]}{i:04d}{body[80:]}" for i in range(700)]
    assert len(set(near_duplicate_clusters(family, exact_limit=0).tolist())) == 1
    assert len(set(near_duplicate_clusters(family).tolist())) == 1


def test_empty_and_single():
    assert near_duplicate_clusters([]).shape == (0,)
    assert near_duplicate_clusters(["密钥"]).tolist() == [0]
    assert near_duplicate_clusters(["密钥"], exact_limit=0).tolist() == [0]


def test_jaccard_of_known_texts():
    assert jaccard("abcdefg", "ABC-defg") == 1.0
    assert jaccard("abcdefg", "abcdefh") == pytest.approx(2 / 4)
    assert jaccard("abcde", "vwxyz") == 0.0


def test_band_width_keeps_the_recall():
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        rows = near_duplicates._rows_per_band(threshold)
        assert 1 - (1 - threshold**rows) ** (near_duplicates._NUM_PERM // rows) >= 0.999


def test_texts_are_cut_into_shingles_once_as_far_as_the_file_may_grow(monkeypatch):
    """Questions of one pattern meet in many bands; cut anew each time they took five times as long."""
    made, cut = [], near_duplicates.shingles

    def counted(text):
        made.append(text)
        return cut(text)

    texts = [
        f"请说明密码应用方案第{i * 7919}号系统在第{i % 7}层面的密评要求与高风险判定"
        for i in range(300)
    ]
    expected = near_duplicate_clusters(texts)
    monkeypatch.setattr(near_duplicates, "shingles", counted)
    near_duplicate_clusters(texts, exact_limit=0)
    assert len(made) == 300
    monkeypatch.setattr(near_duplicates, "_KEPT_BYTES", 10_000)
    made.clear()
    labels = near_duplicate_clusters(texts, exact_limit=0)
    assert len(made) > 300, "those that are not kept are made anew"
    np.testing.assert_array_equal(labels, expected)


SIGNS = "密钥分组杂凑签名证书随机数协议曲线填充轮函数明文密文算法安全国家标准加密解密认证完整性"


def form_letters(count: int, slots: int = 20) -> list[str]:
    """One letter, three phrases to choose from in each slot: all share rare shingles, few are near."""
    drawn = random.Random(5)
    fixed = ["".join(drawn.choices(SIGNS, k=20)) for _ in range(slots)]
    phrases = [["".join(drawn.choices(SIGNS, k=12)) for _ in range(3)] for _ in range(slots)]
    return [
        "".join(text + drawn.choice(choices) for text, choices in zip(fixed, phrases, strict=True))
        for _ in range(count)
    ]


def test_the_work_for_form_letters_grows_with_their_number(compared):
    """Every pair would be compared, 600 for each of 1,200 texts; 15 if nobody counted those in vain."""
    for count in (600, 1200):
        compared.clear()
        near_duplicate_clusters(form_letters(count))
        assert 1 < len(compared) / count < 7, count


@pytest.mark.parametrize("alone", ["PAIRS_A_TEXT", "_MEETINGS_A_TEXT"])
def test_either_limit_alone_ends_the_exact_join(alone, monkeypatch):
    """Each holds for what the other lets through: few meetings of many pairs, many of few."""
    for limit in {"PAIRS_A_TEXT", "_MEETINGS_A_TEXT"} - {alone}:
        monkeypatch.setattr(near_duplicates, limit, 1_000_000)
    asked = _counted(monkeypatch, "_join_minhash")
    near_duplicate_clusters(form_letters(300))
    assert asked == [1]


def test_near_ones_are_found_among_form_letters():
    """A letter with one character changed has its partner found, whatever the family around it."""
    letters = form_letters(600)
    changed = [text[:-1] + "改" for text in letters[:100]]
    labels = near_duplicate_clusters([*letters, *changed])
    found = sum(labels[i] == labels[600 + i] for i in range(100))
    assert found >= 99, found


def arithmetic(count: int) -> list[str]:
    """One line, other numbers: short texts that share many shingles, few of them near."""
    drawn = random.Random(5)
    return [
        f"计算{drawn.randint(10, 30)}乘以{drawn.randint(10, 99)}再加{drawn.randint(10, 30)}等于多少"
        for _ in range(count)
    ]


def long_patterns(count: int) -> list[str]:
    """A long text with sixty slots for any word."""
    drawn = random.Random(5)
    fixed = ["".join(drawn.choices(SIGNS, k=20)) for _ in range(60)]
    return ["".join(f + "".join(drawn.choices(SIGNS, k=6)) for f in fixed) for _ in range(count)]


@pytest.mark.parametrize("texts", [arithmetic(300), long_patterns(40)], ids=["arithmetic", "long"])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_patterns_are_joined_as_brute_force_joins_them(texts, threshold, exact_only):
    found = near_duplicate_clusters(texts, threshold)
    np.testing.assert_array_equal(found, _brute_force(texts, threshold))


@pytest.mark.parametrize("threshold", [0.3, 0.8, 1.0])
def test_short_and_repeated_texts_are_joined_as_brute_force_joins_them(threshold, exact_only):
    """Sets of one to a dozen shingles, where a prefix is nearly all of them."""
    drawn = random.Random(7)
    texts = ["".join(drawn.choices("密钥分", k=drawn.randint(1, 16))) for _ in range(300)]
    found = near_duplicate_clusters(texts, threshold)
    np.testing.assert_array_equal(found, _brute_force(texts, threshold))


@pytest.mark.parametrize("texts", [arithmetic, long_patterns])
def test_few_of_a_pattern_are_compared(texts, compared, exact_only):
    """Those with several rare shingles in common, not all that share one: about two a text."""
    near_duplicate_clusters(texts(800))
    assert len(compared) < 800


def test_what_occurs_once_is_in_no_prefix():
    """Nobody shares it, and it would be most of what is joined."""
    drawn = random.Random(5)
    texts = ["".join(drawn.choices(SIGNS * 30, k=60)) for _ in range(200)]
    with TemporaryFile() as file:
        sets = near_duplicates._Sets(texts, np.arange(200), file)
        prefixes, _ = near_duplicates._prefixes(sets, 0.8)
        assert prefixes.nnz < 0.05 * sets.sizes.sum()


@pytest.mark.slow
def test_both_searches_are_made_at_once_by_two_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_POOL_FROM", 100)
    samples = [Sample(text, "", f"{i}") for i, text in enumerate(arithmetic(300))]
    alone = SampleClusters(samples)
    expected = alone.questions, alone.pairs
    monkeypatch.setattr(near_duplicates, "near_duplicate_clusters", None)  # not by this process
    for folder in (None, tmp_path):
        at_once = SampleClusters(samples, "fingerprint", folder, workers=2)
        at_once.search_both()
        for found, wanted in zip((at_once.questions, at_once.pairs), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


# ------------------------------------------------------------------------------------- temporary files

WAITS = """
import signal
from finetuning.data import near_duplicates

def wait(*_):
    print("made", flush=True)
    signal.pause()

near_duplicates._likely_pairs = wait
near_duplicates.near_duplicate_clusters(["密钥有多长？", "分组有多长？"] * 100, exact_limit=0)
"""
FILLS = """
import random
from finetuning.common.errors import UserError
from finetuning.data.near_duplicates import near_duplicate_clusters

drawn = random.Random(1)
texts = ["".join(chr(0x4E00 + drawn.randrange(2000)) for _ in range(12)) for _ in range(9000)]
try:
    near_duplicate_clusters(texts, exact_limit=0)
except UserError as error:
    print(error)
"""


def _started(code: str, folder: Path, *before: str) -> subprocess.Popen:
    """A program whose temporary files lie in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    return subprocess.Popen(
        [*before, sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_remains_of_one_that_a_signal_ends(tmp_path, how):
    child = _started(WAITS, tmp_path)
    try:
        assert child.stdout.readline() == "made\n", child.stderr.read()
    finally:
        child.send_signal(getattr(signal, how))
        child.communicate()
    assert child.returncode and not list(tmp_path.iterdir())


def _may_mount() -> bool:
    """Whether this user may have a file system of his own."""
    trial = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "mount",
        "-t",
        "tmpfs",
        "none",
        "/mnt",
    ]
    return (
        bool(shutil.which(trial[0])) and not subprocess.run(trial, capture_output=True).returncode
    )


@pytest.mark.slow
@pytest.mark.skipif(not _may_mount(), reason="needs a file system of its own")
@pytest.mark.parametrize("kilobytes", [256, 1024], ids=["sets", "signatures"])
def test_a_full_temporary_folder_is_said(tmp_path, kilobytes):
    """A page of a mapped file that finds no room would end the process by a signal."""
    mount = f'mount -t tmpfs -o size={kilobytes}k none "{tmp_path}" && exec "$@"'
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    child = _started(FILLS, tmp_path, *own)
    said, complaint = child.communicate()
    assert child.returncode == 0, complaint
    assert said.startswith(f"can't write to the temporary folder {tmp_path}: No space left")
    assert "TMPDIR" in said and said.count("\n") == 1
