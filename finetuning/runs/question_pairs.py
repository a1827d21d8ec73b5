"""The base against the tuned model, question by question: what the first and the newest evaluation left.

Two files of a run's logs, before.json and after.json, each a record of `evaluation.question_record`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.common.files import read_json_object

BEFORE, AFTER = "before.json", "after.json"
SAME = 1e-9  # of a score, below which two are equal
Pairs = list[tuple[Mapping[str, Any], Mapping[str, Any]]]


@dataclass(frozen=True)
class QuestionPairs:
    """Pairs (before, after) of the same questions: their losses, and their answers where both were judged.

    held_out: samples, of which `losses` has all or evenly spread ones.
    """

    held_out: int
    losses: Pairs
    answers: Pairs

    @classmethod
    def read(cls, logs: Path) -> "QuestionPairs | None":
        """None where there are not both yet. Raises UserError for a file that is no JSON."""
        if not all((logs / name).is_file() for name in (BEFORE, AFTER)):
            return None
        before, after = (read_json_object(logs / name) for name in (BEFORE, AFTER))
        answers = _pairs(before["answers"], after["answers"])
        judged = [p for p in answers if all(one["score"] is not None for one in p)]
        losses = _pairs(before["losses"], after["losses"])
        return cls(int(after.get("held_out", len(losses))), losses, judged)

    def loss_change(self) -> tuple[float, float]:
        """The mean change of a question's loss, weighed by its tokens, and its standard error over the
        questions (ratio estimator); NaN for fewer than two."""
        tokens = [float(before["tokens"]) for before, _ in self.losses]
        changes = [after["loss"] - before["loss"] for before, after in self.losses]
        total, count = sum(tokens), len(tokens)
        if count < 2 or not total:
            return math.nan, math.nan
        mean = sum(n * change for n, change in zip(tokens, changes, strict=True)) / total
        spread = sum((n * (c - mean)) ** 2 for n, c in zip(tokens, changes, strict=True))
        return mean, math.sqrt(count / (count - 1) * spread) / total

    def by_loss(self) -> tuple[Pairs, Pairs]:
        """Questions whose loss fell and whose loss rose, the most changed first."""
        return _won_and_lost(self.losses, lambda one: -one["loss"])

    def by_answer(self) -> tuple[Pairs, Pairs]:
        """Questions that are answered better and worse, the most changed first."""
        return _won_and_lost(self.answers, lambda one: one["score"])


def _pairs(before: Sequence[Mapping], after: Sequence[Mapping]) -> Pairs:
    known = {one["place"]: one for one in before}
    return [(known[one["place"]], one) for one in after if one["place"] in known]


def _won_and_lost(pairs: Pairs, value: Any) -> tuple[Pairs, Pairs]:
    gains = [(value(after) - value(before), (before, after)) for before, after in pairs]
    won = sorted((g for g in gains if g[0] > SAME), key=lambda g: -g[0])
    lost = sorted((g for g in gains if g[0] < -SAME), key=lambda g: g[0])
    return [pair for _, pair in won], [pair for _, pair in lost]
