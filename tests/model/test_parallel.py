"""Replicas or shards: which is chosen, and what is refused."""

import pytest
import torch

from finetuning.common.errors import UserError
from finetuning.model.parallel import parallel_mode
from finetuning.training.engine import TrainingEngine
from finetuning.training.state import TrainState


def test_what_is_sharded_before_memory_decides(subtests):
    for wanted, trains_all, dtype, ranks, mode in [
        ("auto", False, torch.bfloat16, 8, "ddp"),
        ("auto", True, torch.bfloat16, 1, "fsdp"),
        ("auto", True, torch.float32, 1, "ddp"),
        ("auto", True, torch.float32, 2, "fsdp"),
        ("ddp", True, torch.float32, 2, "ddp"),
        ("fsdp", False, torch.bfloat16, 1, "fsdp"),
    ]:
        with subtests.test(wanted=wanted):
            found = parallel_mode(wanted, trains_all=trains_all, dtype=dtype, world_size=ranks)
            assert found == mode


def test_shards_take_no_divided_micro_batches():
    """A checkpoint of replicas may ask for them; ranks would gather weights unequally often."""
    model, state = object.__new__(TrainingEngine), TrainState(micro_batch_splits=2)
    model._parallel, model.captured, model.not_captured = "fsdp", None, "sharded"
    model.apply_memory_measures(state)
    assert state.micro_batch_splits == 0


def test_replicas_of_weights_trained_in_bf16_are_refused():
    with pytest.raises(UserError, match="--precision fp32"):
        parallel_mode("ddp", trains_all=True, dtype=torch.bfloat16, world_size=1)
