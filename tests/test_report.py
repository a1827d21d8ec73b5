"""The page of a run: whole, offline, escaped; for runs that ended and runs that did not.

uv run pytest tests/test_report.py
"""

import html.parser
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import tyro

import report
from command_line import exit_code
from direct_finetuning_with_existing_modules import main
from errors import UserError
from line_chart import COLUMNS, line_chart, thinned, ticks
from recorded_run import find_runs, read_recorded
from report import markdown, page, write_report
from run_directory import RUN_PREFIX, RunDirectory
from tb_logger import TensorBoardLogger

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
VOID = {"meta", "br", "hr", "img", "circle", "line", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """Tags and addresses of a page; complains of tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag, tag


def assert_harmless(text: str) -> Page:
    parsed = Page(text)
    assert not parsed.tags & {"script", "img", "iframe", "object", "link", "form"}
    assert all(address.startswith("#") for address in parsed.addresses), parsed.addresses
    assert not parsed.handlers
    assert "default-src 'none'" in text
    return parsed


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, tiny_data, cache_dir) -> Path:
    """The output directory of a short whole run."""
    out = tmp_path_factory.mktemp("report") / "out"
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    places = ["--output-dir", str(out), "--cache-dir", str(cache_dir)]
    steps = ["--max-steps", "4", "--logging-steps", "1", "--eval-steps", "2"]
    short = ["--max-seq-length", "768", "--num-probes", "1", "--probe-max-new-tokens", "8"]
    assert main([*inputs, *places, *steps, *short, "--quiet"]) == 0
    return out


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that was broken off before it had written anything but a point or two."""
    run = RunDirectory(tmp_path / "out", RUN_PREFIX + "20250101_000000")
    run.logs.mkdir(parents=True)
    run.tensorboard.mkdir(parents=True)
    return run


def test_a_run_leaves_its_page(finished: Path):
    (path,) = finished.glob("training_logs/*/report.html")
    text = path.read_text(encoding="utf-8")
    parsed = assert_harmless(text)
    assert {"svg", "table", "details"} <= parsed.tags
    for part in ("completed", "4 of 4", "Loss", "Learning rate", "Held-out questions", "torch"):
        assert part in text, part
    assert "learning_rate" in text and "0.0003" in text, "the configuration"
    assert text.count("<svg") >= 8 and "Lengths" in text
    assert len(text) < 2_000_000


def test_every_pattern_of_the_charts_fits_a_known_tag():
    from metric_table import METRICS

    tags = [re.sub("<name>", "q_proj", re.sub("<[ik]>", "1", m.tag)) for m in METRICS]
    for title, patterns in report.CHARTS.items():
        for pattern in patterns:
            assert any(re.fullmatch(pattern, tag) for tag in tags), (title, pattern)


def test_a_run_that_was_broken_off_has_a_page(run: RunDirectory):
    lines = [
        {"step": 1, "time": 10.0, "metrics": {"Training/Loss": 2.0}},
        {"step": 2, "time": 12.0, "metrics": {"Training/Loss": None, EVIL: 1.0}},
        {"step": 3, "time": 14.0, "metrics": {"Training/Loss": 1.5}},
    ]
    cut = '{"step": 4, "time": 16.0, "metr'
    text = "".join(json.dumps(record) + "\n" for record in lines) + cut
    (run.logs / "metrics.jsonl").write_text(text, encoding="utf-8")
    path = write_report(run)
    text = path.read_text(encoding="utf-8")
    assert_harmless(text)
    assert "unknown" in text and "1.5" in text
    recorded = read_recorded(run)
    assert recorded.seconds == 4.0 and recorded.lowest("Training/Loss") == 1.5
    assert math.isnan(recorded.series["Training/Loss"][1][1])


def test_texts_of_the_data_stay_text(run: RunDirectory):
    with TensorBoardLogger(run.tensorboard, metrics_path=run.logs / "metrics.jsonl") as writer:
        writer.log(1, {"Training/Loss": 2.0})
        writer.add_text("Eval/Samples", f"{EVIL}\n\n[a](javascript:alert(3)) ![b](http://x/y)", 1)
    alert = {"name": EVIL, "step": 1, "value": 1.0, "threshold": 2.0, "advice": EVIL}
    (run.logs / "alerts.jsonl").write_text(json.dumps(alert) + "\n", encoding="utf-8")
    status = {
        "status": EVIL,
        "at": "now",
        "reason": f"{EVIL} token=hf_abcdefghijklmnopqrstuvwxyz01",
    }
    (run.logs / "status.json").write_text(json.dumps(status), encoding="utf-8")
    settings = {"config": {"model_name": EVIL, "api_key": "sk-secretsecretsecret"}}
    (run.logs / "configuration.json").write_text(json.dumps(settings), encoding="utf-8")
    text = page(read_recorded(run))
    assert_harmless(text)
    assert "alert(1)" in text, "shown as text"
    assert "hf_abc" not in text and "sk-secret" not in text


def test_markdown_has_tables_and_fences_but_no_html():
    text = markdown("| a | b |\n| --- | --- |\n| 1 | <b>2</b> |\n\n```\n<i>\n```\n\x1b[31mred")
    assert "<td>1</td>" in text and "<b>" not in text and "<i>" not in text and "\x1b" not in text


def test_a_later_record_of_a_step_wins(run: RunDirectory):
    lines = [{"step": 1, "time": 1.0, "metrics": {"a": v}} for v in (1.0, 2.0)]
    text = "".join(json.dumps(record) + "\n" for record in lines)
    (run.logs / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert read_recorded(run).series == {"a": [(1, 2.0)]}


def test_the_newest_run_of_an_output_directory(finished: Path, tmp_path: Path):
    (logs,) = (finished / "training_logs").iterdir()
    shutil.copytree(logs, tmp_path / "out" / "training_logs" / (RUN_PREFIX + "20000101_000000"))
    shutil.copytree(logs, tmp_path / "out" / "training_logs" / logs.name)
    runs = find_runs([tmp_path / "out"])
    assert [run.name for run in runs] == [RUN_PREFIX + "20000101_000000", logs.name]
    for place in (logs, finished / "tensorboard_logs" / logs.name, logs / "metrics.jsonl"):
        (found,) = find_runs([place])
        assert found.logs.resolve() == logs.resolve()


def test_bad_places_and_files_are_clear_errors(
    run: RunDirectory, tmp_path: Path, capfd, monkeypatch
):
    with pytest.raises(UserError, match="no run"):
        find_runs([tmp_path])
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "absent")])
    assert exit_code(lambda: tyro.cli(report.main)) == 2
    assert capfd.readouterr().err.startswith("error: ")
    (run.logs / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="not a metrics file"):
        read_recorded(run)


