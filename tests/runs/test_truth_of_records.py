"""Records say what ran: settings that resumes change, runs that end early, a user's own metrics.

uv run pytest -m "not long" tests/runs/test_truth_of_records.py
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

import compare_runs
import convergence
import dataset_stats
import export
from direct_finetuning_with_existing_modules import DirectTrainer
from finetuning.config import DirectTrainingConfig
from finetuning.events.event_values import SESSION_START_TAG
from finetuning.events.reading import read_metrics, read_run
from finetuning.monitoring import detectors
from finetuning.monitoring.convergence import describe
from finetuning.monitoring.detector_memory import Finding
from finetuning.monitoring.loss_curves import read_curve
from finetuning.runs import record, report
from finetuning.runs.comparison import metric_rows, outcomes
from finetuning.runs.comparison import page as comparison_page
from finetuning.runs.recorded import find_runs, read_recorded
from finetuning.runs.result import CHOSEN, Trained, find_trained
from sweep import Sweep, members_of
from tests.helpers.read_events import read_texts

LESS = ("--max-steps", "6", "--save-steps", "2", "--logging-steps", "1")


def logs_of(out: Path) -> Path:
    (logs,) = (out / "training_logs").iterdir()
    return logs


def json_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def hparams_of(out: Path) -> dict:
    """The settings in the run's row."""
    return row_of(out).hparams


def row_of(out: Path) -> SessionStartInfo:
    """The run's row as TensorBoard's reader has it."""
    (events,) = (out / "tensorboard_logs").iterdir()
    reader = EventAccumulator(str(events))
    reader.Reload()
    content = reader.SummaryMetadata(SESSION_START_TAG).plugin_data.content
    return HParamsPluginData.FromString(content).session_start_info


# -----------------------------------------------------------------------------
# Settings


@pytest.mark.slow
def test_a_trial_is_called_by_what_was_set_and_has_the_rate_that_was_used(tmp_path, run):
    assert run(tmp_path, first=("--max-steps", "2", "--num-probes", "0")) == 0
    row = row_of(tmp_path / "out")
    assert row.group_name.startswith("steps=2") and "lr=" not in row.group_name
    record = json_of(logs_of(tmp_path / "out") / "configuration.json")
    rate = record["automatic_learning_rate"]
    assert 1e-3 <= rate <= 2e-3, "of a small model and few passes"
    assert row.hparams["learning_rate"].number_value == pytest.approx(rate)


@pytest.mark.slow
def test_all_records_of_a_changed_resume_agree_and_keep_what_was(tmp_path, finished, run):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    checkpoint = out / "checkpoints" / "checkpoint-4"
    assert run(tmp_path, "--resume", str(checkpoint), "--learning-rate", "1e-5") == 0
    change = "learning_rate 0.0003 -> 1e-05 at step 4"
    configuration = json_of(logs_of(out) / "configuration.json")
    statistics = json_of(out / "training_statistics.json")
    for found in (configuration, statistics):
        assert found["config"]["learning_rate"] == 1e-5 and change in found["changes"]
    assert hparams_of(out)["learning_rate"].number_value == pytest.approx(1e-5)
    (events,) = (out / "tensorboard_logs").iterdir()
    assert "changed by resumes" in read_texts(events)["Training/Final_Summary"][-1][1]
    found = read_recorded(find_runs([out])[0])
    assert change in report.page(found).replace("&gt;", ">")
    assert any(change in texts[0] for _, texts in outcomes([found]))
    # A later session with the same settings keeps it.
    assert run(tmp_path, "--resume", "latest", "--learning-rate", "1e-5") == 0
    assert change in json_of(logs_of(out) / "configuration.json")["changes"]


def test_settings_that_others_override_are_recorded_as_they_are_used(finished):
    config = json_of(logs_of(finished) / "configuration.json")["config"]
    assert config["precision"] == "fp32" and config["device"] == "cpu"
    assert config["compile"] == config["gradient_checkpointing"] == "off"
    model = json_of(logs_of(finished) / "configuration.json")["model"]
    assert len(model["model_weights"]) == len(model["chat_template"]) == 32
    assert "init_adapter" not in model and "revision" not in model, (
        "a local folder, a fresh adapter"
    )
    statistics = json_of(finished / "training_statistics.json")
    assert config["num_epochs"] == statistics["training"]["epochs"] < 3, "max_steps overrides it"
    assert statistics["outcome"] == "completed" and statistics["result"] == "final_model"


