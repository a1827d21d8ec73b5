"""Training speed at the exact shapes of Qwen3-4B: this program's path, its pieces, and its peers.

    python -m benchmarks.train_gpu                               # everything, documents of 300–1,500
    python -m benchmarks.train_gpu --sides ours "ours, eager" --lengths 8192
    python -m benchmarks.train_gpu --sides peers --repeats 2

Random weights in bf16, LoRA r = 16 on all linear layers with fp32 masters, random documents whose
first quarter is the prompt, AdamW, clipping at 1. Rows of 8,192 tokens, or 4,096 on a GPU below
100 GiB, one per update: what, by the estimate, sides can hold that pad (about 1.6 times the tokens,
146 KiB a token and layer); ours alone should fit 80 GiB with `--row-tokens 16384`. Every step is a
real one: plan, batch, forward, backward, clip, update. Each side runs in a process of its own, so
peaks and out-of-memory errors are its own; `--repeats` lets the sides take turns. Without CUDA a
small model runs end to end in fp32, which tests this script and measures nothing.

tokens/s counts real tokens (no padding) after the warm-up. MFU is model FLOPs (`training_flops`: no
recomputation, causal attention, head on labelled rows) per second over the rate of plain matrix
products measured in the same run. The compile cold start is the first step less a median step.
Losses: the sides see the same distribution of documents, so their mean losses must agree within 0.1
and no gradient may be zero; that the losses are equal step by step is shown by train_cpu.py. Needs
torch, transformers and peft; a peer that is not installed is left out. The last line is JSON.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import finetuning.common.process  # noqa: F401  before torch
from finetuning.common.distributed import Distributed
from finetuning.config import PROJECTIONS, BatchSettings, DataSettings, OptimizerSettings
from finetuning.data.packing import PackedBatch, StepPlan
from finetuning.data.token_table import Segment, TokenizedSamples, TruncationReport
from finetuning.model import attention
from finetuning.model.flops import dims_from_config, lora_parameters, peak_flops, training_flops
from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.loading import recompute_activations
from finetuning.model.loss import LossSums
from finetuning.model.packed_model import PackedLossModel
from finetuning.training.captured_step import CapturedStep
from finetuning.training.engine import Execution, TrainingEngine
from finetuning.training.optimizer import (
    MicroBatchSums,
    build_optimizer,
    clip_gradients,
    forward_backward,
    update_weights,
)
from finetuning.training.state import TrainState
from finetuning.training.step_clock import CudaTimeline, HostTimeline, StepClock

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
PAD, END, CLOSE, LEARNING_RATE, MAX_NORM = 0, 1, 2, 1e-4, 1.0
TARGETS = list(PROJECTIONS)
LAST_LINES = 20  # of what a side that failed has said
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


# -----------------------------------------------------------------------------
# The work


@dataclass(frozen=True)
class Work:
    """What every side does."""

    shortest: int
    longest: int
    row_tokens: int
    steps: int
    warm_up: int

    def documents(self) -> TokenizedSamples:
        """Enough random documents for all steps; the same for every side."""
        rng = np.random.default_rng(0)
        mean = (self.shortest + self.longest) / 2
        count = math.ceil(self.steps * self.row_tokens / mean) + 8
        lengths = rng.integers(self.shortest, self.longest + 1, count)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = rng.integers(8, config().vocab_size, offsets[-1]).astype(np.int32)
        segments = np.full(len(ids), Segment.ANSWER, dtype=np.uint8)
        for start, end in itertools.pairwise(offsets):
            prompt, close = start + (end - start) // 4, start + 3 * (end - start) // 4
            segments[start:prompt], segments[prompt:close] = Segment.PROMPT, Segment.THINKING
            segments[close], ids[close] = Segment.CLOSE, CLOSE
            segments[end - 1], ids[end - 1] = Segment.END, END
        targets = np.add.reduceat(segments != Segment.PROMPT, offsets[:-1]).astype(np.int64)
        return TokenizedSamples(
            ids=ids,
            segments=segments,
            offsets=offsets,
            sample_index=np.arange(count),
            num_targets=targets,
            truncation=TruncationReport(),
            close_id=CLOSE,
            end_id=END,
            max_seq_length=self.longest,
        )

    def plan(self, tokens: TokenizedSamples) -> StepPlan:
        """One row an update."""
        data = DataSettings(max_seq_length=self.row_tokens)
        batch = BatchSettings(max_steps=self.steps)
        return StepPlan(tokens.lengths, tokens.num_targets, data=data, batch=batch)


def config() -> Qwen3Config:
    """Qwen3-4B from its numbers; on a CPU a small relative."""
    return Qwen3Config(
        **(QWEN3_4B if ON_CUDA else SMALL),
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
        use_cache=False,
    )


def build_base() -> torch.nn.Module:
    """Random weights, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return Qwen3ForCausalLM(config())
    finally:
        torch.set_default_dtype(before)


