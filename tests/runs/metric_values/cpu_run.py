"""A run on a CPU in two sessions against plain torch and peft, with clock, host and answers set by hand."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

import direct_finetuning_with_existing_modules as program
import tb_logger
from finetuning.config import DirectTrainingConfig
from finetuning.evaluation.evaluator import Evaluator
from finetuning.model.decoding import Decoder, Request
from finetuning.model.packed_model import PackedLossModel
from finetuning.monitoring.alerts import AlertMonitor
from finetuning.monitoring.convergence import ConvergenceMonitor
from finetuning.runs import metrics as run_metrics
from finetuning.runs import session as run_session
from finetuning.training import optimizer, step_clock
from finetuning.training.checkpoint_manager import CheckpointManager
from finetuning.training.engine import TrainingEngine
from tests.helpers.checked_values import Ledger, Values, kept_figures
from tests.helpers.hand_machine import MB, HandMachine, HandTime, Reading
from tests.helpers.reference import Document, PlainTraining, Reference, Sums, tokens_of

LAYERS, HIDDEN, QUERIES, KEYS, INNER = 2, 32, 32, 16, 64  # of the tiny model
RANK, EVALUATED, LOGGED, STOPPED, SAVED = (
    4,
    (0, 4, 8, 12, 15),
    (3, 6, 9, 12, 15),
    11,
    (6, 11, 12, 15),
)
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


SPENT = {  # seconds by hand; the first two for each document
    "data": 1 / 64,
    "forward_backward": 1 / 8,
    "optimizer": 1 / 4,
    "between": 1 / 32,
    "evaluation": 8.0,
    "model": 4.0,
    "checkpoint": 2.0,
    "logging": 1 / 8,
    "forecast": 1 / 16,
    "alerts": 1 / 32,
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
        slow(ConvergenceMonitor, "observe", lambda *_: SPENT["forecast"])
        slow(AlertMonitor, "observe", lambda *_: SPENT["alerts"])
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

    def write(self, request: Request) -> torch.Tensor:
        assert request.most == BUDGET
        replies = REPLIES[len(self.given)]
        self.given.append(replies)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        rows = []
        for prompt in self.tokenizer.batch_decode(request.ids):
            (asked,) = (i for i, row in enumerate(HELD_OUT) if row["question"] in prompt)
            ids, _ = self.ids(replies[asked])
            rows.append(ids + [end] * (BUDGET + 1 - len(ids)))
        width = min(BUDGET, max(row.index(end) + 1 if end in row else BUDGET for row in rows))
        return torch.tensor([row[:width] for row in rows])


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
        general_path=(write(folder, "general.jsonl", training_rows("戊", 6)),),
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
        probe_temperature=0.0,
        tokens_per_row=0,
        best_by="loss",
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
            patch.setattr(run_session, "start_system_monitor", lambda *_: machine.monitor())
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
        patch.setattr(Decoder, "write", lambda self, request: answers.write(request))
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