@pytest.mark.slow
def test_the_status_names_the_newest_step_while_the_run_goes_on(tmp_path, run, monkeypatch):
    monkeypatch.setattr(record, "STATUS_SECONDS", 0.0)
    seen, original = [], record.RunRecord.log

    def log(self, step, metrics):
        wishes = original(self, step, metrics)
        seen.append((step, json_of(self.run.logs / "status.json")))
        return wishes

    monkeypatch.setattr(record.RunRecord, "log", log)
    assert run(tmp_path, *LESS, "--max-steps", "3") == 0
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert all((s["status"], s["step"]) == ("running", step) for step, s in seen)
    status = json_of(logs_of(tmp_path / "out") / "status.json")
    assert (status["step"], status["saved"], status["result"]) == (3, 3, "final_model")


# -----------------------------------------------------------------------------
# Runs that end early

WORSE = ("--max-steps", "60", "--learning-rate", "0.05", "--lr-schedule", "constant",
         "--eval-steps", "1", "--save-steps", "0", "--early-stopping-patience", "3")  # fmt: skip


@pytest.mark.slow
def test_the_best_model_is_the_result_of_a_run_that_stopped_early(tmp_path, run, capfd):
    assert run(tmp_path, *WORSE) == 0
    out = tmp_path / "out"
    statistics, said = json_of(out / "training_statistics.json"), capfd.readouterr().out
    training = statistics["training"]
    end, best = training["steps"], training["best_step"]
    assert 0 < best < end < 60 and training["best_eval_loss"] < training["last_eval_loss"]
    assert (statistics["outcome"], statistics["result"]) == ("stopped", "best_model")
    assert f"model: {out / 'best_model'}, of step {best}" in said
    assert find_trained("", str(out)).folder == out / "best_model"
    assert json_of(out / "best_model" / "origin.json")["step"] == best
    # It does not train on, unless it is told to.
    before = (out / "final_model" / "adapter_model.safetensors").read_bytes()
    assert run(tmp_path, *WORSE, "--resume", "auto") == 0
    assert json_of(out / "training_statistics.json")["training"]["steps"] == end
    assert (out / "final_model" / "adapter_model.safetensors").read_bytes() == before
    assert find_trained("", str(out)).folder == out / "best_model"
    log = (logs_of(out) / "training.log").read_text(encoding="utf-8")
    assert log.count("To train on, resume with a larger --early-stopping-patience") == 2
    more = ["--early-stopping-patience", "5"]
    assert run(tmp_path, *WORSE, "--resume", "auto", *more) == 0
    assert json_of(out / "training_statistics.json")["training"]["steps"] > end


@pytest.mark.slow
def test_who_says_what_makes_a_model_the_best_has_the_best_one(tmp_path, run, capfd):
    less = [one for one in WORSE if one not in ("--early-stopping-patience", "3")]
    assert run(tmp_path, *less, "--max-steps", "20", "--best-by", "loss") == 0
    out = tmp_path / "out"
    statistics = json_of(out / "training_statistics.json")
    assert 0 < statistics["training"]["best_step"] < 20, "it got worse"
    assert (statistics["outcome"], statistics["result"]) == ("completed", "best_model")
    assert f"({CHOSEN}); ask.py" in capfd.readouterr().out
    assert find_trained("", str(out)) == Trained(out / "best_model", CHOSEN)