def lora() -> LoraConfig:
    """r = 16 on all linear layers, no dropout."""
    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )


def build_model(checkpointing: bool = False) -> torch.nn.Module:
    """Frozen base, fp32 adapters."""
    base = build_base()
    if checkpointing:
        recompute_activations(base)
    return get_peft_model(base, lora()).train()


# -----------------------------------------------------------------------------
# This program, and variants that lack one piece


class FullLogits(PackedLossModel):
    """Logits of all rows at once, as a model with its head makes them."""

    def forward(self, batch: PackedBatch, num_targets: int, scale: float = 1.0):
        weight = self._base[0].get_output_embeddings().weight
        logits = F.linear(self.hidden_states(batch), weight).float()
        loss = F.cross_entropy(logits[batch.target_positions], batch.labels, reduction="sum")
        empty = torch.zeros(1, 5, 3, device=loss.device)
        empty[0, 1, 0], empty[0, 1, 2] = loss.detach(), len(batch.labels)
        return loss * scale / num_targets, LossSums(empty, empty, empty)


class PaddedAttention(PackedLossModel):
    """One document a row, right-padded, causal SDPA without a mask."""

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        ids = torch.nn.utils.rnn.pad_sequence(
            batch.input_ids[0].split(batch.lengths), batch_first=True, padding_value=PAD
        )
        with attention.ordinary_attention(self.model):
            hidden = self._base[0].get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        parts = (row[:length] for row, length in zip(hidden, batch.lengths, strict=True))
        return torch.cat(list(parts))


class Pieces:
    """The loop's own pieces without what is measured to be missing."""

    def __init__(
        self,
        model: torch.nn.Module,
        kind: type[PackedLossModel],
        fast_lora: bool,
        dist: Distributed,
    ) -> None:
        if fast_lora:
            enable_fast_lora(model)
        self.packed, self.dist = kind(model, CLOSE).train(), dist
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(
            self.parameters,
            learning_rate=LEARNING_RATE,
            betas=(0.9, 0.999),
            epsilon=1e-8,
            weight_decay=0.0,
        )
        self.captured = None

    def forward_backward(self, planned, tokens, clock, *_) -> tuple[MicroBatchSums, bool]:
        """As `TrainingEngine` does it."""
        return forward_backward(self.packed, planned, tokens, self.dist, clock), False

    def update(self, learning_rate: float, *, max_grad_norm: float) -> torch.Tensor:
        """As `TrainingEngine` does it."""
        norm = clip_gradients(self.parameters, max_grad_norm)
        update_weights(self.optimizer, norm)
        return norm


def in_training(
    plan: StepPlan,
    *,
    compiled: bool = True,
    graph: bool = True,
    checkpointing: bool = False,
    fp8: bool = False,
) -> TrainingEngine:
    """The model as a run trains it."""
    training = TrainingEngine(
        build_model(checkpointing),
        CLOSE,
        Distributed(0, 1, 0, DEVICE),
        Execution(
            parallel="ddp",
            dtype=DTYPE,
            batch_shape=plan.constant_shape if compiled and ON_CUDA else {},
            must_compile=True,
            fp8=fp8 and ON_CUDA,
        ),
        OptimizerSettings(learning_rate=LEARNING_RATE),
        warn=lambda text: print(text, file=sys.stderr),
    )
    if not graph:
        training.not_captured = "not wanted"
    return training


