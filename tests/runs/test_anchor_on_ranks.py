"""Training that is held to its base: two ranks make the updates of one process with the same global batch.

uv run pytest -m "not long" tests/runs/test_anchor_on_ranks.py
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetuning.config import DirectTrainingConfig
from tests.helpers.sessions import Run, Session, do_on_ranks, settings

pytestmark = pytest.mark.slow

ANCHOR = 0.7
LOSSES = ("Training/Loss", "Training/Gradient_Norm", "Eval/Loss", "Forgetting/KL_Held_Out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("anchor")


@pytest.fixture(scope="module")
def config(folder: Path, tiny_model: Path, cache_dir: Path) -> DirectTrainingConfig:
    return settings(folder, tiny_model, cache_dir, kl_anchor=ANCHOR, gradient_accumulation_steps=2)


@pytest.fixture(scope="module")
def alone(config, folder) -> tuple[Run, Session]:
    run, (session,) = do_on_ranks(0, replace(config, output_dir="alone"), folder)
    return run, session


def far(one: Session, other: Session) -> list[float]:
    """How far the gradients of each update are apart, as a share of their length."""
    found = []
    for mine, yours in zip(one.updates, other.updates, strict=True):
        apart = [a - b for a, b in zip(mine.gradients, yours.gradients, strict=True)]
        length = torch.cat([a.flatten() for a in mine.gradients]).norm()
        found.append(float(torch.cat([a.flatten() for a in apart]).norm() / length))
    return found


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_make_the_updates_of_one(config, folder, alone, mode):
    run, session = alone
    changes = {"parallel": mode, "gradient_accumulation_steps": 1, "output_dir": mode}
    shared, sessions = do_on_ranks(2, replace(config, **changes), folder)
    assert shared.plan.rows_per_step == run.plan.rows_per_step == 2
    for rank in sessions:
        assert len(rank.updates) > 4 and max(far(session, rank)) < 1e-4
    for tag in LOSSES:
        assert len(run.points[tag]) > 1
        assert shared.points[tag] == pytest.approx(run.points[tag], rel=2e-4, abs=1e-6), tag


def test_without_the_anchor_the_updates_are_others(config, folder, alone):
    """Else the test above would say nothing about it; at first, with adapters at zero, they are alike."""
    free = replace(config, kl_anchor=0.0, output_dir="free")
    _, (session,) = do_on_ranks(0, free, folder)
    first, *later = far(alone[1], session)
    assert first < 1e-5 and min(later) > 1e-3
