"""F16, F17: numbers that are not finite, and memory that is not there."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from finetuning.model import packed_model
from finetuning.training import checkpoint, engine
from finetuning.training import optimizer as training_optimizer

from .rig import Reference, Rig, nothing_lost, read_ledger, replaced, status_of, steps_done
from .tally import Row, Tally, Trial

# -----------------------------------------------------------------------------
# F16: where the bad number comes from


def at_step(step: int, marker: Path, change: Callable, owner: object, name: str) -> None:
    """In a child: let `change(result, arguments)` work on the result of a function at one update."""
    real, done = getattr(owner, name), steps_done()

    def changed(*arguments, **options):
        result = real(*arguments, **options)
        if done() + 1 == step:
            result = change(result, arguments)
            marker.write_text(name)
        return result

    replaced(owner, name, changed)


def poison_loss(value: float) -> Callable:
    """The loss of every micro-batch of the step times `value`."""

    def patch(step: int, marker: Path) -> None:
        def change(result, arguments):
            loss, sums = result
            return loss * value, sums

        at_step(step, marker, change, packed_model.PackedLossModel, "forward")

    return patch


def poison_gradient(value: float, everything: bool = False) -> Callable:
    """One number of one gradient, or all of all; before clipping."""

    def patch(step: int, marker: Path) -> None:
        def change(result, arguments):
            model = arguments[0]
            for parameter in model.parameters if everything else model.parameters[:1]:
                if everything:
                    parameter.grad.fill_(value)
                else:
                    parameter.grad.view(-1)[0] = value
            return result

        at_step(step, marker, change, engine.TrainingEngine, "forward_backward")

    return patch


def poison_moments(step: int, marker: Path) -> None:
    """The optimizer's own state: the gradient is fine, the update is not."""

    def change(result, arguments):
        model = arguments[0]
        for state in model.optimizer.state.values():
            state["exp_avg"].view(-1)[0] = math.nan
        return result

    at_step(step, marker, change, engine.TrainingEngine, "forward_backward")


def finite_checkpoints(output: Path) -> list[str]:
    """Checkpoints whose numbers are not all finite."""
    problems = []
    for path in sorted((output / "checkpoints").glob("checkpoint-*")):
        tensors = checkpoint.load_checkpoint(path).tensors
        for name in ("adapter_model", "optimizer"):
            bad = [k for k, v in tensors[name].items() if not torch.isfinite(v.float()).all()]
            problems += [f"{path.name}: {name} is not finite in {bad[0]}"] if bad else []
    return problems


def kept_weights(output: Path, step: int) -> list[str]:
    """The update of `step` did not happen."""
    truncation = read_ledger(output)[0]
    if step == 1 or step not in truncation:
        return []
    same = truncation[step]["weights"] == truncation[step - 1]["weights"]
    return [] if same else [f"the update of step {step} reached the weights"]


