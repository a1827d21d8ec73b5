"""For every row of the metric table a value that a run must have written, computed apart from the program.

Three runs of the real loop and a description of a data set: on a CPU against plain torch and peft
(`tests/helpers/reference.py`), with clock, host and answers set by hand; on a pretended machine of two ranks
with GPUs, where the losses follow a known curve; and one trouble after the other for the alerts. A row is
covered where a check has compared a value of it, never by its name. `test_every_row_has_a_checked_value`
names the rows that none has.

uv run pytest tests/runs/test_metric_values.py
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

import direct_finetuning_with_existing_modules as program
import tb_logger
from finetuning.config import DirectTrainingConfig
from finetuning.evaluation.evaluator import Evaluator
from finetuning.events import event_values
from finetuning.events.metric_table import METRICS
from finetuning.model.packed_model import PackedLossModel
from finetuning.monitoring.system_monitor import SystemMonitor
from finetuning.runs import metrics as run_metrics
from finetuning.runs.directory import new_run
from finetuning.runs.metrics import MetricsProcessor
from finetuning.runs.plan import plan_run
from finetuning.runs.record import RunRecord
from finetuning.training import optimizer, step_clock
from finetuning.training.checkpoint_manager import CheckpointManager
from finetuning.training.engine import TrainingEngine
from tests.helpers import fake_nvml
from tests.helpers.checked_values import Ledger, Values, table_rows
from tests.helpers.hand_machine import MB, HandMachine, HandTime, Reading
from tests.helpers.pretended_gpus import (
    Device,
    NoEvaluator,
    ScriptedEngine,
    ScriptedStep,
    cuda,
    two_ranks,
)
from tests.helpers.reference import PARTS, Document, PlainTraining, Reference, Sums, tokens_of
from tests.helpers.tiny_model import make_tiny_data

CLOSE_TO = {"rel": 2e-5, "abs": 2e-6}
CHECKS: list[Callable] = []


def check(function: Callable) -> Callable:
    """A check takes one run; it is a test of its own."""
    CHECKS.append(function)
    return function


def by_step(values: Sequence[float], first: int = 1) -> dict[int, float]:
    return dict(enumerate(values, start=first))


# -----------------------------------------------------------------------------
# A run on a CPU: data, and what happens in it

LAYERS, HIDDEN, QUERIES, KEYS, INNER = 2, 32, 32, 16, 64  # of the tiny model
RANK, EVALUATED, LOGGED, STOPPED, SAVED = 4, (0, 4, 8, 12, 15), (3, 6, 9, 12, 15), 7, (6, 7, 12, 15)
STEPS, EPOCH, BUDGET = 15, 5, 95
SUBJECTS = {"SM4": "对称算法", "数字证书": "证书与PKI", "SM2": "非对称算法"}  # else none


def training_rows(word: str, count: int) -> list[dict]:
    """Questions with thinking of different lengths, of all difficulties, with and without a term."""
    rows = []
    for i in range(count):
        a, b = 13 + 7 * i, 29 + 5 * i
        steps = "，".join(f"{word}{j}步得{(a + 3 * j) * b}" for j in range(1 + i * 5 % 7))
        term = ("SM4", "数字证书", "")[i % 3]
        question = f"{term}{word}题{i}：{a}乘以{b}是多少？"
        answer = f"{word}的答案是{a * b}。"
        rows.append(
            {"question": question, "thinking": f"先算{a}×{b}。{steps}。", "answer": answer}
            | {"difficulty": 1 + i % 4}
        )
    return rows


HELD_OUT = [
    {"question": "SM4和SM4题：5乘以7？", "answer": "SM4和SM3。最终答案：35", "difficulty": 2},
    {"question": "SM2题：50乘以25？", "answer": "SM2。最终答案：1,250", "difficulty": 4},
    {"question": "SM2是哪一种？", "answer": "它是SM9与SM2中的一种。", "difficulty": 4},
    {"question": "丙题：好不好？", "answer": "没有什么不好，" * 3 + "。", "difficulty": 1},
]
for number, row in enumerate(HELD_OUT):
    row["thinking"] = "再想一想这题，" * (2 + number) + f"得{number}。"


def groups_of(record: dict) -> tuple[str, str]:
    """The names under which the reference counts a record's loss."""
    subject = next((s for word, s in SUBJECTS.items() if word in record["question"]), "none")
    return f"difficulty {record['difficulty']}", f"category {subject}"


# What the model is made to answer to the four questions at each evaluation; "" is a loop without an end.
FIRST = "再想一想。\n</think>\n\nSM4。最终答案：35"
REPLIES = [
    ["", "", "", ""],
    [FIRST, "", "想</think>SM2与SM9。", "想一想"],
    [FIRST, "想\n</think>\n\n最终答案：1250。", "想</think>", "想</think>好</think>好"],
    ["想</think>SM3与SM4，最终答案：36", "</think>SM2", "想</think>SM2", "好" * 12],
    [FIRST, "一二三四五六七八九十一二三四五六七八九十\n</think>\n\n最终答案：**1,250**", "", ""],
]


def host_reading(read: int, look: int) -> Reading:
    """Other numbers at each of three looks before a read."""
    return Reading(
        seconds=2.0,
        cpu_percent=5.0 + 10 * read + (20, 1, 6)[look],
        memory_percent=30.0 + read + (2, 9, 4)[look],
        resident=(400 + 10 * read + (3, 1, 8)[look]) * MB,
        of_children=[16 * MB, 8 * MB],
        disk_free=(90 - read) * 2**30 - look * 2**28,
        disk_bytes=(4 + read) * MB * (look + 1),
        net_bytes=(3 * MB * (look + 1), read * MB),
    )


def looks_of(reads: int) -> list[list[Reading]]:
    return [[host_reading(read, look) for look in range(3)] for read in range(reads)]


SPENT = {  # seconds by hand: (of each document, or at once)
    "data": 1 / 64,
    "forward_backward": 1 / 8,
    "optimizer": 1 / 4,
    "between": 1 / 32,
    "evaluation": 8.0,
    "model": 4.0,
    "checkpoint": 2.0,
    "logging": 1 / 8,
}


@contextlib.contextmanager
def hand_clock() -> Iterator[HandTime]:
    """The program's clocks move where it works, by what `SPENT` says."""
    clock = HandTime()

    def slow(place: object, name: str, seconds: Callable[..., float]) -> None:
        original = getattr(place, name)

        def slower(*arguments, **options):
            clock.spend(seconds(*arguments))
            return original(*arguments, **options)

        patch.setattr(place, name, slower)

    def of_pass(model: object, batch: object, *_: object) -> float:
        return SPENT["forward_backward"] * len(batch.documents) * torch.is_grad_enabled()

    with pytest.MonkeyPatch.context() as patch:
        for module in (step_clock, run_metrics, tb_logger):
            patch.setattr(module, "time", clock)
        slow(optimizer, "build_batch", lambda tokens, documents: SPENT["data"] * len(documents))
        slow(PackedLossModel, "forward", of_pass)
        slow(TrainingEngine, "update", lambda *_: SPENT["optimizer"])
        slow(program.DirectTrainer, "advance", lambda *_: SPENT["between"])
        slow(Evaluator, "measure", lambda *_: SPENT["evaluation"])
        slow(TrainingEngine, "save", lambda *_: SPENT["model"])
        slow(CheckpointManager, "save", lambda *_: SPENT["checkpoint"])
        slow(tb_logger.TensorBoardLogger, "_numbers", lambda *_: SPENT["logging"])
        yield clock


class Answers:
    """In place of the model: the replies of one evaluation after the other, as tokens behind the prompts."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.given = tokenizer, []

    def ids(self, text: str) -> tuple[list[int], bool]:
        """Tokens of a reply, and whether it ended."""
        if text:
            return self.tokenizer.encode(text, add_special_tokens=False), True
        return self.tokenizer.encode("啊", add_special_tokens=False)[:1] * BUDGET, False

    def generate(self, *, input_ids: torch.Tensor, max_new_tokens: int, **_) -> torch.Tensor:
        assert max_new_tokens == BUDGET
        replies = REPLIES[len(self.given)]
        self.given.append(replies)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        rows = []
        for prompt in self.tokenizer.batch_decode(input_ids):
            (asked,) = (i for i, row in enumerate(HELD_OUT) if row["question"] in prompt)
            ids, _ = self.ids(replies[asked])
            rows.append(ids + [end] * (BUDGET + 1 - len(ids)))
        width = min(BUDGET, max(row.index(end) + 1 if end in row else BUDGET for row in rows))
        written = torch.tensor([row[:width] for row in rows])
        return torch.cat([input_ids, written], dim=1)


def schooled(model: Path, folder: Path) -> Path:
    """The tiny model after some training of all weights: a few of its guesses are right, ends among them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = [tokens_of(tokenizer, row) for row in training_rows("丁", 8)]
    whole = AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    for number in range(40):
        ids = torch.tensor([documents[number % 8].ids])
        whole(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def kept_figures() -> Iterator[dict[str, list]]:
    """The figures that are drawn for events, by tag."""
    figures: dict[str, list] = {}
    original = event_values.figure_value

    def kept(tag: str, figure: Callable) -> object:
        drawn = figure()
        value = original(tag, drawn)
        figures.setdefault(tag, []).append(drawn)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_values, "figure_value", kept)
        yield figures


@dataclass
class CpuRun:
    """A run on a CPU in two sessions, and the same by plain torch."""

    values: Values
    config: DirectTrainingConfig
    trainer: program.DirectTrainer
    folder: Path
    reference: Reference
    documents: dict
    held_out: list[Document]
    answers: Answers
    figures: dict[str, list]
    micro_batches: list[list[int]]  # documents of each, by step

    def interval(self, step: int) -> Sums:
        """What the point of this step is about."""
        return sum(self.reference.steps[step - 3 : step], Sums())

    def logged(self, value: Callable[[Sums], float]) -> dict[int, float]:
        return {step: value(self.interval(step)) for step in LOGGED}

    def evaluated(self, value: Callable[[Sums], float]) -> dict[int, float]:
        return {step: value(sums) for step, sums in self.reference.held_out.items()}


