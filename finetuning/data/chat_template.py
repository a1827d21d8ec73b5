"""What a tokenizer and its chat template do with a conversation, found out by rendering a probe.

Also both ends of inference: `encode_prompt` makes exactly the prefix that training used, and
`parse_completion` takes apart what a model wrote behind it.

A template whose generation prompt closes the think block by default is asked with the switch that keeps
it open, in training and in inference alike.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.data.template_limits import within_limits
from finetuning.data.template_probe import check_template
from finetuning.readers.sample import strings_of

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class ChatFormat:
    """Facts about a tokenizer and its chat template, found by rendering a probe."""

    reasoning: str
    """How reasoning gets into a turn: `field` (reasoning_content), `inline` (in the content), or
    `composed` (the template drops both, so it is put between prompt and answer here)."""
    opens: bool
    """The generation prompt ends with an open think block."""
    close_id: int
    end_id: int
    control: re.Pattern
    """Text that must not come from content: it would become a control token."""
    special: frozenset[int] = frozenset()
    """Ids of the special tokens, one of which may end a turn of another kind, such as a tool call."""
    closes: bool = False
    """The generation prompt holds a think block that is closed already, however it is asked."""
    switch: dict[str, bool] = field(default_factory=dict)
    """What the template is asked with so that it leaves room for reasoning; see `thinking_switch`."""


SWITCHES = ("enable_thinking", "thinking")
"""What templates call the switch between reasoning and none."""


_MARKUP = re.compile(r"<\|.*\|>|</?(?:think|thinking|tools?|tool_call|tool_response)>")


def chat_format(tokenizer: Any) -> ChatFormat:
    """Probe a tokenizer. UserError where it has no usable chat template or no end of turn."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise UserError("the tokenizer has no chat template; use a chat model, or set one")
    for text in template.values() if isinstance(template, dict) else [template]:
        check_template(text)
    try:
        return _probed(tokenizer)
    except template_errors() as error:
        raise UserError(
            f"the model's chat template can't be used: {clean_line(str(error), 200)}"
        ) from error


def template_errors() -> tuple[type[Exception], ...]:
    """What a chat template can raise."""
    import jinja2

    arithmetic = (ArithmeticError, RecursionError)
    return (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, *arithmetic)


def _probed(tokenizer: Any) -> ChatFormat:
    switch = thinking_switch(tokenizer)
    prompt = render(tokenizer, _QUESTION, None, switch, prompt=True)
    plain = render(tokenizer, [*_QUESTION, turn_with("A0a", "")], None, switch)
    if "A0a" not in plain:
        raise UserError("the chat template does not render the assistant's turn")
    tail = encode(tokenizer, [plain[plain.rindex("A0a") + 3 :]])[0]
    special = {i for i, token in _added(tokenizer).items() if token.special}
    end_id = next((token for token in tail if token in special), tokenizer.eos_token_id)
    if end_id is None:
        raise UserError("the tokenizer has no token that ends a turn; set its eos_token")
    return ChatFormat(
        reasoning=_reasoning_way(tokenizer, prompt, switch),
        opens=opens_thinking(prompt),
        close_id=next((i for i, t in _added(tokenizer).items() if t.content == CLOSE), -1),
        end_id=int(end_id),
        control=_control_pattern(tokenizer),
        special=frozenset(special),
        closes=CLOSE in _behind_question(prompt),
        switch=switch,
    )


def opens_thinking(prompt: str) -> bool:
    """Whether a generation prompt ends with an open think block; behind a tool's answer it need not."""
    return prompt[-2 * len(OPEN) :].rstrip().endswith(OPEN)


_QUESTION = [{"role": "user", "content": "Q0q"}]


def _behind_question(prompt: str) -> str:
    return prompt[prompt.rfind("Q0q") + 3 :]


def thinking_switch(tokenizer: Any) -> dict[str, bool]:
    """Arguments with which the template's generation prompt leaves the think block open.

    Empty where it does so without being asked, and where no switch helps.
    """
    for switch in ({}, *({name: True} for name in SWITCHES)):
        prompt = render(tokenizer, _QUESTION, None, switch, prompt=True)
        if CLOSE not in _behind_question(prompt):
            return switch
    return {}


