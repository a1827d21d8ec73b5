"""What a column, key or tag of another tool's log means: `train/loss`, `run - train/lr`, `current_steps`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from finetuning.common.errors import UserError

STEP, LOSS, PLANNED = "step", "Training/Loss", "total_steps"
RATE, EVALUATION = "Training/Learning_Rate", "Eval/Loss"
COUNTED = "(counted)"  # beside a step that is the number of its line
KNOWN = {  # the last part of a name, without "train" or "eval" before it
    "loss": LOSS,
    "learning_rate": RATE,
    "lr": RATE,
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
SIDES = "|".join((*TRAINED[:2], *HELD_OUT))
SIDE_FIRST, SIDE_LAST = re.compile(rf"({SIDES})_(.+)"), re.compile(rf"(.+)_({SIDES})")
PAIR = re.compile(r"(\d+)/(\d+)")


def meanings(names: Iterable[str]) -> dict[str, str]:
    """Our name for each of `names` that has a meaning here: {"train/loss": "Training/Loss", ...}.

    One of several step columns is taken, the optimizer's before a tool's own count of calls. Where no
    name says plainly that it is the training loss, those that end in "loss" are. Which of several losses
    is the curve, their values tell (`with_one_loss`).
    """
    names = list(dict.fromkeys(n for n in names if n))
    found = {name: ours for name in names if (ours := _meaning(name))}
    steps = [(rank, name) for name in names if (rank := _step_rank(name)) is not None]
    if steps:
        found[min(steps)[1]] = STEP
    if LOSS not in found.values():
        found |= {name: LOSS for name in _other_losses(names)}
    return found


def with_one_loss(found: dict[str, str], values: Mapping[str, int], place: str) -> dict[str, str]:
    """The meanings without losses that sum up the curve: a mean of an epoch, of a whole run.

    values: how many numbers each name has; a summary has at most half as many as the curve. Raises UserError
    where several may be meant, as those of two runs.
    """
    losses = [name for name, ours in found.items() if ours == LOSS and values.get(name)]
    curves = losses
    if len({_run(name) for name in losses}) == 1:
        curves = [name for name in losses if not _parts(name)[-1].endswith("_epoch")] or losses
        most = max(values[name] for name in curves)
        curves = [name for name in curves if 2 * values[name] > most]
    if len(curves) > 1:
        raise UserError(
            f"{place}: {len(curves)} training losses ({', '.join(curves[:4])}); leave one of them"
        )
    return {name: ours for name, ours in found.items() if ours != LOSS or name in curves}


def is_step(name: str) -> bool:
    """Does it count steps?"""
    return _step_rank(name) is not None


def unpaired(record: Mapping) -> dict:
    """With {"global_step/max_steps": "10/300"} as the two fields that it is (ms-swift)."""
    if not any(isinstance(value, str) and "/" in value for value in record.values()):
        return dict(record)
    fields: dict = {}
    for name, value in record.items():
        pair = PAIR.fullmatch(value) if isinstance(value, str) else None
        names = str(name).split("/")
        fields |= (
            dict(zip(names, pair.groups(), strict=True))
            if pair and len(names) == 2
            else {name: value}
        )
    return fields


def _run(name: str) -> str:
    """An export of several runs puts the run's name before " - "."""
    return name.strip().rpartition(" - ")[0]


def _parts(name: str) -> list[str]:
    """The parts of a path without its run, in lower case, words joined by _: ["train", "grad_norm"]."""
    path = name.strip().rpartition(" - ")[2].lower()
    return [re.sub(r"[\s-]+", "_", part) for part in re.split(r"[/.]", path)]


def _meaning(name: str) -> str | None:
    if OF_A_BAND.search(name.lower()):
        return None
    *path, last = _parts(name)
    if path and re.fullmatch(SIDES, last):  # PyTorch's tutorials: Loss/train
        path, last = [*path[:-1], last], path[-1]
    elif split := SIDE_FIRST.fullmatch(last):
        path, last = [*path, split[1]], split[2]
    elif split := SIDE_LAST.fullmatch(last):
        path, last = [*path, split[2]], split[1]
    last = re.sub(r"^loss_(step|epoch)$", "loss", last)  # Lightning
    kind = path[-1] if path else ""
    if kind in HELD_OUT:
        return EVALUATION if last == "loss" else None
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
