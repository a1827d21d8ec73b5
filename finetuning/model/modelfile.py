"""The Modelfile with which ollama serves a GGUF file as training taught the model to speak.

ollama renders a conversation with a Go template, where Hugging Face's is Jinja. The texts around what is said
are found by rendering neutral words with the model's own template; so any template whose turns are text,
content, text can be said in Go. Whether this one is such, a comparison over whole conversations decides.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.data.chat_template import CLOSE, OPEN, chat_format, render, template_errors
from finetuning.model.sampling_defaults import SamplingDefaults

CHAT = 16_384
"""Tokens: a long thought with its question and answer; keys and values of Qwen3-4B take 2.4 GB."""
_ELSE = "Use --format gguf: that file holds the model's own template, which llama.cpp renders"


@dataclass(frozen=True)
class Frame:
    """The texts that a chat template puts around what is said."""

    no_system: str
    """What stands first where the conversation has no system text."""
    system: tuple[str, str]  # before and behind a system text
    user: tuple[str, str]
    assistant: tuple[str, str]
    thinking: tuple[str, str]  # around the reasoning of a turn; ollama knows it by these
    prompt: str
    """What stands last, where the model goes on."""
    keeps: bool
    """Whether what was thought before earlier answers stays in the conversation."""


# -----------------------------------------------------------------------------
# The frame of a template


def frame_of(tokenizer: Any) -> Frame:
    """Found by rendering, and compared with the template. UserError for a template of another shape."""
    try:
        frame = _found(tokenizer)
        wrong = _seen_otherwise(tokenizer, frame)
        if wrong is not None:
            frame = replace(frame, keeps=True)
            wrong = _seen_otherwise(tokenizer, frame)
    except template_errors() as error:
        reason = clean_line(str(error), 200) or type(error).__name__
        raise UserError(
            f"--format ollama: the chat template refuses a plain conversation ({reason}). {_ELSE}"
        ) from error
    if wrong is not None:
        roles = ", ".join(message["role"] for message in wrong)
        raise UserError(
            "--format ollama: the chat template writes more than a text before and behind each turn, seen "
            f"with the turns {roles}. {_ELSE}"
        )
    if any("{{" in text or text.endswith("{") or '"""' in text for text in _texts(frame)):
        raise UserError('--format ollama: the chat template itself writes {{ or """. ' + _ELSE)
    return frame


def _prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Without the token that begins a text, which ollama puts there itself."""
    text = render(tokenizer, messages, None, chat_format(tokenizer).switch, prompt=True)
    return text.removeprefix(tokenizer.bos_token or "")


def _say(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


def _found(tokenizer: Any) -> Frame:
    """From two renderings of neutral words; the texts between them are cut where they are alike."""
    turns = [_say("user", "Q0q"), _say("assistant", "A0a"), _say("user", "R0r")]
    first, answer, question, last = _between(_prompt(tokenizer, turns), "Q0q", "A0a", "R0r")
    with_system = _prompt(tokenizer, [_say("system", "S0s"), *turns])
    before_system, behind_system = _between(with_system, "S0s", "Q0q")[:2]
    before_user = _common_end(first, question, behind_system)
    behind_assistant = question.removesuffix(before_user)
    behind_user = _common_start(answer, last, behind_assistant) or _common_start(answer, last)
    opening, closing = _thinking(tokenizer)
    return Frame(
        no_system=first.removesuffix(before_user),
        system=(before_system, behind_system.removesuffix(before_user)),
        user=(before_user, behind_user),
        assistant=(answer.removeprefix(behind_user), behind_assistant),
        thinking=(opening, closing),
        prompt=last.removeprefix(behind_user),
        keeps=False,
    )


def _between(text: str, *words: str) -> list[str]:
    """The texts before, between and behind the words. ValueError where one is missing."""
    pieces = []
    for word in words:
        piece, found, text = text.partition(word)
        if not found:
            raise ValueError(f"it leaves out what one says, such as {word}")
        pieces.append(piece)
    return [*pieces, text]


def _common_start(*texts: str) -> str:
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in alike)


def _common_end(*texts: str) -> str:
    return _common_start(*(text[::-1] for text in texts))[::-1]


def _thinking(tokenizer: Any) -> tuple[str, str]:
    """Around the reasoning of the last turn; the usual tags where the template has no place for it."""
    turn = _say("assistant", "A0a", reasoning_content="T0t")
    facts = chat_format(tokenizer)
    text = render(tokenizer, [_say("user", "Q0q"), turn], None, facts.switch)
    before, found, behind = text.partition("T0t")
    if not found or OPEN not in before or CLOSE not in behind:
        return f"{OPEN}\n", f"\n{CLOSE}\n\n"
    return before[before.rindex(OPEN) :], behind.partition("A0a")[0]


def _seen_otherwise(tokenizer: Any, frame: Frame) -> list[dict[str, str]] | None:
    """A conversation that the frame does not say as the template does; None where all are the same."""
    return next((c for c in _conversations() if rendered(frame, c) != _prompt(tokenizer, c)), None)


def _conversations() -> list[list[dict[str, str]]]:
    """What a chat may be, to its last question: with and without system text, turns, reasoning; no two
    texts are the same."""
    long = 'Say: **"A"** <b>&amp; B</b>  x\n\n' + "密码学 Kryptographie, 128 bit.\n" * 20 + "End "
    system = _say("system", f"{long}0")
    turns = [_say(role, f"{long}{i}") for i, role in enumerate(("user", "assistant") * 3, 1)]
    thinking = [
        turn
        if turn["role"] == "user"
        else {**turn, "reasoning_content": f"First {turn['content']}"}
        for turn in turns
    ]
    mixed = [*turns[:2], *thinking[2:4], turns[4]]
    tails = (turns[:1], turns[:3], mixed, [*thinking[:2], *turns[2:5]], thinking[:5])
    return [[*head, *tail] for head in ([], [system]) for tail in tails]


def rendered(frame: Frame, messages: Sequence[dict[str, str]]) -> str:
    """What the Go template of this frame makes of a conversation, up to where the model goes on."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    text = "" if messages[0]["role"] == "system" else frame.no_system
    for i, message in enumerate(messages):
        before, behind = getattr(frame, message["role"])
        thought = message.get("reasoning_content") if frame.keeps or i > last else ""
        opening, closing = frame.thinking
        text += before + (f"{opening}{thought}{closing}" if thought else "")
        text += message["content"] + behind
    return text + frame.prompt


