"""No control character and no secret gets through.

uv run pytest tests/common/test_text.py
"""

from html.parser import HTMLParser
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.common.text import (
    REDACTED,
    clean,
    fenced,
    redact,
    redact_values,
    table_cell,
    table_cell_of_lines,
    without,
)


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


def test_addresses_of_robots_are_redacted_and_ordinary_paths_are_not(subtests):
    """With their host, as a user gives them, and without, as libraries show them."""
    key, slack = (
        "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9",
        "T0AB12CD/B0EF34GH/aB3dE5fG7hI9jK1lM3nO5pQ7",
    )
    for path in (f"/bot/v2/hook/{key}", f"/services/{slack}", f"/webhook/send?key={key}"):
        for text in (f"at https://host{path}.", f"(url: {path})", f"'{path}'"):
            with subtests.test(text=text):
                said = redact(text)
                assert REDACTED in said and key not in said and slack.split("/")[-1] not in said
    for path in (
        "/srv/services/Training/data.jsonl",
        "/services/TEST/BASE/run.json",
        "/home/u/bot/v2/hook/notes.md",
        "https://docs.example/services/Terms",
        "/data/webhook/send.csv",
    ):
        with subtests.test(path=path):
            assert redact(path) == path


@pytest.mark.parametrize("secret", ["ab+cd/ef==", "a.b-c_d~e", "密码+密码/密码", "plain12345"])
def test_no_piece_of_a_secret_is_left(secret: str):
    """However others write it, and wherever they cut it."""
    escaped = quote(secret, safe="")
    for written in (secret, escaped, unquote(escaped), f"x{secret}x", secret.replace("/", "\\/")):
        shown = without(f"sign of {written} is wrong", secret, piece=4)
        assert shown.startswith("sign of ") and shown.endswith(" is wrong") and REDACTED in shown
        assert not [i for i in range(len(secret) - 3) if secret[i : i + 4] in shown]
    for cut in range(4, len(secret)):
        for piece in (secret[:cut], secret[-cut:]):
            assert without(f"at {piece}", secret, piece=4) == f"at {REDACTED}"
            assert without(f"at {piece}", escaped, piece=4) == f"at {REDACTED}"


def test_what_others_say_stays_readable():
    said = "404 no_service: token is not exist, see the service"
    assert without(said, "https://hooks.example.com/services/T0/B0/Qx7pl41n?access_token=") == said
    assert (
        without("404 in services", "https://hooks.example.com/services/T0") == "404 in [redacted]"
    )
    assert without("", "secret1") == "" and without("as it is") == "as it is"


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


def test_a_character_that_nobody_sees_hides_no_secret():
    secret = "hf_" + "a1B2" * 8
    for invisible in ("\u200b", "\x00", "\u2060", "\x1b[0m", "\ufeff"):
        text = redact(f"a {secret[:12]}{invisible}{secret[12:]} b tok{invisible}en=abcdef123")
        assert text == f"a {REDACTED} b token={REDACTED}"


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the text that is seen."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def tensorboard_page(markdown: str) -> Page:
    from tensorboard.plugin_util import markdown_to_safe_html

    return Page(markdown_to_safe_html(markdown))


MARKS = r"""` `` ``` ~~~ | || \ \\ < > <b> </td> <script> <img&#32;src=x> & &lt; &#91; [a](http://x) ![b](y)
[c]: <http://z> * ** _ # ## - + 1. = --- : :--- $ ^ ! ( ) { } http://x.y www.x.y a@b.c 密 x"""
BLANKS = [" ", "    ", "\t", "\n", "\n\n", "\r", "\x00", "\x02", "\u200b", "\u2028", "\x1b[1m"]
PIECES = st.one_of(st.sampled_from(MARKS.split()), st.sampled_from(BLANKS), st.characters())
TROUBLE = st.lists(PIECES, max_size=30).map("".join)
CELL_ELEMENTS = {"table", "thead", "tbody", "tr", "th", "td", "br"}


@settings(max_examples=400, deadline=None)
@given(TROUBLE)
def test_no_text_is_markup_in_tensorboard(text: str):
    """TensorBoard's own renderer makes no link, no picture, no element but ours, and shows every word."""
    fence = tensorboard_page(f"before\n\n{fenced(text)}\n\nafter")
    assert fence.elements <= {"p", "pre", "code"}
    assert "".join(clean(text).split()) in "".join(fence.text.split()) or REDACTED in redact(text)
    for cell in (table_cell, table_cell_of_lines):
        page = tensorboard_page(f"| a | b |\n| --- | --- |\n| {cell(text)} | x |")
        assert page.elements <= CELL_ELEMENTS, page.elements
        assert "".join(clean(text).split()) in "".join(page.text.split()) or REDACTED in redact(
            text
        )
        assert page.text.split()[-1:] == ["x"]


def test_a_table_cell_stays_one_cell():
    assert "\n" not in table_cell("a\nb") and table_cell("a|b") == "a\\|b"
