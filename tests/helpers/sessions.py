"""Sessions of the real program, and what they told torch: to be laid beside `reference`'s numbers."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from direct_finetuning_with_existing_modules import DirectTrainer
from finetuning.common.distributed import leave
from finetuning.config import DirectTrainingConfig
from finetuning.data.packing import StepPlan
from finetuning.runs import metrics
from tests.helpers import reference as plain
from tests.helpers.ranks import Ended, on_ranks, results_of
from tests.helpers.read_events import read_texts

CLOSE_TO = {"rel": 2e-5, "abs": 2e-6}
PEAK, WARMUP, LOWEST, DECAY, CLIP = 2e-2, 0.23, 0.2, 0.5, 0.14
BETAS, EPSILON, SEED, RANK, ALPHA = (0.8, 0.95), 1e-5, 11, 4, 12.0
EVAL_STEPS = 4
PROJECTIONS = ("q_proj", "v_proj", "down_proj")
Work = Callable[[int], None]  # told the number of an update of this session, from 1

# -----------------------------------------------------------------------------
# The data: two sources with weights, and held-out questions


def write(path: Path, word: str, count: int) -> str:
    """Questions with thinking of different lengths."""
    rows = []
    for i in range(count):
        a, b = 13 + 7 * i, 29 + 5 * i
        steps = "，".join(f"{word}第{j}步得{(a + 3 * j) * b}" for j in range(1 + i * 5 % 7))
        rows.append(
            {
                "question": f"{word}题{i}：{a}乘以{b}是多少？",
                "thinking": f"先算{a}×{b}。{steps}。",
                "answer": f"{word}的答案是{a * b}。",
            }
        )
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path.name


def settings(folder: Path, model: Path, cache_dir: Path, **changes: object) -> DirectTrainingConfig:
    """Everything off its default that changes an update; its data are written below `folder`."""
    values = {
        "model_name": str(model),
        "data_path": (
            write(folder / "twice.jsonl", "密钥", 9),
            write(folder / "half.jsonl", "证书", 10),
        ),
        "data_weights": (2.0, 0.5),
        "eval_path": (write(folder / "held_out.jsonl", "签名", 5),),
        "max_seq_length": 270,
        "gradient_accumulation_steps": 3,
        "num_epochs": 2.0,
        "learning_rate": PEAK,
        "warmup_ratio": WARMUP,
        "min_lr_ratio": LOWEST,
        "weight_decay": DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPSILON,
        "max_grad_norm": CLIP,
        "seed": SEED,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": PROJECTIONS,
        "logging_steps": 1,
        "eval_steps": EVAL_STEPS,
        "num_probes": 0,
        "device": "cpu",
        "output_dir": "out",
        "cache_dir": str(cache_dir),
    }
    return DirectTrainingConfig(**{**values, **changes})


# -----------------------------------------------------------------------------
# A session


@dataclass
class Update:
    """What torch got in an update: gradients as clipping found them and left them, AdamW's options."""

    gradients: list[torch.Tensor]
    clipped: list[torch.Tensor] = field(default_factory=list)
    options: dict = field(default_factory=dict)
    seconds: float = 0.0  # time.monotonic()