# -----------------------------------------------------------------------------
# The file


def _texts(frame: Frame) -> Iterable[str]:
    return (
        frame.no_system,
        *frame.system,
        *frame.user,
        *frame.assistant,
        *frame.thinking,
        frame.prompt,
    )


def go_template(frame: Frame) -> str:
    """The frame as ollama's template."""
    opening, closing = frame.thinking
    thought = ".Thinking" if frame.keeps else "and .Thinking (gt $i $last)"
    turns = {
        "system": f"{frame.system[0]}{{{{ .Content }}}}{frame.system[1]}",
        "user": f"{frame.user[0]}{{{{ .Content }}}}{frame.user[1]}",
        "assistant": (
            f"{frame.assistant[0]}{{{{ if {thought} }}}}{opening}{{{{ .Thinking }}}}"
            f"{closing}{{{{ end }}}}{{{{ .Content }}}}{frame.assistant[1]}"
        ),
    }
    cases = "{{ else ".join(f'if eq .Role "{role}" }}}}{text}' for role, text in turns.items())
    first = f"{{{{ if not $system }}}}{frame.no_system}{{{{ end }}}}" if frame.no_system else ""
    return (
        "{{ $last := -1 }}{{ $system := false }}{{ range $i, $_ := .Messages }}"
        '{{ if eq .Role "user" }}{{ $last = $i }}{{ else if eq .Role "system" }}{{ $system = true }}'
        f"{{{{ end }}}}{{{{ end }}}}{first}"
        f"{{{{ range $i, $_ := .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}{frame.prompt}"
    )


def context_length(positions: int, longest: int) -> int:
    """Tokens that a chat gets: the longest sample of the training, `CHAT` at least, no more than the model's
    `positions`. ollama's own choice is 4,096 on most machines, in which long thoughts are cut."""
    return min(positions, max(CHAT, longest))


def modelfile(
    weights: str, tokenizer: Any, defaults: SamplingDefaults, context: int, system: str = ""
) -> str:
    """The text of a Modelfile.

    weights: name of the GGUF file beside it. context: tokens of a chat. system: the system prompt of all the
    data, or empty.
    """
    end = tokenizer.convert_ids_to_tokens(chat_format(tokenizer).end_id)
    lines = [f"FROM ./{weights}", f'TEMPLATE """{go_template(frame_of(tokenizer))}"""']
    if '"""' in system:
        raise UserError(
            f'--format ollama: the system prompt of the data holds """, which ends a text there. {_ELSE}'
        )
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines.append(f'PARAMETER stop "{end}"')
    lines.append(f"PARAMETER num_ctx {context}")
    lines += [f"PARAMETER {name} {value:g}" for name, value in asdict(defaults).items()]
    return "\n".join(lines) + "\n"
