"""Several runs side by side: settings that differ, results, curves."""

import csv
import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from finetuning.common.errors import UserError
from finetuning.common.files import atomic_write_text, strict
from finetuning.common.formatting import UNKNOWN, duration, flat, grouped, shown
from finetuning.common.html import cell, html_page, line_chart, table
from finetuning.common.language import translated
from finetuning.common.text import clean_line, redact, table_cell
from finetuning.events.metric_table import is_custom
from finetuning.runs import naming
from finetuning.runs.directory import RunDirectory
from finetuning.runs.recorded import RecordedRun, read_recorded

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 16
# Settings that differ without meaning.
IGNORED = ("output_dir", "cache_dir", "workers", "run_name", "mirror", "notify")
# Row -> how its number comes from which tag of a run; None where the run has none.
METRICS: dict[str, tuple[Callable[[RecordedRun, str], float | None], str]] = {
    "last training loss": (RecordedRun.last, "Training/Loss"),
    "first held-out loss": (RecordedRun.first, "Eval/Loss"),
    "last held-out loss": (RecordedRun.last, "Eval/Loss"),
    "lowest held-out loss": (RecordedRun.lowest, "Eval/Loss"),
    "last held-out thinking loss": (RecordedRun.last, "Eval/Thinking_Loss"),
    "last held-out answer loss": (RecordedRun.last, "Eval/Answer_Loss"),
    "held-out token accuracy": (RecordedRun.last, "Eval/Token_Accuracy"),
    "KL, held out": (RecordedRun.last, "Forgetting/KL_Held_Out"),
    "KL, general text": (RecordedRun.last, "Forgetting/KL_General"),
    "loss on general text": (RecordedRun.last, "Forgetting/General_Loss"),
    "convergence score": (RecordedRun.last, "Monitoring/Convergence_Score"),
    "tokens per second, median": (RecordedRun.median, "Throughput/Tokens_Per_Second"),
    "MFU, %, median": (RecordedRun.median, "Throughput/MFU_Percent"),
    "peak GPU memory, MB": (RecordedRun.highest, "Memory/GPU_Peak_MB"),
    "non-finite steps": (RecordedRun.last, "Monitoring/NonFinite_Steps"),
}
# Rows of which one run is the best, where all were measured on the same tokens.
BEST = {
    "last held-out loss": min,
    "lowest held-out loss": min,
    "last held-out thinking loss": min,
    "last held-out answer loss": min,
    "held-out token accuracy": max,
}
# Settings by which the held-out tokens are what they are.
HELD_OUT_BY = {
    "model", "model_name", "data_path", "columns", "eval_path", "eval_fraction", "max_eval_samples",
    "max_seq_length", "over_length", "loss_on", "empty_thinking", "control_tokens", "seed",
}  # fmt: skip
CHARTS = {
    "Training loss": "Training/Loss",
    "Held-out loss": "Eval/Loss",
    "Held-out thinking loss": "Eval/Thinking_Loss",
    "Held-out answer loss": "Eval/Answer_Loss",
    "KL on general text": "Forgetting/KL_General",
    "Loss on general text": "Forgetting/General_Loss",
    "Gradient norm": "Training/Gradient_Norm",
    "Learning rate": "Training/Learning_Rate",
    "Tokens per second": "Throughput/Tokens_Per_Second",
    "GPU 0 utilisation, %": "GPU_0/Utilization_Percent",
}
MOST_CURVES = 24  # runs in one chart; more can't be told apart
WIDEST_CELL = 24  # columns of the terminal, where a row is a run
Rows = list[tuple[str, list[str]]]  # a name, and a text for each run


def read_all(directories: Sequence[RunDirectory], *, curves: bool) -> list[RecordedRun]:
    """What the comparison shows of each run, and no more. curves: also what `page` draws."""
    numbers = {tag for _, tag in METRICS.values()}
    drawn = numbers | set(CHARTS.values())
    known = [
        drawn if curves and i <= MOST_CURVES else numbers for i in range(len(directories), 0, -1)
    ]
    return [
        read_recorded(directory, lambda tag, tags=tags: tag in tags or is_custom(tag))
        for directory, tags in zip(directories, known, strict=True)
    ]


# -----------------------------------------------------------------------------
# What differs


def differences(runs: Sequence[RecordedRun]) -> dict[str, list[Any]]:
    """Settings (and the model) that are not the same in all runs that recorded any; else None."""
    configurations = [_settings(run) for run in runs]
    recorded = [settings for settings in configurations if settings]
    names = dict.fromkeys(name for settings in recorded for name in settings)
    return {
        name: [settings.get(name) for settings in configurations]
        for name in names
        if len({repr(settings.get(name)) for settings in recorded}) > 1
    }