@dataclass
class Session:
    """What one rank did from its start to its end."""

    updates: list[Update] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)  # of dropout, in order
    plan: StepPlan | None = None
    held_out: StepPlan | None = None
    texts: dict[int, plain.Sample] = field(default_factory=dict)  # document -> its sample
    weights: list[torch.Tensor] = field(default_factory=list)  # what is trained, at the end
    seconds: float = 0.0


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; all ranks call together where it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@contextlib.contextmanager
def watched(session: Session, before_update: Work, after_backward: Callable) -> Iterator[None]:
    """Torch's own functions tell the session what they get; `after_backward` may spoil gradients."""
    clip, drop = torch.nn.utils.clip_grad_norm_, torch.nn.Dropout.forward

    def note_clip(parameters: Sequence[torch.Tensor], *rest: object, **more: object) -> object:
        after_backward(1 + len(session.updates), parameters)
        session.updates.append(Update([whole(p.grad) for p in parameters]))
        return clip(parameters, *rest, **more)

    def note_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
        (group,) = optimizer.param_groups
        update = session.updates[-1]
        update.clipped = [whole(p.grad) for p in group["params"]]
        update.options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        before_update(len(session.updates))
        update.seconds = time.monotonic()

    def note_mask(module: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        found = drop(module, x)
        if module.training:
            assert (x != 0).all(), "a zero would look like a dropped value"
            session.masks.append((found != 0).detach())
        return found

    hook = register_optimizer_step_pre_hook(note_step)
    try:
        with (
            mock.patch.object(torch.nn.utils, "clip_grad_norm_", note_clip),
            mock.patch.object(torch.nn.Dropout, "forward", note_mask),
        ):
            yield
    finally:
        hook.remove()


def nothing(*_: object) -> None:
    """What happens in most updates."""


def train(
    config: DirectTrainingConfig,
    folder: Path,
    *,
    resume: str = "",
    before_update: Work = nothing,
    after_backward: Callable = nothing,
    tick: float = 0.0,
) -> Session:
    """A session in this folder; with a `tick`, the seconds of its updates are so many, and no others pass."""
    session, begin = Session(), time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: tick * len(session.updates)) if tick else time
    with (
        watched(session, before_update, after_backward),
        contextlib.chdir(folder),
        mock.patch.object(metrics, "time", clock),
    ):
        trainer = DirectTrainer(config, resume=resume, quiet=True)
        trainer.train()
    session.seconds = time.monotonic() - begin
    session.plan, session.held_out = trainer.plan.steps, trainer.plan.evaluation
    part = trainer.plan.data.train
    samples = {int(d): part.sample(int(d)) for d in part.documents}
    session.texts = {d: (Path(s.source).name, s.line) for d, s in samples.items()}
    session.weights = [whole(p) for p in trainer.engine.parameters]
    return session


def train_and_leave(*arguments: object, **session: object) -> Session:
    """A rank's session."""
    done = train(*arguments, **session)
    leave()
    return done


def train_on_ranks(
    ranks: int, config: DirectTrainingConfig, folder: Path, **session: object
) -> list[Ended]:
    """A session of so many ranks; 0: of a process without a group, which a signal may kill."""
    return on_ranks(ranks, partial(train_and_leave, config, folder, **session))


def _send(number: int, at: int, rank: str, update: int) -> None:
    if update == at and os.environ.get("RANK", "0") == rank:
        os.kill(os.getpid(), number)


def stop_at(update: int, rank: int = 0) -> Work:
    """One rank gets a SIGTERM with this update."""
    return partial(_send, signal.SIGTERM, update, str(rank))


def kill_at(update: int, rank: int = 0) -> Work:
    """One rank gets a SIGKILL before this update."""
    return partial(_send, signal.SIGKILL, update, str(rank))


def _spoil(updates: Sequence[int], update: int, parameters: Sequence[torch.Tensor]) -> None:
    if update in updates:
        parameters[0].grad.mul_(float("nan"))


def spoil_at(*updates: int) -> Callable:
    """The gradient of these updates is not a number."""
    return partial(_spoil, updates)


# -----------------------------------------------------------------------------
# A run


@dataclass
class Run:
    """What the last session of a run knows, and the files that the run left."""

    session: Session
    points: dict[str, dict[int, float]]  # tag -> step -> value
    texts: dict[str, dict[int, str]]  # the same of texts
    adapter: dict[str, torch.Tensor]
    statistics: dict

    @property
    def plan(self) -> StepPlan:
        return self.session.plan

    def steps(self) -> list[list[plain.Sample]]:
        """The samples of every step."""
        numbers = range(1, self.plan.num_steps + 1)
        return [[self.session.texts[d] for d in self.plan[n].documents] for n in numbers]

    def hardest(self, step: int) -> list[tuple[plain.Sample, int, float, float]]:
        """The table of that step's hardest samples: sample, step, loss above the level, loss."""
        rows = []
        for line in self.texts["Training/Hardest_Samples"][step].splitlines():
            if re.match(r"\| \d+ \|", line):
                _, place, at, above, loss, *_ = line.strip("| ").split(" | ")
                file, _, number = place.split()[0].rpartition(":")
                rows.append(((Path(file).name, int(number)), int(at), float(above), float(loss)))
        return rows


