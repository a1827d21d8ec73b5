"""Questions and answers in a Markdown text become `Sample`s.

    ## 难度 2 对称密码            a section heading ends an answer; `难度 k` in it holds for the section
    ### Q1: 什么是分组密码？       `Q1` with an ASCII or full-width colon, or none
    难度: 3                       optional, for this question only
    <thinking>
    …
    </thinking>

    A1: …                         the marker may be missing after the thinking

`### q1`, `### 问题1` and `### 问1` are questions too where a reply follows, `a1`, `答案1` and `答1` markers.

White space around a question, a reasoning or an answer is not content and is dropped, as is a rule
(`---`) that closes an answer; nothing else is.
"""

import bisect
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

from finetuning.common.text import clean_line
from finetuning.readers.reasoning import split_reasoning
from finetuning.readers.records import oddities
from finetuning.readers.sample import (
    THINK_TAG,
    BrokenRecordError,
    BrokenSample,
    Remark,
    Sample,
    checked,
    split_thinking,
)

# ---- Markdown ---------------------------------------------------------------------------------

# Found anywhere, since real files glue a heading to the end of the answer before it.
_QUESTION = re.compile(
    r"#{3,6}\s*+(?:\*\*)?Q[ \t]*+(\d++)(?:\*\*)?[ \t]*+[:：.、]?(?:\*\*)?"
    r"|^#{1,2}[ \t]*+(?:\*\*)?Q[ \t]*+(\d++)(?:\*\*)?[ \t]*+[:：](?:\*\*)?"
    r"|^#{1,6}[ \t]*+(?:\*\*)?(?:q|问题?)[ \t]*+(\d++)(?:\*\*)?(?:[ \t]*+[:：.、](?:\*\*)?|\s|\Z)",
    re.MULTILINE,
)
_HEADING = re.compile(r"^#{1,2}(?:[ \t\u3000]+\S|[\u4e00-\u9fff]).*$", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})", re.MULTILINE)
_DIFFICULTY_LINE = re.compile(
    r"^[ \t]*[*_]*(?:难度|difficulty)[ \t]*[:：][ \t]*([1-4])[*_]*[ \t]*$", re.MULTILINE | re.I
)
_DIFFICULTY_HEADING = re.compile(r"难度[ \t]*+(?:[:：][ \t]*+)?([1-4])(?!\d)")
_ANSWER = re.compile(r"^[ \t]*+\**+([Aa]|答案?)[ \t]*+(\d*+)\**+[ \t]*+[:：]\**+", re.MULTILINE)
# What in an answer looks like another question or answer.
_STRANGER = re.compile(
    r"^(?:#{3,6}.*\n\s*\**(?:答案?|回答)\**[ \t]*[:：]"
    r"|#{3,6}[ \t]*(?:\*\*)?(?:[Qq]|问题?)[ \t]*[\d一二三四五六七八九十]"
    r"|#{3,6}[ \t]*(?:\*\*)?(?P<number>\d+)[ \t]*(?:[.、．:：)）]|$)"
    r"|\*\*[Qq][ \t]*\d|[ \t>]*\**(?:问题?|提问)\**[ \t]*\d*\**[:：]"
    r"|[ \t]*\**(?:A|答案?|回答)[ \t]*\d+\**[ \t]*[:：]).*$",
    re.MULTILINE,
)
_RULE = re.compile(r"\n[ \t]*(?:-{3,}|\*{3,}|_{3,})[ \t]*\Z")
_RESIDUE = re.compile(r"[\u4e00-\u9fff]{1,11}类")


def _same(number: str, other: str) -> bool:
    return bool(number) and number.lstrip("0") == other.lstrip("0")


def _rank(marker: re.Match, number: str) -> int:
    """0 for the question's own marker, 1 for another's or 答, 2 for a bare `A`, which may be an option
    of a multiple-choice question, 3 for an `a`, which marks nothing."""
    if _same(marker[2], number):
        return 0
    return {"a": 3, "A": 1 if marker[2] else 2}.get(marker[1], 1)


def _answer_marker(text: str, number: str) -> re.Match | None:
    markers = [marker for marker in _ANSWER.finditer(text) if _rank(marker, number) < 3]
    return min(markers, key=lambda marker: _rank(marker, number), default=None)


