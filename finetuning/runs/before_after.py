"""What a run has changed: the base's numbers beside those of the trained model."""

from collections.abc import Mapping
from dataclasses import dataclass

from finetuning.common.formatting import shown
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
_ERRORS = {"Eval/Loss": "Eval/Loss_Error"}  # standard errors of a row, where they are known
TAGS = frozenset((*(tag for tag, _ in BEFORE_AND_AFTER.values()), *_ERRORS.values()))


@dataclass(frozen=True)
class Change:
    """One number of the base, and of the trained model."""

    name: str
    tag: str
    before: float
    after: float
    verdict: str
    """better, worse, or empty: the same, or a distance."""
    errors: tuple[float, float] | None = None
    """Standard errors of both, where they are known."""

    @property
    def texts(self) -> tuple[str, str]:
        """Both numbers as people read them, with twice their standard errors."""
        first, second = (shown(value) for value in (self.before, self.after))
        if self.errors is None:
            return first, second
        before, after = (shown(2 * error) for error in self.errors)
        return f"{first} ± {before}", f"{second} ± {after}"


def changes(series: Mapping[str, Points], step: int | None = None) -> list[Change]:
    """Rows of the table at the evaluation of this step, else at the newest; none before there are two."""

    def ends(tag: str) -> tuple[float, float] | None:
        """Of the base, and at the evaluation."""
        points = series.get(tag, ())
        later = [value for at, value in points[1:] if step is None or at == step]
        return (points[0][1], later[-1]) if later else None

    rows = []
    for name, (tag, more) in BEFORE_AND_AFTER.items():
        found = ends(tag)
        if found is None:
            continue
        before, after = found
        same = more is None or before == after
        verdict = "" if same else ("worse", "better")[more == (after > before)]
        errors = ends(_ERRORS.get(tag, ""))
        rows.append(Change(name, tag, before, after, verdict, errors))
    return rows
