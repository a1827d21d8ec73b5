"""Reasoning that stands inside a text, in whatever marks, apart from the answer.

`<think>` and `<thinking>` are read strictly (`sample.split_thinking`). Other programs write `<reasoning>`,
`<|begin_of_thought|>`, `[THINK]`, `◁think▷` or `&lt;think&gt;`: a pair of marks whose name means reasoning
and that opens the text holds the reasoning. Thinking models themselves put out a lone `</think>`, since
their prompt has opened it.
"""

import html
import re

from finetuning.readers.names import LABELS, NEUTRAL, meaning, words
from finetuning.readers.sample import THINK_TAG, split_thinking

_NAME = r"(?P<name>[A-Za-z][A-Za-z0-9_ -]{0,40}|[\u4e00-\u9fff]{1,10})"
# A mark's opening, and the closing that belongs to it; {} is the name.
_FORMS = (
    (rf"<\|(?:begin|start)_of_{_NAME}\|>", "<|end_of_{}|>"),
    (rf"<\|{_NAME}_(?:begin|start)\|>", "<|{}_end|>"),
    (rf"<\|{_NAME}\|>", "<|/{}|>"),
    (rf"<(?:\w{{1,10}}:)?{_NAME}>", "</{}>"),
    (rf"\[{_NAME}\]", "[/{}]"),
    (rf"【{_NAME}】", "【/{}】"),
    (rf"◁{_NAME}▷", "◁/{}▷"),
)
_OPENINGS = [(re.compile(opening), closing) for opening, closing in _FORMS]
_BY_LETTER = [(opening.pattern.lstrip("\\")[0], opening) for opening, _ in _OPENINGS]
_ESCAPED = re.compile(r"&lt;/?\s*([A-Za-z_]{1,40})\s*&gt;")
_DETAILS = re.compile(
    r"<details(?P<kind>[^>]*+)>\s*+(?:<summary>(?P<title>[^<]*+)</summary>)?(?P<text>.*?)</details>",
    re.S,
)
_CHANNELS = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>(?P<thinking>(?:(?!<\|end\|>).)*+)<\|end\|>\s*+"
    r"(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>(?P<answer>(?:(?!<\|(?:end|return)\|>).)*+)"
    r"(?:<\|(?:end|return)\|>)?\s*+",
    re.S,
)
_FENCED = re.compile(rf"```[ ]?{_NAME}[ ]?\n(?P<text>.*?)\n```[ \t]*(?:\n|\Z)", re.S)


def split_reasoning(text: str, *, labels: bool = True) -> tuple[str, str, list[str]]:
    """(thinking, answer, what is odd about it). Raises BrokenRecordError as `split_thinking` does.

    labels: labels such as `思考过程：` and `答案：` count as marks, too.
    """
    if labels and (label := _first_label(text)) and _labels(label, "thinking"):
        return _by_labels(text)
    if not has_marks(text):
        return "", text.strip(), []
    told: list[str] = []
    if "&lt;" in text and any(_means(m[1], "thinking") for m in _ESCAPED.finditer(text)):
        text = html.unescape(text)
        told.append("the text is escaped for HTML (&lt;think&gt;); it is read unescaped")
    tags = list(THINK_TAG.finditer(text))
    if len(tags) == 1 and tags[0][1]:
        told.append(
            f"{tags[0][0]} has no opening before it; the text before it is read as the reasoning"
        )
        thinking, rest = text[: tags[0].start()].strip(), text[tags[0].end() :].strip()
    elif tags:
        thinking, rest = split_thinking(text)
    else:
        thinking, rest, mark = _in_other_marks(text.strip())
        told += [f"{mark} is read as <think>"] if thinking else []
    if thinking:
        rest, mark = _unwrapped(rest)
        told += [f"{mark} around the answer is left out"] if mark else []
    told += _left_as_text(thinking, rest)
    return thinking, rest, told


_FIRST_LETTERS = ("]", "】", "▷", "&", "`")


def has_marks(text: str) -> bool:
    """Whether a text may hold marks of any form: one look for a letter costs less than an expression."""
    return "<" in text or any([letter in text for letter in _FIRST_LETTERS])


def _means(name: str, role: str) -> bool:
    meant = meaning(name)
    return meant is not None and meant.role == role and meant.rank < NEUTRAL


