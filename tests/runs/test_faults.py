"""A short, representative part of the fault suite; the whole: `uv run python -m benchmarks.faults --all`.

uv run pytest -m "not long" tests/runs/test_faults.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Every row of the quick form has a trial here, so that one whose fault no longer comes is seen at once.
COUNTS = {
    **{"F02": 2, "F03": 1, "F04": 3, "F06": 1, "F07": 1, "F09": 0, "F10": 20, "F11": 2, "F12": 1},
    **{"F16": 1, "F18": 3, "F22": 20, "F23": 1, "F24": 1, "F25": 1},
}
SECONDS = 900  # on a machine that is busy; about 90 on one that is not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="the fault suite forks; Windows can't"),
]


def run_suite(path: Path, *options: str) -> tuple[list[dict], dict]:
    """Run the suite in a process of its own; its rows' numbers, and its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *options, "--json", str(path)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "FAULTS_WORK"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    output = f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.returncode in (0, 1) and path.is_file(), output[-3000:]
    return json.loads(path.read_text()), json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def tallies(tmp_path_factory) -> dict[str, dict]:
    """Row -> its numbers."""
    path = tmp_path_factory.mktemp("faults") / "tallies.json"
    counts = ",".join(f"{row}={count}" for row, count in COUNTS.items())
    rows, last = run_suite(path, "--only", ",".join(COUNTS), "--counts", counts, "--no-mutants")
    assert last["tried"] == sum(tally["tried"] for tally in rows)
    return {tally["row"]: tally for tally in rows}


@pytest.mark.parametrize("row", COUNTS)
def test_nothing_is_lost(tallies: dict[str, dict], row: str):
    tally = tallies[row]
    if tally["skipped"] and not tally["tried"]:
        pytest.skip("; ".join(tally["skipped"]))
    assert tally["tried"] > 0
    assert (tally["lost"], tally["void"]) == (0, 0), "\n".join(tally["faults"])


def test_signals_come_at_places_that_exist():
    """The row takes minutes and is run by hand; a function that moved would make it void."""
    from benchmarks.faults.interruptions import SIGNAL_PLACES

    assert [
        name for name, owner, function, _ in SIGNAL_PLACES if not hasattr(owner, function)
    ] == []


def test_an_error_of_the_suite_itself_ends_it_and_is_no_loss():
    """A name that the program no longer has would else count as a fault that the program did not survive."""
    from benchmarks.faults.checkpoints import resealed
    from benchmarks.faults.rig import replaced
    from benchmarks.faults.tally import SuiteError, Tally

    tally = Tally("F00")
    tally.attempt("the program's own", lambda: json.loads(3))
    assert (tally.tried, tally.lost) == (1, 1)
    for name, trial in (
        ("a name that is gone", lambda: replaced(json, "gone", None)),
        ("a wrong call", lambda: resealed(None)),
    ):
        with pytest.raises(SuiteError, match=name):
            tally.attempt(name, trial)
    assert tally.tried == 1


def test_an_error_of_the_suite_in_a_child_ends_it(tmp_path: Path):
    from benchmarks.faults.rig import fork, replaced
    from benchmarks.faults.tally import SuiteError

    with pytest.raises(SuiteError, match=r"json.* has no gone"):
        fork(tmp_path / "log", lambda: replaced(json, "gone", None)).wait(60)
    assert fork(tmp_path / "log", lambda: json.loads(3)).wait(60).code == 70


def test_the_suite_notices_a_program_without_its_protection(tmp_path: Path):
    """Two mutants end to end: without digests, without seal, damage is loaded and the row says so."""
    rows, _ = run_suite(tmp_path / "tallies.json", "--only", "F10", "--counts", "F10=1")
    assert set(rows[0]["mutants"].values()) == {True}