def metrics(runs: Sequence[RecordedRun]) -> dict[str, list[float | None]]:
    """Numbers of all runs by row, those of the users' own tags last; rows that no run has are left out."""
    table = {name: [of(run, tag) for run in runs] for name, (of, tag) in METRICS.items()}
    own = sorted({tag for run in runs for tag in run.custom})
    table |= {f"{tag}, last": [run.last(tag) for run in runs] for tag in own}
    return {name: row for name, row in table.items() if any(value is not None for value in row)}


def outcomes(runs: Sequence[RecordedRun]) -> Rows:
    """How each run stands: status, steps, time spent training, alerts."""
    return [
        ("status", [clean_line(str(run.status.get("status", "unknown"))) for run in runs]),
        ("steps", [_steps(run) for run in runs]),
        ("training time", [duration(run.seconds) for run in runs]),
        ("alerts", [str(run.alerts.count) for run in runs]),
        *_changed(runs),
    ]


def told(rows: Rows) -> Rows:
    """Rows of results, names and texts, in the language of the reader."""
    return [(translated(name), [translated(text) for text in texts]) for name, texts in rows]


def _changed(runs: Sequence[RecordedRun]) -> Rows:
    """What resumes have set otherwise: the settings above are those of the newest session."""
    texts = ["; ".join(run.configuration.get("changes", ())) for run in runs]
    return [("changed by resumes", [redact(text) for text in texts])] if any(texts) else []


def unlike(runs: Sequence[RecordedRun]) -> list[str]:
    """Settings that differ and with them the held-out tokens, so that no run is the best."""
    return [name for name in differences(runs) if name.partition(".")[0] in HELD_OUT_BY]


def results_title(runs: Sequence[RecordedRun]) -> str:
    """What the stars mean, or why there are none."""
    reasons = ", ".join(unlike(runs))
    return (
        f"Results (no best: held out is not the same, by {reasons})"
        if reasons
        else "Results (* the best)"
    )


def labels(runs: Sequence[RecordedRun], *, by_time: bool = False) -> list[str]:
    """Short names that tell the runs apart: what they were called, or what was set otherwise, with the
    time and the directory where needed. by_time: only when each began, which is short."""
    differing = differences(runs)
    settings = [{n: values[i] for n, values in differing.items()} for i in range(len(runs))]
    short = naming.labels([run.name for run in runs], settings)
    if by_time:
        short = [naming.stamp(run.name) for run in runs]
    if len({run.directory.output_dir for run in runs}) == 1:
        return short
    return [
        f"{run.directory.output_dir.name}/{name}" for run, name in zip(runs, short, strict=True)
    ]


