"""What a run's record says to do next: at most five findings in plain words, with evidence and a command.

Each kind is a function of a recorded run that returns a finding or None. They come in the order of what costs
most to leave as it is, and what is the matter with the whole run comes before what is with a part of it. A
run that is not over gets none of them: it is told how to go on.

Nothing is said from a difference that chance explains (`Measured.differs_from`), nothing against a number of
the record that speaks against it, and no two findings set one setting to different values.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetuning.common.formatting import four_digits, two_digits
from finetuning.config import DirectTrainingConfig
from finetuning.runs.before_after import Measured, changes
from finetuning.runs.course import Course
from finetuning.runs.own_command import PROGRAM, command, option
from finetuning.runs.question_pairs import QuestionPairs
from finetuning.runs.recorded import RecordedRun
from finetuning.runs.source_finding import without_source, worse_source
from finetuning.training.peak_rate import SMALL_MODEL_RATE

MOST = 5
RISEN = 0.02  # of the held-out loss above its best, as a share, from which it is worth a word
FALLING = 0.02  # of the loss over the last quarter of the run, as a share, that is still falling
LEARNED = 0.05  # fall of the loss, as a share of its start, below which a run has hardly learned
ROSE = 0.05  # of the training loss above its lowest part, as a share, that confirms alerts
FAR = 0.25  # the same, that needs no alert
ABOVE = 0.1  # of the training loss at the end above the first one, where no held-out loss says how it is
NEAR = 1.5  # times the program's own learning rate, or a part of it, that is neither high nor low
CUT = 0.05  # share of the samples that is left out or shortened for its length


@dataclass(frozen=True)
class NextStep:
    """One finding: what is the matter, the numbers that say so, and the one command to try.

    changes: settings in which the command differs from the run's own.
    """

    title: str
    evidence: str
    command: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RecordedRun, title: str, evidence: str, **changes: Any) -> "NextStep":
        """With the run's own command, changed so."""
        return cls(title, evidence, command(run, **changes), changes)


def findings(run: RecordedRun) -> list[NextStep]:
    """The findings of a run, the costliest first, five at most; none for a run that went as it should, or
    that is going on."""
    if not run.is_over:
        one = unfinished(run)
        return [one] if one else []
    told: list[NextStep] = []
    known: dict[str, Any] = {}
    for kind in KINDS:
        found = kind(run)
        if found and all(known.get(k, v) == v for k, v in found.changes.items()):
            told.append(found)
            known |= found.changes
    return told[:MOST]


# -----------------------------------------------------------------------------
# What the record holds


def _setting(run: RecordedRun, name: str) -> Any:
    return run.configuration.get("config", {}).get(name, getattr(DirectTrainingConfig(), name))


def _rate(run: RecordedRun) -> float | None:
    """The peak learning rate, as recorded or as logged."""
    rate = _setting(run, "learning_rate")
    return rate if isinstance(rate, float) else run.highest("Training/Learning_Rate")


def _own_rate(run: RecordedRun) -> float | None:
    """The learning rate that the program would choose for this run; None: an earlier version's record, which
    does not hold it."""
    return run.configuration.get("automatic_learning_rate")


def _lower(run: RecordedRun, rate: float) -> float:
    """A third of the rate; the program's own, or else that of small models, where that is still lower."""
    return two_digits(min(rate / 3, _own_rate(run) or SMALL_MODEL_RATE))


def _rates(run: RecordedRun, rate: float) -> str:
    own = _own_rate(run)
    beside = f", the program's own is {own:.3g}" if own else ""
    return f"the learning rate was {rate:.3g}{beside}."


def _shorter(run: RecordedRun, step: int) -> dict[str, Any]:
    """What ends a run at this step, by the setting that was set: --max-steps, or else --num-epochs; empty
    where the run was no longer than that."""
    if steps := _setting(run, "max_steps"):
        return {"max_steps": step, **_same_rate(run)} if 0 < step < steps else {}
    epochs, made = _setting(run, "num_epochs"), run.last("Training/Epoch")
    made = made or (epochs if isinstance(epochs, float) else 0)
    fewer = two_digits(made * step / max(run.steps, 1))
    return {"num_epochs": fewer, **_same_rate(run)} if 0 < fewer < made else {}