def flagged(output: Path, step: int) -> list[str]:
    """metrics.jsonl holds null and a flag for a non-finite number of the step, and no NaN."""
    lines = []
    for path in (output / "training_logs").glob("*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            lines.append(json.loads(line, parse_constant=lambda name: {"NaN": name}))
    found = [line for line in lines if line["step"] == step and line.get("nonfinite")]
    raw = any("NaN" in json.dumps(line["metrics"]) for line in lines)
    problems = [] if found else [f"metrics.jsonl does not flag step {step}"]
    return problems + (["metrics.jsonl holds NaN"] if raw else [])


def stopped(rig: Rig, patch: Callable, step: int, update_is_bad: bool) -> Trial:
    """Policy stop: exit 3, samples named, no bad checkpoint; without the fault nothing is lost."""
    output = rig.place("f16") / "out"
    marker = output.with_name("fired")
    outcome = rig.run(output, patch=lambda: patch(step, marker))
    problems = []
    if outcome.code != 3:
        problems.append(f"exit {outcome.code}: {outcome.output[-400:]}")
    problems += ["a traceback"] if "Traceback" in outcome.output else []
    problems += finite_checkpoints(output)
    if not update_is_bad:
        problems += kept_weights(output, step) + flagged(output, step)
        problems += [] if "records.jsonl:" in outcome.output else ["no sample is named"]
    if status_of(output).get("status") not in ("stopped", "nonfinite", "failed"):
        problems.append(f"status {status_of(output)}")
    problems += nothing_lost(output, rig.reference, rig.run(output))
    fired = marker.exists()
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def goes_on(rig: Rig, patch: Callable, step: int, policy: str) -> Trial:
    """Policies skip and rollback: to the end, the bad update left out, everything finite."""
    output = rig.place("f16") / "out"
    marker = output.with_name("fired")
    outcome = rig.run(output, "--nonfinite", policy, patch=lambda: patch(step, marker))
    problems = [f"exit {outcome.code}: {outcome.output[-500:]}"] if outcome.code else []
    problems += [] if "records.jsonl:" in outcome.output else ["no sample is named"]
    problems += finite_checkpoints(output) + kept_weights(output, step)
    if not outcome.code:
        curves = Reference.read(output).curves["Training/Loss"]
        steps = sorted(curves)
        problems += [f"curve has steps {steps}"] if steps != list(range(1, 25)) else []
        problems += ["a step is twice in the curve"] if -1.0 in curves.values() else []
    fired = marker.exists()
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def too_many(rig: Rig) -> Trial:
    """Skip gives up after max_nonfinite_steps."""
    output = rig.place("f16") / "out"
    marker = output.with_name("fired")

    def patch() -> None:
        for step in range(3, 9):
            poison_loss(math.nan)(step, marker)

    options = ("--nonfinite", "skip", "--max-nonfinite-steps", "3")
    outcome = rig.run(output, *options, patch=patch)
    truncation = read_ledger(output)[0]
    problems = [] if outcome.code == 3 else [f"exit {outcome.code}: {outcome.output[-300:]}"]
    problems += [f"went on to step {max(truncation)}"] if max(truncation) > 6 else []
    return marker.exists(), problems + finite_checkpoints(output)


def f16(rig: Rig, tally: Tally, count: int) -> None:
    """NaN and infinity in loss, gradients and moments, under each policy."""
    cases: list[tuple[str, Callable, int, bool]] = [
        ("loss NaN at a step that saves", poison_loss(math.nan), 10, False),
        ("one gradient infinite", poison_gradient(math.inf), 7, False),
        ("moments NaN at a step that saves", poison_moments, 10, True),
        ("one gradient NaN", poison_gradient(math.nan), 12, False),
        ("loss infinite at step 1", poison_loss(math.inf), 1, False),
        ("norm overflows", poison_gradient(3e38, everything=True), 8, False),
        ("all gradients NaN", poison_gradient(math.nan, everything=True), 24, False),
        ("moments NaN", poison_moments, 12, True),
    ]
    for name, patch, step, bad in cases[:count]:
        tally.attempt(f"stop: {name}", lambda p=patch, s=step, b=bad: stopped(rig, p, s, b))
    for policy, step in (("skip", 10), ("rollback", 12), ("skip", 1), ("rollback", 15))[:count]:
        trial = lambda p=policy, s=step: goes_on(rig, poison_loss(math.nan), s, p)  # noqa: E731
        tally.attempt(f"{policy}: loss NaN at step {step}", trial)
    if count > 2:
        tally.attempt("skip gives up", lambda: too_many(rig))
        tally.attempt("rollback without a checkpoint", lambda: no_way_back(rig))


def no_way_back(rig: Rig) -> Trial:
    """Rollback before the first checkpoint: stops."""
    output = rig.place("f16") / "out"
    marker = output.with_name("fired")
    patch = poison_loss(math.nan)
    outcome = rig.run(output, "--nonfinite", "rollback", patch=lambda: patch(3, marker))
    problems = [] if outcome.code == 3 else [f"exit {outcome.code}: {outcome.output[-300:]}"]
    problems += nothing_lost(output, rig.reference, rig.run(output))
    return marker.exists(), problems


def updates_anyway() -> None:
    """Mutant: the update happens whatever the gradient is."""

    def update(optimizer, grad_norm, *, skip=False):
        optimizer.grad_scale = optimizer.found_inf = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    replaced(engine, "update_weights", update)


# -----------------------------------------------------------------------------
# F17: out of memory


def short_memory(step: int, marker: Path, error: Callable[[], Exception], tokens: int) -> None:
    """In a child: from `step` on, micro-batches of more than `tokens` tokens don't fit (0: once)."""
    real, done = packed_model.PackedLossModel.forward, steps_done()

    def forward(self, batch, *rest, **options):
        due = done() + 1 >= step and torch.is_grad_enabled()
        if due and (not marker.exists() if not tokens else batch.input_ids.shape[1] > tokens):
            marker.write_text("fired")
            raise error()
        return real(self, batch, *rest, **options)

    replaced(packed_model.PackedLossModel, "forward", forward)


def host_error() -> Exception:
    """What the CPU allocator says."""
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 12884901888 bytes. Error code 12 (Cannot allocate memory)"
    )


