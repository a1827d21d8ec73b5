"""What a plan decides about memory, in a run: on all ranks alike, told, recorded, and without another result.

uv run pytest -m "not long" tests/runs/test_placement.py
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from finetuning.command_line import parse_command_line
from finetuning.common.distributed import Distributed
from finetuning.common.terminal import Terminal
from finetuning.config import DirectTrainingConfig
from finetuning.events.reading import read_run
from finetuning.model.loading import separate_layers
from finetuning.runs import plan
from finetuning.runs.build import build_engine
from finetuning.runs.summary import run_rows
from finetuning.training import memory_plan
from finetuning.training.memory_estimate import USABLE
from tests.helpers.tiny_model import FAST

ONE = Distributed(0, 1, 0, torch.device("cpu"))
LOUD = [option for option in FAST if option != "--quiet"]


@dataclass(frozen=True)
class BesideATighterRank(Distributed):
    """Whose plan has one more layer recomputed."""

    def gather(self, value: object) -> list:
        return [value, value + 1] if type(value) is int else [value]


@pytest.fixture(autouse=True)
def layer_by_layer(monkeypatch) -> None:
    """This machine plans as a GPU does."""
    monkeypatch.setattr(memory_plan, "BY_LAYER", {"cpu"})


@pytest.fixture
def config(tmp_path, tiny_model, tiny_data, cache_dir) -> DirectTrainingConfig:
    """What the short runs of tests have."""
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    places = ["--output-dir", str(tmp_path / "out"), "--cache-dir", str(cache_dir)]
    return parse_command_line([*FAST, *inputs, *places]).training


def leave_room(config: DirectTrainingConfig, monkeypatch, recomputed: int) -> None:
    """From here on so much is free that a step just fits with so many layers recomputed."""
    found = plan.plan_run(config, ONE, Terminal(quiet=True)).forecast.memory
    assert found.layers == 2 and found.text == "off"
    free = int(found.estimates[recomputed].total / USABLE) + 1
    monkeypatch.setattr(plan, "free_memory", lambda *_: free)


def test_as_many_layers_are_recomputed_as_the_memory_asks_for(config, monkeypatch):
    leave_room(config, monkeypatch, 1)
    found = plan.plan_run(config, ONE, Terminal(quiet=True))
    assert found.execution.recomputed_layers == 1 and found.execution.may_recompute
    assert found.settings["gradient_checkpointing"] == "1 of 2 layers"
    assert "gradient_checkpointing" in found.automatic
    assert not {"gradient_checkpointing", "recomputed_layers"} & set(found.identity)
    engine = build_engine(config, found, ONE, Terminal(quiet=True))
    layers = separate_layers(engine.packed.model)
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert dict(run_rows(found, engine, ONE))["gradient checkpointing"] == "1 of 2 layers"
    engine.recomputes_all = True
    assert dict(run_rows(found, engine, ONE))["gradient checkpointing"] == "on"


def test_all_ranks_recompute_as_many_layers_as_the_tightest(config, monkeypatch):
    leave_room(config, monkeypatch, 1)
    ranks = BesideATighterRank(0, 1, 0, torch.device("cpu"))
    found = plan.plan_run(config, ranks, Terminal(quiet=True))
    assert found.execution.recomputed_layers == 2 and not found.execution.may_recompute
    assert found.settings["gradient_checkpointing"] == "on" == found.forecast.memory.text


@pytest.mark.slow
def test_a_run_with_some_layers_recomputed_is_the_same_run(
    tmp_path: Path, config, finished, run, monkeypatch, capfd
):
    leave_room(config, monkeypatch, 1)
    assert run(tmp_path, "--num-probes", "1", "--probe-max-new-tokens", "8", first=LOUD) == 0
    assert "1 of 2 layers" in capfd.readouterr().out
    (made,), (reference,) = (
        (out / "tensorboard_logs").iterdir() for out in (tmp_path / "out", finished)
    )
    assert read_run(made)["Training/Loss"] == read_run(reference)["Training/Loss"]
    (path,) = (tmp_path / "out").rglob("configuration.json")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    assert recorded["config"]["gradient_checkpointing"] == "1 of 2 layers"