def _same_rate(run: RecordedRun) -> dict[str, float]:
    """The run's own learning rate, where it was left to the program: that goes by the passes, so that more
    of them would teach no more, and fewer no less."""
    rate = _rate(run)
    automatic = "learning_rate" in run.configuration.get("automatic", ())
    return {"learning_rate": two_digits(rate)} if automatic and rate else {}


def _alerts(run: RecordedRun, *names: str) -> list[Mapping[str, Any]]:
    return [alert for alert in run.alerts.newest if alert.get("name") in names]


def _course(run: RecordedRun) -> Course | None:
    return Course.of(run.series.get("Training/Loss", ()))


def _held_out(run: RecordedRun, step: int) -> Measured:
    return Measured.of(run.series, "Eval/Loss", step)


def _held_out_falls(run: RecordedRun) -> bool:
    """Whether the last held-out loss is the lowest one, and below the first by more than chance."""
    losses = run.finite("Eval/Loss")
    if len(losses) < 2 or losses[max(losses)] > min(losses.values()):
        return False
    return _held_out(run, max(losses)).differs_from(_held_out(run, min(losses)))


def _worse(run: RecordedRun) -> str:
    """Numbers that say that the model is worse than before the first step: by the held-out loss, with the
    error of the same questions' changes where these are recorded, or else by the training loss. Empty where
    none do, or where its answers are better."""
    told = {change.tag: change for change in changes(run.series)}
    answers = told.get("Eval/Answer_Score")
    if answers and answers.verdict == "better":
        return ""
    if loss := told.get("Eval/Loss"):
        before, after = loss.before, loss.after
        if after.value <= before.value * (1 + RISEN):
            return ""
        pairs = QuestionPairs.read(run.directory.logs)
        mean, error = pairs.loss_change() if pairs else (math.nan, math.nan)
        if not (mean > 2 * error if math.isfinite(mean) else loss.verdict == "worse"):
            return ""
        return (
            f"The held-out loss was {four_digits(before.value)} before the first step, and "
            f"{four_digits(after.value)} at the end"
        )
    course = _course(run)
    if course is None or _held_out_falls(run) or not course.is_above(course.first, ABOVE):
        return ""
    return (
        f"The training loss was {course.first.text} at the first step, and {course.end.text} over the last "
        "quarter"
    )


def _rose(run: RecordedRun) -> bool:
    """Whether the training loss is far above its lowest part, or above it after alerts that fit that."""
    course = _course(run)
    if course is None or _held_out_falls(run):
        return False
    wild = _alerts(run, "Gradient_Explosion", "Loss_Spike", "NonFinite")
    confirmed = len(wild) >= 3 or _alerts(run, "Divergence")
    return course.is_above(course.lowest, ROSE if confirmed else FAR)


# -----------------------------------------------------------------------------
# A run that is not over


def unfinished(run: RecordedRun) -> NextStep | None:
    """It was ended before its last step, and goes on from its checkpoint. None while it is running."""
    planned, status = run.configuration.get("steps"), run.status
    step = status.get("step", run.steps)
    if run.is_running or planned is None:
        return None
    how_far = f"It ended at step {step} of {planned}."
    worse, rate = _worse(run), _rate(run)
    if worse and rate is not None:
        return NextStep.of(
            run,
            "The run broke off, and was worse than at its beginning: begin anew with a lower learning rate.",
            f"{worse}; {_rates(run, rate)}",
            learning_rate=_lower(run, rate),
        )
    title = "The run has not come to its end: go on with it."
    if status.get("status") in ("failed", "stopped"):
        title = "The run broke off: mend what its status says, and go on with it."
    saved = status.get("status") != "killed" and status.get("saved") != 0
    where = "latest" if saved else "auto"  # where nothing is saved it begins again
    return NextStep(title, how_far, f"{command(run)} --resume {where}")


# -----------------------------------------------------------------------------
# The kinds


def worse_than_before(run: RecordedRun) -> NextStep | None:
    """The result is worse than what it was made of, and was never better (`overfitted` tells the others)."""
    evidence, rate = _worse(run), _rate(run)
    if not evidence or rate is None or overfitted(run):
        return None
    return NextStep.of(
        run,
        "The training has made the model worse: the learning rate is too high.",
        f"{evidence}; {_rates(run, rate)}",
        learning_rate=_lower(run, rate),
    )


