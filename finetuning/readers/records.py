"""A record of JSON, Parquet, CSV or a table becomes a `Sample`.

Forms of records: a question and an answer in columns (Alpaca, prompt/completion, any names that `names.py`
understands), or a conversation (ShareGPT, messages, pairs). The question's material and options belong to it.
White space around a question, a reasoning or an answer is not content and is dropped; nothing else is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, count, islice
from string import ascii_uppercase
from typing import Any, NamedTuple

from finetuning.common.text import clean_line
from finetuning.readers.damage import damages
from finetuning.readers.fields import Fields, Notes, Oddity
from finetuning.readers.flags import heed_flags
from finetuning.readers.names import NEUTRAL, is_record, meaning, word_set, words
from finetuning.readers.sample import (
    THINK_TAG,
    BrokenRecordError,
    LeftOutError,
    Sample,
    checked,
    strings_of,
)
from finetuning.readers.turns import (
    are_turns,
    earlier_turns,
    message,
    messages_of,
    reasoned,
    reasoning_in,
    tools_text,
)
from finetuning.readers.values import (
    NOTHING,
    is_absent,
    kind,
    one_line_end,
    others,
    parsed,
    short_text,
    width,
)

SAMPLE_KEYS = (
    "question", "thinking", "answer", "system", "history", "tools", "difficulty", "messages",
    "input", "context", "options",
)  # fmt: skip
"""Fields that `--columns` names a column for."""

_JOINS_INPUT = ("instruction", "prompt", "指令", "提示", "提示词")
_INPUT = ("input", "输入")
_PREFERS = word_set(
    "winner better best preferred preference prefer choice chosen 优选 更优 胜者 偏好"
)
_OPTION_TEXTS = ("text", "content", "value", "内容", "选项")
_OPTION_LABELS = ("label", "key", "id")
_CITATION = 60  # width up to which a `reference` cites, and is no material to read


class Reading(NamedTuple):
    """A sample and what is to be said of the record it was read from."""

    sample: Sample
    oddities: list[Oddity]
    notes: Notes
    """What else there is to say, and the values that nobody took."""


def record_sample(record: Any, columns: tuple[tuple[str, str], ...] = ()) -> Reading:
    """A record of any known form as a sample; `columns` are (field, name of its column).

    Raises BrokenRecordError with the reason where that can't be done, LeftOutError where the record
    itself says that it is not to be learnt.
    """
    if are_turns(record):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise BrokenRecordError(f"a record must be an object, not {kind(record)}")
    if not record:
        raise BrokenRecordError("an empty record")
    missing = columns and [column for _, column in columns if column not in record]
    if missing:
        names = clean_line(", ".join(map(str, record)), 200)
        raise BrokenRecordError(f"no column {clean_line(missing[0], 60)!r}; there is: {names}")
    fields, notes = Fields(record, columns), Notes()
    if not columns and not fields.layout.is_record:
        fields = Fields(_inner(record))
    heed_flags(fields)
    key = fields.first("messages", _is_conversation)
    if key:
        turns = parsed(fields.take(key), key)
        sample = _conversation(turns, fields, notes)
    else:
        sample = _pair(fields, notes)
    tools = fields.first("tools")
    if tools:
        text, listed = tools_text(fields.take(tools))
        list(strings_of(listed))  # for its check of the depth
        sample = replace(sample, tools=text)
    if (difficulty := _difficulty(fields)) is not None:
        sample = replace(sample, difficulty=difficulty)
    sample = checked(sample)
    notes.add(fields)
    return Reading(sample, list(oddities(sample)), notes)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _inner(record: dict) -> dict:
    """A record inside another object, as a tool that labels data writes it, beside that one's keys."""
    if labelled := _labelled(record):
        return labelled
    inner = [
        key
        for key, value in record.items()
        if isinstance(value, dict) and is_record(map(str, value))
    ]
    if len(inner) != 1:
        return record
    return {**{key: value for key, value in record.items() if key != inner[0]}, **record[inner[0]]}


