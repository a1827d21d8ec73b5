"""The proofs that docs/comparison.md gives for other programs: named, complete, and able to fail.

    uv run pytest tests/runs/test_comparison.py

The look-up in the real sources needs a network: `uv run python benchmarks/comparison_sources.py`. That our
own tests named there exist is checked in tests/runs/test_documents.py.
"""

import re
import sys
from pathlib import Path

import pytest

from benchmarks import comparison_sources
from benchmarks.comparison_sources import CLAIMS, SOURCES, TRIALS, Row, Source

PAGE = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text(encoding="utf-8")
SOURCE = '"""A trainer."""\n\nclass Trainer:\n    filter_nan: bool = True\n'


def test_every_proof_is_named_on_the_page_and_every_name_is_a_proof():
    assert set(re.findall(r"§([\w-]+)", PAGE)) == {*CLAIMS, *TRIALS}
    assert not CLAIMS.keys() & TRIALS.keys()


def test_every_program_stands_on_the_page_with_its_version():
    opening = " ".join(PAGE.split("## ")[0].split())
    for program, source in SOURCES.items():
        assert f"{program} {source.requirement.partition('==')[2]}" in opening
    assert {row.program for rows in CLAIMS.values() for row in rows} <= SOURCES.keys()
    assert all(CLAIMS.values())


def test_every_pattern_compiles_and_matches_no_empty_text():
    for rows in CLAIMS.values():
        for row in rows:
            assert not re.search(row.pattern, "", re.MULTILINE), row


@pytest.fixture
def program(tmp_path: Path, monkeypatch):
    """A function that looks up one row in a small source tree of its own; the exit status."""
    package = tmp_path / "peer" / "peer"
    package.mkdir(parents=True)
    (package / "trainer.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(comparison_sources, "SOURCES", {"Peer": Source("peer==1.0", "peer")})
    monkeypatch.setattr(comparison_sources, "TRIALS", {})

    def exit_status(row: Row) -> int:
        monkeypatch.setattr(comparison_sources, "CLAIMS", {"claim": [row]})
        monkeypatch.setattr(sys, "argv", ["comparison_sources.py", "--sources", str(tmp_path)])
        return comparison_sources.main()

    return exit_status


@pytest.mark.parametrize(
    ("row", "status", "told"),
    [
        (
            Row("Peer", "trainer.py", r"^    filter_nan: bool = True"),
            0,
            "ok   Peer           trainer.py:4",
        ),
        (
            Row("Peer", "trainer.py", r"^    filter_nan: bool = False"),
            1,
            "absent in 1 files of trainer.py",
        ),
        (Row("Peer", "*.py", r"add_histogram", present=False), 0, "absent in 1 files of *.py"),
        (Row("Peer", "*.py", r"class Trainer", present=False), 1, "trainer.py:3"),
        (Row("Peer", "gone.py", r"class Trainer"), 1, "no file gone.py"),
        (Row("Peer", "gone.py", r"class Trainer", present=False), 1, "no file gone.py"),
    ],
)
def test_a_wrong_claim_fails(program, capsys, row: Row, status: int, told: str):
    assert program(row) == status
    output = capsys.readouterr().out
    assert told in output and ("FAIL" in output) == bool(status)


def test_another_version_is_refused(program, tmp_path: Path):
    (tmp_path / "peer" / "peer-2.0.dist-info").mkdir()
    with pytest.raises(SystemExit, match=r"peer-2.0.dist-info, but the page is about peer==1.0"):
        program(Row("Peer", "trainer.py", "class Trainer"))


def test_a_trial_that_comes_out_otherwise_fails(monkeypatch, capsys):
    results = {"as-told": True, "otherwise": False}
    trials = {
        name: lambda folder, holds=holds: [(holds, "seen")] for name, holds in results.items()
    }
    monkeypatch.setattr(comparison_sources, "TRIALS", trials)
    assert [comparison_sources.check_trials([name]) for name in results] == [0, 1]
    assert "FAIL seen" in capsys.readouterr().out
