"""What to do next: each finding on a run that was built to have it, and its absence on one that has not."""

import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from finetuning.command_line import parse_command_line
from finetuning.common import language
from finetuning.data.split import replay_text
from finetuning.runs.findings import KINDS, findings
from finetuning.runs.own_command import command
from finetuning.runs.recorded import find_runs, read_recorded
from finetuning.runs.report import headline, page
from finetuning.runs.source_finding import without_source, worse_source
from tests.helpers.recorded_runs import (
    alert,
    by_heart,
    diverged,
    forgets,
    goes_on,
    got_worse,
    healthy,
    overfits,
    poor_source,
    recorded,
    too_long,
    too_slow,
)

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


@pytest.mark.parametrize("kind", ["overfitted", "saturated", "stopped_too_early"])
def test_a_command_of_other_passes_keeps_an_automatic_rate(tmp_path, kind):
    """It goes by the passes: with twice as many a run would learn no more."""
    files = healthy()
    BUILT[kind][0](files)
    files["settings"] |= {"learning_rate": 2.64e-4}
    files["automatic"] = ["learning_rate"]
    (found,) = findings(recorded(tmp_path, files))
    config = parse_command_line(shlex.split(found.command)[4:]).training
    assert config.learning_rate == 2.6e-4
    assert config.num_epochs == pytest.approx(BUILT[kind][2]["num_epochs"])


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


@pytest.mark.slow
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
    forgets(files)
    run = recorded(tmp_path, files)
    language.use("zh")
    try:
        text = page(run)
    finally:
        language.use("en")
    assert "模型在忘记原来会的东西。" in text and "它在通用文本上的损失，第一步之前是" in text
    assert "接下来做什么" in text


def test_the_costliest_five_are_told(tmp_path):
    files = healthy()
    for change in (diverged, poor_source, overfits, forgets, too_long, by_heart):
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
