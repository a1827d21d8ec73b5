"""One training of a model through the program's own parts, and what became of the model.

A trial goes the way of a run (`plan_run`, engine, evaluator) without its record, so that hundreds fit into
minutes: no events, no checkpoints, no report.
"""

import dataclasses
import json
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetuning.common.distributed import Distributed, init_distributed
from finetuning.common.terminal import Terminal
from finetuning.config import DirectTrainingConfig
from finetuning.data.chat_template import encode_prompt
from finetuning.data.training_data import general_part
from finetuning.evaluation.evaluator import held_out_sums
from finetuning.evaluation.generation import Completion, complete
from finetuning.model.decoding import Decoder
from finetuning.runs.build import build_engine, build_evaluator
from finetuning.runs.passes import one_pass
from finetuning.runs.plan import RunPlan, plan_run
from finetuning.training.engine import TrainingEngine
from finetuning.training.optimizer import learning_rate_at
from finetuning.training.state import TrainState
from finetuning.training.step_clock import StepClock
from tb_logger import NullLogger

# Whose template opens a think block, so that a model which has learnt it thinks first.
THINKING_TEMPLATE = """\
{%- for m in messages -%}
{{- '<|im_start|>' ~ m.role ~ '\\n' -}}
{%- if m.role == 'assistant' and (loop.last or m.reasoning_content) -%}
{{- '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""
ANSWER_TOKENS, ANSWERED_AT_ONCE = 160, 64
Numbers = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """What is tried: settings on a data set, from a model.

    model: "base", or the name of a trial that saves its model. questions: how many held-out sums are
    answered at the end, whatever the data set is.
    """

    experiment: str
    data: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = "base"
    saves: str = ""
    questions: int = 0
    replay: float = 0.0  # of the training tokens, from Python's documentation

    @property
    def name(self) -> str:
        """What tells it from others."""
        words = [self.experiment, self.data, f"seed={self.seed}", f"from={self.model}"]
        words += [f"replay={self.replay}"] * bool(self.replay)
        return " ".join([*words, *(f"{k}={v}" for k, v in sorted(self.settings.items()))])


@dataclass(frozen=True)
class Place:
    """Where trials find and leave what they need."""

    model: Path  # the base
    work: Path  # data sets, models that trials save, caches
    device: str
    light: bool = False  # without the losses on other data sets

    def model_of(self, name: str) -> Path:
        return self.model if name == "base" else self.work / "models" / name

    def data_of(self, name: str, part: str) -> str:
        return str(self.work / "data" / f"{name}.{part}.jsonl")


def guarded(trial: Trial, place: Place) -> dict[str, Any]:
    """The trial's result, or what went wrong."""
    try:
        return run_trial(trial, place)
    except Exception as error:  # the other trials go on
        return {
            "name": trial.name,
            "error": f"{type(error).__name__}: {error}",
            "trace": traceback.format_exc()[-1500:],
        }


def run_trial(trial: Trial, place: Place) -> dict[str, Any]:
    """Train, measure before and after, and tell it all; JSON."""
    started = time.monotonic()
    config = configuration(trial, place)
    dist = init_distributed(config.device)
    plan = plan_run(config, dist, Terminal(quiet=True))
    engine = build_engine(config, plan, dist, Terminal(quiet=True))
    evaluator = build_evaluator(config, plan, engine, dist)
    unseen = {"Unseen_General_Loss": place.data_of("general", "unseen")}
    if not place.light:
        unseen["Docs_Loss"] = place.data_of("docs", "held_out")
        unseen["Crypto_Loss"] = place.data_of("crypto", "held_out")

    def measured() -> Numbers:
        found = evaluator.measure(0, NullLogger()) or {}
        kept = {k: v for k, v in found.items() if k.startswith(("Eval/", "Forgetting/"))}
        kept = {k: v for k, v in kept.items() if "By_" not in k}
        return kept | {k: text_loss(engine, plan, config, dist, v) for k, v in unseen.items()}

    before = measured()
    prepared = time.monotonic()
    training = train(engine, plan, config)
    trained = time.monotonic()
    result = {
        "trial": dataclasses.asdict(trial),
        "name": trial.name,
        "before": before,
        "after": measured(),
        "training": training,
        "facts": facts(plan, engine),
    }
    if trial.questions:
        result["answers"] = answers(trial, place, engine, plan, dist)
    if trial.saves:
        engine.save(place.model_of(trial.saves), plan.inputs.tokenizer, {})
    ended = time.monotonic()
    result["seconds"] = {
        "to_train": round(prepared - started, 2),
        "training": round(trained - prepared, 2),
        "all": round(ended - started, 2),
    }
    return result


def configuration(trial: Trial, place: Place) -> DirectTrainingConfig:
    """The settings of a trial; what it does not name is as a run has it."""
    paths, weights = (place.data_of(trial.data, "train"),), ()
    if trial.replay:
        paths, weights = with_replay(paths[0], place.data_of("docs", "train"), trial.replay)
    own = {"learning_rate": 1e-3, "max_steps": 150, "max_seq_length": 2048} | dict(trial.settings)
    return DirectTrainingConfig(
        model_name=str(place.model_of(trial.model)),
        data_path=paths,
        data_weights=weights,
        eval_path=(place.data_of(trial.data, "held_out"),),
        general_path=(place.data_of("general", "gauge"),),
        seed=trial.seed,
        device=place.device,
        compile="off",
        gradient_checkpointing="off",
        num_probes=0,
        workers=1,
        max_broken_fraction=0.9,
        output_dir=str(place.work / "out"),
        cache_dir=str(place.work / "cache"),
        **own,
    )


