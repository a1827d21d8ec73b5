"""For every row of the metric table a value that a run must have written, computed apart from the program.

Three runs of the real loop and a description of a data set: on a CPU against plain torch and peft
(`tests/helpers/reference.py`), with clock, host and answers set by hand; on a pretended machine of two ranks
with GPUs, where the losses follow a known curve; and one trouble after the other for the alerts. A row is
covered where a check has compared a value of it, never by its name. `test_every_row_has_a_checked_value`
names the rows that none has.

uv run pytest tests/runs/test_metric_values.py
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

import tb_logger
from finetuning.events.metric_table import METRICS
from tests.helpers import fake_nvml
from tests.helpers.checked_values import Ledger, Values
from tests.runs.metric_values import cpu_run, cpu_values, data_set, gpu_run
from tests.runs.metric_values import troubles as alerts

CHECKS = (*cpu_values.CHECKS, *gpu_run.CHECKS, *data_set.CHECKS, *alerts.CHECKS)


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture(scope="module")
def done() -> set[Callable]:
    """Checks that were made."""
    return set()


@pytest.fixture(scope="module")
def cpu(ledger, tmp_path_factory, tiny_model, cache_dir) -> cpu_run.CpuRun:
    folder = tmp_path_factory.mktemp("cpu")
    return cpu_run.do_cpu_run(
        ledger, folder, cpu_run.schooled(tiny_model, folder / "model"), cache_dir
    )


@pytest.fixture(scope="module")
def gpus(ledger, tmp_path_factory, tiny_model, cache_dir) -> gpu_run.GpuRun:
    folder = tmp_path_factory.mktemp("gpus")
    return gpu_run.do_gpu_run(ledger, folder, tiny_model, cache_dir, fake_nvml.build(folder))


@pytest.fixture(scope="module")
def data(ledger, tmp_path_factory, tiny_model, cache_dir) -> list[data_set.Described]:
    folder = tmp_path_factory.mktemp("described")
    return [
        data_set.describe(ledger, folder, tiny_model, cache_dir, limit)
        for limit in (data_set.SHORT, data_set.WIDE)
    ]


@pytest.fixture(scope="module")
def troubles(ledger, tmp_path_factory) -> alerts.Troubles:
    return alerts.do_troubles(ledger, tmp_path_factory.mktemp("troubles"))


def do(check: Callable, request: pytest.FixtureRequest) -> None:
    """A check on its run."""
    (name,) = inspect.signature(check).parameters
    check(request.getfixturevalue(name))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_values(check: Callable, request: pytest.FixtureRequest, done: set[Callable]):
    do(check, request)
    done.add(check)


def test_every_row_has_a_checked_value(request: pytest.FixtureRequest, ledger, done):
    """By itself it makes all checks; behind the others only those that failed, once more."""
    for check in CHECKS:
        if check not in done:
            do(check, request)
    assert not ledger.missing()
    runs = [request.getfixturevalue(name) for name in ("cpu", "gpus", "troubles")]
    for run in [*runs, *request.getfixturevalue("data")]:
        assert not run.values.half_checked()


def test_a_row_without_a_value_is_named(ledger: Ledger):
    assert len(Ledger().missing()) == len(METRICS)
    without = Ledger(ledger.rows - {("scalar", "Eval/Loss")})
    assert "scalar Eval/Loss" in without.missing()


def test_a_wrong_value_a_missing_point_and_an_unknown_tag_are_seen(tmp_path: Path):
    with tb_logger.TensorBoardLogger(tmp_path) as logger:
        for step in (1, 2):
            logger.log(step, {"Eval/Loss": float(step), "Custom/Mine": 0.0})
    values = Values(found := Ledger(), tmp_path)
    for wrong in ({1: 1.0, 2: 2.1}, {1: 1.0}, {1: 1.0, 2: 2.0, 3: 3.0}, {}):
        with pytest.raises(AssertionError):
            values.scalars("Eval/Loss", wrong)
    for tag in ("Eval/Perplexity", "Custom/Mine"):
        with pytest.raises(AssertionError):
            values.scalars(tag, {1: 0.0, 2: 0.0})
    assert not found.rows
    values.scalars("Eval/Loss", {1: 1.0, 2: 2.0})
    assert found.rows == {("scalar", "Eval/Loss")}
