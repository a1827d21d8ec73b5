"""The same faults against transformers.Trainer with peft: what the most used loop does with them.

uv run python -m benchmarks.faults.faults_hf_trainer            small counts, some minutes
uv run python -m benchmarks.faults.faults_hf_trainer --full     200 kills and flips

Same model, adapters, records, steps and save interval as `benchmarks/faults`; resume is
`trainer.train(resume_from_checkpoint=get_last_checkpoint(...))`, the documented way to restart. Trials end
  survived  the same command comes to its end with the uninterrupted run's losses and adapter, bit for bit
  refused   it stops with an error and needs a person
  lost      it comes to its end with other losses or another adapter, or steps were lost at a signal
Prints a table, and JSON on the last line.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import hook

NUM_STEPS, SAVE_STEPS = 24, 5


def train(output: Path, rig: object, poison_step: int = 0, stop_step: int = 0) -> int:
    """The training script of a careful user: seeded, deterministic, resumes from the newest checkpoint."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_utils import get_last_checkpoint

    from finetuning.config import PROJECTIONS

    torch.set_num_threads(1)
    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(rig.model)
    records = [json.loads(line) for line in rig.data.read_text().splitlines()]
    rows = [tokenizer(r["question"] + r["thinking"] + r["answer"])["input_ids"] for r in records]
    data = [{"input_ids": ids, "labels": ids} for ids in rows]

    def collate(items: list[dict]) -> dict:
        width = max(len(item["input_ids"]) for item in items)
        ids = torch.zeros(len(items), width, dtype=torch.long)
        labels = torch.full((len(items), width), -100)
        for row, item in enumerate(items):
            ids[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
            labels[row, : len(item["input_ids"])] = torch.tensor(item["labels"])
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}

    class AtStep(TrainerCallback):
        """Notes every loss; a NaN or a signal at a step."""

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                line = json.dumps({"step": state.global_step, "loss": logs["loss"]})
                with open(output.with_name(output.name + ".losses"), "a") as file:
                    file.write(line + "\n")

        def on_step_end(self, args, state, control, **_):
            if state.global_step == stop_step:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            if state.global_step + 1 == poison_step:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.nan)

    model = AutoModelForCausalLM.from_pretrained(rig.model)
    lora = LoraConfig(r=4, lora_alpha=32, lora_dropout=0.1, target_modules=list(PROJECTIONS))
    model = get_peft_model(model, lora)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=3,
        learning_rate=1e-3,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=1,
        report_to=["tensorboard"],
        use_cpu=True,
        seed=42,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[AtStep()]
    )
    newest = get_last_checkpoint(str(output)) if output.is_dir() else None
    trainer.train(resume_from_checkpoint=newest)
    trainer.save_model(str(output / "final_model"))
    return 0


class Peer:
    """The rig with Trainer in the place of the program."""

    def __init__(self, rig: object) -> None:
        self.rig = rig
        self.reference = self.finished(self.run("reference"))
        self.stopped = rig.place("peer") / "out"
        self.start(self.stopped, patch=None, stop_step=12).wait()

    def start(self, output: Path, patch: Callable | None = None, **options: int):
        """Fork a run."""
        from benchmarks.faults.rig import fork

        def action() -> int:
            if patch:
                patch()
            return train(output, self.rig, **options)

        return fork(output.with_name("console.txt"), action)

    def run(self, name: str) -> Path:
        """A whole run."""
        output = self.rig.place(name) / "out"
        self.cpu_seconds = (done := self.start(output).wait()).cpu_seconds
        assert done.code == 0, done.output
        return output

    def finished(self, output: Path) -> tuple[str, dict[int, float]]:
        """Adapter's digest and losses by step."""
        adapter = (output / "final_model" / "adapter_model.safetensors").read_bytes()
        lines = output.with_name(output.name + ".losses").read_text().splitlines()
        losses = {r["step"]: r["loss"] for r in map(json.loads, lines)}
        return hashlib.sha256(adapter).hexdigest(), losses

    def verdict(self, output: Path, code: int) -> str:
        """How a trial ended."""
        if code:
            return "refused"
        return "survived" if self.finished(output) == self.reference else "lost"

    def again(self, output: Path) -> str:
        """The same command until its end."""
        return self.verdict(output, self.start(output).wait().code)

    def copy_of_stopped(self) -> Path:
        """Two checkpoints and the losses so far, as a run killed at step 12 leaves them."""
        output = self.rig.place("peer") / "out"
        shutil.copytree(self.stopped, output)
        losses = self.stopped.with_name("out.losses")
        shutil.copy(losses, output.with_name("out.losses"))
        return output


def kills(peer: Peer, count: int) -> Counter:
    """F01."""
    draw, found = random.Random(1), Counter()
    for _ in range(count):
        output = peer.rig.place("kill") / "out"
        later = draw.uniform(0.0, 0.7) * peer.cpu_seconds  # after its first change to a file
        kill = lambda o=output, t=later: hook.arm(  # noqa: E731
            o, action=hook.SIGNAL, number=signal.SIGKILL, computing=t
        )
        fired = peer.start(output, kill).wait().code == -signal.SIGKILL
        found[peer.again(output) if fired else "void"] += 1
    return found


