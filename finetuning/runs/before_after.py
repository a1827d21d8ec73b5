"""What a run has changed: the base's numbers beside those of the trained model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
class Measured:
    """A number with its interval of 95%; without one it may be anything. text: both, as people read them."""

    value: float
    low: float
    high: float
    text: str

    @classmethod
    def of(cls, series: Mapping[str, Points], tag: str, step: int) -> "Measured":
        """A tag at a step at which it was measured."""
        ends = ("", _ERROR, *_INTERVAL)
        value, error, low, high = (dict(series.get(tag + end, ())).get(step) for end in ends)
        if error is not None:
            text = f"{shown(value)} ± {shown(2 * error)}"
            return cls(value, value - 2 * error, value + 2 * error, text)
        if low is not None and high is not None:
            return cls(value, low, high, f"{shown(value)} ({shown(low)}–{shown(high)})")
        return cls(value, -math.inf, math.inf, shown(value))

    def differs_from(self, other: "Measured") -> bool:
        """Whether chance hardly explains the difference: the interval of 95% of two independent numbers'
        difference is without 0 (Newcombe 1998, method 10; of standard errors, the usual one). The same
        questions are asked twice, so it is rather too wide."""
        low, high = sorted((self, other), key=lambda one: one.value)
        return high.value - low.value > math.hypot(high.value - high.low, low.high - low.value)


@dataclass(frozen=True)
class Change:
    """One number of the base, and of the trained model."""

    name: str
    tag: str
    before: Measured
    after: Measured
    verdict: str
    """better, worse, or empty: chance explains it, nobody knows how sure it is, or it is a distance."""

    @property
    def texts(self) -> tuple[str, str]:
        """Both numbers as people read them."""
        return self.before.text, self.after.text


def newest_evaluation(series: Mapping[str, Points], step: int) -> int | None:
    """Step of the newest evaluation up to `step`; None where there is none behind that of the base."""
    steps = (at for tag in _VALUES for at, _ in series.get(tag, ()))
    return max((at for at in steps if 0 < at <= step), default=None)


def changes(series: Mapping[str, Points], step: int | None = None) -> list[Change]:
    """Rows of the table at the evaluation of this step, else at the newest; none before there are two.

    A number that was not measured before the first step has no row: nothing else is of the base.
    """
    rows = []
    for name, (tag, more) in BEFORE_AND_AFTER.items():
        at = [known for known, _ in series.get(tag, ())]
        later = [known for known in at[1:] if step is None or known == step]
        if not later or at[0] != 0:
            continue
        before, after = Measured.of(series, tag, 0), Measured.of(series, tag, later[-1])
        told = more is not None and after.differs_from(before)
        verdict = "better" if more == (after.value > before.value) else "worse"
        rows.append(Change(name, tag, before, after, verdict * told))
    return rows


def start_name(configuration: Mapping[str, Any]) -> str:
    """What is trained on: the base, or an adapter of an earlier run."""
    return "first adapter" if configuration.get("config", {}).get("init_adapter") else "base"
