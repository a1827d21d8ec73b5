"""A run as one page for a colleague: curves, alerts, samples, data and settings, offline and without scripts.

uv run python -m finetuning.runs.report qwen3_4b_thinking_output                        # its newest run
uv run python -m finetuning.runs.report qwen3_4b_thinking_output/training_logs/<run>

The page is report.html among the run's logs. Finished, running and broken-off runs alike.
"""

import html
import io
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tyro
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline

from finetuning.analysis import report as analysis_report
from finetuning.common.arguments import parsed
from finetuning.common.bounds import REPORT_CPU, REPORT_MEMORY, REPORT_WALL
from finetuning.common.errors import exit_code
from finetuning.common.files import atomic_write_text
from finetuning.common.formatting import UNKNOWN, duration, flat, shown
from finetuning.common.html import Points, cell, html_page, line_chart, table
from finetuning.common.language import current, translated
from finetuning.common.limited import STOPPED, Ended, Limits, run_limited
from finetuning.common.terminal import Terminal
from finetuning.common.text import clean_line, redact, redact_values
from finetuning.events.address import SERVER, pinned_address
from finetuning.runs import naming
from finetuning.runs.directory import RunDirectory
from finetuning.runs.findings import findings
from finetuning.runs.model_card import complete_cards
from finetuning.runs.recorded import (
    Alerts,
    RecordedRun,
    files_of_ours,
    find_runs,
    read_recorded,
)
from finetuning.runs.report_before_after import before_and_after

# Title of a chart -> expressions; every tag that fits one is a curve, named by what the title leaves out.
CHARTS = {
    "Loss": (r"Training/Loss", r"Eval/Loss"),
    "Loss by part": (r"(Thinking|Answer)/Loss",),
    "Held-out loss by part": (r"Eval/(Thinking|Answer|Close|EOS)_Loss",),
    "Token accuracy": (r"(Training|Eval)/Token_Accuracy",),
    "Loss by tenth of the chain of thought": (r"Thinking/Loss_By_Position_\d+",),
    "Held-out loss by difficulty": (r"Eval/By_Difficulty_\d",),
    "Held-out loss by category": (r"Eval/By_Category/.+",),
    "Held-out loss by source": (r"Eval/By_Source/.+",),
    "Distance from the base (KL)": (r"Forgetting/KL_.+",),
    "Loss on general text": (r"Forgetting/General_Loss",),
    "Answers of the probes": (
        r"Eval/(Format_Valid|Repetition|Budget_Hit)_Rate",
        r"Eval/(Term_Recall|Fact_Recall|Exact_Answer|Answer_Score)",
    ),
    "Learning rate": (r"Training/Learning_Rate",),
    "Gradient norm": (r"Training/Gradient_Norm(_Max)?",),
    "Update of the adapters": (r"LoRA/[a-z_]+/Update_Ratio",),
    "Convergence score": (r"Monitoring/Convergence_Score(_Low|_High)?",),
    "Tokens per second": (r"Throughput/(Supervised_)?Tokens_Per_Second",),
    "Seconds of a step": (r"Throughput/Step_Seconds(_.+)?",),
    "GPU utilisation, %": (r"GPU_\d+/Utilization_Percent",),
    "GPU memory, %": (r"GPU_\d+/Memory_Usage_Percent",),
    "GPU temperature, °C": (r"GPU_\d+/Temperature_C",),
    "GPU power, W": (r"GPU_\d+/Power_W",),
    "Host memory of the run, MB": (r"Memory/Host_RSS_MB",),
    "CPU, %": (r"System/CPU_Percent",),
}
MOST_CURVES = 12  # in one chart
TEXTS = (
    ("Eval/Samples", "Held-out questions and the model's answers"),
    ("Eval/Hardest_Samples", "Hardest held-out samples"),
    ("Training/Hardest_Samples", "Hardest training samples"),
    ("Training/Epoch_Summary", "Epochs"),
    ("LoRA/Modules", "Adapters"),
    ("Dataset/Mask_Audit", "Which tokens carry loss"),
)
Rows = Iterable[Sequence[object]]
REPORT = "finetuning.runs.report"  # this module's name as a program
LIMITS = Limits(REPORT_MEMORY, REPORT_CPU, REPORT_WALL)


def write_report(run: RunDirectory) -> Path:
    """Write report.html among the run's logs, and the cards of its models; returns the page's path. Raises
    UserError for broken files."""
    path = run.logs / "report.html"
    recorded = read_recorded(run)
    with files_of_ours(run):
        text = page(recorded)
    atomic_write_text(path, text)
    complete_cards(recorded)
    return path


