"""The page of a run: whole, offline, escaped; for runs that ended and runs that did not.

uv run pytest tests/runs/test_report.py
"""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetuning.common.arguments import parsed
from finetuning.common.bounds import REPORT_CPU, REPORT_MEMORY, REPORT_WALL
from finetuning.common.errors import UserError, exit_code
from finetuning.common.formatting import shown
from finetuning.common.language import in_chinese
from finetuning.common.terminal import Terminal
from finetuning.evaluation.generation import Completion, EvalPrompt, samples_text
from finetuning.readers.sample import Sample
from finetuning.runs import comparison, report
from finetuning.runs.directory import RUN_PREFIX, RunDirectory
from finetuning.runs.recorded import find_runs, read_recorded
from finetuning.runs.report import markdown, page, write_report
from tb_logger import TensorBoardLogger
from tests.helpers.html_page import assert_harmless

sys.path.append(str(Path(__file__).parents[2] / "docs"))  # screenshots

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


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
    for part in ("completed", "6 of 6", "Loss", "Learning rate", "Held-out questions", "torch"):
        assert part in text, part
    assert "learning_rate" in text and "0.0003" in text, "the configuration"
    assert text.count("<svg") >= 8 and "Lengths" in text
    assert len(text) < 2_000_000


def test_the_first_table_is_the_base_against_the_tuned_model(run):
    def record(step: int, **metrics: float) -> str:
        return json.dumps({"step": step, "time": float(step), "metrics": metrics}) + "\n"

    rows = [
        {
            "Eval/Loss": 2.0,
            "Eval/Loss_Error": 0.1,
            "Forgetting/General_Loss": 1.5,
            "Forgetting/General_Loss_Error": 0.05,
            "Eval/Term_Recall": 0.2,
        },
        {
            "Eval/Loss": 1.5,
            "Eval/Loss_Error": 0.2,
            "Forgetting/General_Loss": 1.75,
            "Forgetting/General_Loss_Error": 0.05,
            "Eval/Term_Recall": 0.2,
        },
    ]
    text = "".join(record(10 * i, **row) for i, row in enumerate(rows))
    (run.logs / "metrics.jsonl").write_text(text, encoding="utf-8")
    first = page(read_recorded(run)).partition("<h2>")[2].partition("</table>")[0]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", first)
    assert first.startswith("Before and after")
    assert cells == [
        *("held-out loss", "2 ± 0.2", "1.5 ± 0.4", "better"),
        *("terms of the reference named", "0.2", "0.2", ""),
        *("loss on general text", "1.5 ± 0.1", "1.75 ± 0.1", "worse"),
    ]
    answers = [{"place": f"a:{i}", "question": f"第{i}问<b>", "thinking": ""} for i in range(9)]
    for name, step, losses, scores in (
        ("before", 0, [2.0, 2.0, 2.0], [0, 0.5, 1, 0, 0, 0, 0, 0, None]),
        ("after", 10, [1.0, 1.5, 2.1], [1, 0.5, 0, 1, 1, 1, 1, 1, 1.0]),
    ):
        found = {
            "step": step,
            "losses": [
                {"place": f"b:{i}", "question": f"留出{i}", "loss": loss, "tokens": 10 * (i + 1)}
                for i, loss in enumerate(losses)
            ],
            "answers": [
                {**one, "reference": "参考", "answer": f"{name}{i}", "score": scores[i]}
                for i, one in enumerate(answers)
            ],
        }
        (run.logs / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    text = page(read_recorded(run))
    assert_harmless(text)
    first = text.partition("<h2>")[2].partition("<h2>")[0]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", first.partition("</table>")[0])
    # By tokens: (10 · -1 + 20 · -0.5 + 30 · 0.1) / 60; the error by the deviations of the three questions.
    off = [10 * (-1 + 17 / 60), 20 * (-0.5 + 17 / 60), 30 * (0.1 + 17 / 60)]
    error = 2 * math.sqrt(1.5 * sum(x * x for x in off)) / 60
    assert cells[12:16] == [
        *("held-out questions by loss", "2 better, 1 worse"),
        *(f"-0.2833 ± {shown(error)}", ""),
    ]
    found |= {"held_out": 5000}
    (run.logs / "after.json").write_text(json.dumps(found), encoding="utf-8")
    assert "3 of 5000 held-out questions by loss" in page(read_recorded(run))
    assert in_chinese("3 of 5000 held-out questions by loss") == "5000 个留出问题中的 3 个，按损失"
    assert cells[16:20] == ["questions by answer", "6 better, 1 worse", "1 alike", ""]
    better, worse = first.split("<details>")[1:3]
    assert "Answered better (5/6)" in better and "before0" in better and "after0" in better
    assert "Answered worse (1/1)" in worse and "before2" in worse and "第2问&lt;b&gt;" in worse
    assert "Loss fell most (2/2)" in first and "Loss rose most (1/1)" in first
    (run.logs / "metrics.jsonl").write_text(record(0, **rows[0]), encoding="utf-8")
    assert "Before and after" not in page(read_recorded(run)), "there is no after yet"


HARMED = {
    "memory": ("MEMORY", "x = bytearray(2**33)", "too much memory|MemoryError"),
    "killed": ("MEMORY", "import os; os.kill(os.getpid(), 9)", "too much memory or time"),
    "broken": ("MEMORY", "raise RuntimeError('odd')", "RuntimeError: odd"),
    "time": ("WALL", "import time; time.sleep(60)", "too much memory or time"),
}


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMED)
def test_a_report_that_fails_harms_no_run(harm, run, capfd, monkeypatch, tmp_path):
    """It runs in a process of its own: whatever becomes of that, this one says a line and goes on."""
    which, code, expected = HARMED[harm]
    (tmp_path / "harmed_report.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(report, "REPORT", "harmed_report")
    if which == "WALL":
        limits = report.Limits(REPORT_MEMORY, REPORT_CPU, dataclasses.replace(REPORT_WALL, limit=1))
        monkeypatch.setattr(report, "LIMITS", limits)
    report.leave_report(run, Terminal(), lambda: False)
    said = capfd.readouterr().err
    assert re.search(f"warning: no report.html: .*({expected}).*uv run python -m", said), said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_relative_folder_has_its_report_wherever_the_program_starts(run, capfd, monkeypatch):
    """The process of the report begins in another folder."""
    point = {"step": 1, "time": 1.0, "metrics": {"Training/Loss": 1.0}}
    (run.logs / "metrics.jsonl").write_text(json.dumps(point) + "\n", encoding="utf-8")
    monkeypatch.chdir(run.output_dir.parent)
    here = RunDirectory(Path(run.output_dir.name), run.name)
    report.leave_report(here, Terminal(), lambda: False)
    said = capfd.readouterr()
    assert "no report.html" not in said.err, said.err
    assert (run.logs / "report.html").is_file()


@pytest.mark.slow
def test_a_signal_leaves_the_report(run, capfd, monkeypatch, tmp_path):
    (tmp_path / "slow_report.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(report, "REPORT", "slow_report")
    began = time.monotonic()
    report.leave_report(run, Terminal(), lambda: time.monotonic() > began + 0.5)
    assert time.monotonic() - began < 2 and "a signal came" in capfd.readouterr().err


@pytest.mark.slow
def test_a_long_run_is_reported_in_little_memory(run, tmp_path):
    """20,000 logged steps of 60 tags: 100 MB above what the imports take (it was a gigabyte)."""
    tags = {f"LoRA/part_{i}/Update_Ratio": i + 0.25 for i in range(60)}
    with (run.logs / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, 20_001):
            record = {"step": step, "time": 1.0 * step, "metrics": {"Training/Loss": 1.0, **tags}}
            file.write(json.dumps(record) + "\n")
    code = (
        "import sys, resource; from finetuning.runs import report, recorded;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; before = peak();"
        "report.write_report(recorded.find_runs([sys.argv[1]])[0]); print(peak() - before);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(run.logs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100


def test_every_pattern_of_the_charts_fits_a_known_tag():
    from finetuning.events.metric_table import METRICS

    tags = [re.sub("<name>", "q_proj", re.sub("<[ik]>", "1", m.tag)) for m in METRICS]
    for title, patterns in report.CHARTS.items():
        for pattern in patterns:
            assert any(re.fullmatch(pattern, tag) for tag in tags), (title, pattern)


def test_every_rate_of_the_probes_is_in_their_chart():
    from finetuning.events.metric_table import METRICS

    rates = [m.tag for m in METRICS if m.source == "evaluation.generation" and m.unit == "fraction"]
    patterns = "|".join(report.CHARTS["Answers of the probes"])
    assert len(rates) >= 5 and all(re.fullmatch(patterns, tag) for tag in rates)


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


def test_of_html_only_line_breaks_pass():
    text = markdown(
        "| a |\n| --- |\n| 1<br>2 `<br>` \\<br\\> <br onclick=x> <BR/> |\n\n```\n<br>\n```"
    )
    assert text.count("<br") == 1 and re.search(r"1<br ?/?>\s*2", text)
    assert text.count("&lt;br") == 4


def test_the_answers_of_the_model_have_lines():
    sample = Sample("问", "想一\n想二", "答一\n\n答二", source="a.md", line=3)
    text = "先\n后 <br> <b>"
    completion = Completion((1,), True, text, "一\n二", True, 1)
    shown = markdown(samples_text([EvalPrompt(sample, (1,), 2, 4)], [completion]))
    assert re.search(r"想一<br ?/?>\s*想二", shown) and re.search(
        r"先<br ?/?>\s*后 &lt;br&gt; &lt;b&gt;", shown
    )
    assert shown.count("<br") == 5 and shown.count("&lt;br") == 1, "that of the model is text"


def test_time_is_that_of_training(run: RunDirectory):
    """300 s of a whole epoch, though a night lay in it, and 10 + 5 + 10 s of the next one."""
    epoch, resumes = "Epoch/Duration_Seconds", "Monitoring/Resume_Count"
    records = [
        (0.0, {"Training/Loss": 3.0, resumes: 0.0}),
        (50_000.0, {epoch: 300.0, resumes: 1.0}),
        (50_010.0, {resumes: 1.0}),
        (50_015.0, {"Eval/Loss": 2.0}),
        (90_000.0, {"Eval/Loss": 1.9}),
        (90_010.0, {resumes: 2.0}),
    ]
    lines = [{"step": i, "time": time, "metrics": m} for i, (time, m) in enumerate(records)]
    metrics = run.logs / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in lines), encoding="utf-8")
    assert read_recorded(run).seconds == 325.0
    metrics.write_text(json.dumps(lines[-1]) + "\n", encoding="utf-8")
    assert read_recorded(run).seconds == 0.0, "all before the checkpoint was taken back"


def test_the_speed_is_that_of_most_steps(run: RunDirectory):
    speeds = [100.0, 102.0, 7.0, None, 101.0, 900.0]
    lines = [
        {"step": i, "time": 1.0 * i, "metrics": {"Throughput/Tokens_Per_Second": speed}}
        for i, speed in enumerate(speeds)
    ]
    text = "".join(json.dumps(record) + "\n" for record in lines)
    (run.logs / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert report.headline(read_recorded(run))["tokens per second, median"] == "101"


def test_the_losses_to_read_first(run: RunDirectory):
    losses = {"Eval/Loss": [3.0, 1.5, None, 2.0], "Training/Loss": [2.5, 1.25, 1.0, 2.25]}
    rows = [dict(zip(losses, pair, strict=True)) for pair in zip(*losses.values(), strict=True)]
    lines = [{"step": i, "time": 1.0 * i, "metrics": row} for i, row in enumerate(rows)]
    text = "".join(json.dumps(record) + "\n" for record in lines)
    (run.logs / "metrics.jsonl").write_text(text, encoding="utf-8")
    numbers = report.headline(read_recorded(run))
    assert numbers["held-out loss"] == "3 → 2" and numbers["lowest held-out loss"] == "1.5"
    assert numbers["training loss"] == "2.25" and numbers["steps"] == "3"


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
    monkeypatch.setattr("sys.argv", ["finetuning.runs.report", str(tmp_path / "absent")])
    assert exit_code(lambda: parsed("report", report.main)()) == 2
    assert capfd.readouterr().err.startswith("error: ")
    (run.logs / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="not a metrics file"):
        read_recorded(run)


# -----------------------------------------------------------------------------
# In a browser


LAYOUT = """() => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const lines = cell => { const r = document.createRange(); r.selectNodeContents(cell);
    return new Set([...r.getClientRects()].map(box => box.top)).size; };
  return {
    overflow: document.documentElement.scrollWidth - innerWidth,
    broken: [...document.querySelectorAll("td:first-child")].filter(c => lines(c) > 1).length,
    rows: document.querySelectorAll("td:first-child").length,
  };
}"""


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from screenshots import browser_path

    if browser_path() is None:
        pytest.skip("no Chromium on the PATH (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_lies_beside_the_page_and_names_are_whole(finished: Path, chromium, width: int):
    runs = [read_recorded(run) for run in find_runs([finished])]
    (recorded,) = runs
    recorded.series["Eval/By_Source/" + "a-long-file-name" * 3] = [(0, 1.0)]
    recorded.configuration["config"]["data_path"] = ["/somewhere/far" * 12]
    view = chromium.new_page(viewport={"width": width, "height": 800})
    for content in (page(recorded), comparison.page(runs * 3)):
        view.set_content(content)
        found = view.evaluate(LAYOUT)
        assert found["overflow"] <= 0 and found["broken"] == 0 and found["rows"] > 8, found
    view.close()


# -----------------------------------------------------------------------------
# Charts


def test_a_chart_says_what_it_leaves_out():
    series = {
        f"Eval/By_Source/{i:02d}": [(0, 1.0), (1, 2.0)] for i in range(report.MOST_CURVES + 3)
    }
    charts = report._charts(series)
    assert charts.count("<path") == report.MOST_CURVES
    assert "Held-out loss by source (the first 12 of 15)" in charts
    del series["Eval/By_Source/00"], series["Eval/By_Source/01"], series["Eval/By_Source/02"]
    assert "the first" not in report._charts(series)
