"""What a run has changed: the base's numbers beside those of the trained model."""

from collections.abc import Mapping
from dataclasses import dataclass

from finetuning.runs.recorded import Points

# Row of the table -> its tag, and whether more is better; None: it is a distance.
BEFORE_AND_AFTER = {
    "held-out loss": ("Eval/Loss", False),
    "held-out loss of the thinking": ("Eval/Thinking_Loss", False),
    "held-out loss of the answers": ("Eval/Answer_Loss", False),
    "held-out tokens foretold": ("Eval/Token_Accuracy", True),
    "probes thought, answered and ended": ("Eval/Format_Valid_Rate", True),
    "probes with the right number": ("Eval/Exact_Answer", True),
    "terms of the reference named": ("Eval/Term_Recall", True),
    "probes cut at their budget": ("Eval/Budget_Hit_Rate", False),
    "loss on general text": ("Forgetting/General_Loss", False),
    "KL to the base, general text": ("Forgetting/KL_General", None),
    "KL to the base, held out": ("Forgetting/KL_Held_Out", None),
}


@dataclass(frozen=True)
class Change:
    """One number of the base, and of the trained model."""

    name: str
    tag: str
    before: float
    after: float
    verdict: str
    """better, worse, or empty: the same, or a distance."""


def changes(series: Mapping[str, Points], step: int | None = None) -> list[Change]:
    """Rows of the table at the evaluation of this step, else at the newest; none before there are two."""
    rows = []
    for name, (tag, more) in BEFORE_AND_AFTER.items():
        points = series.get(tag, ())
        later = [value for at, value in points[1:] if step is None or at == step]
        if not later:
            continue
        before, after = points[0][1], later[-1]
        same = more is None or before == after
        verdict = "" if same else ("worse", "better")[more == (after > before)]
        rows.append(Change(name, tag, before, after, verdict))
    return rows