def _reasoning_way(tokenizer: Any, prompt: str, switch: dict[str, bool]) -> str:
    field = {**turn_with("A0a", ""), "reasoning_content": "R0r"}
    for way, turn in (("field", field), ("inline", turn_with("A0a", "R0r"))):
        text = render(tokenizer, [*_QUESTION, turn], None, switch)
        if text.startswith(prompt) and "R0r" in text[len(prompt) :]:
            return way
    return "composed"


def turn_with(answer: str, thinking: str) -> dict:
    """An assistant message with its thinking inline, for templates that know no reasoning field."""
    block = f"{OPEN}\n{thinking}\n{CLOSE}\n\n" if thinking else ""
    return {"role": "assistant", "content": block + answer}


def _added(tokenizer: Any) -> dict:
    return tokenizer.added_tokens_decoder


def _control_pattern(tokenizer: Any) -> re.Pattern:
    """Special tokens, and others that look like markup; other added tokens may be ordinary words."""
    tokens = {
        token.content
        for token in _added(tokenizer).values()
        if token.special or _MARKUP.fullmatch(token.content)
    }
    tokens |= {OPEN, CLOSE}
    longest_first = sorted(filter(None, tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)))


def render(
    tokenizer: Any,
    messages: list[dict],
    tools: list | None,
    switch: dict[str, bool],
    *,
    prompt: bool = False,
) -> str:
    """The template's text for `messages`; with `prompt`, up to where the model goes on.

    Raises TemplateLimitError where that takes more time or memory than any honest template does.
    """
    return within_limits(
        lambda: tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **switch
        )
    )


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text; the template has written all control tokens already."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation is not None or backend.padding is not None:
        return tokenizer(texts, add_special_tokens=False, padding=False, truncation=False).input_ids
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def marked(value: Any, control: re.Pattern, mark: str) -> Any:
    """`value` with a mark inside every text of a control token; encoding splits the text there."""
    if isinstance(value, str):
        return control.sub(lambda match: match[0][0] + mark + match[0][1:], value)
    if isinstance(value, dict):
        return {marked(k, control, mark): marked(v, control, mark) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [marked(item, control, mark) for item in value]
    return value


def encode_prompt(tokenizer: Any, messages: list[dict], tools: list | None = None) -> list[int]:
    """The generation prompt for `messages`, exactly the prefix that training puts before a completion.

    Text of control tokens inside the messages is encoded as ordinary characters.
    """
    control = _control_pattern(tokenizer)
    mark = unused_mark(strings_of([messages, tools or []]))
    messages, tools = marked(messages, control, mark), marked(tools, control, mark)
    text = render(tokenizer, messages, tools, thinking_switch(tokenizer), prompt=True)
    pieces = [piece for piece in text.split(mark) if piece]
    return [token for ids in encode(tokenizer, pieces) for token in ids]


def unused_mark(texts: Iterable[str]) -> str:
    """A character that none of the texts holds: a noncharacter, else one of private use."""
    held = set().union(*texts)
    free = (chr(c) for c in (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE)))
    mark = next((character for character in free if character not in held), None)
    if mark is None:
        raise UserError("a sample holds every private character of Unicode; it is no text")
    return mark


_CLOSING = re.compile(r"</think(?:ing)?>")
_OPENING = re.compile(r"<think(?:ing)?>")
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "</s>")


def parse_completion(text: str) -> tuple[str, str, bool]:
    """(thinking, answer, closed) of what a model wrote behind the generation prompt.

    Without a closing tag all of it is thinking, since the prompt opened the block.
    """
    text = text.strip()
    while end := next((end for end in _ENDS if text.endswith(end)), None):
        text = text.removesuffix(end).rstrip()
    opening = _OPENING.match(text)
    text = text[opening.end() :] if opening else text
    closing = _CLOSING.search(text)
    if not closing:
        return text.strip(), "", False
    return text[: closing.start()].strip(), text[closing.end() :].strip(), True
