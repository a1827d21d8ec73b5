"""Questions and answers in a text become records.

They are found by labels (`问：`, `答：`, `**问题1：…**`, `Q:`), or by how a question stands (a heading, a
bold or a numbered line) where an answer follows.

    1、问：什么是分组密码？    a question's label begins a record; a number before it is not its text
    思考过程：…               a label is a field of the record; its name says which, as a column's does
    答：…                    all that follows belongs to the last field, until the next one
    解析：…

A label that means something only in some answers is text there: one that is not among the usual ones counts
only where most records have it.
"""

import bisect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from finetuning.common.text import clean_line
from finetuning.readers.names import LABELS, meaning, words
from finetuning.readers.opening import lines_of
from finetuning.readers.sample import THINK_TAG, Remark

_NUMBER = r"\d{1,4}|[一二三四五六七八九十百]{1,4}"
_LABEL = re.compile(
    r"[ \t>]*+(?P<heading>#{1,6}[ \t]*+)?(?:<a [^>]*></a>[ \t]*+)?(?:[-*+•][ \t]++)?(?P<bold>\*\*|__)?"
    rf"(?:[(（【\[]?第?(?P<number>{_NUMBER})[题问条]?[)）】\].、．:：]?[ \t]*+)?(?P<bold2>\*\*)?"
    r"(?P<bracket>[【\[])?(?P<name>[A-Za-z][A-Za-z ]{0,20}?|[\u4e00-\u9fff]{1,8}?)"
    rf"[ \t]*+(?P<count>{_NUMBER})?(?P<closed>[】\]])?(?P<bold3>\*\*|__)?"
    r"(?:[ \t]*+(?P<mark>[:：]|[.、．](?=[ \t]*+\S))|(?<=[】\]])|(?<=\*\*)|[ \t]*+$)[ \t]*+(?P<bold4>\*\*)?"
)
_HEADING = re.compile(r"[ \t]{0,3}(#{1,6})[ \t]*(?!#)(?=\S)")
_BOLD = re.compile(r"[ \t]*(?:\*\*|__)(?P<text>(?:(?!\*\*|__).)+)(?:\*\*|__)[:：]?[ \t]*$")
_NUMBERED = re.compile(
    rf"[ \t]*+(?:第(?:{_NUMBER})[题问][:：、. ]?|[(（【](?:{_NUMBER})[)）】]|(?:{_NUMBER})[.、．)）])"
    r"[ \t]*+(?=\S)"
)
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})")
_RULE = re.compile(r"[ \t]*+(?:-{3,}|\*{3,}|_{3,}|={3,})[ \t]*+")
_ASKS = re.compile(r"[?？][)）”\"'*_ ]*$")
_MOST = 0.6  # share of records that have a label which is not among the usual ones


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    text: str
    quoted: bool
    """Inside a code fence."""


@dataclass(frozen=True)
class _Label:
    at: int
    role: str
    name: str
    rest: str
    """The text behind it on its line."""
    level: int
    """Of a heading, 0 for none."""
    usual: bool
    numbered: bool = False


def labelled_records(text: str, source: str) -> Iterator[tuple[int, dict[str, str]] | Remark]:
    """(line, record) of every question, its fields by their labels; and what belongs to none."""
    lines = list(_lines(text))
    labels = _labels(lines)
    starts = [label for label in labels if label.role == "question"]
    if not starts:
        starts = _unlabelled(lines, labels)
    if not starts:
        return
    title = not any(label.at < starts[0].at for label in labels)
    yield from _stray(lines[: starts[0].at], source, "before the first question", title=title)
    fields = _fields(labels, starts)
    for i, start in enumerate(starts):
        end = starts[i + 1].at if i + 1 < len(starts) else len(lines)
        cut = _section(lines, start, end)
        record = _record(lines, start, [label for label in fields[i] if label.at < cut], cut)
        yield lines[start.at].number, record
        yield from _stray(
            lines[cut:end],
            source,
            f"under “{clean_line(lines[cut].text, 40)}”" if cut < end else "",
        )


def _lines(text: str) -> Iterator[_Line]:
    fence = ""
    for number, line in lines_of(text):
        match = _FENCE.match(line)
        quoted = bool(fence)
        if match and not fence:
            fence, quoted = match[1], True
        elif match and match[1].startswith(fence):
            fence = ""
        yield _Line(number, line, quoted)


# ---- labels -------------------------------------------------------------------------------------


