"""Several runs side by side: what differs, what is best, as text, JSON and page.

uv run pytest tests/runs/test_compare_runs.py
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import tyro
from rich.cells import cell_len

import compare_runs
from finetuning.common.errors import exit_code
from finetuning.common.formatting import four_digits
from finetuning.config import DataSettings, DirectTrainingConfig
from finetuning.runs import comparison
from finetuning.runs.comparison import (
    as_json,
    differences,
    labels,
    metrics,
    page,
    sparkline,
    unlike,
)
from finetuning.runs.directory import RUN_PREFIX, RunDirectory
from finetuning.runs.recorded import find_runs, read_recorded
from tests.helpers.html_page import assert_harmless


def make_run(output: Path, stamp: str, losses: list[float], **config: object) -> RunDirectory:
    run = RunDirectory(output, RUN_PREFIX + stamp)
    run.logs.mkdir(parents=True)
    lines = [
        {"step": i, "time": 10.0 * i, "metrics": {"Training/Loss": loss, "Eval/Loss": loss + 0.1}}
        for i, loss in enumerate(losses, 1)
    ]
    text = "".join(json.dumps(record) + "\n" for record in lines)
    (run.logs / "metrics.jsonl").write_text(text, encoding="utf-8")
    if config:
        record = {"config": config, "model": {"name": "m"}, "steps": len(losses)}
        (run.logs / "configuration.json").write_text(json.dumps(record), encoding="utf-8")
    (run.logs / "status.json").write_text('{"status": "completed"}', encoding="utf-8")
    return run


@pytest.fixture
def output(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    one = {"workers": 1, "mirror": "", "notify": []}
    make_run(out, "20250101_000000", [3.0, 2.5, 2.0], learning_rate=1e-4, seed=1, **one)
    other = {"workers": 2, "mirror": "s3://a", "notify": ["slack"]}
    make_run(out, "20250102_000000", [3.0, 2.0, 1.0], learning_rate=3e-4, seed=1, **other)
    return out


def recorded(*places: Path) -> list:
    return [read_recorded(run) for run in find_runs(places)]


def test_only_settings_that_differ_are_shown(output):
    assert differences(recorded(output)) == {"learning_rate": [1e-4, 3e-4]}


def test_a_run_without_recorded_settings_makes_nothing_differ(output):
    make_run(output, "20250103_000000", [3.0])
    assert differences(recorded(output)) == {"learning_rate": [1e-4, 3e-4, None]}


def test_metrics(output):
    table = metrics(recorded(output))
    assert table["last training loss"] == [2.0, 1.0]
    assert table["lowest held-out loss"] == pytest.approx([2.1, 1.1])
    assert "MFU, %" not in table, "no run has it"


def test_the_tables_mark_the_best(output, capfd):
    compare_runs.main((str(output),))
    said = capfd.readouterr().out
    assert "learning_rate" in said and "1.1 *" in said and "2.1 *" not in said
    assert "3/3" in said and "0:20" in said and "█" in said
    assert " 1 *" not in said, "the last training loss is of one interval, over other samples"


def test_no_run_is_the_best_where_the_held_out_samples_differ(output, capfd):
    make_run(output, "20250103_000000", [3.0, 2.0, 0.5], learning_rate=1e-4, seed=2)
    compare_runs.main((str(output),))
    said = capfd.readouterr().out
    assert "*" not in said and "no best: held out is not the same, by seed" in said
    assert "*" not in page(recorded(output)).partition("</style>")[2]


HELD_OUT_OTHERWISE = {
    "model_name": "another",
    "data_path": ["b"],
    "columns": {"question": "q"},
    "eval_path": ["held_out"],
    "eval_fraction": 0.2,
    "max_eval_samples": 7,
    "max_seq_length": 4096,
    "over_length": "error",
    "loss_on": "all_turns",
    "empty_thinking": "train",
    "control_tokens": "split",
    "seed": 2,
}


@pytest.mark.parametrize(("name", "value"), HELD_OUT_OTHERWISE.items())
def test_each_setting_of_what_is_held_out_makes_no_run_the_best(tmp_path, name, value):
    for stamp, loss, settings in [("1", 2.0, {}), ("2", 1.0, {name: value})]:
        config = dataclasses.asdict(DirectTrainingConfig()) | settings
        make_run(tmp_path, f"2025010{stamp}_000000", [loss], **config)
    assert {found.partition(".")[0] for found in unlike(recorded(tmp_path))} == {name}


def test_every_setting_of_the_data_is_among_them_or_moves_no_held_out_token():
    trains_only = {
        "data_weights",
        "data_weights_by",
        "replay",
        "packing",
        "tokens_per_row",
        "max_broken_fraction",
    }
    names = {field.name for field in dataclasses.fields(DataSettings)}
    assert names - trains_only == set(HELD_OUT_OTHERWISE) - {"model_name", "seed"}


def test_the_speed_is_the_median(output):
    for logs, speeds in zip(
        sorted(output.glob("training_logs/*")), ([9.0, 5.0, 1.0], [4.0] * 3), strict=True
    ):
        lines = [
            {"step": i, "time": 1.0, "metrics": {"Throughput/Tokens_Per_Second": speed}}
            for i, speed in enumerate(speeds)
        ]
        text = "".join(json.dumps(record) + "\n" for record in lines)
        (logs / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert metrics(recorded(output)) == {"tokens per second, median": [5.0, 4.0]}


def test_json_is_strict_and_alone(output, tmp_path, capfd):
    make_run(tmp_path / "odd", "20250104_000000", [math.nan], learning_rate=1e-4)
    logs = next((tmp_path / "odd" / "training_logs").iterdir())
    line = {"step": 1, "time": 1.0, "metrics": {"Training/Loss": None}}
    (logs / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    compare_runs.main((str(output), str(tmp_path / "odd")), json=True)
    found = json.loads(capfd.readouterr().out, parse_constant=lambda c: pytest.fail(c))
    assert len(found["runs"]) == 3
    assert found["metrics"]["last training loss"] == [2.0, 1.0, None]
    assert as_json(recorded(output))["settings"] == {"learning_rate": [1e-4, 3e-4]}


def test_the_page_is_harmless_and_has_the_curves(output, tmp_path, capfd):
    make_run(output, "20250105_000000", [2.0], learning_rate="<script>x</script>")
    compare_runs.main((str(output),), html=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert_harmless(text)
    assert "&lt;script&gt;" in text and text.count("<path") == 6
    assert page(recorded(output)) == text


def test_runs_of_several_directories_are_told_apart(output, tmp_path):
    make_run(tmp_path / "other", "20250101_000000", [1.0], seed=1)
    names = labels(recorded(output, tmp_path / "other"), by_time=True)
    assert len(set(names)) == 3 and "other/20250101_000000" in names
    assert labels(recorded(output), by_time=True) == ["20250101_000000", "20250102_000000"]
    assert labels(recorded(output)) == ["learning_rate=1e-4", "learning_rate=3e-4"]
    assert len(set(labels(recorded(output, tmp_path / "other")))) == 3


def test_sparkline():
    assert sparkline([3.0, 2.0, 1.0]) == "█▄▁" or sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([]) == sparkline([math.nan]) == ""
    assert len(sparkline([float(i) for i in range(1000)])) <= comparison.SPARK_WIDTH
    assert sparkline([1.0, math.nan, 1.0]) == "▁ ▁"


@pytest.mark.parametrize("arguments", [["absent"], [".", "--html", "x.html"]])
def test_bad_input_is_one_line_and_exit_code_2(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["compare_runs.py", *arguments])
    assert exit_code(lambda: tyro.cli(compare_runs.main)) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_page_that_cannot_be_written(output, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        "sys.argv", ["compare_runs.py", str(output), "--html", str(tmp_path / "file" / "x.html")]
    )
    assert exit_code(lambda: tyro.cli(compare_runs.main)) == 2
    assert "can't be written" in capfd.readouterr().err


def test_many_runs_are_legible_at_80_columns(tmp_path, capfd, monkeypatch):
    """A row a run: no line is wider, no number and no name is split over two lines."""
    monkeypatch.setenv("COLUMNS", "80")
    for i in range(20):
        losses = [3.0, 2.0 + i / 7, 1.0 + i / 7]
        make_run(tmp_path, f"20250101_0000{i:02d}", losses, learning_rate=1e-4 * (i + 1), lora_r=i)
    compare_runs.main((str(tmp_path),))
    lines = capfd.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) % 20 == 0 and all(re.match(r"│ 20250101_0000\d\d │", row) for row in rows)
    said = "\n".join(lines)
    for i, run in enumerate(recorded(tmp_path)):
        assert said.count(f"│ {run.name.removeprefix(RUN_PREFIX)} │") == len(rows) // 20
        assert f" {four_digits(run.last('Eval/Loss'))} " in said and f" {i} " in said
    assert "held-out" in said and "learning_rate" in said and "█" in said


def test_a_page_of_many_runs_draws_the_newest(tmp_path):
    for i in range(comparison.MOST_CURVES + 3):
        make_run(tmp_path, f"20250101_0000{i:02d}", [3.0, 1.0])
    text = page(comparison.read_all(find_runs([tmp_path]), curves=True))
    assert text.count("<path") == 2 * comparison.MOST_CURVES and "of the newest 24" in text
    assert text.count("20250101_000000") == 2, "in both tables"


def test_only_what_is_shown_is_read(output):
    logs = sorted(output.glob("training_logs/*"))
    line = {"step": 9, "time": 1.0, "metrics": {"Training/Gradient_Norm": 1.0, "My/Own": 2.0}}
    for folder in logs:
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    plain, drawn = (comparison.read_all(find_runs([output]), curves=c) for c in (False, True))
    assert set(plain[0].series) == {"Training/Loss", "Eval/Loss", "My/Own"}
    assert set(drawn[0].series) == {*plain[0].series, "Training/Gradient_Norm"}