def device_error() -> Exception:
    """What CUDA's allocator raises."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def memory(rig: Rig, error: Callable, step: int, tokens: int, ends: bool) -> Trial:
    """The same global batch and loss in less memory, or a clean stop when one document is too long."""
    output = rig.place("f17") / "out"
    marker = output.with_name("fired")
    patch = lambda: short_memory(step, marker, error, tokens)  # noqa: E731
    outcome = rig.run(output, patch=patch)
    problems = ["a traceback"] if "Traceback" in outcome.output else []
    if ends:
        problems += [] if outcome.code == 3 else [f"exit {outcome.code}: {outcome.output[-300:]}"]
        problems += [] if "--batch-size" in outcome.output else ["no advice"]
        problems += nothing_lost(output, rig.reference, rig.run(output))
    elif outcome.code:
        problems += [f"exit {outcome.code}: {outcome.output[-500:]}"]
    else:
        problems += _same_within(rig, Reference.read(output))
        problems += [] if "out of memory" in outcome.output else ["it was not announced"]
    fired = marker.exists()
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def _same_within(rig: Rig, found: Reference, relative: float = 0.02) -> list[str]:
    """Same documents per step; losses close (dropout falls otherwise when the parts are smaller)."""
    problems = []
    for step, record in rig.reference.truncation.items():
        if found.truncation.get(step, {}).get("documents") != record["documents"]:
            problems.append(f"step {step} has other documents")
        loss, wanted = (float.fromhex(r["loss"]) for r in (found.truncation[step], record))
        if abs(loss - wanted) > relative * abs(wanted):
            problems.append(f"step {step}: loss {loss}, uninterrupted {wanted}")
    return problems[:2]


def f17(rig: Rig, tally: Tally, count: int) -> None:
    """Out of memory on the host and on the device, once, always above a size, and without a way out."""
    cases = [  # the first three: every kind
        ("device, above 150 tokens", device_error, 3, 150, False),
        ("host, once", host_error, 6, 0, False),
        ("device, every document", device_error, 12, 1, True),
        ("device, once", device_error, 6, 0, False),
        ("host, above 100 tokens", host_error, 1, 100, False),
        ("host, every document from the start", host_error, 1, 1, True),
    ]
    for name, error, step, tokens, ends in cases[:count]:
        trial = lambda e=error, s=step, t=tokens, x=ends: memory(rig, e, s, t, x)  # noqa: E731
        tally.attempt(name, trial)


def memory_errors_are_fatal() -> None:
    """Mutant: an error of the allocator is like any other."""
    replaced(engine, "is_out_of_memory", lambda error: False)


def half_is_lost() -> None:
    """Mutant: only the first half of a divided micro-batch is trained on."""
    real = training_optimizer.split_micro_batch

    def halved(*arguments, **options):
        return real(*arguments, **options)[:1]

    replaced(training_optimizer, "split_micro_batch", halved)


ROWS = [
    Row(
        "F16",
        "NaN and infinity in loss, gradients, moments",
        f16,
        full=8,
        quick=3,
        mutants={"the update happens anyway": updates_anyway},
        mutant_count=1,
    ),
    Row(
        "F17",
        "out of memory: the same batch in less memory, or a clean stop",
        f17,
        full=6,
        quick=3,
        mutants={
            "errors of the allocator are fatal": memory_errors_are_fatal,
            "half is lost": half_is_lost,
        },
        mutant_count=2,
    ),
]