def _labels(lines: list[_Line]) -> list[_Label]:
    """All that may be labels. Where a usual label of a question is there, others begin no record, nor does
    one without a number where most have one; a bare
    `A:` before another answer's label is an option."""
    found = [
        label for i, line in enumerate(lines) if not line.quoted if (label := _label(i, line.text))
    ]
    asking = [label for label in found if label.role == "question"]
    usual = {label.name for label in asking if label.usual}
    if not usual:
        counts = Counter(label.name for label in asking)
        usual = {name for name, count in counts.most_common(1) if count > 1}
    found = [label for label in found if label.role != "question" or label.name in usual]
    numbered = [label for label in found if label.role == "question" and label.numbered]
    if 2 * len(numbered) > sum(label.role == "question" for label in found):
        found = [label for label in found if label.role != "question" or label.numbered]
    if any(label.role == "question" for label in found):
        return found
    # Without labelled questions a bare letter marks nothing.
    return [label for label in found if label.name != "a" or _counts(found, "a") > 1]


def _counts(labels: list[_Label], name: str) -> int:
    return sum(label.name == name for label in labels)


def _label(at: int, line: str) -> _Label | None:
    match = _LABEL.match(line)
    if not match:
        return None
    name = " ".join(words(match["name"]))
    role = LABELS.get(name)
    meant = meaning(match["name"])
    usual = role is not None
    if role is None and meant and meant.role in ("question", "answer", "thinking"):
        role = meant.role
    if role is None or not _is_marked(match, line):
        return None
    rest = line[match.end() :]
    if (match["bold"] or match["bold2"]) and not match["bold3"] and not match["bold4"]:
        rest = rest.replace("**" if "**" in (match["bold"], match["bold2"]) else "__", "", 1)
    level = len(match["heading"].strip()) if match["heading"] else 0
    key = name if meant and meant.role == role else role  # by which a record's reader knows it
    return _Label(at, role, key, rest, level, usual, bool(match["number"] or match["count"]))


def _is_marked(match: re.Match, line: str) -> bool:
    """Whether a word is a label: a colon behind it, brackets around it, a line of its own as a heading or in
    bold, or a number with it (`Q1. …`)."""
    if match["mark"] in (":", "："):
        return True
    if match["bracket"] and match["closed"]:
        return True
    if match["bold3"] and not match["mark"]:
        return True
    if match["heading"] and not line[match.end() :].strip("*_ \t"):
        return True
    return bool(match["count"]) and match["mark"] in (".", "、", "．")


def _fields(labels: list[_Label], starts: list[_Label]) -> list[list[_Label]]:
    """The labels of each record's fields: the first of a role, if its name is usual or in most records."""
    places = [start.at for start in starts]
    inside: list[list[_Label]] = [[] for _ in starts]
    for label in labels:
        at = bisect.bisect_left(places, label.at) - 1
        if label.role != "question" and at >= 0 and label.at not in places[at + 1 : at + 2]:
            inside[at].append(label)
    counts = Counter(name for found in inside for name in {label.name for label in found})
    most = {name for name, count in counts.items() if count >= max(2, _MOST * len(starts))}
    chosen = []
    for found in inside:
        kept: list[_Label] = []
        answers = [label for label in found if label.role == "answer"]
        for label in found:
            option = label.name == "a" and any(other.name != "a" for other in answers)
            seen = any(label.role == other.role and label.name == other.name for other in kept)
            other_answer = label.role == "answer" and any(o.role == "answer" for o in kept)
            if (label.usual or label.name in most) and not (seen or other_answer or option):
                kept.append(label)
        chosen.append(kept)
    return chosen


# ---- questions without a label ------------------------------------------------------------------


def _unlabelled(lines: list[_Line], labels: list[_Label]) -> list[_Label]:
    """Questions that stand as a heading, in bold, numbered, or as the paragraph before an answer's label."""
    answers = [label for label in labels if label.role == "answer" and label.usual]
    if not answers:
        return _asking(lines)
    marked = {label.at for label in labels}
    spans, before = [], -1
    for answer in answers:
        between = range(before + 1, answer.at)
        spans.append([i for i in between if not lines[i].quoted and lines[i].text.strip()])
        before = answer.at
    forms = Counter(form for span in spans if (form := _nearest(lines, span)))
    usual = forms.most_common(1)[0][0] if forms else ""
    found = []
    for span in spans:
        fitting = [i for i in span if usual and i not in marked and _form(lines[i].text) == usual]
        at = fitting[-1] if fitting else _paragraph(lines, span, marked)
        if at is not None:
            found.append(_question_at(lines, at))
    return found


def _form(line: str) -> str:
    if heading := _HEADING.match(line):
        return heading[1]
    if _BOLD.match(line):
        return "bold"
    return "numbered" if _NUMBERED.match(line) else ""


