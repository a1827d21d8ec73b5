"""What runs are called: by what people said, else by what differs."""

import csv
import io
import json
from pathlib import Path

import pytest

from compare_runs import main as compare
from finetuning.command_line import parse_command_line
from finetuning.common.errors import UserError
from finetuning.runs import naming
from finetuning.runs.directory import RUN_PREFIX, RunDirectory, new_run

FIRST, SECOND = f"{RUN_PREFIX}20260101_000000", f"{RUN_PREFIX}20260102_000000_2"


@pytest.mark.parametrize(
    ("run", "stamp", "name"),
    [
        (FIRST, "20260101_000000", ""),
        (SECOND, "20260102_000000_2", ""),
        (f"{SECOND}_lr-1e-3_b", "20260102_000000_2", "lr-1e-3_b"),
        (f"{FIRST}_学习率", "20260101_000000", "学习率"),
        ("another", "another", ""),
    ],
)
def test_parts_of_a_name(run: str, stamp: str, name: str):
    assert (naming.stamp(run), naming.given_name(run)) == (stamp, name)


def test_a_given_name_is_in_the_directory(tmp_path: Path):
    names = ("a-b", "a-b", "", "2epochs", "2epochs", "r_2_8", "第一次", "名" * 60)
    for name in names:
        parse_command_line(["--run-name", name])
    runs = [new_run(tmp_path, name) for name in names]
    assert tuple(naming.given_name(run.name) for run in runs) == names
    assert len({run.name for run in runs}) == len(names)


@pytest.mark.parametrize(
    "name", ["a/b", "..", "7", "a b", "x.", "x" * 61, "a\\b", "a:b", "2_epochs", "7_"]
)
def test_a_name_that_no_directory_can_have_is_refused(name: str):
    with pytest.raises(UserError, match="run_name"):
        parse_command_line(["--run-name", name])


def test_labels_say_what_differs():
    settings = [{"seed": 1, "learning_rate": 1e-3}, {"seed": 1, "learning_rate": 3e-4}]
    assert naming.labels([FIRST, SECOND], settings) == [
        "learning_rate=1e-3, seed=1",
        "learning_rate=3e-4, seed=1",
    ]
    alike = naming.labels([FIRST, SECOND], [{"seed": 1}, {"seed": 1}])
    assert alike == ["seed=1 20260101_000000", "seed=1 20260102_000000_2"]
    assert naming.labels([f"{FIRST}_x", SECOND], settings)[0] == "x"
    assert naming.labels([FIRST, SECOND], [{}, {}]) == ["20260101_000000", "20260102_000000_2"]


def test_a_trial_has_a_name_of_its_own():
    assert naming.trial_name(FIRST, {"learning_rate": "auto"}) == "0101_000000"
    assert naming.trial_name(FIRST, {"learning_rate": 3e-4}) == "lr=3e-4 (0101_000000)"
    assert naming.trial_name(FIRST, {"learning_rate": 1e-3, "lora_r": 8}) == (
        "lr=1e-3, r=8 (0101_000000)"
    )
    assert naming.trial_name(f"{FIRST}_mine", {"lora_r": 8}) == "mine (0101_000000)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-3, "1e-3"), (2.5e-5, "2.5e-5"), (0.05, "0.05"), (8, "8"), (True, "True")],
)
def test_values_are_short(value: object, text: str):
    assert naming.value_text(value) == text


def test_tables_for_documents_and_spreadsheets(tmp_path: Path):
    for number, rate in enumerate((1e-3, 3e-4), 1):
        run = RunDirectory(tmp_path, f"{RUN_PREFIX}2026010{number}_000000")
        run.logs.mkdir(parents=True)
        config = {"config": {"learning_rate": rate, "general_path": ["=1+1", "x"][:number]}}
        (run.logs / "configuration.json").write_text(json.dumps(config), encoding="utf-8")
        line = {"step": 1, "time": 1.0, "metrics": {"Training/Loss": 2.0 + number}}
        (run.logs / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    compare((str(tmp_path),), markdown=tmp_path / "t.md", csv=tmp_path / "t.csv")
    table = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert "| learning_rate | 0.001 | 0.0003 |" in table.replace("\\_", "_")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text(encoding="utf-8"))))
    assert [row["last training loss"] for row in rows] == ["3.0", "4.0"]
    assert [row["label"].partition(",")[0] for row in rows] == [
        "learning_rate=1e-3",
        "learning_rate=3e-4",
    ]
    assert not [cell for row in rows for cell in row.values() if cell.startswith("=")]
