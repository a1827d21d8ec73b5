"""What to do next: each finding on a run that was built to have it, and its absence on one that has not."""

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning.command_line import parse_command_line
from finetuning.common import language
from finetuning.config import DirectTrainingConfig
from finetuning.data.split import replay_text
from finetuning.runs.directory import RUN_PREFIX, RunDirectory
from finetuning.runs.findings import KINDS, findings
from finetuning.runs.own_command import command
from finetuning.runs.recorded import find_runs, read_recorded
from finetuning.runs.report import headline, page
from finetuning.runs.source_finding import without_source, worse_source
from finetuning.training.peak_rate import HIGHEST_RATE

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
            rows[step] |= {"Eval/Loss": loss + 0.1, "Eval/Loss_Error": 0.02}
            rows[step] |= {"Eval/By_Source/good": loss, "Eval/By_Source/poor": loss}
    settings = {"learning_rate": 3e-4, "num_epochs": 3.0, "data_path": ["good.jsonl", "poor.jsonl"]}
    return {"rows": rows, "alerts": [], "dataset": {}, "settings": settings}


def recorded(folder: Path, files: dict):
    run = RunDirectory(folder / "out", RUN_PREFIX + "20250101_000000")
    run.logs.mkdir(parents=True)
    run.tensorboard.mkdir(parents=True)
    lines = [
        {"step": s, "time": 1e9 + s, "metrics": row} for s, row in sorted(files["rows"].items())
    ]
    (run.logs / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (run.logs / "alerts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in files["alerts"]))
    (run.logs / "dataset_statistics.json").write_text(json.dumps(files["dataset"]))
    if "status" in files:
        (run.logs / "status.json").write_text(json.dumps(files["status"]))
    configuration = {"config": files["settings"], "steps": 200, "model": files.get("model", {})}
    configuration["automatic"] = files.get("automatic", [])
    configuration["held_out_samples"] = files.get("held_out", {})
    (run.logs / "configuration.json").write_text(json.dumps(configuration))
    return read_recorded(run)


def alert(name: str, step: int = 100, **evidence: object) -> dict:
    return {"name": name, "step": step, "value": 1.0, "threshold": 0.5, "evidence": evidence}


def got_worse(files):
    """As a real run at a rate far too high: up at once, and never back."""
    for step in STEPS:
        row = files["rows"][step]
        row["Training/Loss"] = 1.01 if step == 1 else 3 + 6 * math.exp(-step / 40)
        if "Eval/Loss" in row:
            row["Eval/Loss"] = row["Training/Loss"]
    files["rows"][0] = {"Eval/Loss": 1.07, "Eval/Loss_Error": 0.05}


def diverged(files):
    files["alerts"] += [alert("Divergence", 120)]
    for step in range(120, 201):
        files["rows"][step]["Training/Loss"] = 2.0
        if "Eval/Loss" in files["rows"][step]:
            files["rows"][step]["Eval/Loss"] = 2.1


def poor_source(files, held_out: int = 20):
    """Its held-out loss rises by two thirds, that of the other falls."""
    for step in range(40, 201, 40):
        row = files["rows"][step]
        row["Eval/By_Source/good.jsonl"] = row.pop("Eval/By_Source/good")
        row["Eval/By_Source/poor.jsonl"] = row.pop("Eval/By_Source/poor")
        if step > 80:
            row["Eval/By_Source/poor.jsonl"] *= step / 80
    files["held_out"] = {"good.jsonl": 30, "poor.jsonl": held_out}
    files["dataset"]["samples_per_file"] = {"good.jsonl": 300, "poor.jsonl": 10 * held_out}


def overfits(files):
    for step in (80, 120, 160, 200):
        files["rows"][step]["Eval/Loss"] = 1.1 + step / 1000


def forgets(files):
    files["alerts"] += [{"name": "Forgetting", "step": 160, "value": 2.2, "threshold": 2.1}]
    for step in range(0, 201, 40):
        files["rows"].setdefault(step, {})["Forgetting/General_Loss"] = 2 + step / 800
        files["rows"][step]["Forgetting/General_Loss_Error"] = 0.02


def too_long(files):
    counts = {"dropped": 20, "shortened": 5}
    files["dataset"] |= {"total_samples": 100, "truncation": counts}
    files["settings"] |= {"max_seq_length": 2048}


def too_slow(files):
    files["settings"]["learning_rate"] = 2e-5
    for step in STEPS:
        files["rows"][step]["Training/Loss"] = 3 - step / 4000
        if "Eval/Loss" in files["rows"][step]:
            files["rows"][step]["Eval/Loss"] = 3.1 - step / 4000


def by_heart(files):
    files["alerts"] += [alert("Saturation", 50) | {"threshold": 0.995}]
    for step in STEPS:
        files["rows"][step]["Training/Token_Accuracy"] = min(1.0, 0.5 + step / 100)


def goes_on(files):
    for step in STEPS:
        files["rows"][step]["Training/Loss"] = 3 - step / 200
        if "Eval/Loss" in files["rows"][step]:
            files["rows"][step]["Eval/Loss"] = 3.1 - step / 200


def waits(files):
    for step in STEPS:
        files["rows"][step]["Throughput/Step_Seconds_Data"] = 0.5


BUILT = {  # kind: (what makes a run have it, words of its title, settings that its command changes)
    "worse_than_before": (got_worse, "made the model worse", {"learning_rate": 1e-4}),
    "rate_too_high": (diverged, "too high", {"learning_rate": 1e-4}),
    "overfitted": (overfits, "overfits", {"num_epochs": 1.2}),
    "hardly_learned": (too_slow, "too low", {"learning_rate": 3e-4}),
    "saturated": (by_heart, "by heart", {"num_epochs": 0.75}),
    "stopped_too_early": (goes_on, "too early", {"num_epochs": 6.0}),
    "forgotten": (forgets, "forgets", {"learning_rate": 1e-4}),
    "data_too_long": (too_long, "too long", {"max_seq_length": "auto"}),
    "source_harmful": (poor_source, "poor.jsonl gets worse", {"data_path": ("good.jsonl",)}),
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
        same = value if isinstance(value, tuple | str) else pytest.approx(value)
        assert getattr(config, name) == same, name
    if "data_path" not in settings:
        assert tuple(config.data_path) == ("good.jsonl", "poor.jsonl"), "its settings come along"
    for text in (found.title, found.evidence):
        told = language.in_chinese(text)
        assert told != text and not re.search("[a-z]+ [a-z]+ [a-z]+", told)
    if not files["dataset"]:  # of which the page shows more than this test has
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
    epochs = run.configuration["config"]["num_epochs"]
    assert epochs == round(epochs, 2), "it follows from the steps"


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


def test_one_sample_of_a_source_says_nothing_of_it(tmp_path):
    """Six samples, one of them held out: its loss may rise by any share."""
    for held_out in (1, 4):
        files = healthy()
        poor_source(files, held_out)
        assert findings(recorded(tmp_path / str(held_out), files)) == []


def test_a_rise_within_chance_is_none(tmp_path):
    """Of five samples at a standard error of 0.3 of 35: 2 · 0.3 · sqrt(2 · 35 · (1/5 + 1/30)) = 2.4."""
    for error, number in ((0.3, 0), (0.02, 1)):
        files = healthy()
        poor_source(files, 5)
        for step in range(40, 201, 40):
            files["rows"][step]["Eval/Loss_Error"] = error
        assert len(findings(recorded(tmp_path / str(error), files))) == number


@pytest.mark.parametrize("seed", range(20))
def test_sources_that_do_not_differ_are_not_told(tmp_path, seed):
    """Twelve sources of six held-out samples, all of one kind, whose losses are learned and then overfit."""
    draw = np.random.default_rng(seed)
    names = [f"{number}.jsonl" for number in range(12)]
    level = draw.normal(0, 0.5, (12, 6))
    files = healthy()
    for step in range(40, 201, 40):
        level = level + draw.normal(0, 0.15, level.shape)
        losses = 2 + abs(step - 120) / 200 + level
        error = losses.std(ddof=1) / math.sqrt(losses.size)
        files["rows"][step] |= {"Eval/Loss": losses.mean() - step / 1e3, "Eval/Loss_Error": error}
        for name, own in zip(names, losses, strict=True):
            files["rows"][step][f"Eval/By_Source/{name}"] = own.mean()
    files["held_out"] = dict.fromkeys(names, 6)
    files["dataset"]["samples_per_file"] = dict.fromkeys(names, 60)
    files["settings"]["data_path"] = names
    assert worse_source(recorded(tmp_path, files)) is None


def test_an_overfitted_run_is_told_first(tmp_path):
    files = healthy()
    for change in (poor_source, overfits):
        change(files)
    first, second = findings(recorded(tmp_path, files))
    assert "overfits" in first.title and "poor.jsonl" in second.title


@pytest.mark.parametrize("steps", [0, 200])
def test_where_answers_chose_the_best_model_the_loss_does_not_name_it(tmp_path, steps):
    files = healthy()
    overfits(files)
    files["settings"] |= {"best_by": "answers", "max_steps": steps}
    (found,) = findings(recorded(tmp_path, files))
    assert "best_model" not in found.title and "overfits" in found.title
    assert language.in_chinese(found.title) != found.title


def test_the_run_without_a_source_differs_from_the_run(tmp_path):
    """A file that is named, one of a folder, one of a glob with weights, and the only one."""
    cases = {
        ("/d/good.jsonl", "/d/poor.jsonl"): ({}, ["/d/good.jsonl"]),
        ("/d",): ({}, ["/d/good.jsonl"]),
        ("/d/p*.jsonl", "/d/good.jsonl"): (
            {"data_weights": [2.0, 0.5]},
            ["/d/good.jsonl"],
        ),
        ("/d/poor.jsonl",): ({}, None),
    }
    sources = {"/d/good.jsonl": 1, "/d/poor.jsonl": 1}
    for number, (paths, (more, kept)) in enumerate(cases.items()):
        files = healthy()
        files["settings"] |= {"data_path": list(paths)} | more
        files["dataset"]["samples_per_file"] = sources
        run = recorded(tmp_path / str(number), files)
        fewer = without_source(run, "/d/poor.jsonl")
        assert (fewer or {}).get("data_path") == kept
        if more:
            assert fewer["data_weights"] == [0.5]
        assert fewer is None or command(run, **fewer) != command(run)


def test_where_the_program_chose_the_length_another_setting_is_named(tmp_path):
    """A longer sample does not fit: twice the length would not either."""
    cases = {
        "off": ({"gradient_checkpointing": "off"}, "gradient_checkpointing", "auto"),
        "drop": ({}, "over_length", "truncate_thinking"),
        "shortened": ({"over_length": "truncate_thinking"}, None, None),
    }
    for case, (settings, name, value) in cases.items():
        files = healthy()
        too_long(files)
        files["settings"] |= settings
        files["automatic"] = ["max_seq_length"]
        found = findings(recorded(tmp_path / case, files))
        assert len(found) == bool(name)
        if name:
            config = parse_command_line(shlex.split(found[0].command)[4:]).training
            assert getattr(config, name) == value and config.max_seq_length == "auto"
            assert "memory or the model" in found[0].title
            assert language.in_chinese(found[0].title) != found[0].title


def test_shares_of_tokens_stay_what_they_were(tmp_path):
    """Of a folder of several files none has the folder's share; a source of no weight is not left alone."""
    sources = {"/d/good.jsonl": 9, "/d/other.jsonl": 9, "/d/poor.jsonl": 9, "/e.jsonl": 9}
    for number, (by, paths, weights, wanted) in enumerate(
        [
            ("tokens", ["/d", "/e.jsonl"], [0.4, 0.6], None),
            ("samples", ["/d", "/e.jsonl"], [0.4, 0.6], [0.4, 0.4, 0.6]),
            ("tokens", ["/d/poor.jsonl", "/e.jsonl"], [0.4, 0.6], [0.6]),
            ("samples", ["/d/poor.jsonl", "/e.jsonl"], [1.0, 0.0], None),
            ("samples", ["/d/good.jsonl", "/d"], [2.0, 1.0], [2.0, 1.0]),
        ]
    ):
        files = healthy()
        files["settings"] |= {"data_path": paths, "data_weights": weights, "data_weights_by": by}
        files["dataset"]["samples_per_file"] = sources
        fewer = without_source(recorded(tmp_path / str(number), files), "/d/poor.jsonl")
        assert (fewer or {}).get("data_weights") == wanted
        if fewer:
            assert len(fewer["data_path"]) == len(set(fewer["data_path"])) == len(wanted)


def test_general_text_of_ours_is_left_out_by_its_own_setting(tmp_path):
    files = healthy()
    files["settings"] |= {"replay": 0.2}
    files["dataset"]["samples_per_file"] = {"good.jsonl": 9, "poor.jsonl": 9, replay_text(): 34}
    files["alerts"] += [
        alert("Source_Regression", losses="training", source=replay_text().lstrip("/"))
    ]
    (found,) = findings(recorded(tmp_path, files))
    config = parse_command_line(shlex.split(found.command)[4:]).training
    assert config.replay == 0 and config.data_path == ("good.jsonl", "poor.jsonl")


def test_a_source_that_can_not_be_left_out_is_to_be_looked_at(tmp_path):
    files = healthy()
    poor_source(files)
    files["settings"]["data_path"] = ["hf://datasets/somebody/something"]
    (found,) = findings(recorded(tmp_path, files))
    assert found.command.endswith("--check-data --data-path poor.jsonl")


def test_a_path_keeps_its_slash(tmp_path):
    files = healthy()
    poor_source(files)
    files["dataset"]["samples_per_file"] = {"/good.jsonl": 300, "/poor.jsonl": 200}
    (found,) = findings(recorded(tmp_path, files))
    assert "The source /poor.jsonl" in found.title


def test_held_out_samples_of_a_real_run_are_recorded(finished: Path):
    (place,) = find_runs([finished])
    counts = read_recorded(place).configuration["held_out_samples"]
    tags = {t for t in read_recorded(place).series if t.startswith("Eval/By_Source/")}
    assert {f"Eval/By_Source/{name}" for name in counts} == tags and sum(counts.values()) >= 1


def test_a_run_of_so_many_steps_is_told_so_many_fewer(tmp_path):
    files = healthy()
    overfits(files)
    files["settings"] |= {"max_steps": 200, "num_epochs": 200 / 3}
    (found,) = findings(recorded(tmp_path, files))
    assert "--max-steps 80" in found.command and "fewer steps" in found.title
    assert "--num-epochs" not in found.command


# -----------------------------------------------------------------------------
# What the record says against a finding


def course(files, loss, held_out=None, error=0.02, steps=200):
    """The losses of a run by step; held_out: value by step, beside its standard error."""
    files["rows"] = {
        step: {"Training/Loss": loss(step), "Training/Epoch": 3 * step / steps}
        for step in range(1, steps + 1)
    }
    for step, value in (held_out or {}).items():
        row = files["rows"].setdefault(step, {})
        row |= {"Eval/Loss": value, "Eval/Loss_Error": error}
    return files


def titles(folder: Path, files: dict) -> list[str]:
    return [found.title for found in findings(recorded(folder, files))]


def noise(step: int, size: float = 0.03) -> float:
    return 1 + size * math.sin(12.9 * step * step)


MADE_WORSE = "The training has made the model worse: the learning rate is too high."


@pytest.mark.parametrize(
    ("loss", "held_out"),
    [
        (lambda s: (1.2 + 0.3 * s / 200) * noise(s), None),
        (lambda s: (1.5 if s < 35 else 7.0) * noise(s), None),
        (lambda s: (1.5 if s < 2 else 9.0) * noise(s), None),
        (lambda s: 1.0 - s / 400, {0: 1.0, 100: 1.1, 200: 1.2}),  # the best is the base
    ],
)
def test_a_result_that_is_worse_than_the_base_is_told_first(tmp_path, loss, held_out):
    files = course(healthy(), loss, held_out)
    files["alerts"] = [{"name": "Stagnation", "step": 90, "value": 0.1, "threshold": 0.02}]
    told = titles(tmp_path, files)
    assert told[0] == MADE_WORSE and not any("low" in title or "early" in title for title in told)


def test_a_result_with_better_answers_is_not_worse(tmp_path):
    files = course(healthy(), lambda s: 1.0 - s / 400, {0: 1.0, 100: 1.1, 200: 1.2})
    for step, score in ((0, 0.2), (200, 0.8)):
        files["rows"][step] |= {"Eval/Answer_Score": score, "Eval/Answer_Score_Error": 0.05}
    assert MADE_WORSE not in titles(tmp_path, files)


def test_changes_of_the_same_questions_tell_more_than_two_means(tmp_path):
    """Each of 40 questions got worse by a twentieth, less than two means of so different ones can tell."""
    files = course(healthy(), lambda s: 1.0 - s / 400, {0: 1.0, 100: 1.02, 200: 1.05}, error=0.2)
    assert titles(tmp_path / "means", files) == []
    run = recorded(tmp_path / "pairs", files)
    for name, factor in (("before", 1.0), ("after", 1.05)):
        losses = [
            {"place": f"a:{n}", "loss": factor * (0.2 + n / 25), "tokens": 100} for n in range(40)
        ]
        content = {"answers": [], "losses": losses, "held_out": 40}
        (run.directory.logs / f"{name}.json").write_text(json.dumps(content))
    assert [found.title for found in findings(run)] == [MADE_WORSE]


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: max(1.5, 3 - s / 20),  # learned, then flat
        lambda s: 3.0 if s < 120 else 1 + 2 * math.exp(-(s - 120) / 10),  # stuck, then learned
        lambda s: 1.0 + math.exp(-s / 2),  # learned within a few steps
        lambda s: 2.0 * noise(s, 0.6),  # nobody can tell
    ],
)
def test_a_run_that_learned_is_not_told_that_its_rate_is_too_low(tmp_path, loss):
    files = course(healthy(), loss)
    files["settings"]["learning_rate"] = 3e-5
    files["alerts"] = [{"name": "Stagnation", "step": 90, "value": 2.0, "threshold": 1.5}]
    assert not any("hardly" in title for title in titles(tmp_path, files))


@pytest.mark.parametrize(
    ("rate", "words", "wanted"),
    [(5.0, "is too high", 3e-4), (1e-5, "is too low", 3e-4), (3e-4, "look at the data", None)],
)
def test_a_flat_run_is_judged_by_the_rule_of_the_program(tmp_path, rate, words, wanted):
    files = course(healthy(), lambda s: (3 - s / 4000) * noise(s))
    files["settings"]["learning_rate"] = rate
    (found,) = findings(recorded(tmp_path, files))
    assert words in found.title and "the program's own is 0.0003" in found.evidence
    parsed = parse_command_line(shlex.split(found.command)[4:])
    assert parsed.check_data == (wanted is None)
    assert parsed.training.learning_rate == pytest.approx(wanted or rate)
    for text in (found.title, found.evidence):
        assert language.in_chinese(text) != text


@pytest.mark.parametrize(
    ("held_out", "error", "wanted"),
    [
        ({0: 1.5, 80: 1.0, 120: 1.02, 200: 1.022}, 0.3, False),  # within the error
        ({0: 1.5, 80: 1.0, 120: 1.2, 160: 1.1, 200: 1.05}, 0.01, False),  # it falls again
        ({0: 1.5, 80: 1.0, 120: 1.05, 160: 1.1, 200: 1.15}, 0.01, True),
        ({0: 1.5, 80: 1.0, 120: 1.05, 160: 1.1, 200: 1.15}, None, False),  # nobody knows how sure
    ],
)
def test_a_run_overfits_where_the_rise_is_no_chance(tmp_path, held_out, error, wanted):
    files = course(healthy(), lambda s: 1 + math.exp(-s / 25), held_out, error)
    if error is None:
        for row in files["rows"].values():
            row.pop("Eval/Loss_Error", None)
    assert any("overfits" in title for title in titles(tmp_path, files)) == wanted


def test_spikes_of_a_run_whose_held_out_loss_falls_are_no_high_rate(tmp_path):
    hard = (50, 100, 150, 195)
    held_out = {step: 1 + math.exp(-step / 60) for step in range(0, 201, 40)}
    files = course(healthy(), lambda s: 6.0 if s in hard else 1 + math.exp(-s / 25), held_out)
    files["alerts"] = [alert("Loss_Spike", step) for step in hard]
    assert not any("too high" in title for title in titles(tmp_path, files))


def test_what_was_forgotten_and_came_back_is_not_told(tmp_path):
    files = healthy()
    forgets(files)
    files["rows"][200]["Forgetting/General_Loss"] = 1.95
    assert titles(tmp_path, files) == []


def test_data_that_were_known_by_heart_for_a_while_are_not_told(tmp_path):
    files = healthy()
    by_heart(files)
    files["rows"][190]["Training/Token_Accuracy"] = 0.9
    assert titles(tmp_path, files) == []


def test_a_length_of_all_positions_is_not_raised(tmp_path):
    files = healthy()
    too_long(files)
    files["settings"]["max_seq_length"] = 4096
    files["model"] = {"positions": 4096}
    (found,) = findings(recorded(tmp_path, files))
    assert (
        "--over-length truncate_thinking" in found.command and "memory or the model" in found.title
    )


def test_a_real_run_records_the_positions_of_its_model(finished: Path):
    (place,) = find_runs([finished])
    assert read_recorded(place).configuration["model"]["positions"] >= 64


@pytest.mark.parametrize(
    ("status", "words", "resume"),
    [
        ({"status": "preempted", "signal": "SIGUSR1", "step": 66, "saved": 66}, "go on", "latest"),
        ({"status": "failed", "step": 66, "saved": 50, "reason": "x"}, "broke off", "latest"),
        ({"status": "stopped", "step": 66, "saved": 50, "reason": "x"}, "broke off", "latest"),
        ({"status": "failed", "step": 66, "saved": 0, "reason": "x"}, "broke off", "auto"),
        ({"status": "running", "step": 66}, None, None),
        ({}, "go on", "latest"),  # it says nothing, but 66 of 200 steps are there
    ],
)
def test_of_a_run_that_is_not_over_only_how_to_go_on_is_told(tmp_path, status, words, resume):
    files = course(healthy(), lambda s: 3 - s / 60, steps=66)
    too_long(files)
    files["status"] = status
    run = recorded(tmp_path, files)
    found = findings(run)
    if words is None:
        assert found == []
        files["dataset"] = {}
        text = page(recorded(tmp_path / "page", files))
        assert "The run is not over" in text and "nothing that should be changed" not in text
        return
    assert words in found[0].title and found[0].evidence == "It ended at step 66 of 200."
    parsed = parse_command_line(shlex.split(found[0].command)[4:])
    assert parsed.resume == resume and len(found) == 1
    assert parsed.training == parse_command_line(shlex.split(command(run))[4:]).training
    for text in (found[0].title, found[0].evidence):
        assert language.in_chinese(text) != text


def test_a_run_that_broke_off_far_above_its_beginning_does_not_go_on(tmp_path):
    files = course(healthy(), lambda s: (1.0 if s < 9 else 8.0) * noise(s), steps=66)
    files["status"] = {"status": "preempted", "step": 66, "saved": 66}
    (found,) = findings(recorded(tmp_path, files))
    assert "--resume" not in found.command and "--learning-rate 0.0001" in found.command
    assert all(language.in_chinese(text) != text for text in (found.title, found.evidence))


def test_a_run_that_an_alert_ended_is_not_told_that_it_was_too_short(tmp_path):
    files = course(healthy(), lambda s: 3 - s / 60, steps=66)
    files["status"] = {"status": "stopped", "step": 66, "saved": 66, "result": "final_model"}
    assert titles(tmp_path, files) == []


TEXTS = st.text("ab-. '中*", min_size=1, max_size=6).filter(str.strip)


@given(
    data_path=st.lists(TEXTS, min_size=1, max_size=3),
    eval_path=st.lists(TEXTS, max_size=2),
    run_name=st.sampled_from(["", "-a", "a b", "a.b"]).filter(lambda name: " " not in name),
    rate=st.floats(1e-7, 10) | st.sampled_from([3e-4, "auto"]),
    weight=st.floats(0.01, 9),
    rank=st.integers(0, 64),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_command_sets_what_the_run_had(
    finished, data_path, eval_path, run_name, rate, weight, rank
):
    """Exactly; only a path that begins with "-" is written otherwise where it is not the first."""
    (place,) = find_runs([finished])
    own = DirectTrainingConfig(
        data_path=tuple(data_path),
        data_weights=(weight,) * len(data_path),
        eval_path=tuple(eval_path),
        run_name=run_name,
        learning_rate=rate,
        lora_r=rank,
    )
    run = read_recorded(place)
    run.configuration["config"], run.configuration["automatic"] = vars(own), []
    parsed = parse_command_line(shlex.split(command(run))[4:]).training
    for name, value in vars(own).items():
        told = getattr(parsed, name)
        if name.endswith("_path"):
            told = tuple(path.removeprefix("./") if path[2:3] == "-" else path for path in told)
        assert told == value, name


# -----------------------------------------------------------------------------
# What holds for any record

AGAINST = [  # words of titles of which no two are told of one run
    ("too low", "too high"),
    ("too low", "made the model worse"),
    ("too early", "too long: it overfits"),
    ("too early", "by heart"),
    ("too early", "too high"),
    ("too early", "hardly learned"),
    ("too low", "forgets"),
    ("hardly learned", "overfits"),
]
SETTING = {  # words of a title: the settings that its command may change
    "learning rate is too": {"learning_rate"},
    "lower learning rate": {"learning_rate"},
    "forgets": {"learning_rate"},
    "overfits": {"num_epochs", "max_steps"},
    "by heart": {"num_epochs", "max_steps"},
    "too early": {"num_epochs", "max_steps"},
    "look at the data": set(),
    "go on with it": set(),
    "data are too long": {"max_seq_length", "over_length", "gradient_checkpointing"},
}
SHAPES = {
    "falls": lambda x: 1 + 2 * math.exp(-6 * x),
    "goes on": lambda x: 3 - 2 * x,
    "flat": lambda x: 2.0,
    "rises": lambda x: 1.2 + 0.5 * x,
    "explodes": lambda x: 1.5 - x if x < 0.4 else 6.0,
    "comes back": lambda x: 5.0 if 0.3 < x < 0.4 else 1.5 - x,
    "late": lambda x: 3.0 if x < 0.6 else 1.0,
}
HELD_OUT = {
    "as trained": None,
    "turns": lambda x: 1 + (x - 0.4) ** 2,
    "rises": lambda x: 1 + x / 2,
    "flat": lambda x: 1.5,
}
NAMES = ["Stagnation", "Divergence", "Loss_Spike", "Gradient_Explosion", "NonFinite", "Saturation"]
RECORDS = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(list(SHAPES)),
        "held_out": st.sampled_from(list(HELD_OUT)),
        "noise": st.sampled_from([0.0, 0.03, 0.3]),
        "error": st.sampled_from([0.001, 0.02, 0.3]),
        "alerts": st.lists(st.sampled_from([*NAMES, "Forgetting"]), max_size=5),
        "general": st.sampled_from([-0.1, 0.0, 0.3]),
        "rate": st.sampled_from([1e-6, 3e-4, 1e-3, 5.0]),
        "max_steps": st.sampled_from([0, 200]),
        "lora_r": st.sampled_from([0, 16]),
        "status": st.sampled_from(["completed", "stopped", "preempted", "failed", "running"]),
        "made": st.sampled_from([200, 60]),
        "dropped": st.sampled_from([0, 30]),
        "seed": st.integers(0, 999),
    }
)