def leave_report(run: RunDirectory, terminal: Terminal, unwanted: Callable[[], bool]) -> None:
    """`write_report` at the end of a run, in a process of its own with limits: nothing that it does, no
    file that somebody broke and no full disk harms the run. unwanted: asked whether to leave it now."""
    try:
        with terminal.working("writing the report"):
            arguments = (str(run.logs.absolute()), "--language", current())
            ended = run_limited(REPORT, arguments, LIMITS, unwanted=unwanted)
    except OSError as error:
        ended = Ended(STOPPED, "", str(error))
    if ended.code == 0:
        terminal.info(f"report: {ended.said.strip()}")
        return
    reason = ended.complaint.removeprefix("error: ") or (
        "a signal came" if unwanted() else "it took too much memory or time"
    )
    terminal.warning(
        f"no report.html: {reason}; uv run python -m {REPORT} {run.output_dir.absolute()}"
    )


def page(run: RecordedRun) -> str:
    """The whole page; every text of the run in it is escaped."""
    sections = [
        _head(run),
        _section("Before and after", before_and_after(run)),
        _section("What to do next", _next_steps(run)),
        _section("Alerts", _alerts(run.alerts)),
        _section("Curves", _left_out(run) + _charts(run.series)),
        _section("Your own metrics", _custom(run.custom)),
        _section("Samples and tables", _texts(run.texts())),
        _section("Data", _dataset(run.dataset())),
        _section("Configuration", _pairs(flat(run.configuration.get("config", {})))),
        _section("Changed by resumes", _changes(run.configuration.get("changes", ()))),
        _section("Model and versions", _pairs(_about(run.configuration))),
    ]
    source = f"Written from {run.directory.logs.name}, metrics.jsonl and event files."
    footer = f"<footer>{html.escape(translated(source))}</footer>"
    return html_page(run.name, "".join(sections) + footer)


# -----------------------------------------------------------------------------
# Sections


def _said(text: str) -> str:
    """A sentence of the program, in the reader's language."""
    return html.escape(translated(redact(text)))


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(translated(title))}</h2>{content}" if content else ""


def _head(run: RecordedRun) -> str:
    status = str(run.status.get("status", "unknown"))
    known = status if status in ("completed", "failed", "running") else ""
    note = clean_line(str(run.status.get("reason", "")), 300)
    cards = "".join(
        f'<div class="card"><span>{html.escape(translated(name))}</span><b>{html.escape(value)}</b></div>'
        for name, value in headline(run).items()
    )
    return (
        f"<h1>{html.escape(run.name)}</h1>"
        f'<p><span class="status {known}">{html.escape(translated(status))}</span> '
        f"{html.escape(str(run.status.get('at', '')))} {html.escape(redact(note))}</p>"
        f'<div class="cards">{cards}</div>{_watch(run)}'
    )


def _watch(run: RecordedRun) -> str:
    """How to see the curves move, and the address that pins the charts that matter."""
    command = f"uv run tensorboard --logdir={run.directory.tensorboard.parent}"
    link = (
        f'<a href="{html.escape(pinned_address())}">{_said("TensorBoard, six charts pinned")}</a>'
    )
    return (
        f"<p>{_said('watch it:')} <code>{html.escape(redact(command))}</code><br>"
        f"{_said('then open:')} {link} ({html.escape(SERVER)})</p>"
    )


def headline(run: RecordedRun) -> dict[str, str]:
    """The numbers to read first; what the run does not have is left out."""
    planned = run.configuration.get("steps")
    held_out = run.series.get("Eval/Loss", ())
    speed = run.median("Throughput/Tokens_Per_Second")
    numbers = {
        "set": naming.unlike(flat(run.as_set)),
        "model": clean_line(str(run.configuration.get("model", {}).get("name", "")), 60),
        "steps": f"{run.steps} of {planned}" if planned else str(run.steps),
        "training loss": shown(run.last("Training/Loss"), ""),
        "held-out loss": f"{shown(held_out[0][1])} → {shown(held_out[-1][1])}" if held_out else "",
        "lowest held-out loss": shown(run.lowest("Eval/Loss"), ""),
        "tokens per second, median": "" if speed is None else f"{speed:,.0f}",
        "training time": duration(run.seconds),
        "alerts": str(run.alerts.count),
    }
    return {name: value for name, value in numbers.items() if value}


def _next_steps(run: RecordedRun) -> str:
    """The findings of a run, each with its evidence and the command to try."""
    items = "".join(
        f"<li><b>{_said(f.title)}</b> {_said(f.evidence)}"
        f"<pre>{html.escape(redact(f.command))}</pre></li>"
        for f in findings(run)
    )
    text = "The record shows nothing that should be changed."
    if not run.is_over:
        text = "The run is not over; what to do next is told at its end."
    nothing = _said(text)
    return f"<ol>{items}</ol>" if items else f"<p>{nothing}</p>"


def _alerts(alerts: Alerts) -> str:
    rows = [
        (
            a.get("name"),
            a.get("step"),
            shown(a.get("value"), ""),
            shown(a.get("threshold"), ""),
            translated(f"{a.get('advice')} {a.get('ends', '')}".strip()),
        )
        for a in alerts.newest
    ]
    if not rows:
        return f"<p>{translated('None.')}</p>"
    newest = _said(f"The newest {len(rows)} of {alerts.count}.")
    more = "" if alerts.count == len(rows) else f"<p>{newest}</p>"
    return more + _table(("alert", "step", "value", "threshold", "advice"), rows)


