"""What a run's record says to do next: at most five findings in plain words, with evidence and a command.

Each kind is a function of a recorded run that returns a finding or None. They come in the order of what costs
most to leave as it is, and what is the matter with the whole run comes before what is with a part of it.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from finetuning.common.formatting import four_digits
from finetuning.common.text import REDACTED
from finetuning.config import PARTLY_SHOWN, DirectTrainingConfig
from finetuning.runs.recorded import RecordedRun
from finetuning.runs.source_finding import without_source, worse_source

MOST = 5
PROGRAM = "uv run python direct_finetuning_with_existing_modules.py"
RISEN = 0.02  # of the held-out loss above its best, as a share, that is overfitting
FALLING = 0.02  # of the loss over the last quarter of the run, as a share, that is still falling
LEARNED = 0.05  # fall of the loss, as a share of its start, below which a run has hardly learned
CUT = 0.05  # share of the samples that is left out or shortened for its length
WAITING = 0.3  # share of a step that waits for data


@dataclass(frozen=True)
class NextStep:
    """One finding: what is the matter, the numbers that say so, and the one command to try."""

    title: str
    evidence: str
    command: str


def findings(run: RecordedRun) -> list[NextStep]:
    """The findings of a run, the costliest first, five at most; none for a run that went as it should."""
    found = [finding for kind in KINDS if (finding := kind(run))]
    return found[:MOST]


def command(run: RecordedRun, **changes: object) -> str:
    """The run's own command line with some settings changed; commands of alerts are not recorded.

    What was left to the program is left to it again: the next run may be longer, or be made elsewhere.
    """
    settings = {**run.as_set, **changes}
    if settings.get("max_steps"):
        settings.pop("num_epochs", None)  # it follows from the steps
    default = DirectTrainingConfig()
    words = [PROGRAM]
    for field in fields(DirectTrainingConfig):
        value = settings.get(field.name, getattr(default, field.name))
        value = tuple(value) if isinstance(value, list) else value
        hidden = field.name in PARTLY_SHOWN or REDACTED in str(value)
        if hidden or value == getattr(default, field.name):
            continue
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
        elif isinstance(value, Mapping):
            words += [name, *(shlex.quote(str(x)) for pair in value.items() for x in pair)]
        elif isinstance(value, tuple):
            words += [name, *(shlex.quote(str(x)) for x in value)]
        else:
            words += [name, shlex.quote(f"{value:g}" if isinstance(value, float) else str(value))]
    return " ".join(words)


def _setting(run: RecordedRun, name: str) -> Any:
    return run.configuration.get("config", {}).get(name, getattr(DirectTrainingConfig(), name))


def _rate(run: RecordedRun) -> float | None:
    """The peak learning rate, as recorded or as logged."""
    rate = _setting(run, "learning_rate")
    return rate if isinstance(rate, float) else run.highest("Training/Learning_Rate")


def _epochs(run: RecordedRun) -> float | None:
    """Passes over the data, those that were made or else those that were wanted."""
    wanted = _setting(run, "num_epochs")
    return run.last("Training/Epoch") or (wanted if isinstance(wanted, float) else None)


def _until(run: RecordedRun, step: int) -> dict[str, object] | None:
    """What ends a run at this step, by the setting that was set: --max-steps, or else --num-epochs."""
    epochs = _epochs(run)
    if _setting(run, "max_steps"):
        return {"max_steps": max(1, step)}
    if epochs is None:
        return None
    return {"num_epochs": max(0.1, round(epochs * step / max(run.steps, 1), 1))}


def _alerts(run: RecordedRun, *names: str) -> list[Mapping[str, Any]]:
    return [alert for alert in run.alerts.newest if alert.get("name") in names]


def _quarters(run: RecordedRun, tag: str) -> tuple[float, float, float] | None:
    """Means of a tag over the first tenth, the third and the last quarter; None with under 16 points."""
    values = list(run.finite(tag).values())
    n = len(values)
    if n < 16:
        return None
    return (
        fmean(values[: max(2, n // 10)]),
        fmean(values[n // 2 : 3 * n // 4]),
        fmean(values[3 * n // 4 :]),
    )


def rate_too_high(run: RecordedRun) -> NextStep | None:
    """The loss diverged, or gradients exploded again and again."""
    diverged = _alerts(run, "Divergence")
    wild = _alerts(run, "Gradient_Explosion", "Loss_Spike", "NonFinite")
    rate = _rate(run)
    if rate is None or (not diverged and len(wild) < 3):
        return None
    first = (diverged or wild)[0]
    what = f"{len(diverged)} divergences" if diverged else f"{len(wild)} spikes or explosions"
    return NextStep(
        "The learning rate is too high for these data.",
        f"{what}, the first at step {first.get('step')}; the learning rate was {rate:g}.",
        command(run, learning_rate=rate / 3),
    )


def rate_too_low(run: RecordedRun) -> NextStep | None:
    """The loss has hardly fallen, and no alert says that it was thrown about."""
    means = _quarters(run, "Training/Loss")
    if means is None or rate_too_high(run) or saturated(run):
        return None
    start, _, end = means
    fall = 1 - end / start if start > 0 else 1.0
    rate = _rate(run)
    if rate is None or (fall >= LEARNED and not _alerts(run, "Stagnation")):
        return None
    return NextStep(
        "The run has hardly learned: the learning rate is too low.",
        f"The training loss went from {four_digits(start)} to {four_digits(end)}, {100 * fall:.1f}% less, at "
        f"a learning rate of {rate:g}.",
        command(run, learning_rate=3 * rate),
    )


def overfitted(run: RecordedRun) -> NextStep | None:
    """The held-out loss was best long before the end."""
    held_out = list(run.finite("Eval/Loss").items())
    if len(held_out) < 3:
        return None
    step, best = min(held_out, key=lambda point: point[1])
    last = held_out[-1][1]
    if last <= best * (1 + RISEN) or step >= held_out[-1][0] or step == 0:
        return None
    shorter = _until(run, step)
    if shorter is None:
        return None
    unit = "steps" if "max_steps" in shorter else "epochs"
    title = f"The run went on too long: it overfits. Take best_model, and train fewer {unit}."
    if _setting(run, "best_by") == "answers":  # best_model may be of another step
        title = f"The run went on too long by its held-out loss: it overfits. Train fewer {unit}."
    return NextStep(
        title,
        f"The held-out loss was {four_digits(best)} at step {step}, and {four_digits(last)} at the end.",
        command(run, **shorter),
    )


def stopped_too_early(run: RecordedRun) -> NextStep | None:
    """The loss was still falling when the schedule had come to its end, on held-out data too."""
    means, held_out = _quarters(run, "Training/Loss"), list(run.finite("Eval/Loss").items())
    if means is None or rate_too_low(run) or rate_too_high(run):
        return None
    _, before, end = means
    falls = 1 - end / before if before > 0 else 0.0
    best_last = len(held_out) < 2 or held_out[-1][1] <= min(value for _, value in held_out)
    if falls < FALLING or not best_last:
        return None
    steps, epochs = _setting(run, "max_steps"), _epochs(run)
    if not steps and epochs is None:
        return None
    longer = {"max_steps": 2 * steps} if steps else {"num_epochs": 2 * epochs}
    return NextStep(
        "The run was stopped too early: it was still learning.",
        f"Over its last quarter the training loss fell by {100 * falls:.1f}%, to {four_digits(end)}"
        + (
            f"; the last held-out loss, {four_digits(held_out[-1][1])}, was the best."
            if held_out
            else "."
        ),
        command(run, **longer),
    )


def data_too_long(run: RecordedRun) -> NextStep | None:
    """Many samples are left out, or lose the middle of their thinking, for their length."""
    data = run.dataset()
    counts, total = data.get("truncation") or {}, data.get("total_samples")
    cut = counts.get("dropped", 0) + counts.get("shortened", 0)
    if not total or cut / total < CUT:
        return None
    length = _setting(run, "max_seq_length")
    if not isinstance(length, int):  # a run that has not recorded it
        return None
    evidence = (
        f"{cut} of {total} samples, {100 * cut / total:.0f}%, are longer than {length} tokens."
    )
    if "max_seq_length" not in run.configuration.get("automatic", ()):
        title = "The data are too long for --max-seq-length: samples are left out or shortened."
        return NextStep(title, evidence, command(run, max_seq_length="auto"))
    title = "The data are too long for the memory or the model: samples are left out or shortened."
    for name, bad, better in (
        ("gradient_checkpointing", "off", "auto"),
        ("over_length", "drop", "truncate_thinking"),
    ):
        if _setting(run, name) == bad:
            return NextStep(title, evidence, command(run, **{name: better}))
    return None  # more than that is not in a setting


def source_harmful(run: RecordedRun) -> NextStep | None:
    """One source gets worse while the others get better, beyond what chance does (`worse_source`)."""
    found = worse_source(run)
    if found is None:
        return None
    fewer = without_source(run, found.source)
    look = f"{PROGRAM} --check-data --data-path {shlex.quote(found.source)}"
    return NextStep(
        f"The source {found.source} gets worse with training: look at its samples, or leave it out.",
        found.evidence,
        command(run, **fewer) if fewer else look,
    )


def saturated(run: RecordedRun) -> NextStep | None:
    """The data are learned by heart."""
    spoken = _alerts(run, "Saturation")
    step = spoken[0].get("step", run.steps) if spoken else 0
    shorter = _until(run, step) if spoken else None
    if shorter is None:
        return None
    return NextStep(
        "The data are learned by heart: more epochs teach nothing. Add data, or stop there.",
        f"From step {step} on every training token was predicted (at least 99.5%).",
        command(run, **shorter),
    )


def forgotten(run: RecordedRun) -> NextStep | None:
    """The loss on general text rose above the base's."""
    spoken, rate = _alerts(run, "Forgetting"), _rate(run)
    if not spoken or rate is None:
        return None
    return NextStep(
        "The model forgets what it could.",
        f"Its loss on general text was {four_digits(spoken[-1].get('value'))} at step "
        f"{spoken[-1].get('step')}, where {four_digits(spoken[-1].get('threshold'))} is too much.",
        command(run, learning_rate=rate / 3),
    )


def waits_for_data(run: RecordedRun) -> NextStep | None:
    """The device waits for data."""
    data, whole = run.median("Throughput/Step_Seconds_Data"), run.median("Throughput/Step_Seconds")
    if not data or not whole or data / whole < WAITING:
        return None
    workers = _setting(run, "workers")
    return NextStep(
        "The device waits for data.",
        f"Data take {100 * data / whole:.0f}% of a step, {four_digits(data)} s of {four_digits(whole)} s.",
        command(run, workers=max(4, 2 * workers)),
    )


KINDS: tuple[Callable[[RecordedRun], NextStep | None], ...] = (
    rate_too_high,
    overfitted,
    rate_too_low,
    saturated,
    stopped_too_early,
    forgotten,
    data_too_long,
    source_harmful,
    waits_for_data,
)