def rate_too_high(run: RecordedRun) -> NextStep | None:
    """The training loss has risen and stayed high."""
    course, rate = _course(run), _rate(run)
    if course is None or rate is None or _worse(run) or not _rose(run):
        return None
    return NextStep.of(
        run,
        "The learning rate is too high for these data.",
        f"The training loss was {course.lowest.text} at its lowest, and {course.end.text} over the last "
        f"quarter; {_rates(run, rate)}",
        learning_rate=_lower(run, rate),
    )


def overfitted(run: RecordedRun) -> NextStep | None:
    """The held-out loss was best long before the end and has not turned back since, while the training loss
    did not rise."""
    losses = run.finite("Eval/Loss")
    if len(losses) < 3 or _rose(run):
        return None
    step, end = min(losses, key=losses.get), max(losses)
    best, last = _held_out(run, step), _held_out(run, end)
    peak = _held_out(run, max((s for s in losses if s >= step), key=losses.get))
    turned = peak.differs_from(last)
    if last.value <= best.value * (1 + RISEN) or not last.differs_from(best) or turned:
        return None
    shorter = _shorter(run, step)
    if not shorter:
        return None
    unit = "steps" if "max_steps" in shorter else "epochs"
    title = f"The run went on too long: it overfits. Take best_model, and train fewer {unit}."
    if _setting(run, "best_by") == "answers":  # best_model may be of another step
        title = f"The run went on too long by its held-out loss: it overfits. Train fewer {unit}."
    return NextStep.of(
        run,
        title,
        f"The held-out loss was {four_digits(best.value)} at step {step}, and {four_digits(last.value)} at "
        "the end.",
        **shorter,
    )


def hardly_learned(run: RecordedRun) -> NextStep | None:
    """The loss is where it was all the time. The learning rate is the reason where it is far from the
    program's own."""
    course, held_out = _course(run), list(run.finite("Eval/Loss").values())
    rate, own = _rate(run), _own_rate(run)
    if course is None or rate is None or not own or not run.is_complete or _is_troubled(run):
        return None
    starts = [course.early, *[course.first] * course.first.differs_from(course.early)]
    fall = 1 - course.end.value / course.early.value
    most = max(1 - course.end.low / start.high for start in starts)
    away = max(abs(part.value / course.early.value - 1) for part in course.parts)
    eval_fall = 1 - held_out[-1] / held_out[0] if len(held_out) > 1 and held_out[0] > 0 else 0.0
    if max(fall, eval_fall) >= LEARNED or max(most, away) >= 2 * LEARNED:
        return None
    change = round(-100 * fall, 1) + 0.0  # no minus before a zero
    evidence = (
        f"The training loss went from {course.early.text} to {course.end.text}, a change of {change:+.1f}%; "
        f"{_rates(run, rate)}"
    )
    if own / NEAR < rate < own * NEAR:
        title = "The run has hardly learned, at a usual learning rate: look at the data."
        return NextStep(title, evidence, f"{command(run)} --check-data")
    way = "low" if rate < own else "high"
    title = f"The run has hardly learned: the learning rate is too {way}."
    return NextStep.of(run, title, evidence, learning_rate=own)


def _is_troubled(run: RecordedRun) -> bool:
    """Whether something is the matter beside which it makes no sense to train longer or faster."""
    return any(
        kind(run) for kind in (worse_than_before, rate_too_high, overfitted, saturated, forgotten)
    )


