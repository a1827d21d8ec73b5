"""What a run knows besides its weights, and what a rollback leaves of it."""

import json
import math
from dataclasses import asdict, fields

import numpy as np

from finetuning.common.files import json_text
from finetuning.training.state import TrainState, summed


def test_a_rollback_keeps_what_going_back_does_not_undo():
    """Time that has passed, resumes, failed steps, and what was learned about memory; all else goes back."""
    earlier = TrainState(**{f.name: f"earlier {f.name}" for f in fields(TrainState)})
    earlier.training_seconds, earlier.epoch_seconds = 10.0, 4.0
    later = TrainState(**{f.name: f"later {f.name}" for f in fields(TrainState)})
    later.training_seconds, later.epoch_seconds = 16.0, 1.0  # another epoch
    before = dict(vars(earlier))
    later.skipped_steps = [3]
    earlier.go_on_from(later, 8)
    kept = {"resume_count", "nonfinite_steps", "recomputes", "micro_batch_splits"}
    wanted = {name: f"later {name}" if name in kept else old for name, old in before.items()}
    wanted |= {"training_seconds": 16.0, "epoch_seconds": 10.0, "skipped_steps": [3, 8]}
    assert vars(earlier) == wanted


def test_sums_that_were_not_finite_stay_so_over_a_resume(tmp_path):
    """JSON has no NaN: it is null in the file, and the next step adds to it."""
    state = TrainState(interval=[1.0, float("nan")], grad_norm=float("nan"))
    saved = {"train_state": asdict(state), "identity": {}, "config": {}}
    read = TrainState.read(json.loads(json_text(saved)), tmp_path)
    assert read.interval == [1.0, None]
    first, second = summed(read.interval, np.array([0.5, 2.0]))
    assert first == 1.5 and math.isnan(second)
