"""What to do next agrees with the record: with what speaks against a finding, and with other findings.

uv run pytest tests/runs/test_findings_agree.py
"""

import json
import math
import os
import re
import shlex
import socket
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from finetuning.command_line import parse_command_line
from finetuning.common import language
from finetuning.config import DirectTrainingConfig
from finetuning.runs.directory import only_writer
from finetuning.runs.findings import findings
from finetuning.runs.own_command import command
from finetuning.runs.recorded import find_runs, read_recorded
from finetuning.runs.report import page
from finetuning.training.peak_rate import SMALL_MODEL_RATE
from tests.helpers.recorded_runs import (
    alert,
    by_heart,
    course,
    forgets,
    goes_on,
    healthy,
    noise,
    recorded,
    too_long,
)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))


def titles(folder: Path, files: dict) -> list[str]:
    return [found.title for found in findings(recorded(folder, files))]


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


def test_of_an_earlier_record_nothing_is_said_that_needs_the_programs_own_rate(tmp_path):
    flat = course(healthy(), lambda s: (3 - s / 4000) * noise(s)) | {"own_rate": None}
    flat["settings"]["learning_rate"] = 5.0
    assert titles(tmp_path / "flat", flat) == []
    worse = course(healthy(), lambda s: (1.2 + 0.3 * s / 200) * noise(s)) | {"own_rate": None}
    (found,) = findings(recorded(tmp_path / "worse", worse))
    assert found.title == MADE_WORSE and found.evidence.endswith("the learning rate was 0.0003.")
    assert found.changes == {"learning_rate": 1e-4}, "a third of its own"
    assert not re.search("[a-z]+ [a-z]+", language.in_chinese(found.evidence))


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


def test_a_model_that_forgets_is_not_to_be_trained_longer(tmp_path):
    files = healthy()
    goes_on(files)
    forgets(files)
    assert titles(tmp_path, files) == ["The model forgets what it could."]


def test_losses_that_fall_by_chance_are_not_still_falling(tmp_path):
    """Ten runs without any trend, whose single losses differ by a third."""
    falls = 0
    for seed in range(10):
        losses = 2 * np.exp(0.3 * np.random.default_rng(seed).normal(size=201))
        falls += losses[151:].mean() < 0.97 * losses[101:151].mean()
        files = course(healthy(), lambda step, losses=losses: losses[step])
        assert not any("too early" in title for title in titles(tmp_path / str(seed), files))
    assert falls, "of some the last quarter is lower"


def test_one_setting_is_told_one_value(tmp_path):
    """Both would make the run shorter, each to another step."""
    files = course(
        healthy(), lambda s: 1 + math.exp(-s / 25), {0: 1.5, 80: 1.0, 160: 1.1, 200: 1.2}
    )
    by_heart(files)
    (found,) = findings(recorded(tmp_path, files))
    assert "overfits" in found.title and "--num-epochs 1.2" in found.command


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


def test_a_run_that_was_killed_goes_on_where_its_last_checkpoint_is(tmp_path):
    """Its status is the last one that it wrote; that nobody holds its lock tells."""
    files = course(healthy(), lambda s: 3 - s / 60, steps=66)
    files["status"] = {"status": "running", "step": 10, "host": socket.gethostname()}
    run = recorded(tmp_path, files)
    with only_writer(run.directory.output_dir, is_main=True):
        assert read_recorded(run.directory).is_running
    files["status"]["host"] = "elsewhere"  # whose locks are not seen from here
    other = recorded(tmp_path / "shared", files)
    with only_writer(other.directory.output_dir, is_main=True):
        pass
    assert read_recorded(other.directory).is_running
    killed = read_recorded(run.directory)
    assert killed.status["status"] == "killed" and not killed.is_over
    (found,) = findings(killed)
    assert found.evidence == "It ended at step 66 of 200."
    assert parse_command_line(shlex.split(found.command)[4:]).resume == "auto"
    assert ">killed<" in page(killed) and language.in_chinese("killed") == "被强行结束"


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
@hypothesis.settings(
    max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck)
)
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
NOT_OVER = ["preempted", "failed", "running"]
NAMES = ["Stagnation", "Divergence", "Loss_Spike", "Gradient_Explosion", "NonFinite", "Saturation"]
RECORDS = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(list(SHAPES)),
        "held_out": st.sampled_from(list(HELD_OUT)),
        "noise": st.sampled_from([0.0, 0.03, 0.3]),
        "error": st.sampled_from([0.001, 0.3]),
        "alerts": st.lists(st.sampled_from([*NAMES, "Forgetting"]), max_size=5),
        "general": st.sampled_from([-0.1, 0.0, 0.3]),
        "rate": st.sampled_from([1e-6, 3e-4, 1e-3, 5.0]),
        "own_rate": st.sampled_from([3e-4, 8.3e-4, None]),
        "max_steps": st.sampled_from([0, 200]),
        "lora_r": st.sampled_from([0, 16]),
        "status": st.sampled_from([*["completed"] * 8, *NOT_OVER, "stopped"]),
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
    files["own_rate"] = known["own_rate"]
    files["dataset"] = {"total_samples": 100}
    files["truncation"] = {"dropped": [f"sample {n}" for n in range(known["dropped"])]}
    result = {"result": "final_model"} if known["status"] in ("completed", "stopped") else {}
    files["status"] = {"status": known["status"], "step": made, "saved": made} | result
    return files


@given(known=RECORDS)
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
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
        assert known["own_rate"] or not re.search("program's own|None|hardly", str(one))
        parsed = vars(parse_command_line(shlex.split(one.command)[4:]).training)
        changed = {name for name in own if parsed[name] != own[name]}
        (words,) = [words for words in SETTING if words in one.title]
        assert changed <= SETTING[words] and len(changed) == bool(SETTING[words]), one
        for name in changed:
            assert values.setdefault(name, parsed[name]) == parsed[name], "one setting, one value"
        rate = parsed["learning_rate"]
        if "learning_rate" in changed:
            assert (rate > known["rate"]) == ("too low" in one.title) and rate <= SMALL_MODEL_RATE
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
        parts = [np.mean(losses[a : a + 25]) for a in range(0, len(losses) - 25, 25)]
        assert end > 1.05 * min(parts)
        assert f"{end:.4g}" in one.evidence
    if "forgets" in one.title:
        assert known["general"] > error
