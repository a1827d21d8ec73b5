"""Training speed on one CPU thread: this program's path, HF Trainer, and TRL's SFTTrainer.

    uv run --group bench python -m benchmarks.train_cpu             # about 5 minutes
    uv run --group bench python -m benchmarks.train_cpu --ablation  # what each piece brings
    uv run --group bench python -m benchmarks.train_cpu --data data/raw --steps 15

Every side trains the same tiny Qwen3 with the same weights, LoRA, documents, order and optimizer,
in fp32 without checkpointing. First the step losses and gradient norms are compared; then the runs
alternate and CPU time per step (process_time, all threads of the process) is taken, start-up and
the first steps left out. TRL's defaults that would change the work (bf16, gradient checkpointing,
max_length) are overridden; its token accuracy and entropy metrics cannot be turned off. Memory
settings of malloc are the same for everybody: this is one process. The last line is JSON.
"""

import finetuning.common.process  # noqa: F401, I001  before torch
import argparse
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.utils import clip_grad_norm_
from transformers import Qwen3Config, Qwen3ForCausalLM

from finetuning.config import PROJECTIONS, DataSettings
from finetuning.data.packing import build_batch
from finetuning.data.token_table import Segment, TokenizedSample
from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.loss import packed_loss
from finetuning.model.packed_model import PackedLossModel

VOCAB, PAD, CLOSE = 4096, 0, 5
PER_STEP, LEARNING_RATE, MAX_NORM = 8, 1e-3, 1.0
WARM_UP = 5  # steps that are compared but not timed
TARGETS = list(PROJECTIONS)


@dataclass
class Record:
    """What one run did: a loss and a gradient norm per step, and the CPU clock at each step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    def milliseconds(self, clock: str) -> float:
        """Mean time of a step after the warm-up; a step lasts from its start to the next start."""
        marks = getattr(self, clock)[WARM_UP:]
        return (marks[-1] - marks[0]) / (len(marks) - 1) * 1e3


Trainer = Callable[[torch.nn.Module, Sequence[TokenizedSample]], Record]


def build_model() -> torch.nn.Module:
    """The same weights for everybody: 4 layers, hidden size 64, LoRA r = 8 on all linear layers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=1,
        bos_token_id=None,
        use_cache=False,
    )
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS)
    return get_peft_model(Qwen3ForCausalLM(config), lora).train()


def make_documents(count: int, seed: int = 0) -> list[TokenizedSample]:
    """Random ids, 60 to 300 tokens a document: a quarter prompt, then thinking and answer."""
    rng = np.random.default_rng(seed)
    documents = []
    for index in range(count):
        length = int(rng.integers(60, 301))
        prompt, close = length // 4, length * 3 // 4
        segments = np.full(length, Segment.ANSWER, dtype=np.uint8)
        segments[:prompt], segments[prompt:close] = Segment.PROMPT, Segment.THINKING
        segments[close], segments[-1] = Segment.CLOSE, Segment.END
        ids = rng.integers(8, VOCAB, length).astype(np.int32)
        ids[close], ids[-1] = CLOSE, 1
        documents.append(TokenizedSample(ids=ids, segments=segments, index=index))
    return documents


def read_documents(paths: Sequence[str], count: int) -> list[TokenizedSample]:
    """Samples from files, through the tokenizer of the embedded model, repeated to the number."""
    from finetuning.data.tokenization import tokenize_samples
    from finetuning.model.demo_model import train_tokenizer
    from finetuning.readers.dataset import read_samples

    samples = read_samples(paths).samples
    texts = [f"{s.question}\n{s.thinking}\n{s.answer}" for s in samples]
    tokens = tokenize_samples(samples, train_tokenizer(texts), DataSettings(max_seq_length=1500))
    documents = [tokens[index % len(tokens)] for index in range(count)]
    assert max(int(document.ids.max()) for document in documents) < VOCAB
    return documents


# -----------------------------------------------------------------------------
# This program's path


def packed_step(fast_lora: bool = True):
    """Packed batch through the rooms that training uses."""

    def prepare(model: torch.nn.Module):
        if fast_lora:
            assert enable_fast_lora(model) == 4 * len(TARGETS)
        packed = PackedLossModel(model, CLOSE)

        def loss_of(documents: Sequence[TokenizedSample]) -> torch.Tensor:
            batch = build_batch(documents, range(len(documents)))
            return packed(batch, len(batch.labels))[0]

        return loss_of

    return prepare


