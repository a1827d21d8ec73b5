"""What a run knows besides its weights: counters, sums in progress, monitors. Strict JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.common.errors import UserError
from finetuning.common.kinds import misfit
from finetuning.common.text import clean_line

# Fields that earlier versions did not write down; a run without them goes on with their defaults.
ADDED_LATER = (
    "evaluation_due",
    "stop_alerts",
    "changes",
    "reach",
    "system_prompt",
    "best_score",
    "last_eval_step",
)

Mean = float | None  # of a segment's loss; None where it has no token, or is not finite
HardRow = tuple[
    Mean, int, int, Mean, Mean, Mean, Mean, Mean
]  # `Row` of evaluation/hardest_samples.py


@dataclass
class TrainState:
    """The loop's state after `step` updates; identical on all ranks and saved whole."""

    step: int = 0
    tokens_seen: int = 0
    samples_seen: int = 0
    training_seconds: float = 0.0  # wall time of the loop over all sessions
    resume_count: int = 0
    interval: list[float | None] = field(
        default_factory=list
    )  # loss sums since the last logged step
    epoch: list[float | None] = field(
        default_factory=list
    )  # loss sums since the epoch began, finite steps
    epoch_seconds: float = 0.0
    grad_norm: float | None = 0.0  # of the newest step, before clipping; None was not finite
    grad_norm_max: float | None = None  # of the finite ones since the last logged step
    last_loss: float | None = None  # the newest Training/Loss
    first_eval_loss: float | None = None
    last_eval_loss: float | None = None
    last_eval_step: int | None = None
    best_eval_loss: float | None = None  # of the best model; None where nothing is held out
    best_score: float | None = None  # its Eval/Answer_Score, where the answers decide
    best_step: int | None = None
    evals_without_gain: int = 0
    loss_level: tuple[float, float] = (0.0, 0.0)  # decayed sum and tokens
    hardest: list[HardRow] = field(default_factory=list)  # this epoch
    nonfinite_steps: list[int] = field(default_factory=list)
    skipped_steps: list[int] = field(
        default_factory=list
    )  # their update is left out after a rollback
    recomputes: bool = False  # out-of-memory has turned gradient checkpointing on
    micro_batch_splits: int = 0  # how often out-of-memory has halved the micro-batches
    evaluation_due: bool = False  # a signal came within the one of this step
    stop_alerts: list[str] = field(default_factory=list)  # alerts whose action "stop" ended the run
    changes: list[str] = field(default_factory=list)  # of settings, by resumes, and at which step
    reach: dict[str, int] | None = None  # of a user's own tags, see `events.event_file.Rewind`
    system_prompt: str = (
        ""  # that all samples have, for saved models; known to rank 0, which saves them
    )
    # What the monitors remember; each of them looks at its own. Empty before the first logged step.
    convergence: dict[str, Any] = field(default_factory=dict)
    alerts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, saved: Any, path: Path) -> "TrainState":
        """That of a checkpoint's state file. Raises UserError where it lacks a field, or has one that is not
        known, and so is of another version.

        saved: the whole content of the file: this state, the run's identity and its settings.
        """
        parts = {"train_state": cls, "identity": dict[str, Any], "config": dict[str, Any]}
        state = saved.get("train_state") if isinstance(saved, Mapping) else None
        if isinstance(state, Mapping):
            defaults = {name: value for name, value in asdict(cls()).items() if name in ADDED_LATER}
            saved = {**saved, "train_state": {**defaults, **state}}
        faults = ["it is no object"] if not isinstance(saved, Mapping) else []
        for name, kind in parts.items() if not faults else ():
            faults += [misfit(saved[name], kind, name)] if name in saved else [f"{name} is missing"]
        faults += [] if any(faults) else _below_zero(saved["train_state"])
        if fault := next(filter(None, faults), ""):
            raise UserError(
                f"--resume {path}: its state file is of another version of this program "
                f"({clean_line(fault)}); go on with the version that wrote it, or start a new run with "
                "--init-adapter and this folder"
            )
        return cls(**saved["train_state"])

    def note_evaluation(self, step: int, metrics: Mapping[str, float], by: str = "loss") -> bool:
        """Take an evaluation's numbers; True if its model is the best so far, `by` its loss or its answers,
        of equally good ones the one of the lower loss. An evaluation without the number that decides does
        not count, neither for nor against."""
        loss = metrics.get("Eval/Loss")
        if loss is not None:
            self.first_eval_loss = loss if self.first_eval_loss is None else self.first_eval_loss
            self.last_eval_loss, self.last_eval_step = loss, step
        score = metrics.get("Eval/Answer_Score") if by == "answers" else None
        if (loss if by == "loss" else score) is None:
            return False
        if (loss is None or math.isfinite(loss)) and self._is_better(loss, score):
            self.best_eval_loss, self.best_score = loss, score
            self.best_step, self.evals_without_gain = step, 0
            return True
        self.evals_without_gain += 1
        return False

    def _is_better(self, loss: float | None, score: float | None) -> bool:
        """score: None where the loss decides. What decides now may not have decided before."""
        if score is None:
            return self.best_eval_loss is None or loss < self.best_eval_loss
        if self.best_score is None or score != self.best_score:
            return self.best_score is None or score > self.best_score
        return None not in (loss, self.best_eval_loss) and loss < self.best_eval_loss

    def go_on_from(self, later: "TrainState", failed: int) -> None:
        """This state is that of a rollback: keep what the later one knows and going back doesn't undo.

        The time since then belongs to the run, and to the epoch that it goes back to. The update of the
        step that failed will be left out.
        """
        lost = later.training_seconds - self.training_seconds
        self.training_seconds += lost
        self.epoch_seconds += lost
        self.resume_count = later.resume_count
        self.nonfinite_steps = later.nonfinite_steps
        self.skipped_steps = [*later.skipped_steps, failed]
        self.recomputes, self.micro_batch_splits = later.recomputes, later.micro_batch_splits


def _below_zero(state: Mapping[str, Any]) -> list[str]:
    """Counters that no run could have counted."""
    return [f"{name} is below 0" for name, n in state.items() if isinstance(n, int) and n < 0]


def summed(before: Sequence[float | None], added: np.ndarray) -> list[float]:
    """Sums of a state and of a step; in a state that was saved, None stands for what is not finite."""
    return (np.asarray(before, np.float64) + added).tolist()
