"""A reply of the model, piece by piece: thinking and answer apart, ended where it repeats itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from finetuning.common.text import clean
from finetuning.data.chat_template import OPEN, ChatFormat, chat_format, encode_prompt

LOOP_TOKENS, LOOP_PERIOD = 256, 16  # so many tokens in which so few, or fewer, come again and again


class Reply(BaseStreamer):
    """What a model writes, taken apart by thinking and answer while it comes.

    Args:
        show: called with ("thinking" or "answer", new text).
    """

    def __init__(self, tokenizer, form: ChatFormat, show: Callable[[str, str], None]) -> None:
        self._tokenizer, self._form, self._show = tokenizer, form, show
        self._open_id = tokenizer.convert_tokens_to_ids(OPEN)
        self._part = "thinking" if form.opens else "answer"
        self._line: list[int] = []  # tokens since the last line break, and what of them was shown
        self._shown = 0
        self._prompt_passed = False
        self.text = {"thinking": "", "answer": ""}
        self.num_tokens, self.ended, self.looped = 0, False, False

    def put(self, value: torch.Tensor) -> None:
        """The prompt at first, then one token after the other."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        for token in value.flatten().tolist():
            self._take(token)

    def end(self) -> None:
        """Nothing is left to come."""
        self._write(last=True)

    def _take(self, token: int) -> None:
        self.num_tokens += 1
        if token in stop_tokens(self._tokenizer, self._form):
            self.ended = True
        elif token == self._form.close_id or token == self._open_id:
            self._write(last=True)
            self._part = "answer" if token == self._form.close_id else "thinking"
            self._line, self._shown = [], 0
        else:
            self._line.append(token)
            self._write()

    def _write(self, last: bool = False) -> None:
        line = self._tokenizer.decode(self._line)
        if line.endswith("\ufffd") and not last:  # half a character
            return
        new = clean(line[self._shown :])
        new = new if self.text[self._part] else new.lstrip()
        self._shown = len(line)
        if line.endswith("\n"):
            self._line, self._shown = [], 0
        if new:
            self.text[self._part] += new
            self._show(self._part, new)


class UntilLoop(StoppingCriteria):
    """Ends a reply that says the same again and again, which a badly trained model does until the limit."""

    def __init__(self, prompt_length: int, reply: Reply) -> None:
        self._start, self._reply = prompt_length, reply

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """(rows,) whether to end; one row. Looks at each 32nd token, for a GPU would have to wait."""
        new = input_ids.shape[1] - self._start
        if new >= LOOP_TOKENS and new % 32 == 0:
            self._reply.looped = is_loop(input_ids[0, -LOOP_TOKENS:])
        return torch.full((len(input_ids),), self._reply.looped, device=input_ids.device)


def is_loop(tokens: torch.Tensor) -> bool:
    """Whether a few tokens (up to `LOOP_PERIOD`) repeat themselves from the first to the last."""
    return any(
        bool((tokens[period:] == tokens[:-period]).all()) for period in range(1, LOOP_PERIOD + 1)
    )


def stop_tokens(tokenizer: Any, form: ChatFormat) -> set[int]:
    """Ids that end a reply."""
    return {form.end_id, tokenizer.eos_token_id} - {None}


def generate(
    model: torch.nn.Module,
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    show: Callable[[str, str], None] = lambda part, text: None,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    seed: int = 0,
) -> Reply:
    """Let the model reply to a conversation; `show` gets the pieces as they are written.

    temperature: 0 takes the most probable token, None what the model's own configuration says.
    """
    form = chat_format(tokenizer)
    reply = Reply(tokenizer, form, show)
    prompt = encode_prompt(tokenizer, list(messages))
    ids = torch.tensor([prompt], device=model.device)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=reply,
            stopping_criteria=StoppingCriteriaList([UntilLoop(len(prompt), reply)]),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stop_tokens(tokenizer, form)),
            pad_token_id=form.end_id,
            **sampling(temperature),
        )
    return reply


def sampling(temperature: float | None) -> dict:
    """Arguments of `generate`."""
    if temperature is None:
        return {}
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}