def padded_step(model: torch.nn.Module):
    """The peers' padded batches and masks, with our loss and LoRA: the table of equal work."""
    enable_fast_lora(model)
    base = model.get_base_model()

    def loss_of(documents: Sequence[TokenizedSample]) -> torch.Tensor:
        padded = pad(documents)
        packed = build_batch(documents, range(len(documents)))
        hidden = base.model(
            input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False
        ).last_hidden_state
        positions = torch.nonzero(padded["labels"].flatten() != -100).squeeze(1) - 1
        return packed_loss(
            hidden.flatten(0, 1),
            base.lm_head.weight,
            target_positions=positions,
            labels=packed.labels,
            segments=packed.segments,
            document=packed.document,
            num_documents=len(documents),
            thinking_bucket=packed.thinking_bucket,
            close_id=CLOSE,
            num_targets=len(packed.labels),
        )[0]

    return loss_of


def plain_step(model: torch.nn.Module):
    """transformers' own loss on padded batches in a bare loop: where the ablation starts."""

    def loss_of(documents: Sequence[TokenizedSample]) -> torch.Tensor:
        return model(**pad(documents), use_cache=False).loss

    return loss_of


def our_loop(prepare: Callable) -> Trainer:
    def train(model: torch.nn.Module, documents: Sequence[TokenizedSample]) -> Record:
        record, loss_of = Record(), prepare(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        for start in range(0, len(documents), PER_STEP):
            record.tick()
            loss = loss_of(documents[start : start + PER_STEP])
            loss.backward()
            norm = clip_grad_norm_(trainable, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            record.losses.append(loss.item())
            record.grad_norms.append(norm.item())
        record.tick()
        return record

    return train


# -----------------------------------------------------------------------------
# The peers


def pad(documents: Sequence[TokenizedSample]) -> dict[str, torch.Tensor]:
    """Right-padded ids, mask and labels (B, longest)."""
    shape = (len(documents), max(len(document.ids) for document in documents))
    ids, labels, mask = np.full(shape, PAD), np.full(shape, -100), np.zeros(shape, dtype=np.int64)
    for row, document in enumerate(documents):
        length = len(document.ids)
        ids[row, :length], mask[row, :length] = document.ids, 1
        target = document.segments != Segment.PROMPT
        labels[row, :length] = np.where(target, document.ids, -100)
    named = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: torch.from_numpy(array) for name, array in named.items()}


def trainer_arguments(directory: str) -> dict:
    """Of HF's TrainingArguments, shared by both peers."""
    return dict(
        output_dir=directory,
        per_device_train_batch_size=PER_STEP,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_NORM,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        use_cpu=True,
        bf16=False,
        seed=0,
    )


class Clock(transformers.TrainerCallback):
    """Marks the start of each step and keeps the logged numbers."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.record.tick()

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs:
            self.record.losses.append(float(logs["loss"]))
            self.record.grad_norms.append(float(logs["grad_norm"]))


def run_trainer(trainer: transformers.Trainer, record: Record) -> Record:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Clock(record))
    trainer.train()
    return record


def hf_trainer(model: torch.nn.Module, documents: Sequence[TokenizedSample]) -> Record:
    with tempfile.TemporaryDirectory() as directory:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                **trainer_arguments(directory), remove_unused_columns=False
            ),
            train_dataset=list(documents),
            data_collator=pad,
        )
        return run_trainer(trainer, Record())


def trl_trainer(**options) -> Trainer:
    def train(model: torch.nn.Module, documents: Sequence[TokenizedSample]) -> Record:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        rows = [
            {"input_ids": d.ids.tolist(), "completion_mask": (d.segments != 0).astype(int).tolist()}
            for d in documents
        ]
        with tempfile.TemporaryDirectory() as directory:
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(
                    **trainer_arguments(directory),
                    gradient_checkpointing=False,
                    max_length=None,
                    completion_only_loss=True,
                    **options,
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=word_tokenizer(),
            )
            return run_trainer(trainer, Record())

    return train


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """TRL wants a tokenizer even for tokenized data."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="2"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=str(PAD), eos_token="1", unk_token="2"
    )