# -----------------------------------------------------------------------------
# Charts


def test_thinning_keeps_spikes_and_gaps():
    points = [(i, 1.0) for i in range(20_000)]
    points[7777], points[9999], points[12345] = (7777, 50.0), (9999, -9.0), (12345, math.nan)
    kept = thinned(points)
    assert len(kept) <= 3 * COLUMNS and [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert (7777, 50.0) in kept and (9999, -9.0) in kept
    assert any(math.isnan(y) for _, y in kept)
    assert thinned(points[:50]) == points[:50]


def test_a_chart_of_odd_curves():
    chart = line_chart("<t>", {"<a>": [(0, 1.0), (1, math.nan), (2, 1.0)], "b": []})
    Page(chart)
    assert "&lt;t&gt;" in chart and "&lt;a&gt;" in chart and "nan" not in chart
    assert chart.count("<circle") == 2, "points alone are dots"
    assert line_chart("none", {"a": [(0, math.inf)]}) == ""
    assert line_chart("one point", {"a": [(5, 5.0)]})


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1e-5, 3e-4), (-3, 7), (0, 123456)])
def test_ticks_are_few_round_and_inside(low, high):
    marks = ticks(low, high)
    assert 3 <= len(marks) <= 7 and all(low - 1e-12 <= m <= high * 1.0000001 for m in marks)
