"""Leftovers of other programs in the texts of a sample: told, since they are learnt letter by letter."""

import re
from collections.abc import Iterator

from finetuning.readers.fields import Oddity
from finetuning.readers.sample import WIDE_TAG, Sample

# What is left over, and a letter without which it is not there: a letter is found faster than an expression.
_KINDS = {
    "marks of another format": (
        ("<", r"<(?:\|[A-Za-z][\w-]{0,40}\|>|｜[^｜<>\n]{1,40}｜>|/?s>|</?SYS>>|/?(?:bos|eos)>"
              r"|(?:start|end)_of_turn>|sop>|eop>)"),
        ("]", r"\[(?:/?INST|CLS|SEP|gMASK|sMASK)\]"),
    ),
    "escapes": (
        ("\\", r"\\(?:n(?![a-zA-Z])|u[0-9a-fA-F]{4}|t(?![a-zA-Z]))"),
        ("_", r"_x00[0-9A-F]{2}_"),
    ),
    "bits of HTML": (
        ("&", r"&(?:lt|gt|amp|nbsp|quot|ldquo|rdquo|hellip|#\d{1,6}|#x[0-9a-fA-F]{1,5});"),
        ("<", r"<(?:br ?/?>|/?p>|/(?:div|span)>)"),
    ),
    "places for pictures or sounds": (
        ("<", r"<(?:(?:image|audio|video|图片)>|img[ >])"),
        ("]", r"!\[[^\]\n]{0,200}\]\("),
    ),
}  # fmt: skip
_BY_LETTER = {
    letter: [
        (kind, re.compile(form))
        for kind, forms in _KINDS.items()
        for sign, form in forms
        if sign == letter
    ]
    for letter in ("<", "&", "\\", "]", "_")
}
_ROLE = r"(?:Human|User|Assistant|AI|Bot|Question|Answer|用户|助手|人类|机器人|问|答|提问|回答)"
_ROLES_IN_TEXT = re.compile(rf"{_ROLE}[ \t]*[:：]")


def damages(sample: Sample) -> Iterator[Oddity]:
    """What is odd in the texts that are learnt or asked."""
    text = "\n".join((sample.question, sample.thinking, sample.answer, sample.system))
    found: dict[str, re.Match] = {}
    for letter, forms in _BY_LETTER.items():
        for kind, form in forms if letter in text else ():
            match = form.search(text)
            if match and (kind not in found or match.start() < found[kind].start()):
                found[kind] = match
    for kind, match in found.items():
        yield Oddity(f"{kind}, such as {{}}, stay in the text", match[0])
    if "＜" in text and WIDE_TAG.search(text):
        yield Oddity("＜think＞ with full-width brackets is read as text; write <think>")
    for text in (sample.question, sample.answer):
        role = _ROLES_IN_TEXT.match(text)
        if role:
            yield Oddity(
                "words that name who speaks, such as {}, stay in the text", role[0].strip()
            )
            return
