"""No control character and no secret gets through.

uv run pytest tests/common/test_text.py
"""

import pytest

from finetuning.common.text import REDACTED, clean, fenced, redact, redact_values, table_cell


def test_clean(subtests):
    for hostile, shown in [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("a\rb\x00c\x7f", "abc"),
        ("right\u202eleft\u2066x\u200b", "rightleftx"),
        ("one\u2028two\u0085", "onetwo"),
        ("lone\ud800", "lone"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("密码学 ✓", "密码学 ✓"),
    ]:
        with subtests.test(hostile=hostile):
            assert clean(hostile) == shown


def test_clean_cuts():
    assert clean("密码学密码学", 3) == "密码学…"


def test_secrets_are_redacted_by_shape(subtests):
    for secret in [
        "hf_" + "a1B2" * 8,
        "sk-" + "abcdEFGH" * 4,
        "ghp_" + "x1Y2" * 9,
        "AKIA" + "ABCDEFGH12345678",
    ]:
        with subtests.test(secret=secret):
            assert secret not in redact(f"download with {secret}, please")


def test_secrets_are_redacted_by_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_API_KEY", "plainlooking")
    text = redact("https://user:pw123456@host/x token=abcdef123 plainlooking")
    assert "pw123456" not in text and "abcdef123" not in text and "plainlooking" not in text
    assert text.count(REDACTED) == 3
    assert redact("128 tokens per second") == "128 tokens per second"
    assert redact_values({"hub_token": "x", "n": 3, "l": ["a"]}) == {
        "hub_token": REDACTED,
        "n": 3,
        "l": ["a"],
    }


def test_a_word_without_end_is_looked_at_once(subtests):
    """What a looping model writes. Tried from each letter anew this would take an hour."""
    for word in ["x", "密", "-", "token", "x-"]:
        with subtests.test(word=word):
            text = word * 200_000
            assert redact(text) == text
            assert redact(f"{text} my-token = abcdef123") == f"{text} my-token = {REDACTED}"


def test_a_fence_is_longer_than_any_run_inside():
    text = "a\n````\nb"
    fence = fenced(text).split("\n")[0]
    assert fence == "`" * 5
    assert fenced(text).endswith(fence)


def test_a_table_cell_stays_one_cell():
    assert "\n" not in table_cell("a\nb") and table_cell("a|b") == "a\\|b"
