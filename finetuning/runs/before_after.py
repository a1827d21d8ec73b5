"""What a run has changed: the base's numbers beside those of the trained model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetuning.common.formatting import shown
from finetuning.runs.recorded import Points

# Row of the table -> its tag, and whether more is better; None: it is a distance.
BEFORE_AND_AFTER = {
    "held-out loss": ("Eval/Loss", False),
    "held-out loss of the thinking": ("Eval/Thinking_Loss", False),
    "held-out loss of the answers": ("Eval/Answer_Loss", False),
    "held-out tokens foretold": ("Eval/Token_Accuracy", True),
    "score of the answers": ("Eval/Answer_Score", True),
    "probes thought, answered and ended": ("Eval/Format_Valid_Rate", True),
    "probes with the right number": ("Eval/Exact_Answer", True),
    "numbers, formulas and standards given exactly": ("Eval/Fact_Recall", True),
    "terms of the reference named": ("Eval/Term_Recall", True),
    "probes cut at their budget": ("Eval/Budget_Hit_Rate", False),
    "loss on general text": ("Forgetting/General_Loss", False),
    "KL to the base, general text": ("Forgetting/KL_General", None),
    "KL to the base, held out": ("Forgetting/KL_Held_Out", None),
}
_ERROR = "_Error"  # behind a tag: its standard error
_INTERVAL = ("_Low", "_High")  # behind a tag: its interval of 95%
_VALUES = [tag for tag, _ in BEFORE_AND_AFTER.values()]
TAGS = frozenset(tag + end for tag in _VALUES for end in ("", _ERROR, *_INTERVAL))


@dataclass(frozen=True)
class Change:
    """One number of the base, and of the trained model."""

    name: str
    tag: str
    before: float
    after: float
    verdict: str
    """better, worse, or empty: the same, or a distance."""
    spreads: tuple[str, str] = ("", "")
    """How sure both are: ± twice the standard error, or the interval of a rate in brackets."""

    @property
    def texts(self) -> tuple[str, str]:
        """Both numbers as people read them."""
        before, after = self.spreads
        return shown(self.before) + before, shown(self.after) + after


def newest_evaluation(series: Mapping[str, Points], step: int) -> int | None:
    """Step of the newest evaluation up to `step`; None where there is none behind that of the base."""
    steps = (at for tag in _VALUES for at, _ in series.get(tag, ()))
    return max((at for at in steps if 0 < at <= step), default=None)


def changes(series: Mapping[str, Points], step: int | None = None) -> list[Change]:
    """Rows of the table at the evaluation of this step, else at the newest; none without that of the base,
    which is that of step 0."""

    def ends(tag: str) -> tuple[float, float] | None:
        """Of the base, and at the evaluation."""
        points = series.get(tag, ())
        if not points or points[0][0]:
            return None
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
        rows.append(Change(name, tag, before, after, verdict, _spreads(tag, ends)))
    return rows


def _spreads(tag: str, ends: Callable[[str], tuple[float, float] | None]) -> tuple[str, str]:
    """ends: the base's value of a tag, and that at the evaluation."""
    if errors := ends(tag + _ERROR):
        before, after = (f" ± {shown(2 * error)}" for error in errors)
        return before, after
    low, high = (ends(tag + name) for name in _INTERVAL)
    if low is None or high is None:
        return "", ""
    before, after = (f" ({shown(a)}–{shown(b)})" for a, b in zip(low, high, strict=True))
    return before, after