def _labelled(record: dict) -> dict | None:
    """Label Studio's tasks: the data, and the texts that people wrote, by the name of their place."""
    data, notes = record.get("data"), record.get("annotations")
    if not isinstance(data, dict) or not isinstance(notes, list):
        return None
    found = {key: value for key, value in record.items() if key != "data"} | data
    left = notes[1:]
    note = notes[0] if notes and isinstance(notes[0], dict) else {}
    left.append({key: value for key, value in note.items() if key != "result"})
    for result in note.get("result") or []:
        value = result.get("value") if isinstance(result, dict) else None
        texts = value.get("text") if isinstance(value, dict) else None
        if isinstance(texts, list) and texts and isinstance(result.get("from_name"), str):
            found[result["from_name"]] = texts[0]
            value = {**value, "text": texts[1:]}
            result = {**result, "value": value, "from_name": None}
        left.append(result)
    return found | {"annotations": left} if is_record(map(str, found)) else None


# ---- a question and an answer -------------------------------------------------------------------


def _pair(fields: Fields, notes: Notes) -> Sample:
    """A question and an answer in columns of their own, a list of messages in either included."""
    question_key = fields.first_text("question")
    answer_key = fields.first_text("answer") or fields.first_text("chosen")
    question_key = question_key or fields.first("question")
    answer_key = _preferred(fields, answer_key or fields.first("answer"))
    chosen = fields.peek(answer_key) if answer_key else None
    if question_key is None and are_turns(chosen) and len(chosen) > 1:
        return _conversation(_answer_of(fields, answer_key), fields, notes)
    if question_key is None or answer_key is None:
        raise BrokenRecordError(_missing(fields, question_key))
    question, answer = fields.take(question_key), _answer_of(fields, answer_key)
    if isinstance(answer, dict) and are_turns([answer]):
        answer = [answer]
    if isinstance(question, list) or are_turns(answer):
        return _conversation(_joined_turns(question, answer), fields, notes)
    text = _with_material(fields.text(question_key).strip(), question_key, fields)
    thinking, answer = reasoned(fields.text(answer_key), fields)
    system, history = fields.first("system"), fields.first("history")
    return Sample(
        question=text,
        thinking=thinking,
        answer=answer,
        system=fields.text(system).strip() if system else "",
        history=earlier_turns(fields.take(history), notes) if history else (),
    )


def _answer_of(fields: Fields, key: str) -> Any:
    if key in fields.layout.of("chosen"):
        fields.remark(
            f"{key} of a preference pair is read as the answer; the other one is not used"
        )
    return fields.take(key)


def _preferred(fields: Fields, key: str | None) -> str | None:
    """Of answers that differ in a letter or number alone (`response_0`, `response_1`) the one that a column
    such as `winner` or `better_response_id` names; of others the one that holds the reasoning."""
    if key is None or len(fields.layout.of("answer")) < 2 or fields.is_ruled("answer"):
        return key
    if fields.first_text("thinking") is None and not _reasons(fields.peek(key)):
        for name in fields.layout.of("answer"):
            if _reasons(fields.peek(name)):
                fields.remark(f"{name} is read as the answer, since it holds the reasoning")
                return name
    rivals = {
        words(n)[-1]: n for n in fields.layout.of("answer") if words(n)[:-1] == words(key)[:-1]
    }
    for name in fields.layout.picked(_prefers) if len(rivals) > 1 else ():
        said = words(str(fields.peek(name)))[-1:]
        if said and said[0] in rivals and fields.peek(rivals[said[0]]):
            fields.take(name)
            fields.remark(f"{rivals[said[0]]} is read as the answer, since {name} says so")
            return rivals[said[0]]
    return key


def _reasons(answer: Any) -> bool:
    return isinstance(answer, str) and any(tag[1] for tag in THINK_TAG.finditer(answer))


def _prefers(name: str) -> bool:
    return bool(_PREFERS.intersection(words(name)))


def _joined_turns(question: Any, answer: Any) -> list:
    """One conversation of messages for a question and an answer; a chosen answer may repeat the question."""
    asked = question if isinstance(question, list) else [message("user", question)]
    replied = answer if isinstance(answer, list) else [message("assistant", answer)]
    if len(replied) > 1 and replied[: len(asked)] == asked:
        return replied
    return [*asked, *replied]