def crashes(peer: Peer, count: int) -> Counter:
    """F02: dies at a change to a file below a checkpoint."""
    draw, found = random.Random(2), Counter()
    output = peer.rig.place("count") / "out"
    log = output.with_name("hook.log")
    count_only = lambda: hook.arm(output, action=hook.ONLY_LOG, contains="checkpoint-", log=log)  # noqa: E731
    peer.start(output, count_only).wait()
    total = len(hook.lines(log))
    for k in sorted(draw.sample(range(1, total + 1), min(count, total))):
        output = peer.rig.place("crash") / "out"
        kill = lambda k=k, o=output: hook.arm(  # noqa: E731
            o, action=hook.KILL_IN_HALF, first=k, contains="checkpoint-"
        )
        fired = peer.start(output, kill).wait().code == -signal.SIGKILL
        found[peer.again(output) if fired else "void"] += 1
    return found


def stops(peer: Peer, count: int) -> Counter:
    """F06: SIGTERM after a step; survived means that no step was lost and the end is the same."""
    found = Counter()
    for step in random.Random(6).sample(range(1, NUM_STEPS), count):
        output = peer.rig.place("term") / "out"
        peer.start(output, stop_step=step).wait()
        saved = max((int(p.name.split("-")[1]) for p in output.glob("checkpoint-*")), default=0)
        verdict = peer.again(output)
        found["lost" if saved < step and verdict == "survived" else verdict] += 1
    return found


def cuts(peer: Peer, count: int) -> Counter:
    """F09: a file of the newest checkpoint cut to half."""
    found = Counter()
    newest = peer.stopped / f"checkpoint-{2 * SAVE_STEPS}"
    for name in sorted(p.name for p in newest.iterdir())[:count]:
        output = peer.copy_of_stopped()
        file = output / newest.name / name
        os.truncate(file, file.stat().st_size // 2)
        found[peer.again(output)] += 1
    return found


def flips(peer: Peer, count: int) -> Counter:
    """F10: one bit of the newest checkpoint."""
    draw, found = random.Random(10), Counter()
    for _ in range(count):
        output = peer.copy_of_stopped()
        files = sorted((output / f"checkpoint-{2 * SAVE_STEPS}").iterdir())
        file = draw.choices(files, weights=[f.stat().st_size for f in files])[0]
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        found[peer.again(output)] += 1
    return found


def full_disks(peer: Peer, count: int) -> Counter:
    """F07: no space in the n-th save; afterwards there is room, and the command is given again."""
    import errno

    found = Counter()
    for first in (1, 9, 18, 27)[:count]:
        output = peer.rig.place("full") / "out"
        log = output.with_name("hook.log")
        full = lambda f=first, o=output, log=log: hook.arm(  # noqa: E731
            o,
            action=hook.FAIL,
            number=errno.ENOSPC,
            operations=hook.WRITE,
            first=f,
            count=hook.FOREVER,
            contains="checkpoint-",
            log=log,
        )
        peer.start(output, full).wait()
        found[peer.again(output) if hook.fired(log) else "void"] += 1
    return found


def poisons(peer: Peer, count: int) -> Counter:
    """F16: a NaN gradient at one step; survived means that the final adapter is finite."""
    import torch
    from safetensors.torch import load_file

    found = Counter()
    for step in (10, 7, 12, 20)[:count]:
        output = peer.rig.place("nan") / "out"
        outcome = peer.start(output, poison_step=step).wait()
        if outcome.code:
            found["refused"] += 1
            continue
        tensors = load_file(output / "final_model" / "adapter_model.safetensors")
        finite = all(torch.isfinite(t).all() for t in tensors.values())
        found["survived" if finite else "lost"] += 1
    return found


FAULTS = {
    "F01 kill -9": (kills, 8, 200),
    "F02 crash while a checkpoint is written": (crashes, 8, 200),
    "F06 SIGTERM": (stops, 3, 40),
    "F07 disk full in a save": (full_disks, 3, 4),
    "F09 a file cut to half": (cuts, 12, 12),
    "F10 one bit flipped": (flips, 10, 200),
    "F16 a gradient is NaN": (poisons, 2, 4),
}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument(
        "--only", nargs="+", choices=[name[:3] for name in FAULTS], help="these rows"
    )
    options = parser.parse_args()
    chosen = [name for name in FAULTS if not options.only or name[:3] in options.only]
    if "FAULTS_WORK" not in os.environ:
        hook.restart(["-m", "benchmarks.faults.faults_hf_trainer", *sys.argv[1:]])
    work = Path(os.environ["FAULTS_WORK"])
    from benchmarks.faults.rig import Rig

    results = {}
    try:
        import peft  # noqa: F401  before the forks, so that each starts warm
        import transformers.trainer  # noqa: F401

        peer = Peer(Rig(work / "rig"))
        print("| fault | tried | survived | refused | lost | void |\n|---|---|---|---|---|---|")
        for name in chosen:
            trial, few, many = FAULTS[name]
            found = trial(peer, many if options.full else few)
            results[name] = {"tried": sum(found.values()), **found}
            numbers = [found[k] for k in ("survived", "refused", "lost", "void")]
            cells = " | ".join(map(str, (sum(found.values()), *numbers)))
            print(f"| {name} | {cells} |", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
