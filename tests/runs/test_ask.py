"""Which model answers, what the terminal shows, and how bad input is refused.

uv run pytest tests/runs/test_ask.py
"""

import io
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

import ask
from ask import Ask, main
from finetuning.common.errors import UserError
from finetuning.data.chat_template import chat_format
from finetuning.evaluation import reply as evaluation_reply
from finetuning.evaluation.reply import Reply, generate
from finetuning.model.loading import load_for_inference
from finetuning.runs.result import find_trained

QUESTION = "SM4的分组长度是多少？"


def console() -> Console:
    return Console(file=io.StringIO(), width=100, highlight=False)


# -----------------------------------------------------------------------------
# Which model


def place(adapter: Path, target: Path, seconds: float) -> Path:
    shutil.copytree(adapter, target)
    for path in target.iterdir():
        os.utime(path, (seconds, seconds))
    return target


def reply_to(model, tokenizer, settings: Ask) -> Reply:
    return generate(model, tokenizer, ask.messages(settings), **ask.sampling_settings(settings))


def test_the_newest_adapter_answers(tmp_path, adapter):
    with pytest.raises(UserError, match="train first"):
        find_trained("", str(tmp_path))
    best = place(adapter, tmp_path / "best_model", 200)
    assert find_trained("", str(tmp_path)).folder == best
    checkpoint = place(adapter, tmp_path / "checkpoints" / "checkpoint-50", 300)
    place(adapter, tmp_path / "checkpoints" / "checkpoint-60.damaged", 900)
    (tmp_path / "checkpoints" / "checkpoint-70").mkdir()
    assert find_trained("", str(tmp_path)).folder == checkpoint
    final = place(adapter, tmp_path / "final_model", 300)
    assert find_trained("", str(tmp_path)).folder == final, (
        "final_model wins over a checkpoint as old"
    )
    assert find_trained(str(best), str(tmp_path)).folder == best


def test_base_and_adapter_are_what_inference_loads(adapter, tiny_model):
    model, _ = load_for_inference(adapter, device="cpu")
    base, _ = load_for_inference(tiny_model, device="cpu")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        trained, plain = model(input_ids=ids).logits, base(input_ids=ids).logits
        with model.disable_adapter():
            aside = model(input_ids=ids).logits
    assert torch.equal(aside, plain) and (trained - plain).abs().max() > 0.01
    assert not model.training and model.config.use_cache


# -----------------------------------------------------------------------------
# What it shows


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


def written(tokenizer, text: str) -> tuple[Reply, list[tuple[str, str]]]:
    pieces: list[tuple[str, str]] = []
    reply = Reply(tokenizer, chat_format(tokenizer), lambda part, new: pieces.append((part, new)))
    reply.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer.encode(text, add_special_tokens=False):
        reply.put(torch.tensor([token]))
    reply.end()
    return reply, pieces


def test_a_reply_is_taken_apart_while_it_is_written(tokenizer):
    text = "先算161。\n再验证龘。\n</think>\n\n**答案**是1\n\n完。<|im_end|>"
    reply, pieces = written(tokenizer, text)
    assert reply.text == {"thinking": "先算161。\n再验证龘。\n", "answer": "**答案**是1\n\n完。"}
    assert reply.ended and reply.num_tokens == len(tokenizer.encode(text))
    assert len(pieces) > 10, "piece by piece"
    assert not any("\ufffd" in new for _, new in pieces), "no half characters"
    for part in ("thinking", "answer"):
        assert "".join(new for p, new in pieces if p == part) == reply.text[part]


def test_a_reply_that_is_cut_and_one_that_sends_control_characters(tokenizer):
    reply, _ = written(tokenizer, "还没想完")
    assert not reply.ended and reply.text == {"thinking": "还没想完", "answer": ""}
    reply, _ = written(tokenizer, "a\x1b[31mb</think>\x07c")
    assert "\x1b" not in reply.text["thinking"] and reply.text["answer"] == "c"


def test_it_streams_what_the_model_says(adapter):
    model, tokenizer = load_for_inference(adapter, device="cpu")
    settings = Ask(QUESTION, max_new_tokens=24, temperature=0)
    out = console()
    ask.answer(model, tokenizer, settings, out)
    shown = out.file.getvalue()
    reply = reply_to(model, tokenizer, settings)
    assert reply.num_tokens <= 24
    text = "".join(reply.text.values())
    assert "".join(text.split()) in "".join(shown.split()).replace("─", "").replace("answer", "")
    assert "cut at --max-new-tokens 24" in shown or reply.ended


def test_the_same_seed_says_the_same_and_the_base_something_else(adapter):
    model, tokenizer = load_for_inference(adapter, device="cpu")
    settings = Ask(QUESTION, max_new_tokens=16, temperature=0.8, seed=3)
    first, second = (reply_to(model, tokenizer, settings).text for _ in range(2))
    with model.disable_adapter():
        base = reply_to(model, tokenizer, settings).text
    assert first == second != base


def test_a_reply_that_goes_round_in_circles_ends(adapter):
    model, tokenizer = load_for_inference(adapter, device="cpu")

    class Circle(torch.nn.Module):
        """Makes the head say the same two tokens in turn."""

        def __init__(self):
            super().__init__()
            self.turn = 0

        def forward(self, hidden):
            self.turn += 1
            logits = torch.zeros(*hidden.shape[:2], len(tokenizer))
            logits[..., 40 + self.turn % 2] = 100.0
            return logits

    model.get_base_model().lm_head = Circle()
    settings = Ask(QUESTION, max_new_tokens=2000, temperature=0)
    reply = reply_to(model, tokenizer, settings)
    assert evaluation_reply.LOOP_TOKENS <= reply.num_tokens < evaluation_reply.LOOP_TOKENS + 32
    assert "repeats itself" in ask.remark(reply, settings)


