"""Several runs side by side: what they were set to differently, and what came of it.

uv run python compare_runs.py qwen3_4b_thinking_output               # all runs of an output directory
uv run python compare_runs.py OUTPUT_1 OUTPUT_2 --html compare.html  # also as a page with curves
uv run python compare_runs.py RUN RUN --json

A run is an output directory, or a run's directory below training_logs/ or tensorboard_logs/ in it.
"""

from finetuning.common import process  # first: Ctrl-C gets an answer while the libraries are loaded

if __name__ == "__main__":
    process.imports_begin()

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from finetuning.common.arguments import parsed
from finetuning.common.errors import exit_code
from finetuning.common.language import translated
from finetuning.common.paths import expanded
from finetuning.runs.comparison import (
    WIDEST_CELL,
    as_csv,
    as_json,
    as_markdown,
    labels,
    metric_rows,
    outcomes,
    page,
    read_all,
    results_title,
    rich_tables,
    setting_rows,
    sparkline,
    told,
    write_file,
)
from finetuning.runs.recorded import RecordedRun, find_runs

process.imports_are_done()

# -----------------------------------------------------------------------------
# Terminal


def print_comparison(runs: Sequence[RecordedRun]) -> None:
    """Tables of settings and results, and a small curve of each run's loss."""
    console = Console(highlight=False)
    sparks = [sparkline([y for _, y in run.series.get("Training/Loss", ())]) for run in runs]
    names = labels(runs)
    short = names if max(map(len, names)) <= WIDEST_CELL else labels(runs, by_time=True)
    results = told([*outcomes(runs), *metric_rows(runs), ("training loss", sparks)])
    for title, rows in (
        ("Settings that differ", setting_rows(runs)),
        (results_title(runs), results),
    ):
        for table in rich_tables(title, names, rows, console.width, short):
            console.print(table)


# -----------------------------------------------------------------------------
# Command line


def main(
    places: tyro.conf.Positional[tuple[str, ...]] = ("qwen3_4b_thinking_output",),
    /,
    html: Path | None = None,
    markdown: Path | None = None,
    csv: Path | None = None,
    json: bool = False,
) -> None:
    """Compare runs: settings that differ, final metrics, curves.

    Args:
        places: Output directories (all their runs), or directories of single runs.
        html: Also write a page with curves to this file.
        markdown: Also write the tables to this file, as Markdown.
        csv: Also write a row a run to this file.
        json: Print one JSON object and nothing else.
    """
    runs = read_all(find_runs(places), curves=html is not None)
    if json:
        print(dumps(runs))
    else:
        print_comparison(runs)
    for flag, path, text, what in (
        ("--html", html, page, "Curves as a page"),
        ("--markdown", markdown, as_markdown, "Tables"),
        ("--csv", csv, as_csv, "A row a run"),
    ):
        if path is not None:
            path = Path(expanded(str(path), flag))
            write_file(flag, path, text(runs))
            print(translated(f"{what}: {path}"), file=sys.stderr if json else sys.stdout)


def dumps(runs: Sequence[RecordedRun]) -> str:
    """`as_json` as text."""
    return json.dumps(as_json(runs), ensure_ascii=False, allow_nan=False, indent=2)


if __name__ == "__main__":
    process.exit_process(exit_code(lambda: parsed("compare_runs.py", main)()))
