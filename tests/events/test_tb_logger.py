"""The logger as readers see it: TensorBoard's own reader, tbparse, and the real server in both modes.

uv run pytest -m "not long" tests/events/test_tb_logger.py
"""

import inspect
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import tb_logger
from finetuning.common.errors import UserError
from finetuning.events import event_file, metric_table, step_writer
from finetuning.events.reading import read_metrics, read_run
from tb_logger import NullLogger, TensorBoardLogger
from tests.helpers.read_events import read_histograms, read_texts
from tests.helpers.tensorboard_server import TensorBoardServer

ROOT = Path(__file__).resolve().parents[2]
NO_WARNING = pytest.fail


def accumulate(run_dir: Path) -> EventAccumulator:
    reader = EventAccumulator(
        str(run_dir), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0}
    )
    reader.Reload()
    return reader


def records(run_dir: Path) -> list:
    return list(event_file.surviving_events(event_file.event_files(run_dir)))


# --- scalars -----------------------------------------------------------------------------------


def test_events_and_json_lines_are_equal(tmp_path):
    """To float32, with NaN and infinities, by TensorBoard's reader, tbparse and read_run."""
    tbparse = pytest.importorskip("tbparse")
    run, lines = tmp_path / "run", tmp_path / "logs" / "metrics.jsonl"
    odd = {3: math.nan, 4: math.inf, 5: -math.inf, 6: 1e300}
    with TensorBoardLogger(run, metrics_path=lines, warn=NO_WARNING) as logger:
        for step in range(1, 21):
            logger.log(step, {"Training/Loss": odd.get(step, math.pi / step), "b": float(step)})
            if step % 5 == 0:
                logger.log(step, {"Eval/Loss": 1 / 3})
    from_json: dict[str, list] = {}
    for line in read_metrics(lines):
        kinds = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
        for tag, value in line["metrics"].items():
            value = kinds[line["nonfinite"][tag]] if value is None else value
            with np.errstate(over="ignore"):
                from_json.setdefault(tag, []).append((line["step"], float(np.float32(value))))
    from_events = read_run(run)
    assert from_events.keys() == from_json.keys() == {"Training/Loss", "b", "Eval/Loss"}
    table = tbparse.SummaryReader(str(run)).scalars
    reader = accumulate(run)
    for tag, points in from_events.items():
        rows = table[table.tag == tag]
        events = reader.Scalars(tag)
        np.testing.assert_array_equal(points, from_json[tag])
        np.testing.assert_array_equal(points, [(event.step, event.value) for event in events])
        np.testing.assert_array_equal(points, list(zip(rows.step, rows.value, strict=True)))
    for text in lines.read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)  # strict: no NaN literal


def test_details_are_in_json_lines_only(tmp_path):
    """Also where a step has nothing else; a resume takes them back like all others."""
    lines = tmp_path / "metrics.jsonl"
    for resume in (None, 2):
        logger = TensorBoardLogger(
            tmp_path / "run", metrics_path=lines, resume_step=resume, warn=NO_WARNING
        )
        with logger:
            for step in range((resume or 0) + 1, 4):
                logger.log(step, {"Training/Loss": 1.0, "Training/By_Difficulty_1": float(step)})
            logger.log(4, {"Training/By_Source/a.jsonl": 4.0})
    assert read_run(tmp_path / "run").keys() == {"Training/Loss"}
    assert max(event.step for event in records(tmp_path / "run")) == 3
    found = {line["step"]: line["metrics"] for line in read_metrics(lines)}
    assert [line["step"] for line in read_metrics(lines)] == [1, 2, 3, 4]
    assert found[2]["Training/By_Difficulty_1"] == 2.0
    assert found[4] == {"Training/By_Source/a.jsonl": 4.0}


def test_a_count_of_what_should_not_be_has_a_chart_once_it_is_above_0(tmp_path):
    """And from then on, 0 included, though a resume comes between; what may well be 0 always has one."""
    lines, quiet = tmp_path / "metrics.jsonl", "Monitoring/NonFinite_Steps"
    counts = [0.0, 0.0, 2.0, 0.0, 0.0, 1.0]
    for resume, until in ((None, 2), (2, 4), (4, 6)):
        logger = TensorBoardLogger(
            tmp_path / "run", metrics_path=lines, resume_step=resume, warn=NO_WARNING
        )
        with logger:
            for step in range((resume or 0) + 1, until + 1):
                logger.log(step, {quiet: counts[step - 1], "Eval/Exact_Answer": 0.0, "own": 0.0})
    shown = read_run(tmp_path / "run")
    assert shown[quiet] == [(3, 2.0), (4, 0.0), (5, 0.0), (6, 1.0)]
    assert [len(shown[tag]) for tag in ("Eval/Exact_Answer", "own")] == [6, 6]
    assert [line["metrics"][quiet] for line in read_metrics(lines)] == counts


