"""A sweep runs every combination once, goes on after a kill, and says which is best.

uv run pytest -m "not long" tests/runs/test_sweep.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import sweep
from finetuning.command_line import parse_command_line
from finetuning.common import language
from finetuning.common.errors import UserError
from finetuning.runs.directory import RunDirectory
from finetuning.runs.recorded import RecordedRun

ROOT = Path(sweep.__file__).parent


def members(*words: str, **fields: object) -> list[sweep.Member]:
    return sweep.members_of(sweep.Sweep(words, output_dir="out", **fields))


def test_every_combination_with_every_seed_is_a_run_of_its_own():
    found = members("learning_rate=1e-4,3e-4", "--lora-r=4,16", seeds=(1, 2))
    assert len(found) == len({member.folder for member in found}) == 8
    assert found[0].settings == {"learning-rate": "1e-4", "lora-r": "4"}
    arguments = found[-1].arguments(["--max-steps", "3"])
    for name, value in (("--learning-rate", "3e-4"), ("--lora-r", "16"), ("--seed", "2")):
        assert arguments[arguments.index(name) + 1] == value
    asked = found[0].arguments(["--max-steps", "3", "--language", "zh"])
    assert parse_command_line(asked).training.max_steps == 3
    assert language.current() == "zh", "as the user asks for behind --"
    language.use("en")


@pytest.mark.parametrize(
    ("status", "is_over"),
    [
        ({"status": "completed", "step": 4, "result": "final_model"}, True),
        ({"status": "stopped", "step": 3, "result": "best_model"}, True),
        ({"status": "stopped", "step": 3, "reason": "No space left on device"}, False),
        ({"status": "preempted", "step": 3}, False),
        ({"status": "failed", "step": 3}, False),
    ],
)
def test_a_run_that_broke_off_goes_on_and_counts_for_nothing(monkeypatch, status, is_over):
    (member,) = members("lora-r=4")
    empty = {"medians": {}, "left_out": 0, "seconds": 1.0, "alerts": [], "configuration": {}}
    place, series = RunDirectory(Path("out"), "run"), {"Eval/Loss": [(3, 2.0)]}
    run = RecordedRun(directory=place, series=series, status=status, **empty)
    monkeypatch.setattr(sweep, "recorded", lambda _: run)
    assert sweep.is_over(member) == is_over
    assert bool(sweep.rows_of([member])[0].numbers["held-out loss"]) == is_over


@pytest.mark.parametrize("words", [(), ("lora-r",), ("lora-r=",), ("=4",), ("--=4",)])
def test_a_setting_without_values_is_refused(words: tuple[str, ...]):
    with pytest.raises(UserError, match="write a setting and its values: lora-r=4,16"):
        members(*words)


def test_fewer_runs_than_one_at_a_time_are_refused():
    with pytest.raises(UserError, match="--jobs is -1"):
        members("lora-r=4", jobs=-1)


def test_what_a_run_would_refuse_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match="lora_dropout"):
        sweep.main(["lora-dropout=0.1,7", "--output-dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match="--seed"):
        sweep.main(["lora-r=4", "--output-dir", str(tmp_path / "out"), "--", "--seed", "3"])
    for option in ("--data-path", "--device"):
        with pytest.raises(UserError, match=r"there is no nope|device is 'nope'"):
            sweep.main(["lora-r=4", "--output-dir", str(tmp_path / "out"), "--", option, "nope"])
    assert not (tmp_path / "out").exists()


def test_a_mirror_is_not_shared(tmp_path):
    with pytest.raises(UserError, match="resume from each other"):
        sweep.main(["lora-r=4", "--output-dir", str(tmp_path / "out"), "--", "--mirror", "m"])
    assert not (tmp_path / "out").exists()


def test_what_all_runs_share_is_known_again_and_not_shown(tmp_path):
    shared = ["--notify", "slack=https://host/Qx7pl41n"]
    sweep.remember(tmp_path, shared)
    sweep.remember(tmp_path, shared)
    assert "Qx7pl41n" not in (tmp_path / "sweep.json").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="begun with other arguments"):
        sweep.remember(tmp_path, [*shared, "--packing"])


@pytest.mark.parametrize("record", [{"arguments": ["--packing"]}, {}, {"arguments": None}])
def test_the_record_of_an_earlier_version_is_refused(tmp_path, record: dict):
    (tmp_path / "sweep.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match=r"sweep.json: .*older version; use another --output-dir"):
        sweep.main(["lora-r=4", "--output-dir", str(tmp_path), "--", "--packing"])
    assert json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8")) == record


def test_a_place_that_can_not_be_written_is_told_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "sweep.json").mkdir(parents=True)
    for place in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "taken"):
        with pytest.raises(UserError, match=r"^--output-dir .*: can't be written"):
            sweep.main(["lora-r=4", "--output-dir", str(place)])


def row(rate: str, *losses: float) -> sweep.Row:
    numbers = {column: () for column in sweep.COLUMNS} | {"held-out loss": losses}
    return sweep.Row({"learning-rate": rate}, numbers, (1.0,) * len(losses))


def test_the_winner_has_an_interval_that_seeds_give():
    # By hand: of 1.0 and 1.2 the standard deviation is 0.1414, half of the interval 12.71 · 0.1.
    assert row("1", 1.0, 1.2).half_interval() == pytest.approx(1.271, rel=1e-3)
    clear = sweep.verdict([row("1", 1.0, 1.001), row("2", 1.5, 1.501)])
    assert "--learning-rate 1" in clear and "0 others" in clear
    assert "1 others" in sweep.verdict([row("1", 1.0, 1.2), row("2", 1.1, 1.3)])
    assert "Only --seeds 1 2 3 tell" in sweep.verdict([row("1", 1.0), row("2", 1.1)])
    measured = replace(row("1", 1.0), errors=(0.05,))
    assert "± 0.1 over the held-out samples" in sweep.verdict([measured, row("2", 1.1)])
    assert sweep.verdict([row("1")]) == "no run has a held-out loss yet"


def test_gpus_are_dealt_evenly_and_each_start_is_told(monkeypatch, tmp_path, capsys):
    seen = []

    class Started:
        returncode = 0

        def __init__(self, *_, env, **__) -> None:
            seen.append(env["CUDA_VISIBLE_DEVICES"])

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(sweep.subprocess, "Popen", Started)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0)
    runs = sweep.members_of(sweep.Sweep(("lora-r=1,2,3,4",), output_dir=str(tmp_path)))
    assert sweep.Pool(2, ("3", "5")).run(runs, []) == []
    assert seen == ["3", "5", "3", "5"]
    started = [line for line in capsys.readouterr().err.splitlines() if ": started; " in line]
    assert [line.partition(",")[0] for line in started] == [f"lora-r={r}" for r in (1, 2, 3, 4)]
    assert all(line.endswith("sweep.log") for line in started)


@pytest.fixture
def command(tmp_path, tiny_model, tiny_data, cache_dir) -> list[str]:
    from tests.helpers.tiny_model import FAST

    shared = [word for word in FAST if word != "--quiet"]
    shared += ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    shared += ["--cache-dir", str(cache_dir), "--device", "cpu"]
    own = ["learning-rate=1e-3,1e-2", "--output-dir", str(tmp_path / "out"), "--json"]
    return [sys.executable, str(ROOT / "sweep.py"), *own, "--", *shared]


@pytest.mark.slow
def test_a_second_start_does_only_what_is_missing(command, tmp_path):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first = tmp_path / "out" / "learning-rate=1e-3,seed=42"
    while not list(first.glob("checkpoints/checkpoint-*")):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not list((tmp_path / "out").glob("learning-rate=1e-2*/training_logs/*"))

    second = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(second.stdout)["rows"]
    assert [r["settings"]["learning-rate"] for r in rows] == ["1e-2", "1e-3"], "more teaches more"
    assert all(r["seeds"] == 1 and r["KL, general text"]["mean"] > 0 for r in rows)
    names = {
        p: os.stat(p).st_mtime for p in (tmp_path / "out").glob("*/training_logs/*/status.json")
    }
    assert len(names) == 2, "the run that was broken off went on"

    third = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(third.stdout) == json.loads(second.stdout)
    assert {p: os.stat(p).st_mtime for p in names} == names, "nothing was done again"

    other = subprocess.run([*command, "--num-probes", "1"], capture_output=True, text=True)
    assert other.returncode == 2 and "begun with other arguments" in other.stderr


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(command, tmp_path):
    blocked = tmp_path / "out" / "learning-rate=1e-3,seed=42" / "training_logs"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file in the way")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    assert "1 of 2 runs failed" in result.stderr and "failed with code" in result.stderr
    assert [r["seeds"] for r in json.loads(result.stdout)["rows"]] == [1, 0]


@pytest.mark.parametrize("word", ["seed=1,2", "output_dir=a,b", "--resume=latest"])
def test_what_the_sweep_sets_is_not_varied(word):
    """The runs would be alike, and the table would say that they differ."""
    with pytest.raises(UserError, match="set by the sweep itself"):
        sweep.members_of(sweep.Sweep(vary=(word,)))