def _code_spans(text: str) -> list[tuple[int, int]]:
    """Spans of the code fences that are closed again."""
    spans, opening = [], None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]):
            spans.append((opening.start(), fence.end()))
            opening = None
    return spans


def _within(place: int, spans: list[tuple[int, int]]) -> bool:
    i = bisect.bisect(spans, place, key=lambda span: span[0])
    return i > 0 and place < spans[i - 1][1]


def _cut_at_heading(text: str) -> tuple[str, str]:
    """(answer, following section): a heading line ends an answer, save in a code fence."""
    spans = _code_spans(text)
    for heading in _HEADING.finditer(text):
        if not _within(heading.start(), spans):
            return text[: heading.start()], text[heading.start() :]
    return text, ""


def _cut_at_section(reply: str) -> tuple[str, str]:
    """(reply, following section): a heading inside the reasoning ends nothing, and tags behind the
    heading that ends the answer are not the answer's."""
    answer, section = _cut_at_heading(reply)
    if not THINK_TAG.search(answer):
        return answer, section
    closing = next((tag for tag in THINK_TAG.finditer(reply) if tag[1]), None)
    cut = closing.end() if closing else 0
    answer, section = _cut_at_heading(reply[cut:])
    return reply[:cut] + answer, section


def _question_and_reply(body: str, number: str) -> tuple[str, str]:
    """Cut after the question: at the thinking, at the answer marker, or else after the first line."""
    tag, marker = THINK_TAG.search(body), _answer_marker(body, number)
    cuts = [match.start() for match in (tag, marker) if match]
    own = _cut_at_heading(body)[0]
    unmarked = "\n" in own.strip() and not (marker and _same(marker[2], number))
    if cuts and (min(cuts) < len(own) or not unmarked):
        return body[: min(cuts)], body[min(cuts) :]
    lead = len(body) - len(body.lstrip())
    end = body.find("\n", lead)
    return (body, "") if end < 0 else (body[:end], body[end:])


def _strip_marker(text: str, number: str) -> tuple[str, str | None]:
    """Take an answer marker off the start; also its number, '' where bare, None where missing."""
    text = text.strip()
    marker = _ANSWER.match(text)
    if not marker or _rank(marker, number) > 2:
        return text, None
    return text[marker.end() :].strip(), marker[2]


def _section_difficulty(text: str) -> int | None:
    headings = _HEADING.findall(text)
    stated = _DIFFICULTY_HEADING.search(headings[-1]) if headings else None
    return int(stated[1]) if stated else None


def _markdown_block(body: str, number: str) -> tuple[Sample, str, list[str]]:
    """One question with all that follows it: the sample, the next section's text, remarks."""
    question, reply = _question_and_reply(body, number)
    stated = _DIFFICULTY_LINE.search(question)
    question = _DIFFICULTY_LINE.sub("", question).strip()
    reply, marker = _strip_marker(reply, number)
    reply, section = _cut_at_section(reply)
    has_tags = THINK_TAG.search(reply) is not None
    reply = _RULE.sub("", reply.rstrip())
    tags = list(THINK_TAG.finditer(reply))
    lone = marker is not None and len(tags) == 1 and bool(tags[0][1])
    thinking, answer, told = split_reasoning(reply) if lone else (*split_thinking(reply), [])
    if marker is None:
        answer, marker = _strip_marker(answer, number)
    remarks = [f"Q{number}: {text}" for text in told]
    if marker is None:
        remarks.append(f"Q{number} has no answer marker A{number}:")
    elif marker and not _same(marker, number):
        remarks.append(f"Q{number} is answered by A{marker}")
    if has_tags and not thinking:
        remarks.append(f"Q{number} has an empty thinking block")
    if _RESIDUE.fullmatch(answer.rpartition("\n")[2].strip()):
        remarks.append(f"the answer to Q{number} ends with what looks like a section heading")
    difficulty = int(stated[1]) if stated else None
    sample = checked(Sample(question, thinking, answer, difficulty=difficulty))
    return sample, section, [*remarks, *(f"Q{number}: {odd}" for odd in oddities(sample))]


def _number(heading: re.Match) -> str:
    return heading[1] or heading[2] or heading[3]


