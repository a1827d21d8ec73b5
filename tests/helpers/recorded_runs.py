"""Runs that were built: the files that a run leaves, with whatever courses and alerts."""

import json
import math
from pathlib import Path

from finetuning.runs.directory import RUN_PREFIX, RunDirectory
from finetuning.runs.recorded import read_recorded

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
    (run.logs / "truncation.json").write_text(json.dumps(files.get("truncation", {})))
    (run.logs / "dataset_statistics.json").write_text(json.dumps(files["dataset"]))
    if "status" in files:
        (run.logs / "status.json").write_text(json.dumps(files["status"]))
    configuration = {"config": files["settings"], "steps": 200, "model": files.get("model", {})}
    configuration["automatic"] = files.get("automatic", [])
    configuration["held_out_samples"] = files.get("held_out", {})
    if own := files.get("own_rate", 3e-4):  # else a record of an earlier version
        configuration["automatic_learning_rate"] = own
    (run.logs / "configuration.json").write_text(json.dumps(configuration))
    return read_recorded(run)


def alert(name: str, step: int = 100, **evidence: object) -> dict:
    return {"name": name, "step": step, "value": 1.0, "threshold": 0.5, "evidence": evidence}


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


def noise(step: int, size: float = 0.03) -> float:
    return 1 + size * math.sin(12.9 * step * step)


# -----------------------------------------------------------------------------
# What makes a healthy run have a trouble


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
    files["dataset"] |= {"total_samples": 100}
    ids = [f"sample {number}" for number in range(25)]
    files["truncation"] = {"dropped": [*ids[:20], *ids[:10]], "shortened": ids[20:]}  # of two turns
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
