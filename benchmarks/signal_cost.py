"""What the signals cost: training steps on one CPU thread with all of them, and without any.

    uv run python -m benchmarks.signal_cost              # about 3 minutes
    uv run python -m benchmarks.signal_cost --pairs 10   # shorter, noisier

The embedded model on the bundled data, one packed row of 2048 tokens a step. With: sums by document and
segment, positions in the chain of thought, premature closing, token accuracy, groups, the ranking of the
hardest samples, the metrics of a logged step (every 5th) and the adapters' gradient norms (every 20th).
Without: the same loss and update, the bare number. Both steps are done on the same batch, one after the
other, first the one and then the other, and CPU time (process_time) is taken; the cost is the median of
the pairs' ratios. Evaluation, probes and adapter health run apart, once per evaluation, and are timed apart.
The last line is JSON.
"""

import finetuning.common.process  # noqa: F401, I001  before torch
import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch

from direct_finetuning_with_existing_modules import DirectTrainer
from finetuning.common.formatting import due
from finetuning.config import DirectTrainingConfig
from finetuning.evaluation.evaluator import held_out_sums
from finetuning.model import loss, packed_model
from finetuning.runs.build import build_engine, build_evaluator
from finetuning.runs.metrics import MetricsProcessor
from finetuning.runs.plan import plan_run
from finetuning.training.optimizer import forward_backward
from finetuning.training.step_clock import StepClock
from tb_logger import NullLogger

LOGGING_STEPS, EVAL_STEPS = 5, 20
WARM_UP = 2  # pairs that are not counted


def bare_error(logits, labels, close_id, nll, correct, close, buffer) -> torch.Tensor:
    """`loss._softmax_error` without correctness and the probability of closing."""
    target = labels.unsqueeze(1)
    top = logits.amax(1)
    probability = torch.softmax(logits, 1, out=buffer[: len(labels)])
    torch.sub(top - probability.amax(1).log_(), logits.gather(1, target).squeeze(1), out=nll)
    minus_one = probability.new_full((1, 1), -1.0).expand_as(target)
    return probability.scatter_add_(1, target, minus_one)


def bare_loss(hidden, head_weight, *, target_positions, labels, num_targets, scale=1.0, **_):
    """`packed_loss` without sums."""
    real = torch.ones_like(labels, dtype=torch.bool)
    arguments = (hidden, head_weight, target_positions, labels, real, 0, scale / num_targets, True)
    bare = loss._HeadLoss.apply(*arguments)[0]
    return bare, loss.LossSums(*[bare.detach().view(1)] * 3)  # nobody reads them


@contextmanager
def without_signals():
    """The loss kernel as it would be if nobody asked for more than its number."""
    kept = loss._softmax_error, packed_model.packed_loss
    loss._softmax_error, packed_model.packed_loss = bare_error, bare_loss
    try:
        yield
    finally:
        loss._softmax_error, packed_model.packed_loss = kept


def prepare(folder: str) -> DirectTrainer:
    """A trainer with model and data, at its first step, that writes no run."""
    trainer = DirectTrainer(DirectTrainingConfig(output_dir=folder, device="cpu"), quiet=True)
    trainer.plan = plan_run(trainer.config, trainer.dist, trainer.terminal)
    trainer.engine = build_engine(trainer.config, trainer.plan, trainer.dist, trainer.terminal)
    trainer.evaluator = build_evaluator(trainer.config, trainer.plan, trainer.engine, trainer.dist)
    trainer.metrics = MetricsProcessor(trainer.plan, trainer.dist, trainer.state)
    return trainer


def step_of(trainer: DirectTrainer, step: int, signals: bool) -> float:
    """One update at the planned step; returns its loss."""
    from finetuning.training.optimizer import StepResult

    planned = trainer.plan.steps[step]
    tokens = trainer.plan.data.train.tokens
    sums = forward_backward(trainer.engine.wrapped, planned, tokens, trainer.dist, StepClock())
    if signals and due(step, EVAL_STEPS):
        trainer.evaluator.note_gradients()
    norm = trainer.engine.update(0.0, max_grad_norm=1.0)  # both sides meet the same weights
    if not signals:
        return float(norm)
    trainer.pending.append(StepResult(step, 0.0, planned, sums, norm))
    trainer.collect()
    if due(step, LOGGING_STEPS):
        trainer.metrics.losses.training_metrics(np.asarray(trainer.state.interval))
        trainer.state.interval = trainer.metrics.losses.zeros().tolist()
    return float(norm)


def timed(action: Callable[[], object]) -> tuple[float, object]:
    """CPU seconds of all threads of the process, and the result."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def measure(trainer: DirectTrainer, pairs: int) -> dict[str, list[float]]:
    """CPU seconds of each step with and without, in turns."""
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for pair in range(pairs + WARM_UP):
        step = 1 + pair % trainer.plan.steps.num_steps
        norms = {}
        for name in ("with", "without") if pair % 2 else ("without", "with"):
            if name == "with":
                took, norms[name] = timed(lambda: step_of(trainer, step, True))  # noqa: B023
            else:
                with without_signals():
                    took, norms[name] = timed(lambda: step_of(trainer, step, False))  # noqa: B023
            if pair >= WARM_UP:
                seconds[name].append(took)
        assert abs(norms["with"] - norms["without"]) <= 1e-6 * norms["with"], norms
    return seconds


def apart(trainer: DirectTrainer) -> dict[str, float]:
    """CPU seconds of what runs once per evaluation."""
    held_out, plan = trainer.plan.data.held_out.tokens, trainer.plan.evaluation
    health = trainer.evaluator.health
    health.scalars()  # the norms of the frozen weights, once per run
    return {
        "held_out_losses": timed(
            lambda: held_out_sums(trainer.engine.wrapped, held_out, plan, trainer.dist)
        )[0],
        "probes": timed(lambda: trainer.evaluator._answers(0, NullLogger(), lambda *_: None))[0],
        "adapter_health": timed(health.scalars)[0],
        "weight_histograms": timed(health.weight_histograms)[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare(folder)
        seconds = measure(trainer, arguments.pairs)
        per_evaluation = apart(trainer)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b - 1 for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    for name, median in medians.items():
        print(f"step {name} signals: {median * 1e3:.1f} ms CPU (median)")
    print(f"cost, pair by pair: {', '.join(f'{q:+.2%}' for q in quartiles)} (quartiles)")
    for name, value in per_evaluation.items():
        print(f"once per evaluation: {name:18} {value * 1e3:8.1f} ms CPU")
    result = {
        "signals_overhead_percent": 100 * quartiles[1],
        "paired_quartiles_percent": [100 * q for q in quartiles],
        "step_cpu_ms": medians["without"] * 1e3,
        "pairs": arguments.pairs,
        "evaluation_cpu_ms": {name: value * 1e3 for name, value in per_evaluation.items()},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, 1 thread",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