def _labels(label: re.Match, role: str) -> bool:
    """Whether a label is a usual one of a role; `理由有三：` and `最终答案的依据：` are none."""
    name = " ".join(words(label["name"]))
    return LABELS.get(name.removeprefix("最终").removeprefix("final ")) == role


def _pair(text: str, role: str) -> tuple[re.Match, int, int] | None:
    """The mark that opens the text and where its only closing begins and ends."""
    for opening, closing in _OPENINGS:
        match = opening.match(text)
        if not match or not (
            _means(match["name"], role) or (role, match["name"]) == ("answer", "final")
        ):
            continue
        whole = match[0].startswith("<") and ":" in match[0].partition(match["name"])[0]
        end = f"</{match[0][1:-1]}>" if whole else closing.format(match["name"])
        if text.count(end) == 1 and text.count(match[0]) == 1:
            return match, text.index(end), text.index(end) + len(end)
    return None


_LINE_LABEL = re.compile(rf"[#* \t\u3000\xa0【\[]*+{_NAME}(?:[】\]*]*+[ \t]*+[:：][*]*+|】)")


_HEADING_LABEL = re.compile(
    rf"(?:#{{1,6}}[ \t]++\**|\*\*){_NAME}\**[:：]?\**[ \t]*+$", re.MULTILINE
)


def _first_label(text: str) -> re.Match | None:
    return _label_at(text, len(text) - len(text.lstrip()) if text[:1].isspace() else 0)


def _label_at(text: str, place: int) -> re.Match | None:
    """A label that stands at a place: before a colon, in brackets, or as a heading or in bold on its own."""
    return _LINE_LABEL.match(text, place) or _HEADING_LABEL.match(text, place)


def _by_labels(text: str) -> tuple[str, str, list[str]]:
    """A text that opens with a label of a reasoning, `思考过程：…`, and goes on with one of the answer on a
    line below, `答案：…`; without the latter it is read as it stands, and told."""
    opening = _first_label(text)
    at = text.find("\n", opening.end())
    while at >= 0:
        label = _label_at(text, at + 1)
        if label and _labels(label, "answer"):
            marks = f"“{opening[0].strip()}” and “{label[0].strip()}”"
            told = f"{marks} are read as marks of the reasoning and the answer"
            return text[opening.end() : at].strip(), text[label.end() :].strip(), [told]
        at = text.find("\n", at + 1)
    return "", text.strip(), [f"“{opening[0].strip()}” opens the answer and is read as text"]


def _in_other_marks(text: str) -> tuple[str, str, str]:
    """(thinking, rest, mark) of a text that opens with a pair of marks; ('', text, '') without."""
    if text[:1] not in ("<", "[", "【", "◁", "`"):
        return "", text, ""
    if channels := _CHANNELS.fullmatch(text):
        return channels["thinking"].strip(), channels["answer"].strip(), "<|channel|>analysis"
    details = _DETAILS.match(text)
    if details and ("reasoning" in details["kind"] or _means(details["title"] or "", "thinking")):
        quoted = re.sub(r"^> ?", "", details["text"].strip(), flags=re.MULTILINE)
        return quoted.strip(), text[details.end() :].strip(), "<details>"
    fenced = _FENCED.match(text)
    if fenced and _means(fenced["name"], "thinking") and text.count("```", fenced.end()) % 2 == 0:
        return fenced["text"].strip(), text[fenced.end() :].strip(), f"```{fenced['name']}"
    if found := _pair(text, "thinking"):
        match, start, end = found
        return text[match.end() : start].strip(), text[end:].strip(), match[0]
    return "", text, ""


def _unwrapped(answer: str) -> tuple[str, str]:
    """(answer, mark) without a pair of marks like <answer> that holds the whole of it."""
    found = _pair(answer, "answer") if answer[:1] in ("<", "[", "【", "◁") else None
    if found and found[2] == len(answer) and answer[found[0].end() : found[1]].strip():
        return answer[found[0].end() : found[1]].strip(), found[0][0]
    return answer, ""


def _left_as_text(thinking: str, answer: str) -> list[str]:
    """Marks of a reasoning that open nothing, or not at the beginning."""
    if thinking:
        return []
    head = answer[:2000]
    for letter, opening in _BY_LETTER:
        for match in opening.finditer(head) if letter in head else ():
            if _means(match["name"], "thinking") and not THINK_TAG.fullmatch(match[0]):
                return [f"{match[0]} is read as text; write <think> around the reasoning"]
    return []