def _missing(fields: Fields, question_key: str | None) -> str:
    """What a record lacks."""
    role = "question" if question_key is None else "answer"
    if fields.has(role):
        return f"empty {role}"
    if fields.has("messages") and question_key is None:
        return "a conversation must be a list of turns"
    names = clean_line(", ".join(fields.names()), 200)
    return f"no column for the {role}; there is: {names}"


def _with_material(question: str, key: str, fields: Fields) -> str:
    """The question with what stands in other columns: input below it, material before it, options below."""
    if not fields.layout.has_material:
        return question
    if extra := _input(key, fields):
        question = f"{question}\n{extra}".strip()
    for name in fields.layout.of("context"):
        material = fields.peek(name)
        if not _is_material(name, material, fields):
            continue
        texts = material if isinstance(material, list) else [material]
        text = "\n\n".join(one_line_end(item).strip() for item in texts if not is_absent(item))
        fields.take(name)
        if text and text not in question:
            question = f"{text}\n\n{question}"
            fields.remark(f"{name} is put before the question")
        break
    names, options = _options(fields)
    missing = [option for option in options if option not in question]
    if missing:
        question = "\n".join([question, *options])
        fields.remark(f"{', '.join(names)} put below the question")
    return question


def _input(question_key: str, fields: Fields) -> str:
    """Alpaca's input, or the column that the user rules to be it."""
    ruled = fields.layout.of("input") if fields.is_ruled("input") else ()
    joins = "".join(words(question_key)[-1:]).endswith(_JOINS_INPUT)
    if not ruled and not joins:
        return ""
    names = ruled or [
        n for n in fields.layout.of("question") if "".join(words(n)[-1:]).endswith(_INPUT)
    ]
    for name in names:
        if name != question_key and (text := fields.text(name).strip()):
            if text in NOTHING and not ruled:
                fields.remark(f"“{text}” in {name} is read as no value")
                continue
            return text
    return ""


def _is_material(name: str, value: Any, fields: Fields) -> bool:
    """Whether a column holds a text to read; a short `reference` cites a source."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    if not isinstance(value, str) or is_absent(value):
        return False
    meant = meaning(name)
    cites = meant is not None and meant.rank >= NEUTRAL and not fields.is_ruled("context")
    return not cites or width(value.strip()) > _CITATION


def _options(fields: Fields) -> tuple[list[str], list[str]]:
    """(columns, lines) of a question's options, lettered where they have no letters."""
    single = sorted(fields.layout.of("option"), key=lambda name: words(name)[-1])
    if single:
        lines = [_lettered(words(name)[-1], fields.short(name)) for name in single]
        return single, [line for line in lines if line]
    for name in fields.layout.of("options"):
        value = fields.peek(name)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            value = _json_or_text(value)
        if lines := _option_lines(value, name, fields):
            fields.take(name)
            return [name], lines
    return [], []


def _json_or_text(value: str) -> Any:
    try:
        return parsed(value, "")
    except BrokenRecordError:
        return value


def _option_lines(value: Any, name: str, fields: Fields) -> list[str]:
    """The options in a column: a text, a list, or an object of them; none for anything else."""
    if isinstance(value, str):
        return [] if is_absent(value) else [one_line_end(value).strip()]
    beside: list[
        tuple[dict, tuple[str | None, ...]]
    ] = []  # objects, and which of their keys are taken
    texts, labels = value, None
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # as ARC has its choices
        texts, labels = value["text"], value.get("label")
        beside.append((value, ("text", "label")))
    elif isinstance(value, dict):
        texts, labels = list(value.values()), list(value)
    if not isinstance(texts, list):
        return []
    if not isinstance(labels, list) or len(labels) != len(texts):
        labels = [None] * len(texts)
    lines = []
    for label, text, letter in zip(labels, texts, islice(_letters(), len(texts)), strict=True):
        if isinstance(text, dict):
            keys = _first_filled(text, _OPTION_TEXTS), _first_filled(text, _OPTION_LABELS)
            if keys[0] is None and others(text, _OPTION_LABELS, name):
                return []
            beside.append((text, keys))
            label, text = label or text.get(keys[1]), text.get(keys[0])
        if not is_absent(text) and not isinstance(text, (str, int, float)):
            return []
        lines.append(_lettered(str(label or letter), short_text(text)))
    for item, used in beside:
        fields.leave(item, used, name)
    return [line for line in lines if line]