def do(config: DirectTrainingConfig, folder: Path, **session: object) -> Run:
    """The real program, from files to final model, started in this folder."""
    return run_of(config, folder, train(config, folder, **session))


def do_on_ranks(
    ranks: int, config: DirectTrainingConfig, folder: Path, **session: object
) -> tuple[Run, list[Session]]:
    """The same on so many ranks, and the session of each."""
    sessions = results_of(train_on_ranks(ranks, config, folder, **session))
    return run_of(config, folder, sessions[0]), sessions


def run_of(config: DirectTrainingConfig, folder: Path, session: Session) -> Run:
    """What lies in the run's folder."""
    out = folder / config.output_dir
    (events,) = (out / "tensorboard_logs").iterdir()
    return Run(
        session,
        points_of(out),
        {tag: dict(texts) for tag, texts in read_texts(events).items()},
        load_file(out / "final_model" / "adapter_model.safetensors"),
        json.loads((out / "training_statistics.json").read_text(encoding="utf-8")),
    )


def points_of(out: Path) -> dict[str, dict[int, float]]:
    (path,) = (out / "training_logs").glob("*/metrics.jsonl")
    points: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for tag, value in record["metrics"].items():
            assert record["step"] not in points.setdefault(tag, {}), (tag, record["step"])
            points[tag][record["step"]] = value
    return points


# -----------------------------------------------------------------------------
# Both beside each other


def by_step(values: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(values, start=1))


def assert_curve(run: Run, tag: str, expected: dict[int, float], **tolerance: float) -> None:
    assert run.points[tag] == pytest.approx(expected, **(tolerance or CLOSE_TO)), tag


def assert_same_adapter(run: Run, reference: plain.Reference) -> None:
    assert run.adapter.keys() == reference.adapter.keys()
    for name, weight in reference.adapter.items():
        assert torch.allclose(run.adapter[name], weight, rtol=0, atol=1e-5), name
        assert weight.abs().max() > 1e-3, "nothing was learnt"


def assert_same_gradients(updates: Sequence[Update], steps: Sequence[plain.Step]) -> None:
    """Every tensor, as clipping found it and as AdamW got it."""
    for number, (update, step) in enumerate(zip(updates, steps, strict=True), start=1):
        for found, wanted in ((update.gradients, step.gradients), (update.clipped, step.clipped)):
            for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
                assert one.shape == other.shape
                error = (one - other).abs().max() / step.norm
                assert error < 1e-5, (number, place, error)


def assert_epochs_and_counters(run: Run, reference: plain.Reference) -> None:
    size = run.plan.steps_per_epoch
    epochs = [sum(reference.steps[i : i + size], plain.Sums()) for i in (0, size)]
    means = {size: epochs[0].mean(), 2 * size: epochs[1].mean()}
    assert_curve(run, "Epoch/Average_Loss", means)
    seen = reference.tokens_seen()
    assert run.points["Throughput/Tokens_Seen"] == by_step(seen)
    assert_curve(run, "Training/Epoch", {n: n / size for n in range(1, 2 * size + 1)})
    assert run.statistics["throughput"]["tokens"] == seen[-1]
    assert run.statistics["throughput"]["samples"] == sum(map(len, run.steps())) == 2 * 23


def assert_hardest(run: Run, reference: plain.Reference, **spoilt: Sequence[int]) -> None:
    """The table at every evaluation and at the end of every epoch, each of its own epoch."""
    size = run.plan.steps_per_epoch
    shown = {*reference.held_out, size, 2 * size} - {0}
    assert run.texts["Training/Hardest_Samples"].keys() == shown
    for step in shown:
        begin = (step - 1) // size * size + 1
        wanted = reference.hardest(begin, step, **spoilt)
        for row, other in zip(run.hardest(step), wanted, strict=True):
            assert row[:2] == other[:2], (step, row, other)
            assert row[2:] == pytest.approx(other[2:], abs=1.1e-3), (step, row, other)