# -----------------------------------------------------------------------------
# Comparison

PEERS: dict[str, Trainer] = {
    "ours": our_loop(packed_step()),
    "ours, padded batches": our_loop(padded_step),
    "HF Trainer": hf_trainer,
    "TRL as shipped": trl_trainer(),
    "TRL padding-free": trl_trainer(padding_free=True),
}
ABLATION: dict[str, Trainer] = {
    "bare loop, HF loss, padded": our_loop(plain_step),
    "+ our loss and LoRA, padded": our_loop(padded_step),
    "packed, our loss, peft's LoRA": our_loop(packed_step(fast_lora=False)),
    "packed, our loss, fast LoRA": our_loop(packed_step()),
}


def compare(
    sides: dict[str, Trainer], documents: Sequence[TokenizedSample], repeats: int
) -> dict[str, list[Record]]:
    """Alternate the sides, `repeats` times, each time from the same weights."""
    steps = len(documents) // PER_STEP
    records: dict[str, list[Record]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, train in sides.items():
            record = train(build_model(), documents)
            assert len(record.losses) == steps, (name, len(record.losses))
            assert min(record.grad_norms) > 0, f"{name}: a step without gradient"
            records[name].append(record)
            print(f"repeat {repeat + 1}: {name}: {record.milliseconds('cpu'):.1f} ms", flush=True)
    return records


def largest_difference(records: dict[str, list[Record]], what: str) -> float:
    """Largest distance of any side's step value from the first side's."""
    reference, *others = (np.array(getattr(runs[0], what)) for runs in records.values())
    return max(float(np.abs(other - reference).max()) for other in others)


def print_table(records: dict[str, list[Record]]) -> dict[str, float]:
    """Median over the repeats of each side's CPU time per step."""
    cpu = {n: statistics.median(r.milliseconds("cpu") for r in runs) for n, runs in records.items()}
    first = next(iter(cpu))
    print(f"\n{'':32}{'CPU ms/step':>12}{'spread':>9}{'wall ms':>9}{'x ' + first[:12]:>15}")
    for name, runs in records.items():
        times = [run.milliseconds("cpu") for run in runs]
        spread = (max(times) - min(times)) / cpu[name]
        wall = statistics.median(run.milliseconds("wall") for run in runs)
        ratio = cpu[name] / cpu[first]
        print(f"{name:32}{cpu[name]:12.1f}{spread:9.1%}{wall:9.1f}{ratio:15.2f}")
    return cpu


def machine(sides: Iterable[str]) -> dict:
    names = ["torch", "transformers", "peft", "accelerate"]
    names += ["trl"] * any(side.startswith("TRL") for side in sides)
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ablation", action="store_true", help="our pieces instead of the peers")
    parser.add_argument("--data", nargs="+", help="files or folders instead of random documents")
    arguments = parser.parse_args()
    assert arguments.steps > WARM_UP + 1, "nothing would be left to time"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    sides = ABLATION if arguments.ablation else PEERS
    count = arguments.steps * PER_STEP
    documents = read_documents(arguments.data, count) if arguments.data else make_documents(count)
    records = compare(sides, documents, arguments.repeats)
    cpu = print_table(records)
    differences = {w: largest_difference(records, w) for w in ("losses", "grad_norms")}
    print(f"largest difference between step losses: {differences['losses']:.1e}")
    result = {
        "losses_equal": differences["losses"] < 1e-4,
        "cpu_ms_per_step": cpu,
        **machine(sides),
    }
    result["tokens_per_step"] = sum(len(d.ids) for d in documents) / arguments.steps
    if not arguments.ablation:
        result["speedup_vs_hf_trainer"] = cpu["HF Trainer"] / cpu["ours"]
        result["speedup_vs_trl"] = cpu["TRL as shipped"] / cpu["ours"]
        result["speedup_vs_trl_tuned"] = (
            min(cpu["TRL as shipped"], cpu["TRL padding-free"]) / cpu["ours"]
        )
        result["equal_work_vs_hf_trainer"] = cpu["HF Trainer"] / cpu["ours, padded batches"]
    result["largest_difference"] = differences
    print(json.dumps(result))
    if not result["losses_equal"]:
        sys.exit("the sides did not do the same work")


if __name__ == "__main__":
    main()
