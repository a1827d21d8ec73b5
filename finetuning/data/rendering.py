"""The texts of a sample's turns through the chat template, and whether all of the sample stands in them.

A turn that the template refuses, or of which it changes or drops something, is a `RenderingFault` with the
reason: its sample is broken.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from finetuning.common.text import clean_line
from finetuning.data.chat_template import (
    CLOSE,
    OPEN,
    ChatFormat,
    marked,
    opens_thinking,
    render,
    template_errors,
    turn_with,
)
from finetuning.data.template_limits import TemplateLimitError
from finetuning.data.verification import RenderingFault, Turn, Verifier
from finetuning.readers.sample import Sample

_EMPTY_BLOCK = re.compile(rf"\A\s*+(?:{OPEN})?\s*+{CLOSE}\s*+")
Pieces = list[str]  # encoded one by one and joined, so that no token reaches across their borders


@dataclass(frozen=True)
class Document:
    """Text of one document, not yet encoded."""

    prompt: Pieces
    thinking: Pieces
    """All of the completion where `</think>` is one token, which then marks the border."""
    close: Pieces
    answer: Pieces
    has_thinking: bool


class Renderer:
    """Makes documents of samples, and checks each of them.

    Args:
        tokenizer: whose chat template is used.
        form: what is known about it.
        all_turns: every assistant turn becomes a document, not the final one alone.
    """

    def __init__(self, tokenizer: Any, form: ChatFormat, *, all_turns: bool) -> None:
        self.tokenizer, self.form, self._all_turns = tokenizer, form, all_turns
        self._faults = template_errors()
        self._verifier = Verifier(self._texts, form)

    def documents(self, sample: Sample, mark: str) -> tuple[list[Document], int]:
        """The final turn, or every assistant turn, behind the prompt that the model sees for it; and how
        many assistant turns the sample has.

        mark: a character put into each text of a control token, which keeps it from becoming one; may be
        empty. Raises RenderingFault where the template refuses a turn or loses something of it.
        """
        messages = sample.messages()
        tools = json.loads(sample.tools) if sample.tools else None
        if mark:
            control = self.form.control
            messages, tools = marked(messages, control, mark), marked(tools, control, mark)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        # Without a message before it, a turn has no prompt, as when an assistant greets first.
        may = [i for i in turns if i and messages[i].get("loss", True)]
        learnt = may if self._all_turns else turns[-1:]
        try:
            made = [self._document(Turn(messages[:i], messages[i], tools), mark) for i in learnt]
        except TemplateLimitError as error:
            place = f"{clean_line(sample.source)}:{sample.line}"
            raise TemplateLimitError(f"{place}: {error}") from error
        except self._faults as error:
            if isinstance(error, RenderingFault):
                raise
            reason = f"the chat template refuses it: {clean_line(str(error), 200)}"
            raise RenderingFault(reason) from error
        return made, len(turns)

    def _document(self, turn: Turn, mark: str) -> Document:
        prompt, completion = self._texts(turn)
        self._verifier.check(turn, prompt, completion)
        thinking, close, answer = completion, "", ""
        if self.form.close_id < 0 and CLOSE in completion:
            thinking, close, answer = completion.partition(CLOSE)
        elif self.form.close_id < 0:
            thinking, answer = "", completion
        texts = (prompt, thinking, close, answer)
        pieces = (text.split(mark) if mark else [text] for text in texts)
        return Document(*pieces, has_thinking=bool(turn.thinking.strip()))

    def _texts(self, turn: Turn) -> tuple[str, str]:
        """The prompt as it is at inference, and what the model is to write behind it."""
        prompt = self._render(turn.before, turn.tools, prompt=True)
        return prompt, self._completion(turn, prompt)

    def _render(self, messages: list[dict], tools: list | None, *, prompt: bool = False) -> str:
        return render(self.tokenizer, messages, tools, self.form.switch, prompt=prompt)

    def _completion(self, turn: Turn, prompt: str) -> str:
        """What the model is to write behind `prompt`, up to and beyond the end of the turn."""
        form, message, thinking = self.form, turn.message, turn.thinking
        plain = {key: value for key, value in message.items() if key != "reasoning_content"}
        if form.reasoning == "inline" and thinking:
            message = {**plain, **turn_with(message["content"], thinking)}
        if form.reasoning != "composed":
            text = self._render([*turn.before, message], turn.tools)
            if text.startswith(prompt):
                return text[len(prompt) :]
        text = self._render([*turn.before, plain], turn.tools)
        opens = opens_thinking(prompt)
        stem = prompt[: prompt.rindex(OPEN)] if opens else prompt
        if not text.startswith(stem):
            raise RenderingFault(
                "the chat template's own turn does not begin with its generation prompt"
            )
        answer = text[len(stem) :]
        if opens:
            answer = _EMPTY_BLOCK.sub("", answer)  # the prompt has opened one already
            return f"{thinking}\n{CLOSE}\n\n{answer}"
        return f"{OPEN}\n{thinking}\n{CLOSE}\n\n{answer}" if thinking else answer