def _nearest(lines: list[_Line], span: list[int]) -> str:
    """How the question before an answer's label stands: in the paragraph before it, or, where options
    stand between, as a heading or in bold."""
    last, forms = len(span) - 1, [_form(lines[i].text) for i in span]
    while last > 0 and span[last] - span[last - 1] == 1:
        last -= 1
    near = [form for form in forms[max(0, last) :] if form]
    far = [form for form in forms if form and form != "numbered"]
    return near[-1] if near else far[-1] if far else ""


def _paragraph(lines: list[_Line], span: list[int], marked: set[int]) -> int | None:
    """The first line of the last paragraph that is under no label."""
    if not span or span[-1] in marked:
        return None
    at = span[-1]
    while at - 1 >= span[0] and lines[at - 1].text.strip() and at - 1 not in marked:
        at -= 1
    return at


def _asking(lines: list[_Line]) -> list[_Label]:
    """Headings, bold or numbered lines that ask, of the form that most of them have, with text below."""
    asking = [(i, _form(line.text)) for i, line in enumerate(lines) if not line.quoted]
    asking = [(i, form) for i, form in asking if form and _ASKS.search(lines[i].text)]
    forms = Counter(form for _, form in asking)
    usual = forms.most_common(1)[0][0] if forms else ""
    found = [i for i, form in asking if form == usual]
    ends = [*found[1:], len(lines)][: len(found)]
    return [
        _question_at(lines, i)
        for i, end in zip(found, ends, strict=True)
        if any(line.text.strip() for line in lines[i + 1 : end])
    ]


def _question_at(lines: list[_Line], at: int) -> _Label:
    """A question without a label; neither its marks nor its number are its text."""
    text = lines[at].text
    level = 0
    if heading := _HEADING.match(text):
        level, text = len(heading[1]), text[heading.end() :]
    text = _without_bold(text)  # of `**1. …**`
    text = text[number.end() :] if (number := _NUMBERED.match(text)) else text
    text = _without_bold(text)  # of `1. **…**`
    return _Label(at, "question", "question", text, level, True)


def _without_bold(text: str) -> str:
    bold = _BOLD.match(text)
    return bold["text"] if bold else text


# ---- records ------------------------------------------------------------------------------------


def _section(lines: list[_Line], start: _Label, end: int) -> int:
    """Where a heading ends the record: one as high as the question's, else one of the first two levels."""
    level = start.level or 2
    for i in range(start.at + 1, end):
        heading = None if lines[i].quoted else _HEADING.match(lines[i].text)
        if heading and len(heading[1]) <= level and not _label(i, lines[i].text):
            return i
    return end


def _record(lines: list[_Line], start: _Label, labels: list[_Label], end: int) -> dict[str, str]:
    """The fields of one record by their labels' names."""
    marks = [start, *labels]
    record: dict[str, str] = {}
    for i, label in enumerate(marks):
        stop = marks[i + 1].at if i + 1 < len(marks) else end
        below = [line.text for line in lines[label.at + 1 : stop]]
        record[label.name] = _without_rules("\n".join([label.rest, *below]).strip())
    if not any(label.role == "answer" for label in labels) and not labels:
        record = _cut_in_two(record, start.name)
    question = record[start.name]
    if tag := THINK_TAG.search(question):
        answer = next((label.name for label in labels if label.role == "answer"), "answer")
        record[start.name] = question[: tag.start()].strip()
        record[answer] = f"{question[tag.start() :]}\n{record.get(answer, '')}".strip()
    return record


def _without_rules(text: str) -> str:
    """A text without the rules (`---`) that close it."""
    lines = text.split("\n")
    while lines and _RULE.fullmatch(lines[-1]):
        lines.pop()
    return "\n".join(lines).strip()


def _cut_in_two(record: dict[str, str], name: str) -> dict[str, str]:
    """A question of one line, and all below it as its answer."""
    question, _, answer = record[name].partition("\n")
    return {name: question.strip(), "answer": answer.strip()} if answer.strip() else record


def _stray(lines: list[_Line], source: str, where: str, *, title: bool = False) -> Iterator[Remark]:
    """Text that belongs to no question; a single line may be a title, which is none."""
    filled = [line for line in lines if line.text.strip(" \t-*_=")]
    body = [line for line in filled if not _HEADING.match(line.text)]
    if body and not (title and len(filled) == 1):
        text = f"text {where} belongs to no question: “{clean_line(body[0].text, 40)}”"
        yield Remark(source, body[0].number, text)
