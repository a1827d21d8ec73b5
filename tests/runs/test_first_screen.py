"""What TensorBoard holds of a healthy run, and what the founding guide promises."""

import html
from pathlib import Path

import pytest

from direct_finetuning_with_existing_modules import main
from finetuning.events.address import PINNED, pinned_address
from finetuning.events.reading import read_run
from finetuning.runs.recorded import find_runs, read_recorded

MOST_SCALARS = 120
# Of a model that has learnt nothing, of data that are all good, and of a run that is too short for a score:
# these are measured, and are 0 in this run alone.
MEASURED_AS_ZERO = {
    *(
        f"Eval/{name}"
        for name in ("Format_Valid_Rate", "Exact_Answer", "Fact_Recall", "Term_Recall")
    ),
    *("Eval/Answer_Score", "Eval/Repetition_Rate", "Eval/Budget_Hit_Rate"),
    *(f"Dataset/Quality_Level_{k}_{of}" for k in range(1, 5) for of in ("Count", "Percent")),
    "Final_Dataset/Broken_Samples",
    *("System/Net_MBps", "System/Disk_Read_MBps"),  # of a machine on which nothing else runs
    "Monitoring/Convergence_Score",
    "Monitoring/Alerts_Active",  # always there: that none is raised is what it says
}


@pytest.fixture(scope="module")
def curves(tmp_path_factory, tiny_model: Path, cache_dir: Path) -> Path:
    """A healthy run on the bundled data, with everything that is on by default; its output directory."""
    out = tmp_path_factory.mktemp("healthy") / "out"
    steps = ["--max-steps", "30", "--logging-steps", "1", "--eval-steps", "10", "--quiet"]
    places = ["--output-dir", str(out), "--cache-dir", str(cache_dir)]
    assert main([*steps, *places, "--model-name", str(tiny_model), "--max-seq-length", "4096"]) == 0
    return out


@pytest.mark.slow
def test_a_healthy_run_has_few_charts(curves: Path):
    (run_dir,) = (curves / "tensorboard_logs").iterdir()
    scalars = read_run(run_dir)
    assert len(scalars) <= MOST_SCALARS, len(scalars)
    flat = {tag for tag, points in scalars.items() if not any(value for _, value in points)}
    assert flat <= MEASURED_AS_ZERO, flat - MEASURED_AS_ZERO
    raised = [tag for tag in scalars if tag.startswith("Alerts/")]
    assert all(any(value for _, value in scalars[tag]) for tag in raised)


@pytest.mark.slow
def test_what_is_not_in_a_chart_is_in_the_record(curves: Path):
    (run,) = find_runs([curves])
    recorded, shown = read_recorded(run).series, read_run(run.tensorboard)
    assert recorded.keys() > shown.keys()
    details = {"Dataset/Broken_Samples", "Training/By_Difficulty_1", "Final_Config/seed"}
    assert details <= recorded.keys() - shown.keys()


@pytest.mark.slow
def test_the_address_is_told_at_the_start_at_the_end_and_in_the_report(curves: Path):
    (run,) = find_runs([curves])
    log = (run.logs / "training.log").read_text(encoding="utf-8")
    assert log.count(pinned_address()) == 2
    report = (run.logs / "report.html").read_text(encoding="utf-8")
    assert f'<a href="{html.escape(pinned_address())}">TensorBoard' in report
    assert set(PINNED) <= read_run(run.tensorboard).keys()
