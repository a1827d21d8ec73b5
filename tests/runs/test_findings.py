"""What to do next: each finding on a run that was built to have it, and its absence on one that has not."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest

from finetuning.command_line import parse_command_line
from finetuning.common import language
from finetuning.runs.directory import RUN_PREFIX, RunDirectory
from finetuning.runs.findings import KINDS, command, findings
from finetuning.runs.recorded import find_runs, read_recorded
from finetuning.runs.report import headline, page

STEPS = range(1, 201)


def healthy() -> dict:
    """A run as it should go, by the files that it leaves."""
    rows = {}
    for step in STEPS:
        loss = 1 + 2 * math.exp(-step / 25)
        rows[step] = {
            "Training/Loss": loss,
            "Training/Epoch": 3 * step / 200,
            "Throughput/Step_Seconds": 1.0,
            "Throughput/Step_Seconds_Data": 0.01,
        }
        if step % 40 == 0:
            rows[step]["Eval/Loss"] = loss + 0.1
            rows[step] |= {"Eval/By_Source/good": loss, "Eval/By_Source/poor": loss}
    settings = {"learning_rate": 3e-4, "num_epochs": 3.0, "data_path": ["good.jsonl", "poor.jsonl"]}
    return {"rows": rows, "alerts": [], "dataset": {}, "settings": settings}


def recorded(folder: Path, files: dict):
    run = RunDirectory(folder / "out", RUN_PREFIX + "20250101_000000")
    run.logs.mkdir(parents=True)
    run.tensorboard.mkdir(parents=True)
    lines = [{"step": s, "time": 1e9 + s, "metrics": row} for s, row in files["rows"].items()]
    (run.logs / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (run.logs / "alerts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in files["alerts"]))
    (run.logs / "dataset_statistics.json").write_text(json.dumps(files["dataset"]))
    configuration = {"config": files["settings"], "steps": 200}
    (run.logs / "configuration.json").write_text(json.dumps(configuration))
    return read_recorded(run)


def alert(name: str, step: int = 100, **evidence: object) -> dict:
    return {"name": name, "step": step, "value": 1.0, "threshold": 0.5, "evidence": evidence}


def diverged(files):
    files["alerts"] += [alert("Divergence", 120)]


def poor_source(files):
    for step in (120, 160, 200):
        files["rows"][step]["Eval/By_Source/poor"] *= step / 80


def overfits(files):
    for step in (80, 120, 160, 200):
        files["rows"][step]["Eval/Loss"] = 1.1 + step / 1000


def forgets(files):
    files["alerts"] += [alert("Forgetting")]


def too_long(files):
    counts = {"dropped": 20, "shortened": 5}
    files["dataset"] |= {"total_samples": 100, "truncation": counts}
    files["settings"] |= {"max_seq_length": 2048}


def too_slow(files):
    for step in STEPS:
        files["rows"][step]["Training/Loss"] = 3 - step / 4000


def by_heart(files):
    files["alerts"] += [alert("Saturation", 50)]


def goes_on(files):
    for step in STEPS:
        files["rows"][step]["Training/Loss"] = 3 - step / 200
        if "Eval/Loss" in files["rows"][step]:
            files["rows"][step]["Eval/Loss"] = 3.1 - step / 200


def waits(files):
    for step in STEPS:
        files["rows"][step]["Throughput/Step_Seconds_Data"] = 0.5


BUILT = {  # kind: (what makes a run have it, words of its title, settings that its command changes)
    "rate_too_high": (diverged, "too high", {"learning_rate": 1e-4}),
    "source_harmful": (poor_source, "poor does harm", {"data_weights": (1.0, 0.2)}),
    "overfitted": (overfits, "overfits", {"num_epochs": 1.2}),
    "forgotten": (forgets, "forgets", {"learning_rate": 1e-4}),
    "data_too_long": (too_long, "too long", {"max_seq_length": 4096}),
    "rate_too_low": (too_slow, "too low", {"learning_rate": 9e-4}),
    "saturated": (by_heart, "by heart", {"num_epochs": 0.8}),
    "stopped_too_early": (goes_on, "too early", {"num_epochs": 6.0}),
    "waits_for_data": (waits, "waits for data", {"workers": 4}),
}


def test_every_kind_is_built():
    assert list(BUILT) == [kind.__name__ for kind in KINDS]


def test_a_run_that_went_as_it_should_has_no_finding(tmp_path):
    run = recorded(tmp_path, healthy())
    assert findings(run) == []
    assert "nothing that should be changed" in page(run)


@pytest.mark.parametrize("kind", BUILT)
def test_a_run_with_the_trouble_has_its_finding_and_no_other(tmp_path, kind):
    files = healthy()
    change, words, settings = BUILT[kind]
    change(files)
    run = recorded(tmp_path, files)
    (found,) = findings(run)
    assert words in found.title and any(c.isdigit() for c in found.evidence)
    config = parse_command_line(shlex.split(found.command)[4:]).training
    for name, value in settings.items():
        assert getattr(config, name) == pytest.approx(value), name
    assert tuple(config.data_path) == ("good.jsonl", "poor.jsonl"), (
        "the run's own settings come along"
    )
    for text in (found.title, found.evidence):
        told = language.in_chinese(text)
        assert told != text and not re.search("[a-z]+ [a-z]+ [a-z]+", told)
    if not run.dataset:  # of which the page shows more than this test has
        assert words in page(run)


AUTOMATIC = {
    "learning_rate": "auto",
    "num_epochs": "auto",
    "device": "auto",
    "precision": "auto",
    "parallel": "auto",
    "compile": "auto",
    "gradient_checkpointing": "auto",
    "eval_steps": "auto",
    "logging_steps": "auto",
}


def test_a_command_leaves_to_the_program_what_was_left_to_it(finished: Path, tiny_run, tmp_path):
    """By the record of a real run, whose file holds what each setting became."""
    more = [word for name in AUTOMATIC for word in (f"--{name.replace('_', '-')}", "auto")]
    assert tiny_run(tmp_path, *more, "--device", "cpu", "--max-steps", "0") == 0
    (place,) = find_runs([tmp_path / "out"])
    run = read_recorded(place)
    assert run.configuration["config"]["learning_rate"] != "auto"
    config = parse_command_line(shlex.split(command(run))[4:]).training
    given = {name: getattr(config, name) for name in AUTOMATIC}
    assert given == AUTOMATIC | {"device": "cpu"}
    changed = parse_command_line(shlex.split(command(run, learning_rate=1e-4))[4:]).training
    assert changed.learning_rate == 1e-4
    assert "learning_rate" not in headline(run).get("set", "")


def test_a_command_with_steps_names_no_epochs(finished: Path):
    (place,) = find_runs([finished])
    run = read_recorded(place)
    assert run.configuration["config"]["max_steps"]
    assert "--max-steps" in command(run) and "--num-epochs" not in command(run)


def test_the_page_says_them_in_chinese(tmp_path):
    files = healthy()
    waits(files)
    run = recorded(tmp_path, files)
    language.use("zh")
    try:
        text = page(run)
    finally:
        language.use("en")
    assert "设备在等数据。" in text and "读数据占一步的 50%" in text and "接下来做什么" in text


def test_the_costliest_five_are_told(tmp_path):
    files = healthy()
    for change in (diverged, poor_source, overfits, forgets, too_long, by_heart, waits):
        change(files)
    assert len(findings(recorded(tmp_path, files))) == 5
