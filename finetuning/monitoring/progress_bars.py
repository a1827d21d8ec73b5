"""Progress bars in a printed text: which of them counts the steps of the losses that stand between."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

_BAR = re.compile(r"(?<![\d.])(\d{1,15})/(\d{1,15}) \[")  # a progress bar's "120/3000 [01:10<..."
_LABEL_REACH = 200  # characters before it in which its label is looked for
_CLOCK = re.compile(r"(?<!\d)\d++(?:[-:.,]\d++)++")  # a date or time, another one in each line
EVEN = 2 / 3  # of the strides must be the same one


@dataclass(frozen=True)
class _Counter:
    """A bar by its label and its end, e.g. ("Map:", 5000); all that it showed is one counter."""

    label: str
    end: int


@dataclass(frozen=True)
class _Stretch:
    """What a counter shows at losses in a row, from loss `begin` on; the steps rise in even strides."""

    counter: _Counter
    begin: int
    steps: list[int]

    @property
    def stop(self) -> int:
        return self.begin + len(self.steps)

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Lower is surer: it goes with more losses, in multiples of its stride, it counts further."""
        stride = self.steps[-1] - self.steps[-2] if len(self.steps) > 1 else 1
        return -len(self.steps), any(s % stride for s in self.steps[1:]), -self.counter.end


def steps_at(
    text: str, places: Sequence[int], epochs: Sequence[float | None]
) -> list[tuple[int, int]] | None:
    """(step, last step) of each training loss, from the bar in whose run it stands.

    places: where the losses stand in the text, rising. epochs: those that they tell.

    A bar counts the steps of losses where it moved on between each two of them, in even strides: a bar of
    data, weights or an evaluation stands still there, or runs through. None where no bar does so at every
    loss, or where a bar begins anew and nothing tells whether that is another run or the next epoch.
    """
    shown = _shown(text, places)
    chosen = _covering(
        [s for counter in shown for s in _stretches(counter, shown[counter], len(places))],
        len(places),
    )
    if not chosen or len({stretch.counter.label for stretch in chosen}) > 1:
        return None
    for one, following in pairwise(chosen):
        seen = shown[one.counter]
        behind = range(one.begin + 1, following.begin + 1)
        ended = one.steps[-1] == one.counter.end or any(k in seen and seen[k][2] for k in behind)
        before, now = epochs[one.stop - 1], epochs[following.begin]
        if ended and (before is None or now is None or now >= before):
            return None
    return [(step, s.counter.end) for s in chosen for step in s.steps]


def _shown(text: str, places: Sequence[int]) -> dict[_Counter, dict[int, tuple[int, int, bool]]]:
    """counter -> {k: (first step, last step, has it reached its end?) between loss k - 1 and k}."""
    found: dict[_Counter, dict[int, tuple[int, int, bool]]] = {}
    k = 0
    for at, counter, step in _bars(text):
        while k < len(places) and places[k] < at:
            k += 1
        seen = found.setdefault(counter, {})
        first, _, ended = seen.get(k, (step, step, False))
        seen[k] = first, step, ended or step == counter.end
    return found


def _bars(text: str) -> Iterator[tuple[int, _Counter, int]]:
    """(place, counter, step) of each bar that has begun."""
    for bar in _BAR.finditer(text):
        step, end = int(bar[1]), int(bar[2])
        if 0 < step <= end:
            before = text[max(0, bar.start() - _LABEL_REACH) : bar.start()]
            label = re.split(r"\d+%", re.split(r"[\r\n\]}]", before)[-1])[0]
            yield bar.start(), _Counter(_CLOCK.sub("", label).strip(), end), step


def _stretches(counter: _Counter, seen: dict, losses: int) -> Iterator[_Stretch]:
    """Where the counter goes with the losses: as it stands before each, or as it is drawn anew behind each.

    A bar is drawn at most ten times a second, so what stands before a loss may lag; HF's Trainer draws it
    again behind each line that it prints.
    """
    for before in (True, False):
        run: list[int] = []
        for k in range(losses + 1):
            place = k if before else k + 1
            step = seen[place][1 if before else 0] if k < losses and place in seen else None
            if run and (step is None or step <= run[-1]):
                steps = _even(run, exact=not before)
                if steps:
                    yield _Stretch(counter, k - len(run), steps)
                run = []
            if step is not None:
                run.append(step)


def _even(shown: list[int], exact: bool) -> list[int] | None:
    """The steps, where they rise in even strides; a first loss may be logged for itself.

    Steps that lag behind a multiple of the stride, by less than one, are that multiple.
    """
    strides = [b - a for a, b in pairwise(shown)]
    strides = strides[1:] or strides
    if not strides:
        return shown
    number = max(Counter(strides).values())
    if number == len(strides) or (not exact and number >= EVEN * len(strides)):
        return shown
    stride = round((shown[-1] - shown[0]) / (len(shown) - 1))
    steps = [math.ceil(step / stride) * stride for step in shown]
    even = all(b - a == stride for a, b in pairwise(steps))
    return steps if even and not exact else None


def _covering(stretches: list[_Stretch], losses: int) -> list[_Stretch] | None:
    """Stretches that hold every loss once, the surest first; None where a loss is left.

    A loss by itself proves nothing: its bar must be one that goes with other losses, or the only one.
    """
    free, chosen = [True] * losses, []
    alone = len({stretch.counter for stretch in stretches}) == 1
    for stretch in sorted(stretches, key=lambda s: s.rank):
        proven = len(stretch.steps) > 1 or alone or stretch.counter in {s.counter for s in chosen}
        if proven and all(free[stretch.begin : stretch.stop]):
            free[stretch.begin : stretch.stop] = [False] * len(stretch.steps)
            chosen.append(stretch)
    return None if any(free) else sorted(chosen, key=lambda s: s.begin)
