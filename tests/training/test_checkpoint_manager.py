"""When a run's checkpoints are due, which remain, and which one a later start goes on from.

uv run pytest tests/training/test_checkpoint_manager.py
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from finetuning.common import language
from finetuning.common.distributed import Distributed
from finetuning.common.errors import RunStopped, UserError
from finetuning.training import checkpoint_manager
from finetuning.training.checkpoint_manager import CheckpointManager

ONE = Distributed(0, 1, 0, torch.device("cpu"))
Make = Callable[..., CheckpointManager]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Checkpoints below one directory; what was said and warned of is in `.said`."""

    def make(dist: object = ONE, **settings) -> CheckpointManager:
        said: list[str] = []
        settings = {"save_steps": "auto", "keep": 2, **settings}
        made = CheckpointManager(tmp_path, dist, say=said.append, warn=said.append, **settings)
        made.said = said
        return made

    return make


def save(
    checkpoints: CheckpointManager, step: int, run: str = "run", value: float = 1.0, protect=None
):
    tensors = {"adapter_model": {"a": torch.full((3,), value)}}
    state = {"train_state": {"step": step}}
    checkpoints.save(run, step, tensors, documents={}, state=state, protect=protect)


def took(checkpoints: CheckpointManager, seconds: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """The last save took that long; the time when it ended."""
    now = time.monotonic()
    clock(monkeypatch, now - seconds, now)
    save(checkpoints, 50)
    return now


def clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """What the module's clock says, one after the other."""
    clock = SimpleNamespace(monotonic=partial(next, iter(times)))
    monkeypatch.setattr(checkpoint_manager, "time", clock)


@pytest.mark.parametrize(
    ("seconds", "waited", "due"),
    [(5.0, 99, False), (5.0, 101, True), (600.0, 14 * 60, False), (600.0, 16 * 60, True)],
    ids=["too early", "twenty times as long", "stalled", "stalled, a quarter of an hour ago"],
)
def test_automatic_checkpoints_take_a_twentieth_of_the_time(
    make, monkeypatch, seconds, waited, due
):
    checkpoints = make()
    now = took(checkpoints, seconds, monkeypatch)
    clock(monkeypatch, now + waited)
    assert checkpoints.is_due(100) is due
    assert not checkpoints.is_due(99)


def test_the_wait_begins_anew_with_every_checkpoint(make, monkeypatch):
    checkpoints = make()
    begin = time.monotonic()
    for saved in (1000, 2000):  # seconds after the beginning, of which each save takes 5
        clock(monkeypatch, begin + saved - 5, begin + saved)
        save(checkpoints, 50 * saved // 1000)
        for waited, due in ((99, False), (101, True)):
            clock(monkeypatch, begin + saved + waited)
            assert checkpoints.is_due(100) is due, (saved, waited)


@pytest.mark.parametrize(("waited", "due"), [(14 * 60, False), (16 * 60, True)])
def test_slow_steps_do_not_wait_for_fifty_of_them(make, monkeypatch, waited, due):
    checkpoints = make()
    now = took(checkpoints, 1.0, monkeypatch)
    clock(monkeypatch, *3 * [now + waited])
    assert [checkpoints.is_due(step) for step in (60, 110, 65)] == [due, due, False]


@pytest.mark.parametrize("rank_0_says", [True, False])
def test_rank_0_decides_when_a_checkpoint_is_due(make, rank_0_says):
    asked = []

    def any_of(mine: bool) -> list[bool]:
        asked.append(mine)
        return [rank_0_says]

    checkpoints = make(SimpleNamespace(is_main=False, any=any_of))
    assert checkpoints.is_due(50) is checkpoints.is_due(60) is rank_0_says
    assert asked == [False, False], "another rank's clock counts for nothing"
    assert not checkpoints.is_due(49) and len(asked) == 2, "ranks agree on when to ask"


def test_a_fixed_distance_is_kept(make):
    assert [step for step in range(1, 13) if make(save_steps=4).is_due(step)] == [4, 8, 12]
    assert not any(make(save_steps=0).is_due(step) for step in range(1, 13))


def test_the_newest_and_the_best_remain(make, tmp_path):
    checkpoints = make()
    save(checkpoints, 1, run="another")
    for step in (1, 2, 3, 4):
        save(checkpoints, step, protect=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"}
    assert checkpoints.resolve_resume("latest").run == "run" and checkpoints.step == 4
    assert checkpoints.newest("another").step == 1
    assert make().resolve_resume(str(tmp_path / "checkpoint-2")).step == 2
    assert [line for line in checkpoints.said if line.endswith("checkpoint-4")]


def test_generators_go_on_as_they_were(make):
    checkpoints = make()
    save(checkpoints, 7)
    expected = torch.rand(4)
    later_start = make()
    later_start.load_rng(later_start.resolve_resume("auto"))
    assert torch.equal(torch.rand(4), expected) and later_start.step == 7
    # Rank 1 did not exist then: it keeps its own.
    other = make(Distributed(1, 1, 1, torch.device("cpu")))
    own = torch.get_rng_state()
    other.load_rng(later_start.resolve_resume("auto"))
    assert torch.equal(torch.get_rng_state(), own)


def test_nothing_to_go_on_from(make, tmp_path):
    assert make().resolve_resume("") is None and make().resolve_resume("auto") is None
    with pytest.raises(UserError, match=r"--resume latest: no usable checkpoint.*--resume auto"):
        make().resolve_resume("latest")
    with pytest.raises(UserError, match="not a usable checkpoint"):
        make().resolve_resume(str(tmp_path / "checkpoint-9"))


def test_what_forbids_a_checkpoint_is_said_and_the_one_before_stays(make, tmp_path):
    checkpoints = make()
    save(checkpoints, 1)
    with pytest.raises(RunStopped, match=r"step 2: .*\ba is not finite.*--resume latest"):
        save(checkpoints, 2, value=float("nan"))
    assert checkpoints.step == 1 and make().resolve_resume("latest").step == 1
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1"}


def test_a_restarted_group_goes_on_with_its_run_whatever_resume_says(make):
    save(make(), 9, run="of last week")
    group = dataclasses.replace(ONE, job_store=HashStore())
    first = make(group)
    assert first.resolve_resume("") is None and first.run_before_first_checkpoint() == ""
    group.put("run", "run")
    second = make(group)  # the first one died before it saved anything
    assert second.resolve_resume("") is None and second.run_before_first_checkpoint() == "run"
    save(second, 3)
    third = make(group)
    assert third.resolve_resume("").run == "run" and third.run_before_first_checkpoint() == ""


def test_elsewhere_is_asked_where_there_may_be_something(make: Make, tmp_path: Path):
    """Not for a run that has saved nothing yet: its mirror need not be there."""
    asked: list[str | None] = []
    group = dataclasses.replace(ONE, job_store=HashStore())
    assert make(group).resolve_resume("auto", asked.append) is None and asked == [None]
    group.put("run", "run")
    assert make(group).resolve_resume("auto", asked.append) is None and asked == [None]
    checkpoints = make(group)
    save(checkpoints, 3)
    assert make(group).resolve_resume("auto", asked.append).run == "run" and asked == [None]
    shutil.rmtree(checkpoints.newest_path)
    assert make(group).resolve_resume("auto", asked.append) is None and asked == [None, "run"]


def test_a_second_checkpoint_of_a_step_is_explained(make: Make, tmp_path: Path):
    """`checkpoint-6.2` is no step of six and a fifth."""
    for run in ("first", "second"):
        checkpoints = make(save_steps=0)
        save(checkpoints, 6, run)
    path = tmp_path / "checkpoint-6.2"
    told = f"saved {path} (checkpoint 2 of step 6: others have been here before)"
    assert checkpoints.said == [told] and path.is_dir()
    assert language.in_chinese(told) == (
        f"已保存 {path}（第 6 步的第 2 个检查点：之前的运行已在此处留下同一步的检查点）"
    )