def ours(
    work: Work,
    *,
    kind: type[PackedLossModel] = PackedLossModel,
    fast_lora: bool = True,
    **ways: bool,
) -> dict:
    """What the loop of a run does, without its logging."""
    tokens = work.documents()
    plan, state = work.plan(tokens), TrainState()
    if kind is PackedLossModel and fast_lora:
        training = in_training(plan, **ways)
    else:
        training = Pieces(build_model(), kind, fast_lora, Distributed(0, 1, 0, DEVICE))
    clock = StepClock(timeline=CudaTimeline() if ON_CUDA else HostTimeline())
    record, sums, norms = Record(work), [], []
    for step in range(1, work.steps + 1):
        record.begin(lengths=tokens.lengths[list(plan[step].documents)], step=step)
        of_step, _ = training.forward_backward(plan[step], tokens, clock, state, lambda: False)
        sums += of_step
        norms.append(training.update(LEARNING_RATE, max_grad_norm=MAX_NORM))
    record.end()
    record.captured = training.captured
    totals = sum(s.per_document.sum((0, 1)).cpu() for _, s in sums)
    record.losses = [float(totals[0] / totals[2])]
    record.grad_norms = [float(norm) for norm in norms]
    return record.result()


class Record:
    """Marks of the steps, what they held, and the peak of the device's memory."""

    def __init__(self, work: Work) -> None:
        self.work, self.marks, self.tokens, self.flops = work, [], [], []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.captured: CapturedStep | None = None

    def begin(self, lengths: Sequence[int] | None = None, step: int = 0) -> None:
        """A step begins; synchronises only at the first, the second and the first timed one."""
        if step in (1, 2, self.work.warm_up + 1) or lengths is None:
            self.synchronize()
        if step == self.work.warm_up + 1 and ON_CUDA:
            torch.cuda.reset_peak_memory_stats()
        self.marks.append(time.perf_counter())
        if lengths is not None:
            self.count(lengths)

    def count(self, lengths: Sequence[int]) -> None:
        """Real tokens and model FLOPs of a step; three quarters of a document carry labels."""
        dims = dims_from_config(config())
        targets = sum(int(n) - int(n) // 4 for n in lengths)
        flops = training_flops(dims, lengths, targets, lora_weights=lora_parameters(dims, 16))
        self.tokens.append(int(sum(lengths)))
        self.flops.append(flops)

    def end(self) -> None:
        """The last step is over, on the device too."""
        self.synchronize()
        self.marks.append(time.perf_counter())

    @staticmethod
    def synchronize() -> None:
        if ON_CUDA:
            torch.cuda.synchronize()

    def result(self) -> dict:
        """Rates over the timed steps."""
        start = self.work.warm_up
        seconds = self.marks[-1] - self.marks[start]
        step = seconds / (len(self.marks) - 1 - start)
        return {
            "tokens_per_second": sum(self.tokens[start:]) / seconds,
            "flops_per_second": sum(self.flops[start:]) / seconds,
            "step_seconds": step,
            "first_step_extra_seconds": self.marks[1] - self.marks[0] - step,
            "peak_gib": self.peak_bytes() / 2**30 if ON_CUDA else None,
            "captured": self.captured is not None,
            "mean_loss": statistics.fmean(self.losses),
            "smallest_grad_norm": min(self.grad_norms),
        }

    def peak_bytes(self) -> int:
        """Since the warm-up; what is replayed uses what it used when it was recorded."""
        recorded = self.captured.peak_bytes if self.captured else 0
        return max(torch.cuda.max_memory_allocated(), recorded)


# -----------------------------------------------------------------------------
# The peers


class Callback(transformers.TrainerCallback):
    """Marks a Trainer's steps."""

    def __init__(self, record: Record) -> None:
        self.record, self.step = record, 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.step += 1
        self.record.begin(lengths=(), step=self.step)

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs:
            self.record.losses.append(float(logs["loss"]))
            self.record.grad_norms.append(float(logs["grad_norm"]))


def trainer_arguments(work: Work, directory: str, per_step: int) -> dict:
    """TrainingArguments, tuned: bf16, fused AdamW, no checkpointing, nothing logged to files."""
    return dict(
        output_dir=directory,
        per_device_train_batch_size=per_step,
        max_steps=work.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_NORM,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=ON_CUDA,
        use_cpu=not ON_CUDA,
        gradient_checkpointing=False,
        dataloader_pin_memory=ON_CUDA,
        seed=0,
    )


def run_trainer(trainer: transformers.Trainer, record: Record, batches: list[list[int]]) -> dict:
    """Train; `batches` are the lengths of each step's documents."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Callback(record))
    trainer.train()
    record.end()
    record.tokens, record.flops = [], []
    for lengths in batches:
        record.count(lengths)
    return record.result()


def hf_trainer(work: Work) -> dict:
    """transformers' Trainer with peft: the documents of our rows, right-padded, SDPA."""
    tokens = work.documents()
    plan = work.plan(tokens)
    rows = [plan[step].documents for step in range(1, work.steps + 1)]

    def collate(batch: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
        documents = [tokens[d] for d in batch[0]]
        ids = [torch.from_numpy(d.ids.astype(np.int64)) for d in documents]
        labels = [
            torch.where(torch.from_numpy(d.segments != Segment.PROMPT), i, -100)
            for d, i in zip(documents, ids, strict=True)
        ]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=PAD),
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }

    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            **trainer_arguments(work, directory, 1),
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
        )
        trainer = transformers.Trainer(
            model=build_model(), args=arguments, train_dataset=rows, data_collator=collate
        )
        batches = [tokens.lengths[list(row)].tolist() for row in rows]
        return run_trainer(trainer, Record(work), batches)