def write(folder: Path, name: str, rows: Sequence[dict]) -> str:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return name


def cpu_config(folder: Path, model: Path, cache: Path) -> DirectTrainingConfig:
    return DirectTrainingConfig(
        model_name=str(model),
        data_path=(
            write(folder, "one.jsonl", training_rows("甲", 9)),
            write(folder, "two.jsonl", training_rows("乙", 10)),
        ),
        data_weights=(2.0, 0.5),
        eval_path=(write(folder, "held.jsonl", HELD_OUT),),
        max_seq_length=270,
        gradient_accumulation_steps=3,
        num_epochs=STEPS / EPOCH,
        learning_rate=2e-2,
        warmup_ratio=0.23,
        min_lr_ratio=0.2,
        weight_decay=0.5,
        adam_epsilon=1e-5,
        max_grad_norm=0.14,
        seed=11,
        lora_r=RANK,
        lora_alpha=12.0,
        target_modules=("q_proj", "v_proj", "down_proj"),
        logging_steps=3,
        eval_steps=4,
        save_steps=6,
        save_total_limit=9,
        num_probes=4,
        probe_max_new_tokens=BUDGET,
        log_weight_histograms=True,
        device="cpu",
        output_dir="out",
        cache_dir=str(cache),
    )


def session(config: DirectTrainingConfig, machine: HandMachine, resume: str, stop_after: int):
    """One session; a SIGTERM comes with an update, and the run ends with the step behind it."""
    updates = []

    def note(*_: object) -> None:
        updates.append(1)
        if len(updates) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_pre_hook(note)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(program, "start_system_monitor", lambda *_: machine.monitor())
            trainer = program.DirectTrainer(config, resume=resume, quiet=True)
            trainer.train()
    finally:
        hook.remove()
    return trainer


