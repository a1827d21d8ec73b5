"""A short real training run, its events read back, and the real TensorBoard server asked over HTTP.

    uv run test_tensorboard_integration.py            prints what it checked; exit code 1 on a failure
    uv run pytest test_tensorboard_integration.py     the same checks as tests

By itself it leaves its events for `uv run tensorboard --logdir=test_tensorboard_logs`.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from direct_finetuning_with_existing_modules import DirectTrainer, DirectTrainingConfig
from finetuning.events.metric_table import find_metric, is_detail, is_quiet
from finetuning.events.reading import read_run
from finetuning.training.state import TrainState
from tests.helpers.tensorboard_server import TensorBoardServer

LOG_DIR = Path("test_tensorboard_logs")
STEPS = 24

# The tags of the founding guide: people have dashboards on them. GPU tags need a GPU, so they are not here.
FOUNDING_TAGS = [
    *("Training/Loss", "Training/Learning_Rate", "Training/Gradient_Norm", "Training/Epoch"),
    *("Training/Final_Loss", "Monitoring/Convergence_Score", "Monitoring/Loss_Trend"),
    *("Config/Batch_Size", "Config/Sequence_Length", "Config/Gradient_Accumulation_Steps"),
    *("Epoch/Average_Loss", "Epoch/Duration_Seconds", "Epoch/Steps_Per_Second"),
    *("Dataset/Total_Samples", "Dataset/Avg_Instruction_Length", "Dataset/Avg_Output_Length"),
    *("Dataset/Thinking_Samples_Percent", "Dataset/Avg_Instruction_Quality"),
    *("Dataset/Avg_Output_Quality", "Dataset/Avg_Crypto_Complexity"),
    *(f"Dataset/Difficulty_{k}_{kind}" for k in range(1, 5) for kind in ("Count", "Percent")),
    *("Final_Config/batch_size", "Final_Dataset/Training_Samples"),
    *("Final_Model/Trainable_Parameters", "Final_Monitoring/Convergence_Score"),
]
TEXTS = [
    *("Dataset/Summary", "Training/Epoch_Summary", "Training/Final_Summary"),
    *("Config/Training_Settings", "Dataset/Mask_Audit"),
]


class TrainerWithOwnMetric(DirectTrainer):
    """The founding guide's snippet for a metric of one's own, inside the loop."""

    def training_metrics(self, step: int, learning_rate: float) -> dict[str, float]:
        value = step / 2
        if self.tensorboard_writer:
            self.tensorboard_writer.add_scalar('Custom/My_Metric', value, step)  # fmt: skip
        return super().training_metrics(step, learning_rate)


@dataclass
class Run:
    """A finished run and what its readers see."""

    state: TrainState
    directory: Path
    metrics: list[dict]
    events: EventAccumulator

    @property
    def name(self) -> str:
        """Its name in TensorBoard when the server gets the directory above it."""
        return self.directory.name


def train(output_dir: Path) -> Run:
    """Two dozen steps of the embedded model on the bundled data."""
    config = DirectTrainingConfig(
        output_dir=str(output_dir),
        max_seq_length=1024,
        max_steps=STEPS,
        logging_steps=2,
        eval_steps=12,
        save_steps=12,
        num_probes=1,
        probe_max_new_tokens=16,
        log_weight_histograms=True,
    )
    state = TrainerWithOwnMetric(config, quiet=True).train()
    (directory,) = (output_dir / "tensorboard_logs").iterdir()
    lines = (output_dir / "training_logs" / directory.name / "metrics.jsonl").read_text("utf-8")
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return Run(state, directory, [json.loads(line) for line in lines.splitlines()], events)


# -----------------------------------------------------------------------------
# The checks: each takes a run (and a server) and raises AssertionError


def check_founding_tags(run: Run) -> str:
    tags = run.events.Tags()["scalars"]
    missing = [tag for tag in FOUNDING_TAGS if tag not in tags]
    assert not missing, f"missing: {missing}"
    return f"{len(FOUNDING_TAGS)} of the founding guide's tags among {len(tags)}"


def check_every_tag_is_in_the_table(run: Run) -> str:
    tags = [tag for tag in read_run(run.directory) if not tag.startswith("Custom/")]
    unknown = [tag for tag in tags if find_metric(tag) is None]
    assert not unknown, f"not in METRICS: {unknown}"
    return f"{len(tags)} scalar tags, all described in METRICS"


def check_steps_rise_strictly(run: Run) -> str:
    points = 0
    for tag in run.events.Tags()["scalars"]:
        steps = [event.step for event in run.events.Scalars(tag)]
        assert steps == sorted(set(steps)), f"{tag}: {steps}"
        points += len(steps)
    logged = [event.step for event in run.events.Scalars("Training/Loss")]
    assert logged == list(range(2, STEPS + 1, 2)), f"Training/Loss at {logged}"
    return f"{points} points"


def check_events_equal_metrics_jsonl(run: Run) -> str:
    written = {}
    for record in run.metrics:
        for tag, value in record["metrics"].items():
            begun = tag in {known for known, _ in written} or not is_quiet(tag) or value
            if begun and not is_detail(tag):  # those are in metrics.jsonl alone
                written[tag, record["step"]] = value
    seen = {
        (tag, event.step): event.value
        for tag in run.events.Tags()["scalars"]
        for event in run.events.Scalars(tag)
    }
    assert set(seen) == set(written), set(seen) ^ set(written)
    for key, value in written.items():
        assert math.isclose(seen[key], value, rel_tol=1e-6, abs_tol=1e-30), (key, seen[key], value)
    return f"{len(seen)} values equal to float32"


def check_parts_recombine(run: Run) -> str:
    for record in run.metrics:
        metrics = record["metrics"]
        if "Training/Loss" not in metrics:
            continue
        assert metrics["Training/Perplexity"] == pytest.approx(math.exp(metrics["Training/Loss"]))
        segments = [metrics[f"{name}/Loss"] for name in ("Thinking", "Answer")]
        boundary = [metrics["Boundary/Close_Loss"], metrics["Boundary/EOS_Loss"]]
        assert min(segments + boundary) <= metrics["Training/Loss"] <= max(segments + boundary)
    return "loss lies between its segments' losses, perplexity is its exponential"


def check_custom_metric(run: Run) -> str:
    points = [(event.step, event.value) for event in run.events.Scalars("Custom/My_Metric")]
    assert points == [(step, step / 2) for step in range(2, STEPS + 1, 2)], points
    return f"Custom/My_Metric, {len(points)} points"


def check_training_happened(run: Run) -> str:
    norms = [event.value for event in run.events.Scalars("Training/Gradient_Norm")]
    assert run.state.step == STEPS and all(norm > 0 for norm in norms), norms
    losses = [event.value for event in run.events.Scalars("Eval/Loss")]
    assert losses[-1] < losses[0], f"held-out loss {losses}"
    return f"held-out loss {losses[0]:.3f} -> {losses[-1]:.3f}"


def check_one_event_file(run: Run) -> str:
    files = [path.name for path in run.directory.iterdir()]
    assert len(files) == 1 and "tfevents" in files[0], files
    return files[0]


def check_server_scalars(run: Run, server: TensorBoardServer) -> str:
    tags = server.wait_for(lambda: server.scalar_tags(run.name), "scalar tags")
    missing = [tag for tag in FOUNDING_TAGS if tag not in tags]
    assert not missing, f"missing: {missing}"
    seen = server.scalars(run.name, "Training/Loss")
    wanted = [(event.step, event.value) for event in run.events.Scalars("Training/Loss")]
    assert [step for step, _ in seen] == [step for step, _ in wanted]
    assert all(math.isclose(a[1], b[1], rel_tol=1e-6) for a, b in zip(seen, wanted, strict=True))
    assert tags["Training/Loss"]["description"], "no description"
    return f"{len(tags)} tags with descriptions, Training/Loss {[round(v, 3) for _, v in seen]}"


def check_server_texts(run: Run, server: TensorBoardServer) -> str:
    for tag in TEXTS:
        assert server.texts(run.name, tag), f"{tag} is empty"
    assert "<table" in server.texts(run.name, "Dataset/Summary")[0][1]
    return ", ".join(TEXTS)


def check_server_histograms(run: Run, server: TensorBoardServer) -> str:
    steps = server.histogram_steps(run.name, "Model/Weights_Distribution")
    assert steps == [0, 12, 24], steps
    return f"Model/Weights_Distribution at {steps}"


def check_server_hparams(run: Run, server: TensorBoardServer) -> str:
    experiment = server.post("plugin/hparams/experiment", {"experimentName": ""})
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"learning_rate", "lora_r", "batch_size"} <= names, names
    return f"{len(names)} hyper-parameters in one run"


def check_server_layout(run: Run, server: TensorBoardServer) -> str:
    layout = server.get("plugin/custom_scalars/layout")
    titles = [category["title"] for category in layout["category"]]
    assert titles, "no layout"
    return f"ready dashboard: {', '.join(titles)}"


def check_server_lists_one_run(run: Run, server: TensorBoardServer) -> str:
    assert server.get("runs") == [run.name]
    return run.name


RUN_CHECKS: list[Callable[[Run], str]] = [
    check_founding_tags,
    check_every_tag_is_in_the_table,
    check_steps_rise_strictly,
    check_events_equal_metrics_jsonl,
    check_parts_recombine,
    check_custom_metric,
    check_training_happened,
    check_one_event_file,
]
SERVER_CHECKS: list[Callable[[Run, TensorBoardServer], str]] = [
    check_server_scalars,
    check_server_texts,
    check_server_histograms,
    check_server_hparams,
    check_server_layout,
    check_server_lists_one_run,
]


# -----------------------------------------------------------------------------
# As tests


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("integration"))


@pytest.fixture(scope="module", params=[True, False], ids=["fast loader", "python loader"])
def server(run: Run, request: pytest.FixtureRequest):
    with TensorBoardServer(run.directory.parent, load_fast=request.param) as server:
        yield server


@pytest.mark.parametrize("check", RUN_CHECKS, ids=lambda check: check.__name__)
def test_run(run: Run, check: Callable[[Run], str]):
    check(run)


@pytest.mark.slow
@pytest.mark.parametrize("check", SERVER_CHECKS, ids=lambda check: check.__name__)
def test_server(run: Run, server: TensorBoardServer, check: Callable):
    server.wait_for(lambda: server.scalar_tags(run.name), "scalar tags")
    check(run, server)


def test_a_missing_tag_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch):
    tags = [tag for tag in run.events.Tags()["scalars"] if tag != "Training/Loss"]
    monkeypatch.setattr(run.events, "Tags", lambda: {"scalars": tags})
    with pytest.raises(AssertionError, match="Training/Loss"):
        check_founding_tags(run)


# -----------------------------------------------------------------------------
# By itself


def main() -> int:
    """Train, check, print a table; 1 if a check failed."""
    from rich.console import Console
    from rich.table import Table

    shutil.rmtree(LOG_DIR, ignore_errors=True)
    console, failed = Console(), 0
    console.print(f"training {STEPS} steps of the demonstration model …")
    run = train(LOG_DIR)
    table = Table("check", "result", "seen", title="TensorBoard integration", title_justify="left")

    def attempt(check: Callable, *arguments: object) -> None:
        nonlocal failed
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            table.add_row(name, "[green]ok", str(check(*arguments)).replace("[", "\\["))
        except (AssertionError, KeyError, TimeoutError, OSError) as error:
            failed += 1
            table.add_row(name, "[red]FAILED", repr(error).replace("[", "\\["))

    for check in RUN_CHECKS:
        attempt(check, run)
    with TensorBoardServer(run.directory.parent, load_fast=False) as server:
        server.wait_for(lambda: server.scalar_tags(run.name), "scalar tags")
        for check in SERVER_CHECKS:
            attempt(check, run, server)
    console.print(table)
    console.print(f"{len(RUN_CHECKS) + len(SERVER_CHECKS) - failed} ok, {failed} failed")
    console.print(f"look at it: uv run tensorboard --logdir={LOG_DIR}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