def trl(work: Work, *, model: Callable[[], torch.nn.Module] = build_model, **options) -> dict:
    """TRL's SFTTrainer on as many documents a step as a row of ours holds on average."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokens = work.documents()
    per_step = max(1, int(work.row_tokens / tokens.lengths.mean()))
    documents = [tokens[i] for i in range(min(len(tokens), per_step * work.steps))]
    documents = (documents * 2)[: per_step * work.steps]
    rows = [
        {"input_ids": d.ids.tolist(), "completion_mask": (d.segments != 0).astype(int).tolist()}
        for d in documents
    ]
    with tempfile.TemporaryDirectory() as directory:
        arguments = SFTConfig(
            **trainer_arguments(work, directory, per_step),
            train_sampling_strategy="sequential",
            max_length=None,
            completion_only_loss=True,
            **options,
        )
        trainer = SFTTrainer(
            model=model(),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer(),
        )
        lengths = [len(d.ids) for d in documents]
        batches = [lengths[i : i + per_step] for i in range(0, len(lengths), per_step)]
        return run_trainer(trainer, Record(work), batches)


def flash_model() -> torch.nn.Module:
    """For padding-free batches: FlashAttention where it is installed."""
    model = build_model()
    model.get_base_model().set_attn_implementation("flash_attention_2")
    return model


def unsloth(work: Work) -> dict:
    """Unsloth's patched model in TRL's trainer, padding-free; the base goes through a folder."""
    from unsloth import FastLanguageModel

    def patched() -> torch.nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            build_base().save_pretrained(folder)
            word_tokenizer().save_pretrained(folder)
            model, _ = FastLanguageModel.from_pretrained(
                folder, max_seq_length=work.row_tokens, dtype=DTYPE, load_in_4bit=False
            )
        return FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, target_modules=TARGETS, use_gradient_checkpointing=False
        )

    return trl(work, model=patched, padding_free=True)


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """TRL wants a tokenizer even for tokenized data."""
    from tokenizers import Tokenizer, models

    words = {str(i): i for i in range(config().vocab_size)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="3")),
        pad_token=str(PAD),
        eos_token=str(END),
        unk_token="3",
    )


# -----------------------------------------------------------------------------
# Sides

OURS: dict[str, dict] = {
    "ours": {},
    "ours, FP8": {"fp8": True},
    "ours, no graph": {"graph": False},
    "ours, eager": {"compiled": False},
    "ours, eager, peft's LoRA with fp32 casts": {"fast_lora": False},
    "ours, eager, full logits": {"kind": FullLogits},
    "ours, eager, padded SDPA": {"kind": PaddedAttention},
    "ours, checkpointing": {"checkpointing": True},
    "ours, eager, checkpointing": {"compiled": False, "checkpointing": True},
}
# Name, modules it needs, and what runs it.
PEERS: dict[str, tuple[tuple[str, ...], Callable[[Work], dict]]] = {
    "HF Trainer + PEFT": (("accelerate",), hf_trainer),
    "TRL + PEFT, padded SDPA": (("trl", "datasets"), trl),
    "TRL + PEFT, padding-free flash": (
        ("trl", "datasets", "flash_attn"),
        lambda work: trl(work, model=flash_model, padding_free=True),
    ),
    "TRL + Liger": (
        ("trl", "datasets", "liger_kernel"),
        lambda work: trl(work, use_liger_kernel=True),
    ),
    "Unsloth": (("trl", "datasets", "unsloth"), unsloth),
}
GROUPS = {"ablation": list(OURS), "peers": ["ours", *PEERS], "all": [*OURS, *PEERS]}
TUNED_TRL = ("TRL + PEFT, padded SDPA", "TRL + PEFT, padding-free flash")


def missing(side: str) -> list[str]:
    """Modules that a peer needs and that are not installed."""
    return [m for m in PEERS.get(side, ((),))[0] if importlib.util.find_spec(m) is None]


def run_side(side: str, work: Work) -> dict:
    """In the child process."""
    return ours(work, **OURS[side]) if side in OURS else PEERS[side][1](work)


def matmul_rate() -> float:
    """FLOP/s of the base's four weight shapes on a row of tokens, as plain matrix products."""
    shape, rows, flops, seconds = config(), 16384 if ON_CUDA else 512, 0, 0.0
    queries = shape.num_attention_heads * shape.head_dim
    keys = 2 * shape.num_key_value_heads * shape.head_dim
    pairs = (
        (shape.hidden_size, queries + keys),
        (queries, shape.hidden_size),
        (shape.hidden_size, 2 * shape.intermediate_size),
        (shape.intermediate_size, shape.hidden_size),
    )
    for inputs, outputs in pairs:
        x = torch.randn(rows, inputs, device=DEVICE, dtype=DTYPE)
        w = torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE)
        for timed in (False, True):
            Record.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                F.linear(x, w)
            Record.synchronize()
            seconds += timed * (time.perf_counter() - start)
        flops += 20 * 2 * rows * inputs * outputs
    return flops / seconds


