"""What a column, key or tag of another tool's log means: `train/loss`, `run - train/lr`, `current_steps`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from finetuning.common.errors import UserError

STEP, LOSS, PLANNED = "step", "Training/Loss", "total_steps"
KNOWN = {  # the last part of a name, without "train" or "eval" before it
    "loss": LOSS,
    "learning_rate": "Training/Learning_Rate",
    "lr": "Training/Learning_Rate",
    "grad_norm": "Training/Gradient_Norm",
    "gradient_norm": "Training/Gradient_Norm",
    "epoch": "Training/Epoch",
    "total_steps": PLANNED,
    "max_steps": PLANNED,
}
STEPS = (
    "global_step",
    "current_steps",
    "step",
    "_step",
    "steps",
    "iteration",
    "iter",
)  # best first
TRAINED = ("train", "training", "loss", "")
HELD_OUT = ("eval", "evaluation", "val", "valid", "validation", "dev", "test")
OF_A_BAND = re.compile(r"(__|_)(min|max|timestamp)$")  # beside each curve of an export


def meanings(names: Iterable[str], place: str) -> dict[str, str]:
    """Our name for each of `names` that has a meaning here: {"train/loss": "Training/Loss", ...}.

    One of several step columns is taken, the optimizer's before a tool's own count of calls. Where no
    name says plainly that it is the training loss, the only one that ends in "loss" is taken.
    Raises UserError where several could be meant.
    """
    names = list(dict.fromkeys(n for n in names if n))
    found = {name: ours for name in names if (ours := _meaning(name))}
    steps = [(rank, name) for name in names if (rank := _step_rank(name)) is not None]
    if steps:
        found[min(steps)[1]] = STEP
    if LOSS not in found.values():
        found |= {name: LOSS for name in _other_losses(names)}
    losses = [name for name, ours in found.items() if ours == LOSS]
    if len(losses) > 1:
        raise UserError(
            f"{place}: {len(losses)} training losses ({', '.join(losses[:4])}); leave one of them"
        )
    return found


def _parts(name: str) -> list[str]:
    """The parts of a path, in lower case; an export of several runs puts the run's name before " - "."""
    return re.split(r"[/.]", name.strip().rsplit(" - ", 1)[-1].lower())


def _meaning(name: str) -> str | None:
    if OF_A_BAND.search(name.lower()):
        return None
    *path, last = _parts(name)
    split = re.fullmatch(rf"({'|'.join((*filter(None, TRAINED[:2]), *HELD_OUT))})_(.+)", last)
    if split:
        path, last = [*path, split[1]], split[2]
    kind = path[-1] if path else ""
    if kind in HELD_OUT:
        return "Eval/Loss" if last == "loss" else None
    return KNOWN.get(last) if kind in TRAINED else None


def _step_rank(name: str) -> int | None:
    if OF_A_BAND.search(name.lower()):
        return None
    *path, last = _parts(name)
    return STEPS.index(last) if last in STEPS and (not path or path[-1] in TRAINED) else None


def _other_losses(names: list[str]) -> list[str]:
    """Names such as `my-run-loss`, which are neither of held-out data nor the edge of a band."""
    words = {name: re.split(r"[^a-z0-9]+", name.lower()) for name in names}
    return [
        name
        for name, parts in words.items()
        if parts[-1] == "loss" and not set(parts) & set(HELD_OUT) and not OF_A_BAND.search(name)
    ]