def headed_questions(text: str) -> list[re.Match]:
    """The headings of questions: every `Q`. One like `问题2` asks where a reply follows, unless it stands
    in a reasoning, in a code fence, or in the answer to a `Q` as a part that is counted anew."""
    tags = itertools.pairwise(THINK_TAG.finditer(text))
    thoughts = [(tag.start(), end.end()) for tag, end in tags if not tag[1] and end[1]]
    hiding = (thoughts, _code_spans(text))
    sections = [m.start() for m in _HEADING.finditer(text) if not _hidden(m, hiding)]
    found: list[re.Match] = []
    for heading, following in itertools.pairwise([*_QUESTION.finditer(text), None]):
        if heading[3]:
            body = text[heading.end() : following.start() if following else len(text)]
            replied = THINK_TAG.search(body) or _answer_marker(body, heading[3])
            part = bool(found) and _is_part(heading, found[-1], sections)
            if part or not replied or _hidden(heading, hiding):
                continue
        found.append(heading)
    return found


def _hidden(heading: re.Match, hiding: tuple[list[tuple[int, int]], ...]) -> bool:
    return any(_within(heading.start(), spans) for spans in hiding)


def _is_part(heading: re.Match, question: re.Match, sections: list[int]) -> bool:
    """Whether a heading like `问题1` stands in the answer to a `Q` and does not count on from it."""
    at, before = (bisect.bisect(sections, match.start()) for match in (heading, question))
    counts_on = float(heading[3]) > float(_number(question))  # int refuses thousands of digits
    return not question[3] and at == before and not counts_on


def _stranger(answer: str) -> re.Match | None:
    """The first line that looks like another question or answer; parts counted from 1 are its own."""
    spans = _code_spans(answer)
    lines = [m for m in _STRANGER.finditer(answer) if not _within(m.start(), spans)]
    numbers = [m["number"] for m in lines if m["number"]]
    if numbers and float(numbers[0]) <= 1:
        lines = [m for m in lines if not m["number"]]
    return next(iter(lines), None)


def markdown_samples(
    text: str, anchors: list[re.Match], source: str
) -> Iterator[Sample | BrokenSample | Remark]:
    """Every question of a Markdown text, whatever surrounds it. Lines count from 1.

    anchors: its `headed_questions`.
    """
    preamble = text[: anchors[0].start()] if anchors else ""
    difficulty = _section_difficulty(preamble)
    if stranger := _stranger(preamble):
        at = 1 + text.count("\n", 0, stranger.start())
        yield Remark(source, at, f"“{clean_line(stranger[0], 40)}” is not read as a question")
    line, counted = 1, 0
    for i, anchor in enumerate(anchors):
        line, counted = line + text.count("\n", counted, anchor.start()), anchor.start()
        number = _number(anchor)
        end = anchors[i + 1].start() if i + 1 < len(anchors) else len(text)
        body = text[anchor.end() : end]
        if anchor.start() and text[anchor.start() - 1] != "\n":
            yield Remark(
                source,
                line,
                f"the heading of Q{clean_line(number, 20)} is not on a line of its own",
            )
        try:
            sample, section, remarks = _markdown_block(body, number)
        except BrokenRecordError as error:
            yield BrokenSample(source, line, f"Q{clean_line(number, 20)}: {error}")
            section, remarks = _cut_at_heading(body)[1], []
        else:
            own = sample.difficulty or difficulty
            yield replace(sample, source=source, line=line, difficulty=own)
            if stranger := _stranger(sample.answer):
                below = body.count("\n", 0, body.find(sample.answer) + stranger.start())
                shown = clean_line(stranger[0], 40)
                told = f"“{shown}” is read as part of the answer to Q{clean_line(number, 20)}"
                yield Remark(source, line + below, told)
        for remark in remarks:
            yield Remark(source, line, clean_line(remark, 200))
        if section:
            difficulty = _section_difficulty(section)
            if _has_body(section):
                heading = clean_line(section.partition("\n")[0], 40)
                yield Remark(source, line, f"text under “{heading}” belongs to no question")


def _has_body(section: str) -> bool:
    rest = _HEADING.sub("", section)
    return bool(re.sub(r"^[ \t]*(?:[-*_][ \t]*){3,}$", "", rest, flags=re.MULTILINE).strip())
