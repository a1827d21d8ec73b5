"""The check for a GPU runs without one, compares figures, and says what got worse.

uv run pytest tests/runs/test_gpu_check.py -m "long or not long"
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import gpu_check

ROOT = Path(__file__).parents[2]

KEPT = {
    "bench 2048: sides: ours: tokens_per_second": 12_000.0,
    "bench 2048: sides: ours: peak_gib": 14.5,
    "step 2048: graph: step_ms": 80.0,
}


def test_what_got_worse_is_named_with_both_figures():
    now = {
        "bench 2048: sides: ours: tokens_per_second": 11_000.0,
        "bench 2048: sides: ours: peak_gib": 14.6,
        "step 2048: graph: step_ms": 90.0,
        "step 8192: graph: step_ms": 300.0,
    }
    assert gpu_check.worse(now, KEPT) == [
        "bench 2048: sides: ours: tokens_per_second: 1.2e+04 -> 1.1e+04 (-8.3%)",
        "step 2048: graph: step_ms: 80 -> 90 (+12.5%)",
    ]
    assert gpu_check.worse(KEPT, KEPT) == []


def test_figures_are_found_wherever_they_lie():
    phases = {
        "bench 2048": {
            "verdict": "ok",
            "sides": {"ours": {"tokens_per_second": 12_000.0, "peak_gib": 14.5, "mean_loss": 2.0}},
        },
        "step 2048": {"verdict": "ok", "graph": {"step_ms": 80.0}, "waits": "nowhere"},
    }
    assert gpu_check.figures(phases) == KEPT


@pytest.mark.parametrize(
    ("gpu", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "h100.json"),
        ("NVIDIA A100-SXM4-40GB", "a100sxm440gb.json"),
        ("none", "none.json"),
    ],
)
def test_a_kind_of_gpu_has_a_file_of_its_own(gpu: str, file: str):
    assert gpu_check.kept_file(gpu).name == file


def test_keeping_replaces_what_was_measured_and_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    record = {"gpu": "NVIDIA H100", "versions": {"torch": "2"}, "date": "2026-11-26"}
    for commit, figures in (("a", KEPT), ("b", {"step 2048: graph: step_ms": 70.0})):
        path = tmp_path / "result.json"
        path.write_text(json.dumps(record | {"commit": commit, "figures": figures}))
        gpu_check.keep(path)
        record["versions"] = None  # the phase that tells them was left out
    kept = json.loads((tmp_path / "results" / "h100.json").read_text())
    assert kept["versions"] == {"torch": "2"}
    assert kept["commits"] == dict.fromkeys(KEPT, "a") | {"step 2048: graph: step_ms": "b"}
    assert kept["figures"] == KEPT | {"step 2048: graph: step_ms": 70.0}


def test_the_speed_of_a_run_is_tokens_over_the_time_of_its_steps():
    """Three of six logged steps count: the first third warms up, the last one evaluates."""
    rows = [
        {
            "step": 5 * i,
            "time": 100.0 + 2 * i,
            "metrics": {
                "Throughput/Tokens_Seen": 10_000.0 * i,
                "Throughput/Step_Seconds": 0.25,
                "Training/Loss": 2.0,
            },
        }
        for i in range(1, 7)
    ]
    rates = gpu_check.run_rates(rows)
    assert rates["steps"] == [15, 25]
    assert rates["tokens_per_second"] == pytest.approx(20_000 / (10 * 0.25))
    assert rates["wall_tokens_per_second"] == pytest.approx(20_000 / 4)


@pytest.mark.long
def test_every_phase_runs_without_a_gpu(tmp_path):
    only = ["facts", "model", "step 2048", "bench 2048", "run 2048", "row 32768"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "scripts.gpu_check", "--small", "--device", "cpu"),
            *("--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")),
            *("--budget", "600", "--only", *only),
        ],
        capture_output=True,
        text=True,
        timeout=700,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {p["verdict"] for p in result["phases"].values()} == {"ok"}, result["phases"]
    assert result["figures"]["run 2048: tokens_per_second"] > 0
    assert (tmp_path / "out" / "log.txt").stat().st_size > 0


def test_a_phase_that_hangs_costs_itself_only(tmp_path):
    check = gpu_check.Check(tmp_path / "out", tmp_path / "work", 60)
    sleeper = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    check.run(gpu_check.Phase("hangs", sleeper, 2, 1, gpu_check.last_json))
    check.run(gpu_check.Phase("fails", [sys.executable, "-c", "1/0"], 20, 1, gpu_check.last_json))
    good = [sys.executable, "-c", "print('{\"step_ms\": 3}')"]
    check.run(gpu_check.Phase("good", good, 20, 1, gpu_check.last_json))
    check.run(gpu_check.Phase("late", good, 90, 80, gpu_check.last_json))
    verdicts = {name: phase["verdict"] for name, phase in check.phases.items()}
    assert verdicts["hangs"] == "not done within 2 s" and verdicts["fails"] == "exit code 1"
    assert verdicts["good"] == "ok" and verdicts["late"].startswith("left out")
    assert "ZeroDivisionError" in check.phases["fails"]["last_lines"][-1]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["phases"] == check.phases