def stopped_too_early(run: RecordedRun) -> NextStep | None:
    """The loss was still falling when the schedule had come to its end, on held-out data too."""
    course, held_out = _course(run), run.finite("Eval/Loss")
    if course is None or not run.is_complete or _is_troubled(run) or hardly_learned(run):
        return None
    before, end = course.third, course.end
    fall = 1 - end.value / before.value if before.value > 0 else 0.0
    if fall < FALLING or not end.differs_from(before):
        return None
    told = f"Over its last quarter the training loss fell by {100 * fall:.1f}%, to {end.text}"
    if len(held_out) > 1:
        last, half = (
            max(held_out),
            max(s for s in held_out if s <= max(max(held_out) // 2, min(held_out))),
        )
        lowest = held_out[last] <= min(held_out.values())
        if not lowest or not _held_out(run, last).differs_from(_held_out(run, half)):
            return None
        told += f"; the last held-out loss, {four_digits(held_out[last])}, was the best"
    steps, epochs = _setting(run, "max_steps"), _setting(run, "num_epochs")
    if not steps and not isinstance(epochs, float):
        return None
    longer = {"max_steps": 2 * steps} if steps else {"num_epochs": 2 * epochs}
    return NextStep.of(
        run,
        "The run was stopped too early: it was still learning.",
        f"{told}.",
        **longer,
        **_same_rate(run),
    )


def data_too_long(run: RecordedRun) -> NextStep | None:
    """Many samples are left out, or lose the middle of their thinking, for their length."""
    total, ids = run.dataset().get("total_samples"), run.truncation()
    cut = len(
        {*ids.get("dropped", ()), *ids.get("shortened", ())}
    )  # a sample has several documents
    if not total or cut / total < CUT:
        return None
    length = _setting(run, "max_seq_length")
    if not isinstance(length, int):  # a run that has not recorded it
        return None
    evidence = (
        f"{cut} of {total} samples, {100 * cut / total:.0f}%, are longer than {length} tokens."
    )
    positions = run.configuration.get("model", {}).get("positions", math.inf)
    if "max_seq_length" not in run.configuration.get("automatic", ()) and length < positions:
        title = "The data are too long for --max-seq-length: samples are left out or shortened."
        return NextStep.of(run, title, evidence, max_seq_length="auto")
    title = "The data are too long for the memory or the model: samples are left out or shortened."
    for name, bad, better in (
        ("gradient_checkpointing", "off", "auto"),
        ("over_length", "drop", "truncate_thinking"),
    ):
        if _setting(run, name) == bad and not (
            name == "gradient_checkpointing" and length >= positions
        ):
            return NextStep.of(run, title, evidence, **{name: better})
    return None  # more than that is not in a setting


def source_harmful(run: RecordedRun) -> NextStep | None:
    """One source gets worse while the others get better, beyond what chance does (`worse_source`)."""
    found = worse_source(run)
    if found is None:
        return None
    title = (
        f"The source {found.source} gets worse with training: look at its samples, or leave it out."
    )
    if fewer := without_source(run, found.source):
        return NextStep.of(run, title, found.evidence, **fewer)
    look = " ".join((PROGRAM, "--check-data", *option("data_path", (found.source,))))
    return NextStep(title, found.evidence, look)


def saturated(run: RecordedRun) -> NextStep | None:
    """The data are learned by heart, from an alert on to the end."""
    accuracy = run.finite("Training/Token_Accuracy")
    for alert in _alerts(run, "Saturation"):
        step, least = alert.get("step", run.steps), alert.get("threshold", 1.0)
        shorter = _shorter(run, step)
        if shorter and all(value >= least for s, value in accuracy.items() if s >= step):
            return NextStep.of(
                run,
                "The data are learned by heart: more epochs teach nothing. Add data, or stop there.",
                f"From step {step} on every training token was predicted (at least {100 * least:.4g}%).",
                **shorter,
            )
    return None


def forgotten(run: RecordedRun) -> NextStep | None:
    """The loss on general text rose above the base's, too far for the alert, and is there at the end."""
    spoken, rate = _alerts(run, "Forgetting"), _rate(run)
    loss = next((c for c in changes(run.series) if c.tag == "Forgetting/General_Loss"), None)
    if not spoken or rate is None or loss is None:
        return None
    limit = spoken[-1].get("threshold")
    if loss.verdict != "worse" or loss.after.value <= limit:
        return None
    return NextStep.of(
        run,
        "The model forgets what it could.",
        f"Its loss on general text was {four_digits(loss.before.value)} before the first step and is "
        f"{four_digits(loss.after.value)} at the end, where {four_digits(limit)} is too much.",
        learning_rate=_lower(run, rate),
    )


KINDS: tuple[Callable[[RecordedRun], NextStep | None], ...] = (
    worse_than_before,
    rate_too_high,
    overfitted,
    hardly_learned,
    saturated,
    stopped_too_early,
    forgotten,
    data_too_long,
    source_harmful,
)