def test_a_final_model_whose_run_went_to_its_end_is_the_result(finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    assert find_trained("", str(out)).folder == out / "final_model"
    status = logs_of(out) / "status.json"
    status.write_text(json.dumps(json_of(status) | {"result": "best_model"}))
    assert find_trained("", str(out)).folder == out / "best_model"
    (out / "best_model" / "run.txt").write_text("qwen3_4b_thinking_another\n")
    assert find_trained("", str(out)).folder == out / "final_model", (
        "another run's best says nothing"
    )


@pytest.mark.slow
def test_a_run_that_an_alert_has_stopped_stays_stopped(tmp_path, run, monkeypatch):
    def with_a_loss(memory: object, metrics: dict) -> Finding | None:
        return Finding(1.0, 0.0) if "Training/Loss" in metrics else None

    monkeypatch.setitem(detectors.DETECTORS, "Stagnation", with_a_loss)
    stop, log = (["--alert-actions", "Stagnation", action] for action in ("stop", "log"))
    assert run(tmp_path, *LESS, *stop) == 0
    out = tmp_path / "out"
    assert json_of(out / "training_statistics.json")["training"]["steps"] == 1
    for action, steps in ((stop, 1), (log, 6)):
        assert run(tmp_path, *LESS, *action, "--resume", "latest") == 0
        assert json_of(out / "training_statistics.json")["training"]["steps"] == steps
    said = (logs_of(out) / "training.log").read_text(encoding="utf-8")
    assert "the alert Stagnation asked for the end. To train on, resume with another action" in said


@pytest.mark.parametrize(
    "program", ["ask", "export", "compare_runs", "sweep", "convergence", "dataset_stats"]
)
def test_every_program_means_the_same_folder_by_a_tilde(
    program, finished, tiny_data, tmp_path, monkeypatch, capsys
):
    """`--output-dir=~/out` and TOML come to the program as they are written."""
    home = tmp_path / "home"
    shutil.copytree(finished, home / "out")
    shutil.copy(tiny_data, home / "data.jsonl")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    if program in ("ask", "export"):
        assert find_trained("", "~/out").folder == home / "out" / "final_model"
        assert find_trained("~/out/best_model", "").folder == home / "out" / "best_model"
    if program == "export":
        assert export.main(["--output=~/merged", "--output-dir=~/out", "--device", "cpu"]) == 0
        assert (home / "merged" / "config.json").is_file()
    if program == "compare_runs":
        compare_runs.main(("~/out",), html=Path("~/runs.html"))
        assert (home / "runs.html").is_file()
    if program == "sweep":
        (member,) = members_of(Sweep(("lora-r=4",), output_dir="~/out"))
        assert member.folder.parent == home / "out"
    if program == "convergence":
        assert convergence.main(["~/out"]) == 0
    if program == "dataset_stats":
        dataset_stats.main(("~/data.jsonl",), html=Path("~/data.html"))
        assert (home / "data.html").is_file()
    assert not (tmp_path / "~").exists()


# -----------------------------------------------------------------------------
# A user's own metrics


class OwnMetrics(DirectTrainer):
    """Plots over tokens, and over a part of a step, as the guide shows it; ends at step 3."""

    stop_at = 3

    def training_metrics(self, step: int, learning_rate: float) -> dict[str, float]:
        metrics = super().training_metrics(step, learning_rate)
        writer, tokens = self.tensorboard_writer, self.state.tokens_seen
        writer.add_scalar("Custom/Loss_By_Tokens", metrics["Training/Loss"], tokens)
        writer.add_scalar("My/Half", float(step), step // 2)
        if step > 3:
            writer.add_scalar("Custom/Late", 1.0, step)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics


@pytest.fixture(scope="module")
def own(tmp_path_factory, tiny_model, tiny_data, cache_dir) -> Path:
    """The output of a run with metrics of its own: ended at step 3, killed behind step 5, gone on with."""
    out = tmp_path_factory.mktemp("own") / "out"
    settings = {"model_name": str(tiny_model), "data_path": (str(tiny_data),), "max_steps": 6}
    places = {"output_dir": str(out), "cache_dir": str(cache_dir), "max_seq_length": 512}
    every = {"logging_steps": 1, "save_steps": 0, "eval_steps": 0, "num_probes": 0, "device": "cpu"}
    config = DirectTrainingConfig(**settings, **places, **every)
    OwnMetrics(config, quiet=True).train()

    class Killed(OwnMetrics):
        stop_at = 0

        def save(self, step: int) -> None:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        Killed(config, quiet=True, resume="latest").train()
    OwnMetrics(config, quiet=True, resume="latest").train()
    return out


@pytest.mark.slow
def test_a_tag_over_another_axis_keeps_its_history_and_loses_the_dead_branch(own):
    (events,) = (own / "tensorboard_logs").iterdir()
    curves = read_run(events)
    for tag, steps in (("Custom/Loss_By_Tokens", 6), ("Training/Loss", 6), ("Custom/Late", 3)):
        assert len(curves[tag]) == steps, tag
    losses = [value for _, value in curves["Training/Loss"]]
    assert [value for _, value in curves["Custom/Loss_By_Tokens"]] == losses
    tokens = [step for step, _ in curves["Custom/Loss_By_Tokens"]]
    assert tokens == sorted(set(tokens)) and tokens[0] > 6
    assert [step for step, _ in curves["My/Half"]] == [0, 1, 2, 3]
    lines = [r for r in read_metrics(logs_of(own) / "metrics.jsonl")]
    assert [r["step"] for r in lines if "Custom/Loss_By_Tokens" in r["metrics"]] == tokens
    reader = EventAccumulator(str(events))
    reader.Reload()
    assert [e.step for e in reader.Scalars("Custom/Loss_By_Tokens")] == tokens


@pytest.mark.slow
def test_report_comparison_and_convergence_know_a_users_metrics(own):
    found = read_recorded(find_runs([own])[0])
    assert found.steps == 6 and set(found.custom) == {
        *("Custom/Late", "Custom/Loss_By_Tokens", "My/Half")
    }
    page = report.page(found)
    assert "Your own metrics" in page and "Custom/Loss_By_Tokens" in page and "6 of 6" in page
    rows = dict(metric_rows([found, found]))
    last = found.last("Custom/Loss_By_Tokens")
    assert rows["Custom/Loss_By_Tokens, last"] == [f"{last:.4g}"] * 2
    assert "My/Half" in comparison_page([found])
    assert read_curve(own).total_steps == 6 and describe(read_curve(own), 1.0)["step"] == 6
