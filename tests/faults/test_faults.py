"""A short, representative part of the fault suite; the whole: `uv run python -m tests.faults --all`.

uv run pytest tests/faults
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COUNTS = {"F02": 2, "F03": 1, "F04": 3, "F09": 0, "F10": 20, "F11": 2, "F12": 1, "F16": 1, "F23": 1}
SECONDS = 900  # on a machine that is busy; about 60 on one that is not

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the fault suite forks; Windows can't")


@pytest.fixture(scope="module")
def tallies(tmp_path_factory) -> dict[str, dict]:
    """Row -> its numbers, from one run of the suite in a process of its own."""
    path = tmp_path_factory.mktemp("faults") / "tallies.json"
    counts = ",".join(f"{row}={count}" for row, count in COUNTS.items())
    command = [sys.executable, "-m", "tests.faults", "--only", ",".join(COUNTS), "--counts", counts]
    environment = {k: v for k, v in os.environ.items() if k != "FAULTS_WORK"}
    done = subprocess.run(
        [*command, "--no-mutants", "--json", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert path.is_file(), (done.stdout + done.stderr)[-3000:]
    found = {tally["row"]: tally for tally in json.loads(path.read_text())}
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["tried"] == sum(tally["tried"] for tally in found.values())
    return found


@pytest.mark.parametrize("row", COUNTS)
def test_nothing_is_lost(tallies: dict[str, dict], row: str):
    tally = tallies[row]
    if tally["skipped"] and not tally["tried"]:
        pytest.skip("; ".join(tally["skipped"]))
    assert tally["tried"] > 0
    assert (tally["lost"], tally["void"]) == (0, 0), "\n".join(tally["faults"])


def test_the_suite_notices_a_program_without_its_protection(tmp_path: Path):
    """One mutant end to end: without digests, flipped bits are loaded and the row says so."""
    path = tmp_path / "tallies.json"
    rows = ["--only", "F10", "--counts", "F10=1", "--json", str(path)]
    subprocess.run(
        [sys.executable, "-m", "tests.faults", *rows],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "FAULTS_WORK"},
        capture_output=True,
        timeout=SECONDS,
    )
    assert set(json.loads(path.read_text())[0]["mutants"].values()) == {True}
