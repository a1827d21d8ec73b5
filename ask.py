"""Ask the trained model a question and watch it think.

    uv run python ask.py "SM4的分组长度是多少？"
    uv run python ask.py "SM4的分组长度是多少？" --compare           # the base beside it
    uv run python ask.py "…" --adapter qwen3_4b_thinking_output/checkpoints/checkpoint-50

    uv run python ask.py                                         # a chat

Without --adapter the result of the newest run below --output-dir answers. Thinking and answer appear apart,
as they are written. A chat remembers questions and answers, shows how much was thought, and the thoughts on
demand.
"""

# ruff: noqa: E402  what is slow to import comes once the command line is known to be right

from finetuning.common import process  # first: Ctrl-C gets an answer while torch is loaded

if __name__ == "__main__":
    process.imports_begin()

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetuning.common.arguments import parsed
from finetuning.common.errors import UserError, exit_code
from finetuning.common.language import translated
from finetuning.common.machine import check_device_name
from finetuning.config import EMBEDDED
from finetuning.model.adapter_files import is_adapter
from finetuning.rules import LOWEST_TEMPERATURE, TEMPERATURE
from finetuning.runs.result import Trained, base_named, find_trained


@dataclass(frozen=True)
class Ask:
    """Answer a question with the trained model, its thinking shown apart."""

    question: Annotated[str | None, tyro.conf.Positional] = None
    """What to ask; without it a chat begins."""
    adapter: str = ""
    """Adapter or model: a folder, or the name of one below output_dir, such as best_model or checkpoint-50;
    empty: the result of the newest run."""
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
    """0: always the most probable token, else 0.01 or more; not given: what the model's own configuration
    says."""
    seed: int = 0
    """Of the sampling; both sides of --compare use the same."""
    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""


def checked(ask: Ask) -> tuple[Trained, str]:
    """Which model is asked, and the base that it is given.

    UserError for what can be known to be wrong before the model is loaded.
    """
    if ask.question is not None and not ask.question.strip():
        raise UserError("the question is empty")
    if ask.compare and ask.question is None:
        raise UserError("--compare needs a question; in a chat type /compare")
    if ask.max_new_tokens < 1:
        raise UserError("--max-new-tokens must be at least 1")
    if ask.temperature is not None and not TEMPERATURE.holds(ask.temperature):
        raise UserError(f"--temperature must be 0, or {LOWEST_TEMPERATURE} or more")
    check_device_name(ask.device)
    base_model = base_named(ask.base_model)
    trained = find_trained(ask.adapter, ask.output_dir)
    if ask.compare and not is_adapter(trained.folder):
        raise UserError(
            f"--compare: {trained.folder} is a whole model, not an adapter that can be put aside"
        )
    return trained, base_model


if __name__ == "__main__":  # help, and what is wrong, need none of the slow imports
    if refused := exit_code(lambda: checked(parsed("ask.py", Ask))):
        sys.exit(refused)
    print(translated("starting: the libraries are being loaded"), file=sys.stderr, flush=True)

import torch

from finetuning.common.distributed import limit_threads, pick_device
from finetuning.evaluation.reply import Reply, generate
from finetuning.model.loading import load_for_inference
from finetuning.runs.origin import read_origin

process.imports_are_done()

STYLES = {"thinking": "dim", "answer": ""}
CHAT_HELP = (
    "/thinking: what was thought, /compare: the base beside it, /new: forget all, /exit: end"
)
DEMONSTRATION = "This is the demonstration model: its answers mean nothing."


def answer(model: torch.nn.Module, tokenizer: Any, ask: Ask, console: Console) -> None:
    """One reply to the question, piece by piece."""
    part = ""

    def show(new_part: str, text: str) -> None:
        nonlocal part
        if new_part != part:
            console.print("\n" if part else "", end="")
            console.rule(translated(new_part), style="dim")
            part = new_part
        console.print(Text(text, style=STYLES[part]), end="", soft_wrap=True)

    reply = generate(model, tokenizer, messages(ask), show, **sampling_settings(ask))
    console.print()
    console.rule(translated(remark(reply, ask)), style="dim")


def compare(
    model: torch.nn.Module,
    tokenizer: Any,
    ask: Ask,
    console: Console,
    history: Sequence[dict[str, str]] = (),
) -> None:
    """Base against trained, side by side. history: a conversation instead of the one question."""
    texts = {name: {"thinking": "", "answer": ""} for name in ("base", "trained")}
    remarks = dict.fromkeys(texts, "")

    def picture() -> Table:
        table = Table(expand=True, show_lines=True)
        table.add_column("", no_wrap=True)
        for name in texts:  # Chinese text is one word to rich
            table.add_column(translated(name), ratio=1, overflow="fold")
        for part, style in STYLES.items():
            table.add_row(
                translated(part), *(Text(text[part], style=style) for text in texts.values())
            )
        table.add_row("", *remarks.values())
        return table

    live = Live(get_renderable=picture, console=console, refresh_per_second=4)
    moves = console.is_terminal and console.file.isatty()  # colours can be forced, a cursor can't
    with live if moves else nullcontext():
        for name in texts:

            def show(part: str, text: str, name: str = name) -> None:
                texts[name][part] += text

            with model.disable_adapter() if name == "base" else nullcontext():
                said = history or messages(ask)
                reply = generate(model, tokenizer, said, show, **sampling_settings(ask))
            remarks[name] = translated(remark(reply, ask))
    if not moves:
        console.print(picture())


