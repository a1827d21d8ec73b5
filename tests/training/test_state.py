"""What a run knows besides its weights, and what a rollback leaves of it."""

from dataclasses import fields

from finetuning.training.state import TrainState


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