def _letters() -> Iterator[str]:
    """A, B, …, and numbers behind Z."""
    return chain(ascii_uppercase, map(str, count(len(ascii_uppercase) + 1)))


def _first_filled(value: dict, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if not is_absent(value.get(key))), None)


def _lettered(letter: str, text: str) -> str:
    has_one = text[:2].upper().rstrip(".、．:：)） ") == letter.upper()
    return text if has_one or not text else f"{letter.upper()}. {text}"


def _difficulty(fields: Fields) -> int | None:
    """The stated difficulty; a scale other than 1 to 4 is not ours and counts as not stated."""
    for name in fields.layout.of("difficulty"):
        value = fields.peek(name)
        if isinstance(value, str) and value.strip() in ("1", "2", "3", "4"):
            fields.take(name)
            return int(value)
        if type(value) is int and 1 <= value <= 4:
            fields.take(name)
            return value
    return None


# ---- a conversation -----------------------------------------------------------------------------


def _conversation(turns: Any, fields: Fields, notes: Notes) -> Sample:
    """Messages or ShareGPT turns as a sample of their last assistant turn, to which the record's
    reasoning belongs where no turn has its own."""
    if not isinstance(turns, list) or not turns:
        raise BrokenRecordError("a conversation must be a list of turns")
    messages = _with_answer(messages_of(turns, notes), fields, notes)
    system = _system(messages, fields)
    if not messages or messages[-1]["role"] != "assistant":
        raise BrokenRecordError("the conversation does not end with a turn of the assistant")
    asked = [i for i, turn in enumerate(messages) if turn["role"] == "user"]
    if not asked:
        raise BrokenRecordError("the conversation has no turn of the user")
    final = messages[-1]
    if not final.get("loss", True):
        raise LeftOutError("its last turn carries no loss")
    thinking = final.get("reasoning_content", "")
    if not any("reasoning_content" in turn for turn in messages):
        beside = fields.first_text("thinking")
        thinking = reasoning_in(fields, beside) if beside else ""
    return Sample(
        question=messages[asked[-1]]["content"].strip(),
        thinking=thinking,
        answer=final["content"],
        system=system,
        history=tuple(messages[: asked[-1]]),
        tool_turns=tuple(messages[asked[-1] + 1 : -1]),
        tool_calls=tuple(final.get("tool_calls", ())),
    )


def _system(messages: list[dict], fields: Fields) -> str:
    """The system text: the first message, or else a column. Two that differ are refused where the column is
    called so; another column is left to be told."""
    key = fields.first("system")
    if messages[0]["role"] != "system":
        return fields.text(key).strip() if key else ""
    first = messages.pop(0)["content"].strip()
    if key and words(key) == ("system",) and fields.text(key).strip() != first:
        raise BrokenRecordError("system prompt given twice: as a column and as a message")
    return first


def _with_answer(messages: list[dict], fields: Fields, notes: Notes) -> list[dict]:
    """A conversation that ends with a question, and the answer that has a column of its own."""
    if messages[-1]["role"] != "user":
        return messages
    key = fields.first_text("answer") or fields.first_text("chosen")
    if key is None:
        return messages
    answer = _answer_of(fields, key)
    turns = answer if isinstance(answer, list) else [answer]
    turns = [turn if isinstance(turn, dict) else message("assistant", turn) for turn in turns]
    return [*messages, *messages_of(turns, notes)]


# ---- oddities -----------------------------------------------------------------------------------


def oddities(sample: Sample) -> Iterable[Oddity]:
    """What was read as it stands, though it may not have been meant so."""
    yield from damages(sample)
    if not sample.history and not sample.tool_turns:
        return
    earlier = [turn for turn in sample.history if turn["role"] != "system"]
    if any(turn["role"] == "system" for turn in (*sample.history, *sample.tool_turns)):
        yield Oddity("a system message among the turns is read as one of them")
    if earlier and earlier[0]["role"] == "assistant":
        yield Oddity("the conversation begins with a turn of the assistant")
    if any(turn["role"] == "user" and not turn["content"] for turn in earlier):
        yield Oddity("a turn of the user in the history is empty")