class Chat:
    """Questions and answers one after the other; the model sees all of them, but not what it has thought.

    ask: everything but the question.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, ask: Ask, console: Console) -> None:
        self._model, self._tokenizer, self._ask, self._console = model, tokenizer, ask, console
        self._history = messages(ask)
        self._thought = ""  # before the last answer

    def run(self, lines: Iterable[str]) -> None:
        """Answer each line, or do what it says, until /exit or the end."""
        self._tell(CHAT_HELP)
        for line in lines:
            line = line.strip()
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._reply(line)

    def _command(self, line: str) -> None:
        if line == "/thinking":
            self._console.print(Text(self._thought or translated("nothing was thought yet"), "dim"))
        elif line == "/new":
            self._history, self._thought = messages(self._ask), ""
            self._tell("a new conversation")
        elif line == "/compare":
            self._compare()
        else:
            self._tell(CHAT_HELP)

    def _compare(self) -> None:
        """The last question once more, to the base as well; the conversation stays as it is."""
        if not hasattr(self._model, "disable_adapter"):
            self._tell("this is a whole model, without an adapter that could be put aside")
        elif self._history[-1:] and self._history[-1]["role"] == "assistant":
            said = self._history[:-1]
            compare(self._model, self._tokenizer, self._ask, self._console, said)
        else:
            self._tell("there is no question yet")

    def _reply(self, question: str) -> None:
        said = [*self._history, {"role": "user", "content": question}]
        thought = 0

        def show(part: str, text: str) -> None:
            nonlocal thought
            if part == "answer":
                self._console.print(Text(text), end="", soft_wrap=True)
            elif not thought:
                self._tell("thinking …")
            thought += len(text) * (part == "thinking")

        reply = generate(self._model, self._tokenizer, said, show, **sampling_settings(self._ask))
        self._history = [*said, {"role": "assistant", "content": reply.text["answer"]}]
        self._thought = reply.text["thinking"]
        self._console.print()
        self._tell(
            f"thought {thought} characters (/thinking shows them); {remark(reply, self._ask)}"
        )

    def _tell(self, text: str) -> None:
        self._console.print(Text(translated(text), "dim"))


def typed_lines() -> Iterator[str]:
    """What a person types, or what comes on standard input, until its end."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def messages(ask: Ask) -> list[dict[str, str]]:
    """The conversation that the model continues; in a chat what stands before the first question."""
    system = [{"role": "system", "content": ask.system}] if ask.system else []
    return [*system, *([{"role": "user", "content": ask.question}] if ask.question else [])]


def sampling_settings(ask: Ask) -> dict[str, Any]:
    """How the reply is drawn, as `generate` takes it."""
    return {
        "max_new_tokens": ask.max_new_tokens,
        "temperature": ask.temperature,
        "seed": ask.seed,
    }


def remark(reply: Reply, ask: Ask) -> str:
    """How the reply ended."""
    end = "" if reply.ended else f", cut at --max-new-tokens {ask.max_new_tokens}"
    end = ", ended because it repeats itself" if reply.looped else end
    return f"{reply.num_tokens} tokens{end}"


def run(ask: Ask, console: Console | None = None) -> None:
    """Find the model, load it, and let it reply."""
    trained, base_model = checked(ask)
    limit_threads()
    folder, device = trained.folder, pick_device(ask.device)
    model, tokenizer = load_for_inference(folder, device=device, base_model=base_model)
    aside = Console(stderr=True, style="dim", highlight=False)
    said = translated(f"{folder} ({trained.reason}) on {device}")
    aside.print(Text(said), soft_wrap=True)  # a path stays one word
    if read_origin(folder).get("base", {}).get("model") == EMBEDDED:
        aside.print(Text(translated(DEMONSTRATION)))
    console = console or Console(highlight=False)
    if ask.question is None:
        Chat(model, tokenizer, ask, console).run(typed_lines())
        return
    show = compare if ask.compare else answer
    show(model, tokenizer, ask, console)


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit code."""
    return exit_code(lambda: run(parsed("ask.py", Ask, arguments)))


if __name__ == "__main__":
    process.exit_process(main())