def do_cpu_run(ledger: Ledger, folder: Path, model: Path, cache: Path) -> CpuRun:
    config = cpu_config(folder, model, cache)
    answers = Answers(AutoTokenizer.from_pretrained(model))
    machine = HandMachine(looks_of(len(LOGGED) + 1))
    with (
        contextlib.chdir(folder),
        machine.installed(),
        hand_clock(),
        kept_figures() as figures,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(
            PackedLossModel, "generate", lambda self, **kwargs: answers.generate(**kwargs)
        )
        session(config, machine, "", STOPPED - 1)
        trainer = session(config, machine, "latest", 0)
    plan, part = trainer.plan.steps, trainer.plan.data.train
    assert (plan.num_steps, plan.steps_per_epoch) == (STEPS, EPOCH)
    steps, micro_batches = [], []
    for step in range(1, STEPS + 1):
        samples = [part.sample(d) for d in plan[step].documents]
        steps.append([(Path(s.source).name, s.line) for s in samples])
        micro_batches.append([len(m) for m in plan[step].micro_batches])
    plain = PlainTraining(config, folder, groups_of)
    return CpuRun(
        Values(ledger, folder / trainer.record.run.tensorboard),
        config,
        trainer,
        folder,
        plain.train(steps),
        plain.documents,
        plain.held_out,
        answers,
        figures,
        micro_batches,
    )


# -----------------------------------------------------------------------------
# Losses of the run on a CPU


@check
def losses_of_logged_steps(cpu: CpuRun) -> None:
    tags = {
        "Training/Loss": (),
        "Thinking/Loss": ("thinking",),
        "Answer/Loss": ("answer",),
        "Boundary/Close_Loss": ("close",),
        "Boundary/EOS_Loss": ("end",),
    }
    tags |= {f"Thinking/Loss_By_Position_{i:02d}": (f"tenth {i}",) for i in range(1, 11)}
    for tag, parts in tags.items():
        cpu.values.scalars(tag, cpu.logged(lambda sums, p=parts: sums.mean(*p)), **CLOSE_TO)
    perplexity = cpu.logged(lambda sums: math.exp(sums.mean()))
    cpu.values.scalars("Training/Perplexity", perplexity, rel=1e-4)
    last = cpu.interval(STEPS).mean()
    cpu.values.scalars("Training/Final_Loss", {STEPS: last}, **CLOSE_TO)


@check
def accuracies_and_shares_of_logged_steps(cpu: CpuRun) -> None:
    for name, parts in (
        ("Training/Token_", ()),
        ("Thinking/", ("thinking",)),
        ("Answer/", ("answer",)),
    ):
        right = cpu.logged(lambda sums, p=parts: sums.accuracy(*p))
        assert max(right.values()) > 0, "nothing to see"
        cpu.values.scalars(f"{name}Accuracy", right)
    for name in ("Thinking", "Answer"):
        share = cpu.logged(lambda sums, n=name: 100 * sums.count[n.lower()] / sums.targets)
        cpu.values.scalars(f"{name}/Tokens_Percent", share)
    closing = cpu.logged(lambda sums: sums.closing / sums.count["thinking"])
    cpu.values.scalars("Thinking/Premature_Close_Probability", closing, **CLOSE_TO)


@check
def losses_by_group(cpu: CpuRun) -> None:
    groups = {f"By_Difficulty_{k}": f"difficulty {k}" for k in range(1, 5)}
    groups |= {f"By_Category/{s}": f"category {s}" for s in [*SUBJECTS.values(), "none"]}
    groups |= {f"By_Source/{name}": name for name in ("one.jsonl", "two.jsonl", "held.jsonl")}
    seen = {step: cpu.interval(step) for step in LOGGED}
    for prefix, found in (("Training", seen), ("Eval", cpu.reference.held_out)):
        for tag, group in groups.items():
            losses = {step: sums.mean(group) for step, sums in found.items() if sums.count[group]}
            if losses:
                cpu.values.scalars(f"{prefix}/{tag}", losses, **CLOSE_TO)


@check
def steps_of_the_optimizer(cpu: CpuRun) -> None:
    reference = cpu.reference
    rates = {step: reference.rates[step - 1] for step in LOGGED}
    cpu.values.scalars("Training/Learning_Rate", rates)
    norms = {step: reference.norms[step - 1] for step in LOGGED}
    highest = {step: max(reference.norms[step - 3 : step]) for step in LOGGED}
    assert sum(highest[step] > 1.01 * norms[step] for step in LOGGED) >= 2, "nothing to see"
    falls = [
        a > 1.01 * b for a, b in zip([*highest.values()], [*highest.values()][1:], strict=False)
    ]
    assert any(falls), "a maximum that is never reset would not be seen"
    cpu.values.scalars("Training/Gradient_Norm", norms, rel=1e-4)
    cpu.values.scalars("Training/Gradient_Norm_Max", highest, rel=1e-4)
    cpu.values.scalars("Training/Epoch", {step: step / EPOCH for step in LOGGED})
    cpu.values.scalars("Monitoring/NonFinite_Steps", dict.fromkeys(LOGGED, 0))
    resumes = {step: float(step > STOPPED) for step in LOGGED}
    cpu.values.scalars("Monitoring/Resume_Count", resumes)
    score = dict.fromkeys(LOGGED, 0)  # five losses are no evidence
    cpu.values.scalars("Monitoring/Convergence_Score", score)


@check
def held_out_losses(cpu: CpuRun) -> None:
    tags = {
        "Loss": (),
        "Thinking_Loss": ("thinking",),
        "Answer_Loss": ("answer",),
        "Close_Loss": ("close",),
        "EOS_Loss": ("end",),
    }
    for tag, parts in tags.items():
        losses = cpu.evaluated(lambda sums, p=parts: sums.mean(*p))
        cpu.values.scalars(f"Eval/{tag}", losses, **CLOSE_TO)
    perplexity = cpu.evaluated(lambda sums: math.exp(sums.mean()))
    cpu.values.scalars("Eval/Perplexity", perplexity, rel=1e-4)
    right = cpu.evaluated(lambda sums: sums.accuracy())
    ends = cpu.evaluated(lambda sums: sums.correct["end"])
    assert max(ends.values()) > 0, "no end token was right: whether they count would not be seen"
    cpu.values.scalars("Eval/Token_Accuracy", right)


@check
def the_numbers_at_the_end(cpu: CpuRun) -> None:
    held_out = cpu.evaluated(lambda sums: sums.mean())
    adapted = (HIDDEN + QUERIES) + (HIDDEN + KEYS) + (INNER + HIDDEN)
    trainable = LAYERS * RANK * adapted
    frozen = load_file(Path(cpu.config.model_name) / "model.safetensors")
    model = {
        "First_Eval_Loss": held_out[0],
        "Last_Eval_Loss": held_out[STEPS],
        "Best_Eval_Loss": min(held_out.values()),
        "Trainable_Parameters": trainable,
        "Total_Parameters": trainable + sum(t.numel() for t in frozen.values()),
    }
    for name, value in model.items():
        cpu.values.scalars(f"Final_Model/{name}", {STEPS: value}, **CLOSE_TO)
    samples = {"Training_Samples": 9 * 2 + 5, "Held_Out_Samples": 4, "Broken_Samples": 0}
    for name, value in samples.items():
        cpu.values.scalars(f"Final_Dataset/{name}", {STEPS: value})
    settings = dataclasses.asdict(cpu.config)
    numbers = {n: v for n, v in settings.items() if type(v) in (int, float)}
    assert len(numbers) > 20
    for name, value in numbers.items():
        cpu.values.scalars(f"Final_Config/{name}", {STEPS: value})
    cpu.values.scalars("Final_Monitoring/Convergence_Score", {STEPS: 0})
    cpu.values.scalars("Config/Batch_Size", {0: 1})
    cpu.values.scalars("Config/Sequence_Length", {0: 270})
    cpu.values.scalars("Config/Gradient_Accumulation_Steps", {0: 3})


# -----------------------------------------------------------------------------
# Answers


def ten_grams_again(ids: list[int]) -> float:
    """Share of the ten tokens in a row that stood there before."""
    seen, again = set(), 0
    rows = [tuple(ids[i : i + 10]) for i in range(len(ids) - 9)]
    for row in rows:
        again += row in seen
        seen.add(row)
    return again / len(rows) if rows else 0.0


@check
def answers_to_the_probes(cpu: CpuRun) -> None:
    """Judged by hand. The reference of the last question is longer than the budget, so a reply to it that
    was cut is not judged."""
    long = [sum(map(bool, document.parts)) > BUDGET for document in cpu.held_out]
    assert long == [False, False, False, True]
    values, ids = cpu.values, cpu.answers.ids
    cut = dict(zip(EVALUATED, (1, 1 / 4, 0, 0, 1 / 2), strict=True))
    values.scalars("Eval/Budget_Hit_Rate", cut)
    # At first the fourth is not judged; in the second evaluation 1 and 3 are valid of 4, and so on.
    valid = dict(zip(EVALUATED, (0, 2 / 4, 2 / 4, 3 / 4, 2 / 3), strict=True))
    values.scalars("Eval/Format_Valid_Rate", valid)
    # Question 1 wants SM4 and SM3, 2 wants SM2, 3 wants SM9 and SM2, 4 nothing.
    recall = [0, (1 / 2 + 0 + 1) / 3, (1 / 2 + 0 + 0) / 3, (1 + 1 + 1 / 2) / 3, (1 / 2 + 0 + 0) / 3]
    values.scalars("Eval/Term_Recall", dict(zip(EVALUATED, recall, strict=True)))
    exact = dict(zip(EVALUATED, (0, 1 / 2, 1, 0, 1), strict=True))
    values.scalars("Eval/Exact_Answer", exact)
    repeated = [fmean(ten_grams_again(ids(reply)[0]) for reply in replies) for replies in REPLIES]
    assert repeated[0] == 85 / 86 and repeated[3] > 0
    values.scalars("Eval/Repetition_Rate", dict(zip(EVALUATED, repeated, strict=True)))
    ratios = {}
    for step, replies in zip(EVALUATED, REPLIES, strict=True):
        closed = [
            len(ids(reply.partition("</think>")[0])[0] if reply[0] != "<" else []) / thought
            for reply, thought in zip(replies, thinking_tokens(cpu), strict=True)
            if reply.count("</think>") == 1
        ]
        if closed:
            ratios[step] = fmean(closed)
    values.scalars("Eval/Think_Length_Ratio", ratios)


def thinking_tokens(cpu: CpuRun) -> list[int]:
    return [document.parts.count("thinking") for document in cpu.held_out]


@check
def answers_as_text(cpu: CpuRun) -> None:
    expected = {}
    for step, replies in zip(EVALUATED, REPLIES, strict=True):
        rows = set()
        for row, reply, thought in zip(HELD_OUT, replies, thinking_tokens(cpu), strict=True):
            ids, ended = cpu.answers.ids(reply)
            text = reply or cpu.answers.tokenizer.decode(ids)
            thinking, closed, answer = text.partition("</think>")
            before = (
                len(cpu.answers.ids(thinking)[0])
                if closed and thinking
                else len(ids) * (not closed)
            )
            rows |= {
                ("answer", "<br>".join(answer.strip().splitlines()), row["answer"]),
                ("thinking", thinking.strip(), row["thinking"]),
                ("thinking tokens", str(before), str(thought)),
            }
            assert ended == bool(reply)
        expected[step] = rows
    cpu.values.texts("Eval/Samples", expected, lambda text: set(map(tuple, table_rows(text))))


# -----------------------------------------------------------------------------
# Time and the host


class Diary:
    """What a clock must have counted, step after step, in each session."""

    def __init__(self, cpu: CpuRun) -> None:
        held_out, self.best = cpu.evaluated(lambda sums: sums.mean()), math.inf
        self.found: dict[str, dict[int, float]] = {}
        self.epochs: dict[int, float] = {}  # seconds of the epoch that ends with a step
        self.training = self.of_epoch = 0.0
        for first, last in ((1, STOPPED), (STOPPED + 1, STEPS)):
            self.begin()
            if first == 1:  # settings and data are logged before the first phase
                self.overhead += 2 * SPENT["logging"]
                self.wait(2 * SPENT["logging"])
                self.evaluate(0, held_out)
                self.log()
            for step in range(first, last + 1):
                self.step(cpu, step, held_out)
            # What comes behind the last checkpoint of a session is nobody's time.
            self.training, self.of_epoch = self.saved

    def begin(self) -> None:
        self.parts, self.all, self.overhead, self.seconds = Counter(), Counter(), 0.0, 0.0
        self.counts = Counter()

    def wait(self, seconds: float) -> None:
        self.seconds += seconds
        self.training += seconds
        self.of_epoch += seconds

    def spend(self, part: str, seconds: float) -> None:
        self.parts[part] += seconds
        self.all[part] += seconds
        self.wait(seconds)

    def evaluate(self, step: int, held_out: dict[int, float]) -> None:
        self.spend("evaluation", SPENT["evaluation"])
        if held_out[step] < self.best:
            self.best = held_out[step]
            if step:
                self.spend("saving", SPENT["model"])

    def log(self) -> None:
        self.overhead += SPENT["logging"]
        self.spend("logging", SPENT["logging"])

    def step(self, cpu: CpuRun, step: int, held_out: dict[int, float]) -> None:
        for documents in cpu.micro_batches[step - 1]:
            for part in ("data", "forward_backward"):
                self.spend(part, documents * SPENT[part])
        self.spend("optimizer", SPENT["optimizer"])
        self.spend("between", SPENT["between"])
        sums = cpu.reference.steps[step - 1]
        self.counts += Counter(
            steps=1,
            tokens=sums.tokens,
            supervised=sums.targets,
            samples=sum(cpu.micro_batches[step - 1]),
        )
        if step in LOGGED:
            self.read(step)
        if step in EVALUATED:
            self.evaluate(step, held_out)
        if step % EPOCH == 0:
            self.epochs[step], self.of_epoch = self.of_epoch, 0.0
        if step in LOGGED or step in EVALUATED or step % EPOCH == 0:
            self.log()
        if step in SAVED:
            self.saved = self.training, self.of_epoch
            self.spend("saving", SPENT["checkpoint"])

    def read(self, step: int) -> None:
        """The point of a logged step: then a new interval begins."""
        training = sum(s for p, s in self.parts.items() if p not in ("evaluation", "saving"))
        counts, phases = self.counts, ("data", "forward_backward", "optimizer", "logging")
        found = {
            "Throughput/Tokens_Per_Second": counts["tokens"] / training,
            "Throughput/Supervised_Tokens_Per_Second": counts["supervised"] / training,
            "Throughput/Samples_Per_Second": counts["samples"] / training,
            "Throughput/Step_Seconds": training / counts["steps"],
            "Monitoring/Logging_Overhead_Percent": 100 * self.overhead / self.seconds,
        }
        for part in phases:
            found[f"Throughput/Step_Seconds_{part.title()}"] = self.parts[part] / counts["steps"]
        for part in ("evaluation", "saving"):
            share = 100 * self.all[part] / sum(self.all.values())
            found[f"Throughput/{part.title()}_Percent"] = share
        for tag, value in found.items():
            self.found.setdefault(tag, {})[step] = value
        self.parts, self.counts = Counter(), Counter()


@check
def time_of_steps_and_epochs(cpu: CpuRun) -> None:
    diary = Diary(cpu)
    for tag, points in diary.found.items():
        cpu.values.scalars(tag, points)
    cpu.values.scalars("Epoch/Duration_Seconds", diary.epochs)
    rate = {step: EPOCH / seconds for step, seconds in diary.epochs.items()}
    cpu.values.scalars("Epoch/Steps_Per_Second", rate)
    means = {
        step: sum(cpu.reference.steps[step - EPOCH : step], Sums()).mean()
        for step in (EPOCH, 2 * EPOCH, 3 * EPOCH)
    }
    cpu.values.scalars("Epoch/Average_Loss", means, **CLOSE_TO)
    tables = {
        step: [
            ["Average Loss", f"{means[step]:.4g}"],
            ["Duration Seconds", f"{diary.epochs[step]:.4g}"],
            ["Steps Per Second", f"{rate[step]:.4g}"],
        ]
        for step in means
    }
    cpu.values.texts(
        "Training/Epoch_Summary",
        {
            step: (f"**Epoch {step // EPOCH}**, {EPOCH} steps", rows)
            for step, rows in tables.items()
        },
        lambda text: (text.splitlines()[0], table_rows(text)),
    )


@check
def tokens_and_rows(cpu: CpuRun) -> None:
    seen = list(accumulate(sums.tokens for sums in cpu.reference.steps))
    cpu.values.scalars("Throughput/Tokens_Seen", {step: seen[step - 1] for step in LOGGED})
    rows = sum(len(m) for m in cpu.micro_batches[:EPOCH])  # a row is a micro-batch here
    full = 100 * seen[EPOCH - 1] / (rows * 270)
    cpu.values.scalars("Throughput/Packing_Efficiency_Percent", dict.fromkeys(LOGGED, full))


@check
def gauges_of_the_host(cpu: CpuRun) -> None:
    looks = dict(zip(LOGGED, looks_of(len(LOGGED)), strict=True))

    def means(value: Callable[[Reading], float]) -> dict[int, float]:
        """Of the looks since the last point; the first look of a session is no rate."""
        first = {LOGGED[0]: 1, 9: 1}
        return {
            step: fmean(map(value, found[first.get(step, 0) :])) for step, found in looks.items()
        }

    def plain(value: Callable[[Reading], float]) -> dict[int, float]:
        return {step: fmean(map(value, found)) for step, found in looks.items()}

    values = cpu.values
    values.scalars("System/CPU_Percent", means(lambda r: r.cpu_percent))
    values.scalars("System/Disk_Read_MBps", means(lambda r: r.disk_bytes / 1048576 / r.seconds))
    values.scalars("System/Net_MBps", means(lambda r: sum(r.net_bytes) / 1048576 / r.seconds))
    values.scalars("Memory/Host_Percent", plain(lambda r: r.memory_percent))
    resident = plain(lambda r: (r.resident + sum(r.of_children)) / 1048576)
    values.scalars("Memory/Host_RSS_MB", resident)
    free = {step: found[-1].disk_free / 1024**3 for step, found in looks.items()}
    values.scalars("System/Disk_Free_GB", free)


# -----------------------------------------------------------------------------
# Adapters


def by_projection(values: dict[str, float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for layer, value in values.items():
        found.setdefault(layer.rpartition(".")[2], []).append(value)
    return found


@check
def adapters_at_evaluations(cpu: CpuRun) -> None:
    found = {step: e.adapters for step, e in cpu.reference.evaluations.items()}
    close = {"rel": 2e-4, "abs": 1e-7}
    for name in cpu.config.target_modules:
        for quantity, of in (
            ("Update_Ratio", lambda a: a.ratios),
            ("Effective_Rank", lambda a: a.ranks),
            ("Gradient_Norm", lambda a: {n: v for n, v in a.gradients.items() if n}),
        ):
            of_steps = {step: by_projection(of(a)) for step, a in found.items()}
            means = {step: fmean(v[name]) for step, v in of_steps.items() if name in v}
            assert len(means) >= 4 and (quantity == "Update_Ratio") == (0 in means)
            cpu.values.scalars(f"LoRA/{name}/{quantity}", means, **close)
        ratios = {step: by_projection(a.ratios)[name] for step, a in found.items()}
        cpu.values.histograms(f"LoRA/{name}/Update_Ratio_Histogram", ratios)
    norms = {step: a.gradients[""] for step, a in found.items() if step}
    cpu.values.scalars("LoRA/Gradient_Norm", norms, **close)
    for kind in "AB":
        weights = {step: a.weights[kind].numpy() for step, a in found.items()}
        cpu.values.histograms(f"LoRA/{kind}", weights, slack=6)
    both = {step: torch.cat([*a.weights.values()]).numpy() for step, a in found.items()}
    cpu.values.histograms("Model/Weights_Distribution", both, slack=12)


@check
def the_table_and_the_picture_of_the_adapters(cpu: CpuRun) -> None:
    tables, figures = {}, dict(zip(EVALUATED, cpu.figures["LoRA/Update_Ratio_Map"], strict=True))
    for step, evaluation in cpu.reference.evaluations.items():
        adapters = evaluation.adapters
        tables[step] = {
            f"`{layer}`": pytest.approx(
                [
                    of.get(layer, math.nan)
                    for of in (adapters.ratios, adapters.ranks, adapters.gradients)
                ],
                rel=1e-3,
                abs=1e-7,
                nan_ok=True,
            )
            for layer in adapters.ratios
        }
        (axes, _), (grid,) = figures[step].axes, figures[step].axes[0].images
        layers = [int(t.get_text()) for t in axes.get_yticklabels()]
        projections = [t.get_text() for t in axes.get_xticklabels()]
        assert layers == [0, 1] and set(projections) == set(cpu.config.target_modules)
        shown = np.ma.filled(grid.get_array().astype(float), 0)
        for row, layer in enumerate(layers):
            for column, projection in enumerate(projections):
                (ratio,) = (
                    r
                    for n, r in adapters.ratios.items()
                    if n.startswith(f"layers.{layer}.") and n.endswith(projection)
                )
                assert shown[row, column] == pytest.approx(ratio, rel=2e-4, abs=1e-7)

    def numbers(text: str) -> dict[str, list[float]]:
        return {
            name: [math.nan if cell == "–" else float(cell) for cell in cells]
            for name, *cells in table_rows(text)
        }

    cpu.values.texts("LoRA/Modules", tables, numbers)
    pixels = {step: np.asarray(figure.canvas.buffer_rgba()) for step, figure in figures.items()}
    cpu.values.images("LoRA/Update_Ratio_Map", pixels)


# -----------------------------------------------------------------------------
# Texts of the run on a CPU


def ranking(text: str, moments: bool) -> list[tuple[str, list[float]]]:
    """`file:line` and the numbers of each row, from the first rank on."""
    rows = table_rows(text.partition("**1**")[0])
    assert [row[0] for row in rows] == [str(i) for i in range(1, len(rows) + 1)]
    found = []
    for _, place, *cells in rows:
        file = Path(place.partition(" (")[0]).name
        found.append((file, [float(cell) for cell in cells]))
    return found


def shown_losses(sums: Sums) -> list[float]:
    return [sums.mean(), *(sums.mean(part) for part in PARTS)]


def nearly(rows: list[tuple[str, list[float]]]) -> list:
    return [(place, pytest.approx(numbers, abs=2e-3)) for place, numbers in rows]


@check
def the_hardest_training_samples(cpu: CpuRun) -> None:
    """Of each epoch so far: a sample's loss above the level of the steps around it, which forgets a tenth
    of what it holds at each step."""
    total = tokens = 0.0
    best: dict[tuple[str, int], list[float]] = {}
    expected = {}
    for step, samples in enumerate(cpu.reference.samples, start=1):
        whole = cpu.reference.steps[step - 1]
        total = 0.9 * total + whole.mean() * whole.targets
        tokens = 0.9 * tokens + whole.targets
        for key, sums in samples:
            row = [step, sums.mean() - total / tokens, *shown_losses(sums)]
            if key not in best or row[1] > best[key][1]:
                best[key] = row
        if step in EVALUATED or step % EPOCH == 0:
            hardest = sorted(best.items(), key=lambda item: -item[1][1])[:10]
            expected[step] = [(f"{file}:{line}", row) for (file, line), row in hardest]
        if step % EPOCH == 0:
            best = {}
    cpu.values.texts(
        "Training/Hardest_Samples", expected, lambda text: ranking(text, moments=True), nearly
    )


@check
def the_hardest_held_out_samples(cpu: CpuRun) -> None:
    expected = {}
    for step, evaluation in cpu.reference.evaluations.items():
        rows = [(f"held.jsonl:{i}", shown_losses(s)) for i, s in enumerate(evaluation.samples, 1)]
        expected[step] = sorted(rows, key=lambda row: -row[1][0])
    cpu.values.texts(
        "Eval/Hardest_Samples", expected, lambda text: ranking(text, moments=False), nearly
    )


@check
def settings_as_text(cpu: CpuRun) -> None:
    rows = []
    for name, value in dataclasses.asdict(cpu.config).items():
        text = ", ".join(map(str, value)) if isinstance(value, (tuple, dict)) else str(value)
        rows.append([name, text])
    cpu.values.texts("Config/Training_Settings", {0: rows}, table_rows)


@check
def the_summary_at_the_end(cpu: CpuRun) -> None:
    held_out, seconds = cpu.evaluated(lambda sums: sums.mean()), Diary(cpu).training
    best = min(held_out, key=held_out.get)
    tokens = sum(sums.tokens for sums in cpu.reference.steps)
    del seconds
    expected = {
        "steps": STEPS,
        "planned_steps": STEPS,
        "epochs": 3,
        "final_loss": cpu.interval(STEPS).mean(),
        "first_eval_loss": held_out[0],
        "last_eval_loss": held_out[STEPS],
        "best_eval_loss": held_out[best],
        "best_step": best,
        "resume_count": 1,
        "tokens": tokens,
        "samples": 3 * 23,
    }

    def numbers(text: str) -> dict[str, float]:
        rows = dict(table_rows(text))
        return {name: float(rows[name]) for name in expected}

    cpu.values.texts(
        "Training/Final_Summary",
        {STEPS: expected},
        numbers,
        lambda value: pytest.approx(value, rel=1e-3),
    )


NAMES = {"": "PROMPT", "thinking": "THINKING", "close": "CLOSE", "answer": "ANSWER", "end": "END"}


def audited(document: Document, tokenizer) -> list[str]:
    """The lines of a document: 16 tokens of one part in each, half characters by their ids."""
    lines, start = [], 0
    while start < len(document.ids):
        part, end = document.parts[start], start + 1
        while end < len(document.ids) and document.parts[end] == part and end - start < 16:
            end += 1
        texts = []
        for token in document.ids[start:end]:
            text = tokenizer.decode([token])
            whole = text and "\ufffd" not in text
            texts.append(text.replace("\n", "\\n") if whole else f"⟨{token}⟩")
        sign = "+" if part else "-"
        lines.append(f"{start:6d} {sign} {NAMES[part]:<8} {'│'.join(texts)}")
        start = end
    return lines


@check
def the_audit_of_the_mask(cpu: CpuRun) -> None:
    keys = list(cpu.documents)
    expected = []
    for number in (0, 9, 18):
        document = cpu.documents[keys[number]]
        carry = sum(map(bool, document.parts))
        head = f"**Document {number}** (sample {number}): {len(document.ids)} tokens, {carry} carry loss"
        expected += [head, *audited(document, cpu.answers.tokenizer)]

    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines()[1:] if line and not line.startswith("```")]

    cpu.values.texts("Dataset/Mask_Audit", {0: expected}, lines)


# -----------------------------------------------------------------------------
# A run on a pretended machine: two ranks, GPUs, and losses on a known curve

GPUS = [f"GPU-{n:08x}-0000-0000-0000-000000000000" for n in (1, 2)]
LAST, HALF = 240, 160  # steps; every second is logged. At HALF the forecast is read
FLOOR, FALL = 1.0, 2.0
# The curve's time in steps. At HALF 78 bins of the loss make one unit of the fit, in which the member of
# its family that is this curve has a tau of 0.05 * 120 ** (6 / 15).
TAU = 2 * 78 * 0.05 * 120 ** (6 / 15)
SPIKES, INFINITE, DIVIDED, GRAPH = (180, 192, 204), (101, 150), 120, 100
POINTS = range(2, LAST + 1, 2)


def curve(step: int) -> float:
    """The loss of a logged step and of the one before it."""
    logged = step + step % 2
    return (FLOOR + FALL * math.exp(-logged / TAU)) * (1.5 if logged in SPIKES else 1.0)


def scripted(step: int) -> ScriptedStep:
    norm = math.inf if step in INFINITE else 1.0 + (step * 7 % 5) / 8
    return ScriptedStep(
        own_loss=curve(step) - 0.25,
        other_loss=curve(step) + 0.25,
        norm=norm,
        data=0.25 + step % 3 / 8,
        own=1.0 + step % 4 / 8,
        waiting=0.5,
        optimizer=0.125 + step % 2 / 8,
        flops=1e14 * (1 + step % 5),
    )


def memory_of(read: int) -> dict[str, int]:
    """MB; the pressure rises through all its levels."""
    free = 2000 * (4 - read % 5) + 100 * (read % 7)
    return {
        "free": free,
        "total": 10000,
        "allocated": 3000 + read,
        "reserved": 4000 + read,
        "peak": 5000 + 10 * (read % 9),
    }


THROTTLED = {"SW_Power_Cap": 0x04, "HW_Slowdown": 0x08, "SW_Thermal": 0x20}
THROTTLED |= {"HW_Thermal": 0x40, "Power_Brake": 0x80}


def gpu_lines(gpu: int, read: int, look: int) -> dict[str, int]:
    """What the driver says of a GPU; the reasons to slow down take turns, two at once at most."""
    bits = [*THROTTLED.values()]
    reasons = 0x1 | (bits[(read + gpu) % 5] if look == 0 and read % 2 else 0)
    if look == 1 and read % 3 == 0:
        reasons |= bits[read % 5] | bits[(read + 2) % 5]
    return {
        f"utilization.{gpu}": (40 + read % 30, 90 - read % 11)[look] + gpu,
        f"memory_used.{gpu}": (20 + read % 40 + look) << 30,
        f"temperature.{gpu}": (50 + read % 13, 58 - read % 7)[look] + gpu,
        f"power.{gpu}": 200_000 + 1000 * read + 500 * look,
        f"clock.{gpu}": 1500 + read + 10 * look,
        f"throttle.{gpu}": reasons,
        f"ecc_corrected.{gpu}": read // 2 + look,
        f"ecc_uncorrected.{gpu}": read // 7 + look,
        f"energy.{gpu}": 10**12 + energy(gpu, read, look),
    }


def energy(gpu: int, read: int, look: int) -> int:
    """mJ since some time; later reads use more."""
    return (2 * read + look) ** 2 * 1000 + gpu * read * 700


def gpu_looks() -> list[list[Reading]]:
    """Two looks before each read, the one at the end included."""
    return [
        [
            dataclasses.replace(
                host_reading(read, look), nvml=gpu_lines(0, read, look) | gpu_lines(1, read, look)
            )
            for look in range(2)
        ]
        for read in range(len(POINTS) + 1)
    ]


@dataclass
class GpuRun:
    """A run of the real loop over scripted steps."""

    values: Values
    tokens: list[int]  # of each step

    def logged(self, value: Callable[[int], float]) -> dict[int, float]:
        return {step: value(step) for step in POINTS}


def do_gpu_run(ledger: Ledger, folder: Path, model: Path, cache: Path, library: Path) -> GpuRun:
    data = make_tiny_data(folder / "data.jsonl", LAST)
    config = DirectTrainingConfig(
        model_name=str(model),
        data_path=(str(data),),
        eval_fraction=0.0,
        max_seq_length=768,
        packing=False,
        num_epochs=1,
        logging_steps=2,
        save_steps=0,
        lr_schedule="constant",
        warmup_ratio=0.0,
        nonfinite="skip",
        device="cpu",
        output_dir=str(folder / "out"),
        cache_dir=str(cache),
    )
    trainer = program.DirectTrainer(config, quiet=True)
    with mock.patch("finetuning.training.forecast.matmul_rate", return_value=1e9):  # 0.2 s
        trainer.plan = plan_run(config, trainer.dist, trainer.terminal)
    assert trainer.plan.steps.num_steps == trainer.plan.steps.steps_per_epoch == LAST
    trainer.dist, trainer.logs_late, trainer.reads_are_free = two_ranks(), True, False
    device, run = Device(), new_run(folder / "out")
    with (
        fake_nvml.installed(library, folder / "state") as nvml,
        HandMachine(gpu_looks(), nvml).installed() as machine,
        cuda(device, lambda: memory_of(machine.reads - 1)),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(program, "start_system_monitor", lambda *_: machine.monitor(GPUS))
        trainer.record = trainer.open_record(run, None)
        trainer.metrics = MetricsProcessor(trainer.plan, trainer.dist, trainer.state)
        trainer.evaluator = NoEvaluator()
        trainer.engine = engine = ScriptedEngine(scripted, device, trainer)
        measures = {
            DIVIDED: lambda: setattr(trainer.state, "micro_batch_splits", 1),
            GRAPH: lambda: setattr(engine, "captured", SimpleNamespace(peak_bytes=5050 * MB)),
        }
        engine.before = lambda step: measures.get(step, lambda: None)()
        trainer.loop()
        trainer.finish()
        trainer.record.close("success")
    lengths = trainer.plan.data.train.tokens.lengths
    steps = [trainer.plan.steps[step].documents for step in range(1, LAST + 1)]
    return GpuRun(Values(ledger, run.tensorboard), [int(lengths[list(d)].sum()) for d in steps])


@check
def losses_of_two_ranks(gpus: GpuRun) -> None:
    gpus.values.scalars("Training/Loss", gpus.logged(curve))
    finite = [curve(step) for step in range(1, LAST + 1) if step not in INFINITE]
    gpus.values.scalars("Epoch/Average_Loss", {LAST: fmean(finite)})
    seen = list(accumulate(gpus.tokens))
    gpus.values.scalars("Throughput/Tokens_Seen", gpus.logged(lambda step: seen[step - 1]))


@check
def steps_without_a_finite_gradient(gpus: GpuRun) -> None:
    norms = gpus.logged(lambda step: scripted(step).norm)
    assert norms[150] == math.inf
    gpus.values.scalars("Training/Gradient_Norm", norms)
    pairs = {step: [scripted(s).norm for s in (step - 1, step)] for step in POINTS}
    highest = {step: max(filter(math.isfinite, pair)) for step, pair in pairs.items()}
    gpus.values.scalars("Training/Gradient_Norm_Max", highest)
    counted = gpus.logged(lambda step: sum(bad <= step for bad in INFINITE))
    gpus.values.scalars("Monitoring/NonFinite_Steps", counted)
    divided = {step: 0.5 for step in POINTS if step >= DIVIDED}
    gpus.values.scalars("Config/Batch_Size", divided)


@check
def rates_of_two_ranks(gpus: GpuRun) -> None:
    def seconds(step: int) -> float:
        s = scripted(step)
        return s.data + s.own + s.waiting + s.optimizer

    def pair(value: Callable[[int], float]) -> dict[int, float]:
        return gpus.logged(lambda step: value(step - 1) + value(step))

    time, flops = pair(seconds), pair(lambda step: scripted(step).flops)
    tokens = pair(lambda step: gpus.tokens[step - 1])
    rate = {step: tokens[step] / time[step] for step in POINTS}
    gpus.values.scalars("Throughput/Tokens_Per_Second", rate)
    mfu = {step: 100 * flops[step] / time[step] / (2 * 989.4e12) for step in POINTS}
    gpus.values.scalars("Throughput/MFU_Percent", mfu)
    forward = pair(lambda step: (scripted(step).own + scripted(step).waiting) / 2)
    gpus.values.scalars("Throughput/Step_Seconds_Forward_Backward", forward)
    own = pair(lambda step: (scripted(step).own + scripted(step).data) / 2)
    assert max(own.values()) < 2, "the other rank is the slowest"
    late = {step: 100 * (2 / ((own[step] + 2) / 2) - 1) for step in POINTS}
    gpus.values.scalars("Throughput/Straggler_Percent", late)
    used = {}
    for read, step in enumerate(POINTS):
        if read:
            joules = sum(energy(g, read, 1) - energy(g, read - 1, 1) for g in (0, 1)) / 1000
            used[step] = 1000 * joules / tokens[step]
    gpus.values.scalars("Throughput/Energy_J_Per_1K_Tokens", used)


@check
def memory_of_the_device(gpus: GpuRun) -> None:
    found = {step: memory_of(read) for read, step in enumerate(POINTS)}
    percent = {step: 100 * (1 - m["free"] / m["total"]) for step, m in found.items()}
    levels = {step: (p >= 60) + (p >= 80) + (p >= 90) for step, p in percent.items()}
    assert set(levels.values()) == {0, 1, 2, 3}
    values = gpus.values
    values.scalars("Memory/GPU_Utilization_Percent", percent)
    values.scalars("Memory/Pressure_Level", levels)
    for tag, name in (("Allocated", "allocated"), ("Reserved", "reserved"), ("Total", "total")):
        values.scalars(f"Memory/GPU_{tag}_MB", {step: m[name] for step, m in found.items()})
    # From GRAPH on, a graph uses at each step what it used when it was recorded.
    peaks = {s: max(m["peak"], 5050 if s >= GRAPH else 0) for s, m in found.items()}
    values.scalars("Memory/GPU_Peak_MB", peaks)


def gpu_gauges(gpu: int, read: int) -> dict[str, float]:
    """What two looks at a GPU make together."""
    first, second = (
        {line.partition(".")[0]: v for line, v in gpu_lines(gpu, read, look).items()}
        for look in (0, 1)
    )
    looks = (first, second)

    def average(name: str, unit: float = 1.0) -> float:
        return fmean(look[name] / unit for look in looks)

    found = {
        "Utilization_Percent": average("utilization"),
        "Utilization_Percent_Min": min(look["utilization"] for look in looks),
        "Utilization_Percent_Max": max(look["utilization"] for look in looks),
        "Memory_Usage_Percent": 100 * average("memory_used", 80 * 2**30),
        "Temperature_C": max(look["temperature"] for look in looks),
        "Temperature_Limit_C": 92,
        "Power_W": average("power", 1000),
        "SM_Clock_MHz": average("clock"),
        "ECC_Corrected": second["ecc_corrected"],
        "ECC_Uncorrected": second["ecc_uncorrected"],
        "Energy_J": (energy(gpu, read, 1) - energy(gpu, 0, 0)) / 1000,
        "Throttle_Reasons": max((look["throttle"] & ~1).bit_count() for look in looks),
    }
    for name, bit in THROTTLED.items():
        found[f"Throttle_{name}"] = float(any(look["throttle"] & bit for look in looks))
    return found


@check
def gauges_of_gpus(gpus: GpuRun) -> None:
    for gpu in (0, 1):
        series: dict[str, dict[int, float]] = {}
        for read, step in enumerate(POINTS):
            for name, value in gpu_gauges(gpu, read).items():
                series.setdefault(name, {})[step] = value
        assert {0, 1, 2} <= set(series["Throttle_Reasons"].values())
        for name, points in series.items():
            gpus.values.scalars(f"GPU_{gpu}/{name}", points)
        for name, value in gpu_gauges(gpu, len(POINTS)).items():
            gpus.values.scalars(f"Final_GPU_{gpu}/{name}", {LAST: value})
    gpus.values.scalars("GPU_8/Temperature_C", dict.fromkeys(POINTS, 51))  # of another node
    gpus.values.scalars("Final_GPU_8/Temperature_C", {LAST: 51})


@check
def convergence_on_a_known_curve(gpus: GpuRun) -> None:
    """The curve falls to FLOOR for ever, at a constant learning rate: what will be is known."""
    values, start, now = gpus.values, curve(4), curve(HALF)  # the median of the first three
    score = (start - now) / (start - FLOOR)
    values.scalars_at("Monitoring/Convergence_Score", {10: 0, 20: 0, HALF: score}, rel=0.005)
    # n sudden rises, each by its place in the run, divide the score by 1 + (n / 3) ** 2.
    rises = sum(SPIKES) / LAST
    calm = (start - curve(LAST)) / (start - FLOOR) / (1 + (rises / 3) ** 2)
    assert calm < 0.7
    values.scalars_at("Monitoring/Convergence_Score", {LAST: calm}, rel=0.01)
    # Of every fit 3% is unknown.
    ends = {"Low": score * (1 - 1.2816 * 0.03), "High": min(1.0, score * (1 + 1.2816 * 0.03))}
    for end, value in ends.items():
        values.scalars_at(f"Monitoring/Convergence_Score_{end}", {HALF: value}, rel=0.005)
    forecast, fall = curve(LAST + 2), start - now
    close = {"rel": 0, "abs": 0.005 * fall}
    values.scalars_at(
        "Monitoring/Forecast_Final_Loss", {HALF: forecast, LAST: curve(LAST)}, **close
    )
    spread = 1.2816 * 0.03 * fall  # for up to a doubling of the run
    for end, sign in (("Low", -1), ("High", 1)):
        tag = f"Monitoring/Forecast_Final_Loss_{end}"
        values.scalars_at(tag, {HALF: forecast + sign * spread}, rel=0, abs=0.01 * fall)
    target = start - 0.99 * (start - FLOOR)
    left = -TAU * math.log((target - FLOOR) / FALL) - HALF
    assert left > 20
    values.scalars_at("Monitoring/Steps_To_99_Percent", {HALF: left}, rel=0.05)


@check
def trend_of_the_loss(gpus: GpuRun) -> None:
    """The median of the slopes between all pairs, over the last quarter of what is smoothed."""
    losses, expected = [curve(step) for step in POINTS], {}
    smooth = [(POINTS[i], sorted(losses[i - 1 : i + 2])[1]) for i in range(1, len(losses) - 1)]
    for count in range(5, len(smooth) + 1):
        window = smooth[:count][-max(8, count // 4) :]
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(window, 2)]
        expected[POINTS[count + 1]] = 100 * median(slopes)
    gpus.values.scalars("Monitoring/Loss_Trend", expected)


@check
def monitoring_at_the_end(gpus: GpuRun) -> None:
    """The newest points once more."""
    for tag in gpus.values.family("scalar", "Final_Monitoring/<name>"):
        newest = gpus.values.last(tag.removeprefix("Final_"))
        gpus.values.scalars(tag, {LAST: newest})
    names = ("Convergence_Score", "Loss_Trend", "Forecast_Final_Loss", "Forecast_Final_Loss_Low")
    for name in names:
        assert f"Final_Monitoring/{name}" in gpus.values.family("scalar", "Final_Monitoring/<name>")


# -----------------------------------------------------------------------------
# A data set with known faults

THOUGHTS = [
    "首先应当了解问题的背景，然后逐步分析各个部分的作用，最后得出结论。",
    "我们需要考虑不同的情况，比较它们的优点和缺点，再选择合适的方法。",
    "这个问题涉及许多方面，应当先从基本概念开始，再讨论具体的例子。",
]
ADMIN = "数据库管理员负责备份数据、检查性能，并且处理用户提出的各种问题。"
SERVER = "服务器需要定期检查，因为设备长时间运行以后容易出现故障，影响工作。"
READING = "阅读程序的时候，应当先了解整体结构，再研究重要的函数和数据。"
BLOCKS = "SM4是一种分组密码，它的分组长度和密钥长度都是一百二十八比特。"
LIBRARY = "图书馆每天早上八点开放，晚上九点关闭，周末开放时间有所不同。"
MAIL = "SM9主要用于电子邮件和移动通信，能够简化系统的各种管理工作。"
BAD = "图书馆（每天早上八点开放,晚上九点关闭,周末开放时间有所不同"
HANDBOOK = "这本手册引用GM/T 0002标准，内容是关于数据库管理员的日常工作安排。"
DUTIES = "请说明数据库管理员每{}需要完成的主要工作内容是什么？"
WHY = "为什么服务器需要定期检查，应当怎样安排？"
LONG = "".join([*THOUGHTS, ADMIN, SERVER, READING, LIBRARY, MAIL])
# Question, thinking, answer, difficulty.
FAULTY = [
    ("什么是分组密码算法，它有什么特点？", THOUGHTS[0], BLOCKS, 1),
    ("什么是分组密码算法，它有什么特点？", THOUGHTS[0], BLOCKS, 1),  # once more
    (DUTIES.format("天"), THOUGHTS[1], ADMIN, 2),
    (DUTIES.format("日"), THOUGHTS[1], ADMIN, 2),  # nearly
    (WHY, THOUGHTS[2], SERVER, 3),
    (WHY, THOUGHTS[2], READING, 3),  # another answer
    ("SM9的主要用途是什么，请举出例子。", "", MAIL, 4),  # no thinking
    ("软件工程师怎样阅读别人写的程序，应当注意什么？", THOUGHTS[0] + READING, READING, 4),  # copied
    ("请介绍这本手册的主要内容，说明它的用途？", THOUGHTS[1], HANDBOOK, 2),  # a wrong citation
    ("学校图书馆的开放时间是怎样规定的？", THOUGHTS[2], BAD, 1),  # damaged
    ("怎样整理会议记录，有哪些步骤？", LONG, LIBRARY, 2),  # too long in the thinking
    ("怎样学习一门新的课程，有哪些步骤？", THOUGHTS[0], LONG, 2),  # too long in the answer
    ("请解释<|im_end|>的作用是什么？", THOUGHTS[1], LIBRARY, 1),  # a control token
]
CONTROL, TOO_LONG = 12, (10, 11)
BROKEN = {"question": "没有答案的问题"}
SHORT, WIDE = 512, 2048  # max_seq_length
PLACES = ("mean", "p50", "p90", "p99", "max")


@dataclass
class Described:
    """A data set as a run describes it, with rows of at most `limit` tokens."""

    values: Values
    limit: int
    documents: list[Document]  # of all that can be tokenized, in the order of FAULTY
    figures: dict[str, list]

    @property
    def left_out(self) -> list[Document]:
        return [d for d in self.documents if len(d.ids) > self.limit]

    def lengths(self, part: str) -> list[int]:
        """Tokens of each kept document that has this part."""
        kept = [d for d in self.documents if len(d.ids) <= self.limit]
        if part == "total":
            return [len(d.ids) for d in kept]
        counts = [d.parts.count("" if part == "prompt" else part) for d in kept]
        return [count for count in counts if count]


def describe(ledger: Ledger, folder: Path, model: Path, cache: Path, limit: int) -> Described:
    rows = [{"question": q, "thinking": t, "answer": a, "difficulty": d} for q, t, a, d in FAULTY]
    held_out = [
        dict(rows[4]),
        {"question": "天气怎么样？", "answer": "今天天气很好，适合出去散步。"},
    ]
    config = DirectTrainingConfig(
        model_name=str(model),
        data_path=(str(folder / write(folder, "data.jsonl", [*rows, BROKEN])),),
        eval_path=(str(folder / write(folder, "held.jsonl", held_out)),),
        max_seq_length=limit,
        num_probes=0,
        device="cpu",
        cache_dir=str(cache),
    )
    trainer, run = program.DirectTrainer(config, quiet=True), new_run(folder / f"out-{limit}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    with kept_figures() as figures, pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "start_system_monitor", lambda *_: SystemMonitor((), folder))
        patch.setattr("finetuning.training.forecast.matmul_rate", lambda *_: 1e9)  # 0.2 s
        plan = plan_run(config, trainer.dist, trainer.terminal)
        record = trainer.open_record(run, None)
        record.describe(plan)
        record.close(None)
    documents = [tokens_of(tokenizer, row) for row in rows if row is not rows[CONTROL]]
    return Described(Values(ledger, run.tensorboard), limit, documents, figures)


def check_numbers(data: Described, numbers: dict[str, float], **tolerance: float) -> None:
    for name, value in numbers.items():
        data.values.scalars(f"Dataset/{name}", {0: value}, **tolerance)


@check
def samples_of_a_data_set(data: list[Described]) -> None:
    count = len(FAULTY)
    lengths = [tuple(map(len, row[:3])) for row in FAULTY]
    ratios = sorted(round(t / a, 2) for _, t, a in lengths if t)
    levels = Counter(row[3] for row in FAULTY)
    numbers = {
        "Total_Samples": count,
        "Broken_Samples": 1,
        "Avg_Instruction_Length": sum(q for q, _, _ in lengths) / count,
        "Avg_Output_Length": sum(t + a for _, t, a in lengths) / count,
        "Avg_Thinking_Length": sum(t for _, t, _ in lengths) / (count - 1),
        "Avg_Answer_Length": sum(a for _, _, a in lengths) / count,
        "Thinking_Samples_Percent": 100 * (count - 1) / count,
        "Thinking_Answer_Ratio_P50": median(ratios),
        "Answer_Copied_Into_Thinking": 2,  # and that of the long thinking
        "Citation_Conflicts": 1,
        "Exact_Duplicates": 1,
        "Near_Duplicates": 1,
        "Conflicting_Answers": 1,
        "Train_Eval_Leaks": 1,
        "Control_Tokens": 1,
    }
    for level in range(1, 5):
        numbers[f"Difficulty_{level}_Count"] = levels[level]
        numbers[f"Difficulty_{level}_Percent"] = 100 * levels[level] / count
    for found in data:
        check_numbers(found, numbers)


# Weights of the parts of the quality; of a thinking without the end, of a question without what is behind it.
PARTS_OF_QUALITY = {
    **{"segmentation": 2, "garbling": 2, "charset": 1.5, "script_mix": 1, "cjk_share": 1},
    **{"repetition": 1, "sentence_repetition": 1, "punctuation_width": 1, "brackets": 0.5},
    **{"terminal": 1.5, "punctuation": 1, "clause_length": 0.5, "length": 0.5},
}


def quality_of_bad() -> float:
    """It stops within a sentence, one of its brackets is open, and its commas are half as wide."""
    flaws = {"terminal": 0.25, "brackets": 0.02, "punctuation_width": 0.02}  # 0 counts as 0.02
    logs = sum(PARTS_OF_QUALITY[name] * math.log(value) for name, value in flaws.items())
    return math.exp(logs / sum(PARTS_OF_QUALITY.values()))


def complexities() -> list[float]:
    """S / (S + 8) of each sample: a term of level 2 gives 1 to S, of level 3 2.5, of level 1 nothing. In the
    first two SM4, 分组密码, 分组长度 (2) and 密钥长度 (1); SM9 (3) in the seventh and in LONG."""
    return [3 / 11, 3 / 11, 2.5 / 10.5, 2.5 / 10.5, *[0] * (len(FAULTY) - 4)]


@check
def quality_and_terms_of_a_data_set(data: list[Described]) -> None:
    """All texts are flawless but BAD."""
    count, bad = len(FAULTY), quality_of_bad()
    assert 0.5 < bad < 0.75
    texts = 2 * count - 1  # rated besides the questions
    numbers = {
        "Avg_Instruction_Quality": 1,
        "Avg_Output_Quality": (count - 1 + bad) / count,
        **{
            f"Quality_Level_{k}_Count": n
            for k, n in zip(range(1, 5), (0, 1, 0, count - 1), strict=True)
        },
        **{
            f"Quality_Level_{k}_Percent": 100 * n / count
            for k, n in ((1, 0), (2, 1), (4, count - 1))
        },
        "Quality_Level_3_Percent": 0,
    }
    for name in PARTS_OF_QUALITY:
        flaw = {"terminal": 0.75 / count, "brackets": 1 / texts, "punctuation_width": 1 / texts}
        numbers[f"Quality_{name.title()}"] = 1 - flaw.get(name, 0)
    numbers["Avg_Crypto_Complexity"] = fmean(complexities())
    terms = Counter({4: 2, 1: 2, 0: count - 4})
    numbers |= {f"Crypto_Terms_{k}_Count": terms[k] for k in range(11)}
    for found in data:
        check_numbers(found, numbers, abs=1e-4)


def packed_rows(lengths: list[int], capacity: int) -> int:
    """Longest first, each into the fullest row that has room."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else capacity) - length)
    return len(free)


@check
def tokens_of_a_data_set(data: list[Described]) -> None:
    for found in data:
        total, dropped = found.lengths("total"), len(found.left_out)
        numbers = {}
        for part in ("prompt", "thinking", "answer", "total"):
            counts = found.lengths(part)
            values = [np.mean(counts), *np.quantile(counts, [0.5, 0.9, 0.99]), max(counts)]
            for place, value in zip(PLACES, values, strict=True):
                numbers[f"{part.title()}_Tokens_{place.title()}"] = value
        rows = packed_rows(total, found.limit)
        numbers |= {
            "Packing_Efficiency_Percent": 100 * sum(total) / (rows * found.limit),
            "Truncated_Percent": 100 * dropped / (len(total) + dropped),
            "Dropped": dropped,
            # A cut behind SHORT tokens: of the long thinking it takes all that follows.
            "Lost_Think_Close": sum(close_at(d) >= found.limit for d in found.left_out),
            "Lost_Answer": dropped,
            "Lost_EOS": dropped,
        }
        every = [len(d.ids) for d in found.documents]
        for length in (512, 1024) if found.limit == WIDE else (512,):
            longer = sum(n > length for n in every)
            numbers[f"Exceeding_{length}_Percent"] = 100 * longer / len(every)
        for length in (2048, 4096, 8192, 16384, 32768) if found.limit == WIDE else ():
            numbers[f"Exceeding_{length}_Percent"] = 0
        if found.limit == WIDE:
            numbers["Advised_Max_Seq_Length"] = 1024
        check_numbers(found, numbers)
    short, wide = data
    assert [len(d.left_out) for d in data] == [2, 0]
    assert [close_at(d) >= SHORT for d in short.left_out] == [True, False]
    assert 512 < max(len(d.ids) for d in wide.documents) < 1024


def close_at(document: Document) -> int:
    return document.parts.index("close")


@check
def histograms_of_a_data_set(data: list[Described]) -> None:
    bad, count = quality_of_bad(), len(FAULTY)
    texts = {
        "Question_Chars": [len(row[0]) for row in FAULTY],
        "Thinking_Chars": [len(row[1]) for row in FAULTY if row[1]],
        "Answer_Chars": [len(row[2]) for row in FAULTY],
        "Question_Quality": [1] * count,
        "Output_Quality": [round(bad, 4), *[1] * (count - 1)],
        "Complexity": [round(value, 4) for value in complexities()],
        "Distinct_Terms": [4, 4, 1, 1, *[0] * (count - 4)],
    }
    for found in data:
        tokens = {
            f"{part.title()}_Tokens": found.lengths(part)
            for part in ("prompt", "thinking", "answer", "total")
        }
        for name, values in (texts | tokens).items():
            found.values.histograms(f"Dataset/{name}_Histogram", {0: values})


@check
def pictures_of_a_data_set(data: list[Described]) -> None:
    terms = {"SM4": 2, "分组密码": 2, "分组长度": 2, "密钥长度": 2, "SM9": 2}
    # Besides question and answer, the thinking counts: SM9 stands in that of the long one, too.
    terms["SM9"] += 1
    for found in data:
        (lengths,), (names,) = (
            found.figures[f"Dataset/{name}_Distribution"] for name in ("Length", "Term")
        )
        bins = {
            bars.get_label(): [b.get_height() for b in bars] for bars in lengths.axes[0].containers
        }
        ends = [int(label.get_text()) for label in lengths.axes[0].get_xticklabels()]
        for part, heights in bins.items():
            counts = found.lengths(part)
            expected = [sum((end > 16) * end / 2 < n <= end for n in counts) for end in ends]
            assert heights == expected and sum(heights) == len(counts), part
        assert set(bins) == {"prompt", "thinking", "answer", "total"}
        (bars,) = names.axes[0].containers
        assert sorted(b.get_width() for b in bars) == sorted(terms.values())
        for name, figure in (("Length", lengths), ("Term", names)):
            pixels = np.asarray(figure.canvas.buffer_rgba())
            found.values.images(f"Dataset/{name}_Distribution", {0: pixels})


@check
def the_summary_of_a_data_set(data: list[Described]) -> None:
    count, bad = len(FAULTY), quality_of_bad()
    for found in data:
        advised = "1,024" if found.limit == WIDE else "–"
        expected = {
            "Samples": str(count),
            "Records that could not be read": "1",
            "With thinking": f"{count - 1} ({100 * (count - 1) / count:.1f} %)",
            "Quality of the questions": "1",
            "Quality of the outputs": f"{(count - 1 + bad) / count:.3f}",
            "Complexity by terms": f"{fmean(complexities()):.3f}",
            "Held-out samples seen in training": "1",
            "Exact duplicates": "1",
            "Near duplicates": "1",
            "Questions with several answers": "1",
            "Citation conflicts": "1",
            "Answers copied into the thinking": "2",
            "Advised max_seq_length": advised,
            "1": f"{3 + 1} ({100 * 4 / count:.1f} %)",
        }

        def rows(text: str, names=tuple(expected)) -> dict[str, str]:
            found: dict[str, str] = {}
            for name, value, *_ in table_rows(text):
                found.setdefault(name, value)
            return {name: found[name] for name in names}

        found.values.texts("Dataset/Summary", {0: expected}, rows)


# -----------------------------------------------------------------------------
# One trouble after the other

LIMIT_OF_LOSS_SPIKE = 2.5


@dataclass
class Scene:
    """Values of some tags, step after step, and the alert that they raise; other tags are absent."""

    rows: list[dict[str, float]]
    raised: dict[str, list[int]]  # alert -> 0 or 1 at each step


def of(tag: str, *values: float) -> list[dict[str, float]]:
    return [{tag: float(value)} for value in values]


def plain_scenes() -> list[Scene]:
    """Where each step says by itself, or with a few before it, what is wrong."""
    parts = ("Data", "Forward_Backward")
    starved = [
        {f"Throughput/Step_Seconds_{part}": s for part, s in zip(parts, pair, strict=True)}
        for pair in [(0.4, 0.6)] * 5 + [(0.0, 1.0)] * 5
    ]
    memory = "Memory/GPU_"
    return [
        Scene(
            of("GPU_3/Temperature_C", 84, 86, 83, 81, 86, 79, 84),
            {"GPU_Overheat": [0, 1, 1, 1, 1, 0, 0]},  # until it is below 80
        ),
        Scene(
            [
                *of(f"{memory}Utilization_Percent", 94, 96, 93, 91),
                *of("Memory/Host_Percent", 96, 50),
                {f"{memory}Peak_MB": 77.0, f"{memory}Total_MB": 80.0},
                {f"{memory}Peak_MB": 40.0, f"{memory}Total_MB": 80.0},
            ],
            {"OOM_Risk": [0, 1, 1, 0, 1, 0, 1, 0]},  # until it is below 92
        ),
        Scene(
            of("Throughput/Straggler_Percent", *[30] * 5, *[10] * 3),
            {"Slow_Rank": [0, 0, 0, 0, 1, 1, 1, 0]},  # the median of five
        ),
        Scene(
            of("GPU_1/Utilization_Percent", *[70] * 10, *[100] * 4),
            {"Low_GPU_Utilization": [0] * 9 + [1, 1, 1, 1, 0]},  # the mean of ten
        ),
        Scene(starved, {"Data_Starvation": [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]}),  # the median of ten
        Scene(
            [
                *of("Monitoring/NonFinite_Steps", 0, 2, 2),
                *of("Training/Gradient_Norm", math.inf, *[1] * 10, 4.9, 5.1, 1),
            ],
            {
                "NonFinite": [0, 1, 0, 1, *[0] * 13],
                "Gradient_Explosion": [0] * 15 + [1, 0],  # five times the usual
            },
        ),
        Scene(
            of("Eval/Think_Length_Ratio", 1, 1.2, 1, 0.61, 0.59, 0.7),
            {"Thinking_Collapse": [0, 0, 0, 0, 1, 0]},
        ),
    ]


def scene_of_losses() -> Scene:
    """A spike; a jump that is a spike at first and a divergence later; no progress for 200 losses; then some,
    while the held-out loss rises."""
    losses = [*[2.0] * 20, 2.49, 2.51, *[2.0] * 38, *[2.7] * 12, *[2.0] * 128]
    assert len(losses) == 200
    rows = of("Training/Loss", *losses, *[1.9] * 15, *[1.8] * 15)
    spike, divergence, stagnation = ([0] * len(rows) for _ in range(3))
    spike[21] = 1
    spike[60:64] = [1] * 4  # until half of the last seven losses are as high
    divergence[67:79] = [1] * 12  # half of the last 15 are
    stagnation[199:207] = [1] * 8  # until half of the last 15 are better
    rows[210]["Eval/Loss"] = 1.0
    for at in (224, 226):  # twice more than 2% above the best, and the training loss has fallen
        rows[at]["Eval/Loss"] = 1.03
    rows[228]["Eval/Loss"] = 1.01
    overfitting = [0] * 226 + [1, 1] + [0] * 2
    return Scene(
        rows,
        {
            "Loss_Spike": spike,
            "Divergence": divergence,
            "Stagnation": stagnation,
            "Overfitting": overfitting,
        },
    )


def scene_of_a_leak() -> Scene:
    """4 MB more at each step; a hundred steps are enough to be sure."""
    rows = of("Memory/Host_RSS_MB", *(1000 + 4 * i for i in range(110)))
    return Scene(rows, {"Memory_Leak": [0] * 99 + [1] * 11})


# What is told once an episode: alert, its times, last value and limit.
TOLD = {
    "GPU_Overheat": (1, 86, 85),
    "OOM_Risk": (1, 96, 95),
    "Slow_Rank": (1, 30, 20),
    "Low_GPU_Utilization": (1, 70, 80),
    "Data_Starvation": (1, 0.4, 0.3),
    "NonFinite": (1, 2, 0),
    "Gradient_Explosion": (1, 5.1, 5),
    "Thinking_Collapse": (1, 0.59, 0.6),
    "Loss_Spike": (2, 2.7, LIMIT_OF_LOSS_SPIKE),
    "Divergence": (1, 2.7, 2.6),
    "Stagnation": (1, 0, 0.01),
    "Overfitting": (1, 1.03, 1.02),
    "Memory_Leak": (1, 192, 50),  # over the 24 pairs of the last half
}


@dataclass
class Troubles:
    """The scenes one after the other, as a run records them."""

    values: Values
    scenes: list[Scene]

    def steps(self) -> Iterator[tuple[int, Scene]]:
        """The first step of each scene."""
        first = 1
        for scene in self.scenes:
            yield first, scene
            first += len(scene.rows)


def do_troubles(ledger: Ledger, folder: Path) -> Troubles:
    run = new_run(folder)
    scenes = [*plain_scenes(), scene_of_losses(), scene_of_a_leak()]
    record = RunRecord(
        run,
        tb_logger.TensorBoardLogger(run.tensorboard),
        SystemMonitor((), folder),
        resume_step=None,
        alert_state={},
        alert_actions={},
        warn=lambda text: None,
    )
    for step, row in enumerate((row for scene in scenes for row in scene.rows), start=1):
        record.log(step, row)
    record.close("success")
    return Troubles(Values(ledger, run.tensorboard), scenes)


@check
def alerts_at_every_step(troubles: Troubles) -> None:
    total = sum(len(scene.rows) for scene in troubles.scenes)
    for name in TOLD:
        expected = dict.fromkeys(range(1, total + 1), 0.0)
        for first, scene in troubles.steps():
            expected |= by_step(scene.raised.get(name, []), first)
        troubles.values.scalars(f"Alerts/{name}", expected)
    assert set(TOLD) == {t.partition("/")[2] for t in troubles.values.beginning("Alerts/")}


@check
def the_table_of_alerts(troubles: Troubles) -> None:
    """A row a kind, in the order of their first steps; what ends for less than ten steps is told once."""
    begun = {}
    for first, scene in troubles.steps():
        for name, raised in scene.raised.items():
            starts = [
                first + i for i, now in enumerate(raised) if now and not (i and raised[i - 1])
            ]
            begun[name] = starts[: TOLD[name][0]]
    expected, rows = {}, {}
    for step, name in sorted((s, n) for n, starts in begun.items() for s in starts):
        rows[name] = [s for s in begun[name] if s <= step]
        times, value, limit = TOLD[name]
        if len(rows[name]) < times:
            value = LIMIT_OF_LOSS_SPIKE + 0.01
        rows[name] = (name, rows[name], value, limit)
        expected[step] = list(rows.values())
    assert len(expected) == 14

    def table(text: str) -> list[tuple]:
        return [
            (name, [int(step) for step in steps.split(", ")], float(value), float(limit))
            for name, times, steps, value, limit, *_ in table_rows(text)
            if int(times) == len(steps.split(", "))
        ]

    troubles.values.texts("Alerts/Table", expected, table, nearly_told)


def nearly_told(rows: list[tuple]) -> list[tuple]:
    return [
        (n, s, *(pytest.approx(x, rel=1e-3, abs=1e-9) for x in numbers)) for n, s, *numbers in rows
    ]


# -----------------------------------------------------------------------------
# As tests


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture(scope="module")
def done() -> set[Callable]:
    """Checks that were made."""
    return set()


@pytest.fixture(scope="module")
def cpu(ledger, tmp_path_factory, tiny_model, cache_dir) -> CpuRun:
    folder = tmp_path_factory.mktemp("cpu")
    return do_cpu_run(ledger, folder, schooled(tiny_model, folder / "model"), cache_dir)


@pytest.fixture(scope="module")
def gpus(ledger, tmp_path_factory, tiny_model, cache_dir) -> GpuRun:
    folder = tmp_path_factory.mktemp("gpus")
    return do_gpu_run(ledger, folder, tiny_model, cache_dir, fake_nvml.build(folder))


@pytest.fixture(scope="module")
def data(ledger, tmp_path_factory, tiny_model, cache_dir) -> list[Described]:
    folder = tmp_path_factory.mktemp("described")
    return [describe(ledger, folder, tiny_model, cache_dir, limit) for limit in (SHORT, WIDE)]


@pytest.fixture(scope="module")
def troubles(ledger, tmp_path_factory) -> Troubles:
    return do_troubles(ledger, tmp_path_factory.mktemp("troubles"))


def do(check: Callable, request: pytest.FixtureRequest) -> None:
    """A check on its run."""
    (name,) = inspect.signature(check).parameters
    check(request.getfixturevalue(name))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_values(check: Callable, request: pytest.FixtureRequest, done: set[Callable]):
    do(check, request)
    done.add(check)


def test_every_row_has_a_checked_value(request: pytest.FixtureRequest, ledger, done):
    """By itself it makes all checks; behind the others only those that failed, once more."""
    for check in CHECKS:
        if check not in done:
            do(check, request)
    assert not ledger.missing()
    runs = [request.getfixturevalue(name) for name in ("cpu", "gpus", "troubles")]
    for run in [*runs, *request.getfixturevalue("data")]:
        assert not run.values.half_checked()


def test_a_row_without_a_value_is_named(ledger: Ledger):
    assert len(Ledger().missing()) == len(METRICS)
    without = Ledger(ledger.rows - {("scalar", "Eval/Loss")})
    assert "scalar Eval/Loss" in without.missing()


def test_a_wrong_value_a_missing_point_and_an_unknown_tag_are_seen(tmp_path: Path):
    with tb_logger.TensorBoardLogger(tmp_path) as logger:
        for step in (1, 2):
            logger.log(step, {"Eval/Loss": float(step), "Custom/Mine": 0.0})
    values = Values(found := Ledger(), tmp_path)
    for wrong in ({1: 1.0, 2: 2.1}, {1: 1.0}, {1: 1.0, 2: 2.0, 3: 3.0}, {}):
        with pytest.raises(AssertionError):
            values.scalars("Eval/Loss", wrong)
    for tag in ("Eval/Perplexity", "Custom/Mine"):
        with pytest.raises(AssertionError):
            values.scalars(tag, {1: 0.0, 2: 0.0})
    assert not found.rows
    values.scalars("Eval/Loss", {1: 1.0, 2: 2.0})
    assert found.rows == {("scalar", "Eval/Loss")}
