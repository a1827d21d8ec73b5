"""Leftovers of other programs in the texts of a sample: told, since they are learnt letter by letter."""

import re
from collections.abc import Iterator

from finetuning.readers.fields import Oddity
from finetuning.readers.sample import WIDE_TAG, Sample

# Kind: literal texts of which one must be there, which is quickly seen, and what is then looked for.
_KINDS = {
    "marks of another format": (
        (
            "<|",
            "<｜",
            "s>",
            "INST]",
            "SYS>",
            "os>",
            "<end_of",
            "<start_of",
            "[CLS]",
            "[SEP]",
            "MASK]",
            "<sop>",
            "<eop>",
        ),
        re.compile(
            r"<\|[A-Za-z][\w-]{0,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?s>|\[/?INST\]|<</?SYS>>|</?(?:bos|eos)>"
            r"|<(?:start|end)_of_turn>|\[(?:CLS|SEP|gMASK|sMASK)\]|<sop>|<eop>"
        ),
    ),
    "escapes": (
        ("\\n", "\\u", "\\t", "_x00"),
        re.compile(r"\\n(?![a-zA-Z])|\\u[0-9a-fA-F]{4}|_x00[0-9A-F]{2}_|\\t(?![a-zA-Z])"),
    ),
    "bits of HTML": (
        (
            "&lt;",
            "&gt;",
            "&amp;",
            "&nbsp;",
            "&quot;",
            "&#",
            "&ldquo;",
            "&hellip;",
            "<br",
            "<p>",
            "</p>",
            "</div>",
            "</span>",
        ),
        re.compile(
            r"&(?:lt|gt|amp|nbsp|quot|ldquo|rdquo|hellip|#\d{1,6}|#x[0-9a-fA-F]{1,5});|<br ?/?>|</?p>"
            r"|</(?:div|span)>"
        ),
    ),
    "places for pictures or sounds": (
        ("<image>", "<img", "<audio>", "<video>", "<图片>", "!["),
        re.compile(r"<(?:image|audio|video|图片)>|<img[ >]|!\[[^\]\n]{0,200}\]\("),
    ),
}
_SIGNS = (
    "<",
    "&",
    "\\",
    "INST]",
    "MASK]",
    "SEP]",
    "CLS]",
    "![",
    "_x00",
)  # without one there is none
_ROLE = r"(?:Human|User|Assistant|AI|Bot|Question|Answer|用户|助手|人类|机器人|问|答|提问|回答)"
_ROLES_IN_TEXT = re.compile(rf"{_ROLE}[ \t]*[:：]")


def damages(sample: Sample) -> Iterator[Oddity]:
    """What is odd in the texts that are learnt or asked."""
    text = "\n".join((sample.question, sample.thinking, sample.answer, sample.system))
    if any([sign in text for sign in _SIGNS]):
        for name, (hints, pattern) in _KINDS.items():
            if any([hint in text for hint in hints]) and (match := pattern.search(text)):
                yield Oddity(f"{name}, such as {{}}, stay in the text", match[0])
    if "＜" in text and WIDE_TAG.search(text):
        yield Oddity("＜think＞ with full-width brackets is read as text; write <think>")
    for text in (sample.question, sample.answer):
        role = _ROLES_IN_TEXT.match(text)
        if role:
            yield Oddity(
                "words that name who speaks, such as {}, stay in the text", role[0].strip()
            )
            return