def test_one_event_and_one_line_for_a_step(tmp_path):
    lines = tmp_path / "metrics.jsonl"
    with TensorBoardLogger(tmp_path / "run", metrics_path=lines, warn=NO_WARNING) as logger:
        for step in (1, 2, 3):
            logger.log(step, {f"Group/Tag_{i}": float(i) for i in range(60)})
            logger.add_scalar("Custom/My_Metric", step, step)
            logger.add_text("Dataset/Summary", "text", step)
    events = [event for event in records(tmp_path / "run") if event.step > 0]
    assert [(event.step, len(event.summary.value)) for event in events] == [
        (1, 62),
        (2, 62),
        (3, 62),
    ]
    assert [len(line["metrics"]) for line in read_metrics(lines)] == [61, 61, 61]


def test_numbers_of_all_kinds(tmp_path):
    given = {
        "int": 3,
        "bool": True,
        "numpy": np.float64(0.5),
        "array": np.array([2.0]),
        "tensor": torch.tensor(0.25, requires_grad=True),
        "bfloat16": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    with TensorBoardLogger(tmp_path / "run", warn=NO_WARNING) as logger:
        logger.log(torch.tensor(7), given)
    assert {tag: points for tag, points in read_run(tmp_path / "run").items()} == {
        "int": [(7, 3.0)],
        "bool": [(7, 1.0)],
        "numpy": [(7, 0.5)],
        "array": [(7, 2.0)],
        "tensor": [(7, 0.25)],
        "bfloat16": [(7, 1.5)],
    }


def test_what_is_no_number_costs_only_itself_and_is_told(tmp_path):
    told = []
    with TensorBoardLogger(tmp_path / "run", warn=told.append) as logger:
        logger.log(1, {"good": 1.0, "none": None, "vector": torch.ones(3), "big": 10**400})
        logger.add_scalar("good", "abc", 2)
        logger.add_scalar("good", 2.0, "not a step")
        logger.add_image("image", torch.ones(2, 3, 4, 5), 2)
        logger.add_image("image", np.ones((7, 3, 3)), 2)
        logger.add_figure("figure", "no figure", 2)
        logger.log_histogram_counts("histogram", [1, 2], [0, 1], 2)
        logger.log(3, {"good": 3.0})
    assert read_run(tmp_path / "run") == {"good": [(1, 1.0), (3, 3.0)]}
    assert logger.dropped == 9
    assert any("none" in text for text in told)
    assert "9 values were dropped" in told[-1]


def test_steps_of_a_tag_rise_strictly(tmp_path):
    """The later of two values wins while the step is open; afterwards it is dropped and counted."""
    told = []
    with TensorBoardLogger(tmp_path / "run", warn=told.append) as logger:
        logger.log(5, {"a": 1.0, "b": 1.0})
        logger.add_scalar("a", 2.0, 5)
        logger.flush()
        logger.add_scalar("a", 3.0, 5)
        logger.add_scalar("c", 3.0, 5)  # a late tag of a written step is kept
        logger.log(6, {"a": 4.0})
        logger.log(4, {"a": 5.0, "d": 5.0})  # another tag may count otherwise
    assert read_run(tmp_path / "run") == {
        "a": [(5, 2.0), (6, 4.0)],
        "b": [(5, 1.0)],
        "c": [(5, 3.0)],
        "d": [(4, 5.0)],
    }
    assert logger.dropped == 2
    assert len(told) == 2 and "dropped a at step 5" in told[0]


def test_a_call_without_step_belongs_to_the_last_step(tmp_path):
    with TensorBoardLogger(tmp_path / "run", warn=NO_WARNING) as logger:
        logger.add_scalar("first", 1.0)
        logger.log(8, {"a": 1.0})
        logger.add_scalar("b", 2.0)
        logger.add_scalars("main", {"x": 1.0, "y": 2.0})
        logger.add_scalar("timed", 1.0, 9, walltime=123.0)
    assert read_run(tmp_path / "run") == {
        "first": [(0, 1.0)],
        "a": [(8, 1.0)],
        "b": [(8, 2.0)],
        "main/x": [(8, 1.0)],
        "main/y": [(8, 2.0)],
        "timed": [(9, 1.0)],
    }
    assert [e.wall_time for e in records(tmp_path / "run") if e.step == 9] == [123.0]


def test_signatures_are_those_of_summary_writer():
    from torch.utils.tensorboard import SummaryWriter

    names = "add_scalar add_scalars add_text add_histogram add_image add_figure add_hparams"
    for name in [*names.split(), "get_logdir"]:
        ours = list(inspect.signature(getattr(TensorBoardLogger, name)).parameters)
        theirs = list(inspect.signature(getattr(SummaryWriter, name)).parameters)
        assert ours == theirs, name


def test_null_logger_takes_every_call():
    public = {name for name in vars(TensorBoardLogger) if not name.startswith("_")}
    assert public - set(dir(NullLogger)) <= {"log_dir", "get_logdir"}
    null = NullLogger()
    assert not null
    with null as logger:
        logger.log(1, {"a": 1.0})
        logger.add_scalar("a", 1.0, global_step=2)
        logger.close("success")


def test_strange_tags_and_texts(tmp_path):
    with TensorBoardLogger(tmp_path / "run", warn=NO_WARNING) as logger:
        logger.log(1, {"Custom/密码学.jsonl": 1.0, "bad\ud800\x1b[31m\ntag": 2.0})
        logger.add_text("text", "one\ud800 \x1b[31mtwo\x00 sk-abcdefghijklmnopqrstuv", 1)
    tags = read_run(tmp_path / "run")
    assert tags.keys() == {"Custom/密码学.jsonl", "bad tag"}
    assert read_texts(tmp_path / "run") == {"text": [(1, "one two [redacted]")]}


# --- histograms and pictures ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "numpy", "auto"])
def test_histogram_counts_the_values(tmp_path, kind):
    """Finite values only, and those at the time of the call."""
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    finite = values[3:].numpy().copy()
    values[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    given = values.bfloat16() if kind == "bfloat16" else values
    given = given.numpy() if kind in ("numpy", "auto") else given
    with TensorBoardLogger(tmp_path / "run", warn=NO_WARNING) as logger:
        logger.add_histogram("h", given, 3, bins="auto" if kind == "auto" else "tensorflow")
        given[:] = 100
    [(step, counts, edges)] = read_histograms(tmp_path / "run")["h"]
    assert (step, edges[0], edges[-1]) == (3, finite.min(), finite.max())
    # A value on an inner edge may be counted on either side of it, so compare within one bin.
    below = np.array([(finite <= edge).sum() for edge in edges[1:]])
    under = np.array([(finite < edge).sum() for edge in edges[1:]])
    assert ((under <= np.cumsum(counts)) & (np.cumsum(counts) <= below))[:-1].mean() > 0.9
    assert sum(counts) == len(finite)


@pytest.mark.parametrize("value", [0.0, 1e-4, -300.0])
def test_equal_values_are_a_narrow_bar(tmp_path, value):
    """A wide one would stretch the axis of the steps whose values differ little from it."""
    with TensorBoardLogger(tmp_path / "run", warn=NO_WARNING) as logger:
        logger.add_histogram("h", torch.full((7,), value), 3)
    [(_, counts, edges)] = read_histograms(tmp_path / "run")["h"]
    assert sum(counts) == 7 and edges[0] <= value <= edges[-1]
    assert edges[-1] - edges[0] <= 2e-3 * max(1e-3, abs(value))


def test_histogram_of_counts_made_elsewhere(tmp_path):
    counts = torch.histc(torch.arange(10.0), 5, 0, 10)
    with TensorBoardLogger(tmp_path / "run", warn=NO_WARNING) as logger:
        logger.log_histogram_counts("h", counts, torch.linspace(0, 10, 6), 4)
        logger.add_histogram("equal", torch.full((5,), 2.0), 4)
    histograms = read_histograms(tmp_path / "run")
    assert histograms["h"] == [(4, [2.0] * 5, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0])]
    [(_, counts, _)] = histograms["equal"]
    assert sum(counts) == 5
    [event] = accumulate(tmp_path / "run").Histograms("h")
    assert event.histogram_value.num == 10


def test_pictures_show_the_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    with TensorBoardLogger(tmp_path / "run", warn=NO_WARNING) as logger:
        logger.add_image("hwc", pixels, 1, dataformats="HWC")
        logger.add_image("chw", torch.from_numpy(pixels.transpose(2, 0, 1) / 255.0), 1)
        logger.add_image("hw", pixels[:, :, 0], 1, dataformats="HW")
    reader = accumulate(tmp_path / "run")

    def decoded(tag):
        [event] = reader.Images(tag)
        assert (event.height, event.width) == (4, 6)
        return np.array(Image.open(io.BytesIO(event.encoded_image_string)))

    np.testing.assert_array_equal(decoded("hwc"), pixels)
    np.testing.assert_allclose(decoded("chw"), pixels, atol=1)
    np.testing.assert_array_equal(decoded("hw"), pixels[:, :, 0])


def test_figures_are_drawn(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    with TensorBoardLogger(tmp_path / "run", warn=NO_WARNING) as logger:
        for tag, close in (("closed", True), ("kept", False)):
            figure, axes = plt.subplots(figsize=(2, 1))
            axes.set_facecolor("red")
            logger.add_figure(tag, figure, 1, close=close)
            axes.set_facecolor("blue" if not close else "red")
        red = Figure(figsize=(2, 1), facecolor="red")
        logger.add_figure("made later", lambda: red, 1)
    assert len(plt.get_fignums()) == 1
    plt.close("all")
    reader = accumulate(tmp_path / "run")
    for tag in ("closed", "kept", "made later"):
        [event] = reader.Images(tag)
        image = np.array(Image.open(io.BytesIO(event.encoded_image_string)))
        assert image.shape[:2] == (100, 200)
        assert (image[:, :, :3] == (255, 0, 0)).all(axis=2).mean() > 0.3


# --- the table of metrics -------------------------------------------------------------------------


def test_table_rows_are_complete_and_found():
    assert len({(metric.tag, metric.kind) for metric in metric_table.METRICS}) == len(
        metric_table.METRICS
    )
    for metric in metric_table.METRICS:
        assert metric.meaning and metric.when
        source = ROOT / "finetuning" / f"{metric.source.replace('.', '/')}.py"
        assert source.is_file(), f"{metric.tag}: no file {source}"
        example = re.sub("<[ik]>", "3", metric.tag).replace("<name>", "a.b")
        assert metric_table.find_metric(example).tag == metric.tag
    assert metric_table.find_metric("Custom/My_Metric") is None
    assert metric_table.find_metric("GPU_12/Power_W").unit == "W"


def test_layout_and_hparams_name_tags_of_the_table():
    examples = [re.sub("<[ik]>", "0", metric.tag) for metric in metric_table.METRICS]
    for charts in metric_table.LAYOUT.values():
        for patterns in charts.values():
            for pattern in patterns:
                assert any(re.match(pattern, tag) for tag in examples), pattern
    assert set(metric_table.HPARAM_METRICS) <= set(examples)


# --- the server ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("load_fast", [True, False])
def test_server_shows_everything(tmp_path, load_fast):
    """Scalars with descriptions, text, histograms, images, hparams with status, layout."""
    logdir = tmp_path / "logs"
    for name, status in (("one", "success"), ("two", None)):
        logger = TensorBoardLogger(logdir / name, warn=NO_WARNING)
        logger.add_hparams({"lr": 1e-4, "use_dora": False, "model": "m", "api_key": "hunter2-x"})
        for step in range(1, 6):
            logger.log(
                step, {"Training/Loss": 5.0 - step, "GPU_0/Power_W": math.nan, "My/Own": 1.0}
            )
            logger.add_text("Eval/Samples", f"| a | b |\n|---|---|\n| {step} | **x** |", step)
            logger.add_histogram("Model/Weights_Distribution", torch.randn(100), step)
            logger.add_image("LoRA/Update_Ratio_Map", np.ones((1, 2, 3)), step)
        logger.close(status)
    with TensorBoardServer(logdir, load_fast=load_fast) as server:
        tags = server.wait_for(lambda: server.scalar_tags("two"), "tags")
        server.wait_for(lambda: len(server.scalars("two", "My/Own")) == 5, "points")
        assert tags.keys() == {"Training/Loss", "GPU_0/Power_W", "My/Own"}
        assert "cross-entropy" in tags["Training/Loss"]["description"]
        assert "Unit: W" in tags["GPU_0/Power_W"]["description"]
        assert server.scalars("one", "Training/Loss") == [(s, 5.0 - s) for s in range(1, 6)]
        assert all(math.isnan(value) for _, value in server.scalars("one", "GPU_0/Power_W"))
        texts = server.texts("one", "Eval/Samples")
        assert [step for step, _ in texts] == [1, 2, 3, 4, 5]
        assert "<table>" in texts[0][1] and "<strong>x</strong>" in texts[0][1]
        assert server.histogram_steps("one", "Model/Weights_Distribution") == [1, 2, 3, 4, 5]
        assert len(
            server.get("plugin/images/images", run="one", tag="LoRA/Update_Ratio_Map", sample="0")
        )
        layout = server.get("plugin/custom_scalars/layout")
        assert [c["title"] for c in layout["category"]] == list(metric_table.LAYOUT)
        check_hparams(server)


def check_hparams(server: TensorBoardServer) -> None:
    body = {"experimentName": ""}
    experiment = server.post("plugin/hparams/experiment", body)
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert names == {"lr", "use_dora", "model", "api_key"}
    columns = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert set(columns) == set(metric_table.HPARAM_METRICS)
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    columns = [{"metric": info["name"]} for info in experiment["metricInfos"]]
    columns += [{"hparam": name} for name in names]
    body |= {"colParams": columns, "allowedStatuses": statuses, "startIndex": 0, "sliceSize": 10}
    sessions = {}
    for group in server.post("plugin/hparams/session_groups", body)["sessionGroups"]:
        for session in group["sessions"]:
            sessions[session["name"]] = (session.get("status", "STATUS_UNKNOWN"), group["hparams"])
    assert sessions["one"][0] == "STATUS_SUCCESS"
    assert sessions["two"][0] == "STATUS_UNKNOWN"
    assert sessions["one"][1]["lr"] == 1e-4
    assert sessions["one"][1]["use_dora"] is False
    assert sessions["one"][1]["api_key"] == "[redacted]"


# --- kill and resume ---------------------------------------------------------------------------------

RUN = """
import sys, time
from tb_logger import TensorBoardLogger
run, lines, attempt, first, checkpoint, last = *sys.argv[1:3], *map(int, sys.argv[3:])
logger = TensorBoardLogger(run, metrics_path=lines, resume_step=first if attempt else None)
logger.add_hparams({"lr": 1.0})
logger.add_scalar("Config/Batch_Size", 4, 0)
logger.add_text("Config/Training_Settings", "settings", 0)
for step in range(first + 1, last + 1):
    value = attempt * 10_000.0 + step
    logger.log(step, {"dense": value, "other": -value})
    logger.add_scalar("custom", value, step)
    if step % (7 + attempt) == 0:  # another rhythm after every resume
        logger.log(step, {"sparse": value})
        logger.add_text("text", str(value), step)
    if step % (5 + 2 * attempt) == 0:
        logger.log_histogram_counts("histogram", [1, 2], [value, value + 1, value + 2], step)
    if step == checkpoint:
        logger.flush(durable=True)
        print("checkpoint", flush=True)
    if checkpoint < step:
        logger.add_scalar(f"orphan_{attempt}", value, step)
    time.sleep(0.002)
logger.close("success")
"""
CHECKPOINTS = (0, 60, 110, 170, 230)  # the fourth attempt ends at 230
LAST = 230


def expected_points(tag: str, rhythm=lambda attempt: 1) -> list[tuple[int, float]]:
    """What an undisturbed reader must find: each attempt counts up to its checkpoint."""
    points = []
    for attempt in range(4):
        for step in range(CHECKPOINTS[attempt] + 1, CHECKPOINTS[attempt + 1] + 1):
            if step % rhythm(attempt) == 0:
                points.append((step, attempt * 10_000.0 + step))
    return points


EXPECTED = {
    "dense": expected_points("dense"),
    "custom": expected_points("custom"),
    "other": [(step, -value) for step, value in expected_points("other")],
    "sparse": expected_points("sparse", lambda attempt: 7 + attempt),
    "Config/Batch_Size": [(0, 4.0)],
}
TEXTS = {
    "text": [(step, str(value)) for step, value in EXPECTED["sparse"]],
    "Config/Training_Settings": [(0, "settings")],
}
HISTOGRAM_STEPS = [step for step, _ in expected_points("h", lambda attempt: 5 + 2 * attempt)]


def attempt_and_kill(run: Path, attempt: int, seen) -> None:
    """One attempt of the run; killed in the middle of logging after it went on past its checkpoint."""
    first, checkpoint = CHECKPOINTS[attempt], CHECKPOINTS[attempt + 1]
    last = 100_000 if attempt < 3 else LAST
    command = [sys.executable, "-c", RUN, str(run), str(run.parent.parent / "metrics.jsonl")]
    command += map(str, (attempt, first, checkpoint, last))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "checkpoint\n"
            if attempt == 3:
                assert child.wait(60) == 0
                return
            seen(attempt, checkpoint)  # the servers show points of the branch that will be dead
            time.sleep(random.uniform(0, 0.1))
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                child.wait()


@pytest.fixture(scope="module")
def resumed_run(tmp_path_factory):
    """A run killed three times and resumed three times while servers of both kinds look on."""
    if os.name != "posix":
        pytest.skip("needs SIGKILL")
    logdir = tmp_path_factory.mktemp("resumed") / "logs"
    run = logdir / "run"
    run.mkdir(parents=True)
    with (
        TensorBoardServer(logdir, load_fast=True) as fast,
        TensorBoardServer(logdir, load_fast=False) as slow,
    ):

        def seen(attempt: int, checkpoint: int) -> None:
            for server in (fast, slow):
                server.wait_for(
                    lambda server=server: (
                        server.scalars("run", f"orphan_{attempt}")
                        and server.scalars("run", "dense")[-1][0] > checkpoint
                    ),
                    f"dead branch of attempt {attempt}",
                )

        for attempt in range(4):
            attempt_and_kill(run, attempt, seen)
        yield run, {"fast": fast, "slow": slow}


@pytest.mark.slow
def test_resumed_run_in_files(resumed_run):
    """Our reader, TensorBoard's and tbparse: every tag once per step, nothing of a dead branch."""
    tbparse = pytest.importorskip("tbparse")
    run, _ = resumed_run
    assert read_run(run) == EXPECTED
    assert read_texts(run) == TEXTS
    histograms = read_histograms(run)["histogram"]
    assert [step for step, _, _ in histograms] == HISTOGRAM_STEPS
    reader, table = accumulate(run), tbparse.SummaryReader(str(run))
    assert set(reader.Tags()["scalars"]) == EXPECTED.keys()
    assert set(table.scalars.tag) == EXPECTED.keys()
    for tag, points in EXPECTED.items():
        rows = table.scalars[table.scalars.tag == tag]
        assert [(event.step, event.value) for event in reader.Scalars(tag)] == points
        assert list(zip(rows.step, rows.value, strict=True)) == points
    for tag, points in TEXTS.items():
        rows = table.text[table.text.tag == tag]
        texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in reader.Tensors(tag)]
        assert texts == points
        assert list(zip(rows.step, rows.value, strict=True)) == points
    assert [event.step for event in reader.Histograms("histogram")] == HISTOGRAM_STEPS


@pytest.mark.slow
def test_resumed_run_in_json_lines(resumed_run):
    run, _ = resumed_run
    found: dict[str, list] = {}
    for line in read_metrics(run.parent.parent / "metrics.jsonl"):
        for tag, value in line["metrics"].items():
            found.setdefault(tag, []).append((line["step"], value))
    assert found == EXPECTED


def check_server(server: TensorBoardServer, orphans_stay: bool) -> None:
    server.wait_for(lambda: server.scalars("run", "dense")[-1:] == EXPECTED["dense"][-1:], "end")
    tags = set(server.scalar_tags("run"))
    if orphans_stay:  # a live server never forgets a tag
        tags -= {f"orphan_{attempt}" for attempt in range(3)}
    assert tags == EXPECTED.keys()
    for tag, points in EXPECTED.items():
        assert server.scalars("run", tag) == points, tag
    for tag, points in TEXTS.items():
        shown = [
            (step, re.sub("<[^>]*>", "", html).strip()) for step, html in server.texts("run", tag)
        ]
        assert shown == points
    assert server.histogram_steps("run", "histogram") == HISTOGRAM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_resumed_run_in_a_live_server(resumed_run, mode):
    check_server(resumed_run[1][mode], orphans_stay=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_resumed_run_in_a_fresh_server(resumed_run, mode):
    with TensorBoardServer(resumed_run[0].parent, load_fast=mode == "fast") as server:
        server.wait_for(lambda: server.scalars("run", "dense"), "data")
        check_server(server, orphans_stay=False)


def test_resume_within_a_second_and_with_a_clock_gone_back(tmp_path):
    """Files of a run are read in the order of their names, which must be the order of writing."""
    run = tmp_path / "run"
    for attempt in range(4):
        with TensorBoardLogger(run, resume_step=attempt * 10 or None, warn=NO_WARNING) as logger:
            for step in range(attempt * 10 + 1, attempt * 10 + 16):
                logger.log(step, {"a": attempt * 100.0 + step})
        if attempt == 1:  # the clock of the first processes was ten years ahead
            newest = event_file.event_files(run)[-1]
            newest.rename(newest.with_name("events.out.tfevents.2111111111.host.99999.0"))
    expected = [(s, min((s - 1) // 10, 3) * 100.0 + s) for s in range(1, 46)]
    assert read_run(run)["a"] == expected
    assert [(e.step, e.value) for e in accumulate(run).Scalars("a")] == expected


def test_a_resumed_run_writes_no_value_twice(tmp_path):
    """The start of a run logs settings and data once more; the run has them already."""
    for resume_step in (None, 2):
        logger = TensorBoardLogger(tmp_path / "run", resume_step=resume_step, warn=NO_WARNING)
        logger.log(0, {"Config/Batch_Size": 4.0})
        logger.add_hparams({"lr": 1.0})
        logger.log((resume_step or 0) + 1, {"a": 1.0})
        logger.close()
        assert logger.dropped == 0
    tags = [value.tag for event in records(tmp_path / "run") for value in event.summary.value]
    assert sorted(tags) == sorted([*dict.fromkeys(tags), "a"])


def test_a_directory_with_a_run_is_not_taken_for_a_new_one(tmp_path):
    TensorBoardLogger(tmp_path / "run", warn=NO_WARNING).close()
    with pytest.raises(UserError, match="already holds a run"):
        TensorBoardLogger(tmp_path / "run")


# --- faults ---------------------------------------------------------------------------------------------


def mounted(path: Path) -> bool:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    try:
        return subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    path = tmp_path / "disk"
    if not mounted(path):
        pytest.skip("mounting a small tmpfs is not permitted here; the size limit test covers it")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.slow
def test_full_disk_then_freed(small_disk, monkeypatch):
    """Training goes on, the file stays whole, the backlog is written when there is space again."""
    monkeypatch.setattr(event_file, "RETRY_SECONDS", 0.1)
    told, run, lines = [], small_disk / "run", small_disk / "metrics.jsonl"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(30_000))
    logger = TensorBoardLogger(run, metrics_path=lines, warn=told.append)
    for step in range(1, 101):
        logger.log(step, {f"tag_{i}": float(step) for i in range(10)})
    assert logger.flush()
    assert len(told) == 1 and "cannot write the log" in told[0]
    shown = [step for step, _ in read_run(run)["tag_0"]]
    assert 0 < len(shown) < 100
    assert len(read_metrics(lines)) < 100
    ballast.unlink()
    logger.log(101, {"tag_0": 101.0})
    logger.close()
    assert [step for step, _ in read_run(run)["tag_0"]] == list(range(1, 102))
    assert [event.step for event in accumulate(run).Scalars("tag_0")] == list(range(1, 102))
    assert [line["step"] for line in read_metrics(lines)] == list(range(1, 102))
    assert logger.dropped == 0


LIMITED = """
import json, resource, signal, sys
import tb_logger
from finetuning.events import event_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
event_file.RETRY_SECONDS, event_file.BACKLOG_BYTES = 0.05, 4000
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
told = []
logger = tb_logger.TensorBoardLogger(sys.argv[1], warn=told.append)
for step in range(1, 201):
    logger.log(step, {f"tag_{i}": float(step) for i in range(10)})
    if step % 20 == 0:
        logger.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
logger.log(201, {"tag_0": 201.0})
logger.close()
print(json.dumps([logger.dropped, told]))
"""


@pytest.mark.slow
def test_limit_on_file_size(tmp_path):
    """No file takes more than a few records: each failure goes on in a new file, nothing is torn."""
    pytest.importorskip("resource", reason="no limit on file sizes on this system")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "run")]
    result = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
    dropped, told = json.loads(result.stdout)
    assert len(event_file.event_files(tmp_path / "run")) > 1
    shown = [step for step, _ in read_run(tmp_path / "run")["tag_0"]]
    assert shown == sorted(set(shown)) and shown[-1] == 201
    assert dropped == 10 * (201 - len(shown))  # every point that is missing was counted
    assert [event.step for event in accumulate(tmp_path / "run").Scalars("tag_0")] == shown
    assert "cannot write" in told[0] and len(told) <= 2


def test_a_run_that_begins_again_is_as_a_new_one(tmp_path):
    run, lines = tmp_path / "run", tmp_path / "metrics.jsonl"
    for resume_step in (None, -1):
        with TensorBoardLogger(run, metrics_path=lines, resume_step=resume_step) as logger:
            logger.add_hparams({"lr": 1.0})
            for step in (0, 1):
                logger.log(step, {"Training/Loss": 2.0 - step})
    assert read_run(run) == {"Training/Loss": [(0, 2.0), (1, 1.0)]}
    assert [line["step"] for line in read_metrics(lines)] == [0, 1]
    in_order = [value for event in records(run) for value in event.summary.value]
    values = {value.tag: value for value in reversed(in_order)}  # the first of each tag
    assert "custom_scalars__config__" in values and "_hparams_/experiment" in values
    assert "cross-entropy" in values["Training/Loss"].metadata.summary_description


def test_deleted_directory_is_made_again(tmp_path):
    told, run = [], tmp_path / "run"
    logger = TensorBoardLogger(run, metrics_path=tmp_path / "run" / "m.jsonl", warn=told.append)
    logger.add_hparams({"lr": 1.0})
    logger.log(1, {"Training/Loss": 1.0})
    logger.flush()
    shutil.rmtree(run)
    logger.log(2, {"Training/Loss": 2.0})
    logger.close()
    assert read_run(run) == {"Training/Loss": [(2, 2.0)]}
    assert [line["step"] for line in read_metrics(run / "m.jsonl")] == [2]
    values = {value.tag: value for event in records(run) for value in event.summary.value}
    assert "custom_scalars__config__" in values and "_hparams_/experiment" in values
    assert "cross-entropy" in values["Training/Loss"].metadata.summary_description
    assert len(told) == 1 and "was deleted" in told[0]


def test_deleted_file_is_noticed(tmp_path):
    told, run = [], tmp_path / "run"
    logger = TensorBoardLogger(run, warn=told.append)
    logger.log(1, {"a": 1.0})
    logger.flush()
    event_file.event_files(run)[0].unlink()
    logger.log(2, {"a": 2.0})
    logger.close()
    assert [(event.step, event.value) for event in accumulate(run).Scalars("a")] == [(2, 2.0)]
    assert len(told) == 1


def test_a_directory_that_can_not_be_made_costs_only_points(tmp_path):
    (tmp_path / "file").write_text("in the way")
    told = []
    logger = TensorBoardLogger(tmp_path / "file" / "run", warn=told.append)
    logger.log(1, {"a": 1.0})
    logger.close()
    assert logger.dropped == 1
    assert "cannot write" in told[0] and "1 values were dropped" in told[-1]


def test_a_slow_disk_never_holds_a_caller(tmp_path, monkeypatch):
    """The queue is bounded: what does not fit is dropped, counted and told."""
    write, told = os.write, []
    release = tmp_path / "release"

    def slow_write(fd, data):
        while not release.exists():
            time.sleep(0.01)
        return write(fd, data)

    monkeypatch.setattr(event_file.os, "write", slow_write)
    monkeypatch.setattr(tb_logger, "MAX_QUEUED_BYTES", 100_000)
    logger = TensorBoardLogger(tmp_path / "run", warn=told.append)
    for step in range(1, 1001):
        logger.log(step, {"a": float(step), "b": 1.0})
    assert not logger.flush(wait=0.05)
    assert not logger.flush(wait=0)
    assert logger.dropped > 0
    release.touch()
    logger.close()
    shown = [step for step, _ in read_run(tmp_path / "run")["a"]]
    assert len(shown) + logger.dropped // 2 == 1000
    assert "queue is full" in told[0]


def test_close_does_not_wait_for_ever(tmp_path, monkeypatch):
    write, told, release = os.write, [], tmp_path / "release"

    def stuck_write(fd, data):
        while not release.exists():
            time.sleep(0.01)
        return write(fd, data)

    monkeypatch.setattr(event_file.os, "write", stuck_write)
    logger = TensorBoardLogger(tmp_path / "run", warn=told.append)
    logger.log(1, {"a": 1.0})
    logger.close(wait=0.1)
    release.touch()
    assert any("did not answer" in text for text in told)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_writes_nothing(tmp_path):
    script = """
import os, sys
from tb_logger import TensorBoardLogger
logger = TensorBoardLogger(sys.argv[1])
logger.log(1, {"a": 1.0})
child = os.fork()
for step in range(2, 200):
    logger.log(step, {"a": float(step) if child else -1.0})
logger.flush()
if not child:
    sys.exit(0)  # runs the exit handlers, too
assert os.waitpid(child, 0)[1] == 0
logger.close()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert read_run(tmp_path / "run")["a"] == [(step, float(step)) for step in range(1, 200)]


def test_a_pickled_copy_is_a_null_logger(tmp_path):
    with TensorBoardLogger(tmp_path / "run", warn=NO_WARNING) as logger:
        assert isinstance(pickle.loads(pickle.dumps(logger)), NullLogger)


@pytest.mark.slow
def test_exit_without_close_loses_nothing(tmp_path):
    script = """
import sys
from tb_logger import TensorBoardLogger
logger = TensorBoardLogger(sys.argv[1])
for step in range(1, 300):
    logger.log(step, {"a": 1.0})
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert len(read_run(tmp_path / "run")["a"]) == 299


def test_calls_after_close_are_told_once(tmp_path):
    told = []
    logger = TensorBoardLogger(tmp_path / "run", warn=told.append)
    logger.close()
    logger.log(1, {"a": 1.0})
    logger.add_scalar("a", 1.0, 2)
    logger.close()
    assert logger.dropped == 2
    assert len(told) == 1 and "after close" in told[0]


def test_a_warning_that_fails_stops_nothing(tmp_path, capfd):
    def warn(text: str) -> None:
        raise RuntimeError("warn is broken")

    with TensorBoardLogger(tmp_path / "run", warn=warn) as logger:
        logger.log(1, {"a": None, "b": 1.0})
    assert read_run(tmp_path / "run") == {"b": [(1, 1.0)]}
    assert "warn is broken" in capfd.readouterr().err


def test_json_line_is_strict():
    line = step_writer.json_line(3, 1.25, {"a": math.nan, "b": -math.inf, "c": 0.1})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 3,
        "time": 1.25,
        "metrics": {"a": None, "b": None, "c": 0.1},
        "nonfinite": {"a": "NaN", "b": "-Infinity"},
    }


def test_time_of_callers_is_counted(tmp_path):
    with TensorBoardLogger(tmp_path / "run", warn=NO_WARNING) as logger:
        before = logger.overhead_seconds
        logger.log(1, {"a": 1.0})
        assert 0 <= before < logger.overhead_seconds < 1


def test_a_session_replaces_the_row_of_the_one_before(tmp_path):
    """What the HPARAMS table shows is what the run goes on with; a reader takes the first that it finds."""
    for session, rate in enumerate((0.1, 0.2)):
        resume = 1 if session else None
        with TensorBoardLogger(tmp_path, resume_step=resume, hparams={"rate": rate}) as logger:
            logger.log(session + 1, {"Training/Loss": 1.0})
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    content = reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["rate"].number_value == 0.2
    assert [event.step for event in reader.Scalars("Training/Loss")] == [1, 2]


def test_reach_names_users_tags_only(tmp_path):
    with TensorBoardLogger(tmp_path, hparams={"rate": 0.1}) as logger:
        logger.log(3, {"Training/Loss": 1.0})
        logger.add_scalar("Custom/By_Tokens", 1.0, 5000)
        logger.add_text("My/Note", "text", 7)
        assert logger.flush() and logger.reach == {"Custom/By_Tokens": 5000, "My/Note": 7}
        logger.rewind(3, {"Custom/By_Tokens": 5000})
        assert logger.reach == {"Custom/By_Tokens": 5000}
    assert not NullLogger().reach and not NullLogger().tags