def _charts(series: Mapping[str, Points]) -> str:
    charts = [_chart(title, curves_of(series, patterns)) for title, patterns in CHARTS.items()]
    charts = [chart for chart in charts if chart]
    return (
        f'<div class="charts">{"".join(charts)}</div>'
        if charts
        else f"<p>{_said('No point yet.')}</p>"
    )


def _left_out(run: RecordedRun) -> str:
    text = f"{run.left_out} or more tags are not shown."
    return f"<p>{_said(text)}</p>" if run.left_out else ""


def _custom(series: Mapping[str, Points]) -> str:
    """A chart for each tag of the user's, over the steps that it was given."""
    charts = "".join(line_chart(clean_line(tag, 60), {tag: p}) for tag, p in series.items())
    return charts and f'<div class="charts">{charts}</div>'


def _chart(title: str, curves: Mapping[str, Points]) -> str:
    """The first `MOST_CURVES`, and how many there are where some are left out."""
    if len(curves) > MOST_CURVES:
        title += f" (the first {MOST_CURVES} of {len(curves)})"
    return line_chart(title, dict(islice(curves.items(), MOST_CURVES)))


def curves_of(series: Mapping[str, Points], patterns: Sequence[str]) -> dict[str, Points]:
    """Curves of a chart by the part of the tag in which they differ."""
    whole = re.compile("|".join(patterns))
    tags = sorted(tag for tag in series if whole.fullmatch(tag))
    alike = len({tag.partition("/")[0] for tag in tags}) == 1 < len(tags)
    names = [tag.partition("/")[2] if alike else tag for tag in tags]
    return {clean_line(name, 60): series[tag] for name, tag in zip(names, tags, strict=True)}


def _texts(texts: Mapping[str, Sequence[tuple[int, str]]]) -> str:
    parts = []
    for tag, title in TEXTS:
        entries = texts.get(tag, ())
        # The first shows where it began, the last where it came to.
        for step, text in (
            [*entries[:1], *entries[1:][-1:]] if tag == "Eval/Samples" else entries[-1:]
        ):
            summary = html.escape(translated(f"{title}, step {step}"))
            parts.append(f"<details><summary>{summary}</summary>{markdown(text)}</details>")
    return "".join(parts)


def markdown(text: str) -> str:
    """Markdown as HTML: tables and fences, nothing that loads or leads anywhere; of HTML only <br>."""
    parser = MarkdownIt("js-default", {"html": False, "linkify": False})
    parser.disable(["image", "link", "autolink", "reference"])
    parser.inline.ruler.before("html_inline", "line_break", _line_break)
    return parser.render(redact(text))


def _line_break(state: StateInline, silent: bool) -> bool:
    """A rule of the parser: <br>, by which the cells of a table have lines."""
    if not state.src.startswith("<br>", state.pos):
        return False
    if not silent:
        state.push("hardbreak", "br", 0)
    state.pos += len("<br>")
    return True


def _dataset(report: Mapping[str, Any]) -> str:
    if not report:
        return ""
    warnings = "".join(
        f"<li>{html.escape(translated(clean_line(w)))}</li>" for w in report["warnings"]
    )
    pictures = "".join(
        f'<div class="picture">{_svg(figure)}</div>'
        for figure in analysis_report.figures(dict(report)).values()
    )
    tables = "".join(
        f"<details><summary>{html.escape(translated(title))}</summary>{_table(header, rows)}</details>"
        for title, header, rows in analysis_report.tables(dict(report))
        if rows
    )
    return f"<ul>{warnings}</ul>{pictures}{tables}"


def _svg(figure: Any) -> str:
    """A matplotlib picture as inline SVG; characters become shapes, so no font is needed."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _changes(changes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(redact(clean_line(str(c), 300)))}</li>" for c in changes)
    return items and f"<ul>{items}</ul>"


def _about(configuration: Mapping[str, Any]) -> dict[str, Any]:
    return flat(
        {k: v for k, v in configuration.items() if k not in ("config", "automatic", "changes")}
    )


def _pairs(values: Mapping[str, Any]) -> str:
    values = redact_values(dict(values))
    return _table(("name", "value"), values.items()) if values else ""


def _table(header: Sequence[str], rows: Rows) -> str:
    return table(header, ([_cell(value) for value in row] for row in rows))


def _cell(value: object) -> str:
    return UNKNOWN if value is None else cell(redact(str(value)), 500)


# -----------------------------------------------------------------------------
# Command line


def main(
    place: tyro.conf.Positional[Path] = Path("qwen3_4b_thinking_output"),
    /,
) -> None:
    """Write report.html of a run: curves, alerts, samples, data, settings, in one offline page.

    Args:
        place: An output directory, whose newest run is taken, or the log directory of one run.
    """
    print(write_report(find_runs([place])[-1]))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: parsed(f"python -m {REPORT}", main)()))