def with_replay(
    path: str, replayed: str, share: float
) -> tuple[tuple[str, str], tuple[float, float]]:
    """Both files and their weights, such that `share` of the characters come from the second."""

    def size(name: str) -> int:
        records = map(json.loads, Path(name).read_text(encoding="utf-8").splitlines())
        return sum(len(text.encode()) for record in records for text in record.values())

    return (path, replayed), (1.0, share / (1 - share) * size(path) / size(replayed))


def train(engine: TrainingEngine, plan: RunPlan, config: DirectTrainingConfig) -> Numbers:
    """All steps; loss and accuracy of the first and the last tenth."""
    state, clock, steps = TrainState(), StepClock(), plan.steps
    tokens = plan.data.train.tokens
    tenth = max(1, steps.num_steps // 10)
    ends: dict[str, list] = {"First": [], "Last": []}
    for step in range(1, steps.num_steps + 1):
        sums, _ = engine.forward_backward(steps[step], tokens, clock, state, lambda: False)
        rate = learning_rate_at(step, steps.num_steps, plan.settings["learning_rate"], config)
        engine.update(rate, max_grad_norm=config.max_grad_norm)
        state.step = step
        found = [s.per_document.sum((0, 1)) for _, s in sums]
        ends["First"] += found if step <= tenth else []
        ends["Last"] += found if step > steps.num_steps - tenth else []
    numbers = {}
    for name, parts in ends.items():
        loss, correct, count = torch.stack(parts).sum(0).tolist()
        numbers |= {f"{name}_Loss": loss / count, f"{name}_Accuracy": correct / count}
    return numbers


def facts(plan: RunPlan, engine: TrainingEngine) -> Numbers:
    """Sizes of the training."""
    steps, updates = plan.steps, plan.steps.num_steps
    documents = len(plan.data.train.documents)
    return {
        "updates": updates,
        "tokens_per_update": steps.num_tokens / steps.steps_per_epoch,
        "samples_per_update": documents / steps.steps_per_epoch,
        "epochs": steps.passes,
        "learning_rate": plan.settings["learning_rate"],
        "samples": documents,
        "held_out": len(plan.data.held_out),
        "left_out": len(plan.data.train.tokens.truncation.dropped),
        "trainable": engine.num_trainable,
    }


def text_loss(
    engine: TrainingEngine,
    plan: RunPlan,
    config: DirectTrainingConfig,
    dist: Distributed,
    path: str,
) -> float:
    """The loss on the answers of a file that is no part of the training."""
    part = general_part([path], plan.inputs.tokenizer, config, print)
    sums = held_out_sums(engine.packed, part.tokens, one_pass(part, config, dist), dist)
    loss, _, count = sums.documents.sum((0, 1))
    return float(loss / count)


def answers(
    trial: Trial, place: Place, engine: TrainingEngine, plan: RunPlan, dist: Distributed
) -> dict[str, Any]:
    """Held-out sums, answered greedily: how many think and end, how many are right; the first replies."""
    lines = Path(place.data_of("sums", "held_out")).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][: trial.questions]
    tokenizer, tokens = plan.inputs.tokenizer, plan.data.train.tokens
    prompts = [
        encode_prompt(tokenizer, [{"role": "user", "content": record["question"]}])
        for record in records
    ]
    decoder = Decoder(engine.packed.model, engine.packed.write_adapters)
    replies: list[Completion] = []
    for start in range(0, len(prompts), ANSWERED_AT_ONCE):
        replies += complete(
            decoder,
            tokenizer,
            prompts[start : start + ANSWERED_AT_ONCE],
            max_new_tokens=ANSWER_TOKENS,
            end_id=tokens.end_id,
            close_id=tokens.close_id,
            device=dist.device,
        )
    wanted = [record["answer"].removeprefix("The answer is ") for record in records]
    right = [w in r.answer.split() for w, r in zip(wanted, replies, strict=True)]
    return {
        "questions": len(replies),
        "thinking": sum(r.valid and bool(r.thinking.strip()) for r in replies),
        "ended": sum(r.ended for r in replies),
        "right": sum(right),
        "thinking_tokens": float(np.mean([r.thinking_tokens for r in replies])),
        "examples": [tokenizer.decode(list(r.tokens))[:400] for r in replies[:3]],
    }


def make_thinking_base(base: Path, folder: Path) -> None:
    """The base with the template that opens a think block; its weights are links."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        target = folder / file.name
        if file.name == "chat_template.jinja":
            target.write_text(THINKING_TEMPLATE, encoding="utf-8")
        elif not target.exists():
            target.symlink_to(file.resolve())


def names(trials: Sequence[Trial]) -> list[str]:
    """All are different."""
    found = [trial.name for trial in trials]
    assert len(set(found)) == len(found), sorted(n for n in found if found.count(n) > 1)
    return found