def child(side: str, arguments: argparse.Namespace) -> dict:
    """A side in a process of its own; what went wrong is its result then."""
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--child", side]
    for name in ("lengths", "row_tokens", "steps", "warm_up"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()][-LAST_LINES:]
        error = lines[-1] if lines else f"exit code {done.returncode}"
        return {"error": error, "last_lines": lines}
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(sides: list[str], arguments: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Results side by side, `repeats` times."""
    for _ in range(arguments.repeats):
        for side in sides:
            absent = missing(side)
            result = {"error": f"not installed: {', '.join(absent)}"} if absent else None
            yield side, result or child(side, arguments)


def medians(results: list[dict]) -> dict:
    """Of the runs of a side that ended; else its error."""
    good = [result for result in results if "error" not in result]
    if not good:
        return results[0]
    return {
        name: None if good[0][name] is None else statistics.median(r[name] for r in good)
        for name in good[0]
    }


def print_table(table: dict[str, dict], rate: float) -> None:
    print(f"\n{'':42}{'tok/s':>9}{'MFU %':>7}{'GiB':>7}{'step s':>8}{'cold s':>8}{'loss':>8}")
    for side, result in table.items():
        if "error" in result:
            print(f"{side:42}{result['error'][:100]}")
            continue
        mfu = 100 * result["flops_per_second"] / rate
        peak = f"{result['peak_gib']:.1f}" if result["peak_gib"] is not None else "-"
        print(
            f"{side:42}{result['tokens_per_second']:9.0f}{mfu:7.1f}{peak:>7}"
            f"{result['step_seconds']:8.3f}{result['first_step_extra_seconds']:8.1f}"
            f"{result['mean_loss']:8.3f}"
        )


def check(table: dict[str, dict]) -> list[str]:
    """What makes the comparison worthless."""
    good = {side: result for side, result in table.items() if "error" not in result}
    faults = [f"{s}: a gradient is zero" for s, r in good.items() if r["smallest_grad_norm"] <= 0]
    losses = [result["mean_loss"] for result in good.values()]
    if losses and not max(losses) - min(losses) < 0.1:
        faults.append(f"mean losses from {min(losses):.3f} to {max(losses):.3f}")
    return faults


def machine() -> dict:
    names = ("torch", "transformers", "peft", "trl", "liger_kernel", "flash_attn", "unsloth")
    return {
        "device": torch.cuda.get_device_name() if ON_CUDA else "cpu",
        "versions": {
            name: importlib.metadata.version(name)
            for name in names
            if importlib.util.find_spec(name)
        },
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
    }


def final(table: dict[str, dict], rate: float) -> dict:
    """The last line; null is what was not measured."""
    mine = table.get("ours", {})
    speed = mine.get("tokens_per_second")
    tuned = [table.get(side, {}).get("tokens_per_second") for side in TUNED_TRL]
    best = max(filter(None, tuned), default=None)
    named = ON_CUDA and peak_flops(torch.cuda.get_device_name())
    return {
        "tokens_per_second": speed,
        "mfu_percent": 100 * mine["flops_per_second"] / rate if speed else None,
        "peak_gib": mine.get("peak_gib"),
        "speedup_vs_trl_tuned": speed / best if speed and best else None,
        "matmul_teraflops": rate / 1e12,
        "mfu_of_data_sheet_percent": 100 * mine["flops_per_second"] / named
        if speed and named
        else None,
        "sides": table,
        **machine(),
    }


def default_row_tokens() -> int:
    """A row whose activations all sides can keep on this device."""
    if not ON_CUDA:
        return 512
    return 8192 if torch.cuda.get_device_properties(DEVICE).total_memory > 100 * 2**30 else 4096


def parse_arguments(command: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sides", nargs="+", default=["all"], help=f"of {[*GROUPS, *GROUPS['all']]}"
    )
    parser.add_argument("--lengths", default="300-1500" if ON_CUDA else "30-150")
    parser.add_argument("--row-tokens", type=int, default=default_row_tokens())
    parser.add_argument("--steps", type=int, default=16 if ON_CUDA else 4)
    parser.add_argument("--warm-up", type=int, default=4 if ON_CUDA else 2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(command)


def main() -> None:
    arguments = parse_arguments()
    shortest, _, longest = arguments.lengths.partition("-")
    longest = int(longest or shortest)
    work = Work(int(shortest), longest, arguments.row_tokens, arguments.steps, arguments.warm_up)
    if arguments.child:
        with contextlib.redirect_stdout(sys.stderr):
            transformers.logging.set_verbosity_error()
            result = run_side(arguments.child, work)
        print(json.dumps(result))
        return
    cache = Path(tempfile.gettempdir()) / "train_gpu_inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    warm = any(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).glob("*"))
    print(f"{work}\n{machine()}\ncompile cache {'warm' if warm else 'cold'}", flush=True)
    sides = list(dict.fromkeys(s for name in arguments.sides for s in GROUPS.get(name, [name])))
    results: dict[str, list[dict]] = {}
    for side, result in take_turns(sides, arguments):
        results.setdefault(side, []).append(result)
        print(f"{side}: {json.dumps(result)}", flush=True)
    rate = matmul_rate()
    table = {side: medians(runs) for side, runs in results.items()}
    print_table(table, rate)
    faults = check(table)
    print(json.dumps({**final(table, rate), "compile_cache_warm": warm, "faults": faults}))
    if faults:
        sys.exit("; ".join(faults))


if __name__ == "__main__":
    main()