def generated(known: dict) -> dict:
    """A record of these properties."""
    draw = np.random.default_rng(known["seed"])
    shape = SHAPES[known["shape"]]
    held_out = HELD_OUT[known["held_out"]] or shape
    made = 200 if known["status"] == "completed" else known["made"]
    evals = {step: held_out(step / 200) for step in range(0, made + 1, 20)}
    size = known["noise"]
    losses = [shape(step / 200) * math.exp(size * draw.normal()) for step in range(made + 1)]
    files = course(healthy(), lambda step: losses[step], evals, known["error"], made)
    for step in evals:
        general = {"Forgetting/General_Loss": 2 + known["general"] * step / 200}
        files["rows"][step] |= general | {"Forgetting/General_Loss_Error": known["error"]}
    files["alerts"] = [
        {"name": name, "step": 50 + 10 * n, "value": 2.0, "threshold": 0.995}
        for n, name in enumerate(known["alerts"])
    ]
    files["settings"] |= {name: known[name] for name in ("max_steps", "lora_r")}
    files["settings"] |= {"learning_rate": known["rate"], "max_seq_length": 2048}
    files["dataset"] = {"total_samples": 100, "truncation": {"dropped": known["dropped"]}}
    result = {"result": "final_model"} if known["status"] in ("completed", "stopped") else {}
    files["status"] = {"status": known["status"], "step": made, "saved": made} | result
    return files


