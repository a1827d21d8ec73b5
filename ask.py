"""Ask the trained model a question and watch it think.

    uv run python ask.py "SM4的分组长度是多少？"
    uv run python ask.py "SM4的分组长度是多少？" --compare           # the base beside it
    uv run python ask.py "…" --adapter qwen3_4b_thinking_output/checkpoints/checkpoint-50

Without --adapter the newest one below --output-dir answers. Thinking and answer appear apart, as they
are written.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from chat_format import OPEN, ChatFormat, chat_format, encode_prompt
from command_line import exit_code
from distributed import pick_device
from errors import UserError
from model_loading import load_for_inference
from safe_text import clean
from trained_model import find_trained, is_adapter

STYLES = {"thinking": "dim", "answer": ""}
LOOP_TOKENS, LOOP_PERIOD = 256, 16  # so many tokens in which so few, or fewer, come again and again


@dataclass(frozen=True)
class Ask:
    """Answer a question with the trained model, its thinking shown apart."""

    question: Annotated[str, tyro.conf.Positional]
    """What to ask."""
    adapter: str = ""
    """Folder of an adapter or a model; empty: the newest below output_dir."""
    output_dir: str = "qwen3_4b_thinking_output"
    """Where a run has written final_model/, best_model/ and checkpoints/."""
    base_model: str = ""
    """Folder or hub name of the base; empty: the one that the adapter names."""
    compare: bool = False
    """Show the base model's reply beside the trained one's."""
    system: str = ""
    """System prompt."""
    max_new_tokens: int = 2048
    """Longest reply, tokens."""
    temperature: float | None = None
    """0: always the most probable token; not given: what the model's own configuration says."""
    seed: int = 0
    """Of the sampling; both sides of --compare use the same."""
    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""


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
    ask: Ask,
    show: Callable[[str, str], None] = lambda part, text: None,
) -> Reply:
    """Let the model reply; `show` gets the pieces as they are written."""
    form = chat_format(tokenizer)
    reply = Reply(tokenizer, form, show)
    system = [{"role": "system", "content": ask.system}] if ask.system else []
    prompt = encode_prompt(tokenizer, [*system, {"role": "user", "content": ask.question}])
    ids = torch.tensor([prompt], device=model.device)
    torch.manual_seed(ask.seed)
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=reply,
            stopping_criteria=StoppingCriteriaList([UntilLoop(len(prompt), reply)]),
            max_new_tokens=ask.max_new_tokens,
            eos_token_id=sorted(stop_tokens(tokenizer, form)),
            pad_token_id=form.end_id,
            **sampling(ask.temperature),
        )
    return reply


def sampling(temperature: float | None) -> dict:
    """Arguments of `generate`."""
    if temperature is None:
        return {}
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


# -----------------------------------------------------------------------------
# On the terminal


def answer(model: torch.nn.Module, tokenizer: Any, ask: Ask, console: Console) -> None:
    """One reply, piece by piece."""
    part = ""

    def show(new_part: str, text: str) -> None:
        nonlocal part
        if new_part != part:
            console.print("\n" if part else "", end="")
            console.rule(new_part, style="dim")
            part = new_part
        console.print(Text(text, style=STYLES[part]), end="", soft_wrap=True)

    reply = generate(model, tokenizer, ask, show)
    console.print()
    console.rule(remark(reply, ask), style="dim")


def compare(model: torch.nn.Module, tokenizer: Any, ask: Ask, console: Console) -> None:
    """Base against trained, side by side."""
    texts = {name: {"thinking": "", "answer": ""} for name in ("base", "trained")}
    remarks = dict.fromkeys(texts, "")

    def picture() -> Table:
        table = Table(expand=True, show_lines=True)
        table.add_column("", no_wrap=True)
        for name in texts:  # Chinese text is one word to rich
            table.add_column(name, ratio=1, overflow="fold")
        for part, style in STYLES.items():
            table.add_row(part, *(Text(text[part], style=style) for text in texts.values()))
        table.add_row("", *remarks.values())
        return table

    with Live(get_renderable=picture, console=console, refresh_per_second=4):
        for name in texts:

            def show(part: str, text: str, name: str = name) -> None:
                texts[name][part] += text

            with model.disable_adapter() if name == "base" else nullcontext():
                reply = generate(model, tokenizer, ask, show)
            remarks[name] = remark(reply, ask)


def remark(reply: Reply, ask: Ask) -> str:
    """How the reply ended."""
    end = "" if reply.ended else f", cut at --max-new-tokens {ask.max_new_tokens}"
    end = ", ended because it repeats itself" if reply.looped else end
    return f"{reply.num_tokens} tokens{end}"


def run(ask: Ask, console: Console | None = None) -> None:
    """Find the model, load it, and let it reply."""
    if not ask.question.strip():
        raise UserError("the question is empty")
    if ask.max_new_tokens < 1 or (ask.temperature is not None and not ask.temperature >= 0):
        raise UserError("--max-new-tokens must be at least 1, --temperature 0 or more")
    folder = find_trained(ask.adapter, ask.output_dir)
    if ask.compare and not is_adapter(folder):
        raise UserError(
            f"--compare: {folder} is a whole model, not an adapter that can be put aside"
        )
    device = pick_device(ask.device)
    model, tokenizer = load_for_inference(folder, device=device, base_model=ask.base_model)
    Console(stderr=True, style="dim", highlight=False).print(Text(f"{folder} on {device}"))
    show = compare if ask.compare else answer
    show(model, tokenizer, ask, console or Console(highlight=False))


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit code."""
    return exit_code(lambda: run(tyro.cli(Ask, args=arguments, use_underscores=False)))


if __name__ == "__main__":
    sys.exit(main())