def as_json(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """Everything for programs; strict JSON."""
    return strict(
        {
            "runs": [
                {"name": run.name, "logs": run.directory.logs, "status": run.status.get("status")}
                for run in runs
            ],
            "settings": differences(runs),
            "metrics": metrics(runs),
        }
    )


def as_markdown(runs: Sequence[RecordedRun]) -> str:
    """The two tables of the terminal, a column a run."""
    names, parts = labels(runs), []
    for title, rows in (
        ("Settings that differ", setting_rows(runs)),
        (results_title(runs), told([*outcomes(runs), *metric_rows(runs)])),
    ):
        lines = [
            ["", *names],
            ["---"] * (len(names) + 1),
            *([name, *texts] for name, texts in rows),
        ]
        cells = ("| " + " | ".join(table_cell(text, 200) for text in line) + " |" for line in lines)
        parts.append(f"## {translated(title)}\n\n" + "\n".join(cells))
    return "\n\n".join(parts) + "\n"


def as_csv(runs: Sequence[RecordedRun]) -> str:
    """A row a run: its label and name, the settings that differ, the results as plain numbers."""
    columns = {
        "label": labels(runs),
        "run": [run.name for run in runs],
        "status": [str(run.status.get("status", "unknown")) for run in runs],
        "steps": [run.steps for run in runs],
        "seconds": [run.seconds for run in runs],
        **dict(setting_rows(runs) if differences(runs) else ()),
        **metrics(runs),
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(["" if cell is None else _safe(cell) for cell in row])
    return out.getvalue()


def _safe(cell: object) -> object:
    """A text that a spreadsheet would take for a formula gets a mark before it."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in "=+-@" and cell[:1] else cell


def _settings(run: RecordedRun) -> dict[str, Any]:
    settings = flat(
        {k: v for k, v in run.configuration.get("config", {}).items() if k not in IGNORED}
    )
    model = run.configuration.get("model", {}).get("name")
    return ({"model": model} if model else {}) | settings


def _steps(run: RecordedRun) -> str:
    planned = run.configuration.get("steps")
    return f"{run.steps}/{planned}" if planned else str(run.steps)


def setting_rows(runs: Sequence[RecordedRun]) -> Rows:
    """The settings that differ, a row each, with every run's value."""
    found = differences(runs).items()
    rows = [
        (name, [UNKNOWN if v is None else redact(str(v)) for v in values]) for name, values in found
    ]
    return rows or [(translated("none"), ["" for _ in runs])]


def metric_rows(runs: Sequence[RecordedRun]) -> Rows:
    """The results, a row each, with every run's number; the best is marked where it can be told."""
    judges = {} if unlike(runs) else BEST
    return [(name, _texts(values, judges.get(name))) for name, values in metrics(runs).items()]


def _texts(values: Sequence[float | None], better: Callable | None) -> list[str]:
    """Texts of a row; the best of several is marked where `better`, min or max, picks it."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    best = better(known) if better and len(set(known)) > 1 else None
    return [_number(v) + (" *" if best is not None and v == best else "") for v in values]


def _number(value: float | None) -> str:
    return grouped(value, 0) if value is not None and abs(value) >= 1000 else shown(value)


def rich_tables(
    title: str, names: Sequence[str], rows: Rows, width: int, short: Sequence[str] = ()
) -> list[Table]:
    """The rows for a terminal of `width` columns: a column a run; a row a run where these are too many,
    in as many tables as it takes. short: names of the runs for that, beside what differs; else the same."""
    down = [[name, *(values[i] for _, values in rows)] for i, name in enumerate(short or names)]
    heads = ["", *(name for name, _ in rows)]
    across = [[name, *(values[i] for _, values in rows)] for i, name in enumerate(names)]
    if _width(heads) + sum(map(_width, across)) < width:
        return [_table(title, ["", *names], [[name, *values] for name, values in rows])]
    tables, first = [], 1
    columns = [_column([*head.split(), *(row[i] for row in down)]) for i, head in enumerate(heads)]
    while first < len(heads):
        last, used = first + 1, 1 + columns[0] + columns[first]
        while last < len(heads) and used + columns[last] <= width:
            used, last = used + columns[last], last + 1
        part = [[row[0], *row[first:last]] for row in down]
        widths = [columns[0] - 3, *(width - 3 for width in columns[first:last])]
        tables.append(
            _table(
                title if first == 1 else "", [translated("run"), *heads[first:last]], part, widths
            )
        )
        first = last
    return tables


def _width(texts: Iterable[str]) -> int:
    """Of a column with these texts, with what stands around them."""
    return 3 + max((cell_len(clean_line(text, 200)) for text in texts), default=0)


def _column(texts: Iterable[str]) -> int:
    return min(_width(texts), 3 + WIDEST_CELL)  # what is longer goes on below


def _table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    widths: Sequence[int | None] | None = None,
) -> Table:
    table = Table(title=translated(title) or None, title_justify="left", title_style="bold")
    for name, width in zip(header, widths or [None] * len(header), strict=True):
        table.add_column(Text(clean_line(name)), overflow="fold", width=width)
    for row in rows:
        table.add_row(*(Text(clean_line(cell, 200)) for cell in row))
    return table


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """The course of a curve in a line of text; means of equal parts, blank where nothing is finite."""
    size = max(1, math.ceil(len(values) / width))
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    finite = [[v for v in part if math.isfinite(v)] for part in parts]
    means = [sum(part) / len(part) if part else None for part in finite]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known) or 1.0
    return "".join(" " if m is None else BARS[round((m - low) / span * 7)] for m in means)


# -----------------------------------------------------------------------------
# Page


def page(runs: Sequence[RecordedRun]) -> str:
    """Tables and curves of all runs in one page, offline and without scripts."""
    names = labels(runs)
    results = _html_table(names, told([*outcomes(runs), *metric_rows(runs)]))
    newest = list(zip(names, runs, strict=True))[-MOST_CURVES:]
    own = {clean_line(tag, 60): tag for _, run in newest for tag in run.custom}
    charts = "".join(
        line_chart(title, {name: run.series[tag] for name, run in newest if tag in run.series})
        for title, tag in (CHARTS | own).items()
    )
    some = f"Curves of the newest {len(newest)}" if len(newest) < len(runs) else "Curves"
    body = (
        f"<h1>{translated(f'{len(runs)} runs')}</h1>"
        f"<h2>{translated('Settings that differ')}</h2>{_html_table(names, setting_rows(runs))}"
        f"<h2>{html.escape(translated(results_title(runs)))}</h2>{results}"
        f'<h2>{translated(some)}</h2><div class="charts">{charts}</div>'
    )
    return html_page(translated("Runs"), body)


def _html_table(names: Sequence[str], rows: Rows) -> str:
    return table(("", *names), ([cell(v, 300) for v in (name, *values)] for name, values in rows))


def write_file(flag: str, path: Path, text: str) -> None:
    """Write the file of an option. Raises UserError, which names the option, where that can't be done."""
    try:
        atomic_write_text(path, text)
    except OSError as error:
        raise UserError(f"{flag} {path}: can't be written ({error.strerror or error})") from error