def test_a_list_with_progress_is_no_circle():
    counting = torch.tensor([t for i in range(64) for t in (7, 8, 9, 100 + i)])
    assert not evaluation_reply.is_loop(counting) and evaluation_reply.is_loop(
        torch.tensor([7, 8, 9, 5] * 64)
    )


def test_compare_shows_both_side_by_side(adapter):
    model, tokenizer = load_for_inference(adapter, device="cpu")
    out = console()
    ask.compare(model, tokenizer, Ask(QUESTION, max_new_tokens=8, temperature=0), out)
    shown = out.file.getvalue()
    assert "base" in shown and "trained" in shown and "thinking" in shown
    assert shown.count("8 tokens, cut at") == 2


def test_compare_shows_the_whole_of_chinese_text(adapter, monkeypatch):
    model, tokenizer = load_for_inference(adapter, device="cpu")
    text = "分组密码把明文分成等长的块逐块加密" * 20

    def say(_model, _tokenizer, _messages, show, **_sampling) -> Reply:
        show("thinking", text)
        return Reply(tokenizer, chat_format(tokenizer), show)

    monkeypatch.setattr(ask, "generate", say)
    out = console()
    ask.compare(model, tokenizer, Ask(QUESTION), out)
    shown = out.file.getvalue()
    assert "…" not in shown and sum(shown.count(c) for c in set(text)) == 2 * len(text)


# -----------------------------------------------------------------------------
# The command


def test_the_command_answers(adapter, capsys):
    options = ["--output-dir", str(adapter.parent), "--max-new-tokens", "4", "--device", "cpu"]
    assert main([QUESTION, *options]) == 0
    assert "4 tokens" in capsys.readouterr().out
    assert main([QUESTION, *options, "--compare", "--system", "简短"]) == 0


def test_bad_input_is_one_clear_line(tmp_path, tiny_model, capsys):
    cases = {
        "train first": [QUESTION, "--output-dir", str(tmp_path)],
        "no such folder": [QUESTION, "--adapter", str(tmp_path / "nothing")],
        "neither an adapter": [QUESTION, "--adapter", str(tmp_path)],
        "is empty": [" "],
        "needs a question": ["--compare"],
        "--temperature": [QUESTION, "--temperature", "-1"],
        "0, or 0.01 or more": [QUESTION, "--temperature", "1e-40"],
        "whole model": [QUESTION, "--adapter", str(tiny_model), "--compare"],
    }
    for expected, arguments in cases.items():
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert expected in said and "Traceback" not in said and said.startswith("error:")


# -----------------------------------------------------------------------------
# A chat


@pytest.fixture
def replies(monkeypatch) -> list[list[dict]]:
    """The conversations that the model was given; its reply is made of their length."""
    given: list[list[dict]] = []

    def generate(model, tokenizer, said, show, **settings) -> Reply:
        given.append(list(said))
        reply = Reply.__new__(Reply)
        reply.text = {"thinking": f"想了{len(said)}", "answer": f"答{len(said)}"}
        reply.num_tokens, reply.ended, reply.looped = 7, True, False
        for part, text in reply.text.items():
            show(part, text)
        return reply

    monkeypatch.setattr(ask, "generate", generate)
    return given


def test_a_chat_remembers_what_was_said_but_not_what_was_thought(replies):
    screen = console()
    chat = ask.Chat(None, None, Ask(system="简短"), screen)
    chat.run(["一", "", "二", "/new", "三", "/exit", "四"])
    first, second, third = replies
    assert [m["content"] for m in first] == ["简短", "一"]
    assert [m["content"] for m in second] == ["简短", "一", "答2", "二"]
    assert [m["content"] for m in third] == ["简短", "三"]
    assert "想了" not in str(replies)


def test_thinking_is_folded_until_it_is_asked_for(replies):
    screen = console()
    ask.Chat(None, None, Ask(), screen).run(["一"])
    shown = screen.file.getvalue()
    assert "答1" in shown and "想了1" not in shown and "thought 3 characters" in shown
    screen = console()
    ask.Chat(None, None, Ask(), screen).run(["/thinking", "一", "/thinking", "/what"])
    shown = screen.file.getvalue()
    assert "想了1" in shown and "nothing was thought yet" in shown
    assert shown.count(ask.CHAT_HELP) == 2, "an unknown command is answered with the known ones"


def test_compare_in_a_chat_asks_both_the_last_question(replies, monkeypatch):
    class Model:
        def disable_adapter(self):
            return nullcontext()

    screen = console()
    ask.Chat(Model(), None, Ask(), screen).run(["/compare", "一", "/compare", "二"])
    assert [[m["content"] for m in said] for said in replies] == [
        *(["一"], ["一"], ["一"]),
        ["一", "答1", "二"],
    ]
    shown = screen.file.getvalue()
    assert "there is no question yet" in shown and "base" in shown and "trained" in shown


@pytest.mark.slow
def test_a_chat_with_a_real_model_from_a_pipe(adapter, tiny_model, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n/exit\n"))
    options = ["--adapter", str(adapter), "--device", "cpu", "--max-new-tokens", "4"]
    assert main(options) == 0
    assert "4 tokens" in capfd.readouterr().out