@given(known=RECORDS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_of_any_record_findings_agree_with_it_and_with_each_other(tmp_path_factory, known):
    run = recorded(tmp_path_factory.mktemp("any"), generated(known))
    found = findings(run)
    told = [one.title for one in found]
    for one, other in AGAINST:
        assert not (any(one in t for t in told) and any(other in t for t in told)), told
    if known["status"] == "running":
        assert found == []
    if known["status"] in ("preempted", "failed"):
        assert len(found) == 1 and ("go on" in told[0] or "begin anew" in told[0])
    own = vars(parse_command_line(shlex.split(command(run))[4:]).training)
    values: dict = {}
    for one in found:
        assert language.in_chinese(one.title) != one.title
        assert language.in_chinese(one.evidence) != one.evidence
        parsed = vars(parse_command_line(shlex.split(one.command)[4:]).training)
        changed = {name for name in own if parsed[name] != own[name]}
        (words,) = [words for words in SETTING if words in one.title]
        assert changed <= SETTING[words] and len(changed) == bool(SETTING[words]), one
        for name in changed:
            assert values.setdefault(name, parsed[name]) == parsed[name], "one setting, one value"
        rate = parsed["learning_rate"]
        if "learning_rate" in changed:
            assert (rate > known["rate"]) == ("too low" in one.title) and rate <= HIGHEST_RATE
        _agrees(one, run, known)


def _agrees(one, run, known: dict) -> None:
    """The numbers of the evidence are those of the record, and differ by more than their error."""
    evals, error = run.finite("Eval/Loss"), 2 * math.sqrt(2) * known["error"]
    first, last, best = evals[min(evals)], evals[max(evals)], min(evals.values())
    losses = list(run.finite("Training/Loss").values())
    end, scatter = np.mean(losses[-len(losses) // 4 :]), known["noise"]
    if "overfits" in one.title:
        assert (
            last - best > error and f"{best:.4g}" in one.evidence and f"{last:.4g}" in one.evidence
        )
    if "worse" in one.title:
        assert last - first > error and f"{first:.4g}" in one.evidence
    if "too early" in one.title:
        assert last == best and last < first - error
    if "hardly" in one.title:
        assert known["shape"] == "flat" and scatter < 0.3
    if "too high for these" in one.title:
        assert end > 1.05 * min(np.mean(losses[a : a + 25]) for a in range(0, 150, 25))
        assert f"{end:.4g}" in one.evidence
    if "forgets" in one.title:
        assert known["general"] > error
