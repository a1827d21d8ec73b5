"""What a person sees while a run goes on: lines, warnings, one progress bar; and the same in a log file.

On a terminal rich draws a live bar; elsewhere (a file, a scheduler's log) rare plain lines appear.
Everything passes `clean` and `redact`, so neither control characters of the data nor secrets get out.
"""

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from safe_text import clean, redact

PLAIN_LINE_SECONDS = 5.0  # between progress lines where there is no terminal


class Terminal:
    """The terminal of one rank; silent on ranks other than 0."""

    def __init__(self, *, quiet: bool = False, is_main: bool = True) -> None:
        self._quiet, self._is_main = quiet, is_main
        self._console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self._log: TextIO | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total, self._last_line = 0, 0.0

    def open_log(self, path: Path) -> None:
        """Everything said from here on is also appended to `path`."""
        if self._is_main:
            self._log = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def say(self, text: str, style: str = "") -> None:
        """One line, or several."""
        self._write_log(text)
        if self._is_main and not self._quiet:
            self._live_console().print(Text(clean(redact(text)), style=style))

    def conclude(self, text: str) -> None:
        """A closing line; shown even when quiet."""
        self._write_log(text)
        if self._is_main:
            self._live_console().print(Text(clean(redact(text))))

    def warn(self, text: str) -> None:
        """Something that a person should look at; training goes on."""
        self._write_log(f"warning: {text}")
        if self._is_main:
            console = self._live_console() if self._progress else self._errors
            console.print(Text(f"warning: {clean(redact(text))}", style="yellow"))

    def error(self, text: str) -> None:
        """Why the program ends, on standard error."""
        self._write_log(f"error: {text}")
        self._errors.print(Text(f"error: {clean(redact(text))}", style="bold red"))

    def table(self, title: str, rows: Iterable[tuple[str, object]]) -> None:
        """Name and value, line by line."""
        rows = [(name, clean(redact(str(value)))) for name, value in rows]
        for name, value in rows:
            self._write_log(f"{name}: {value}")
        if self._is_main and not self._quiet:
            table = Table(title=title, show_header=False, title_justify="left", box=None)
            for name, value in rows:
                table.add_row(Text(name, style="bold"), Text(value))
            self._live_console().print(table)

    # -- progress ---------------------------------------------------------

    def start_progress(self, total: int, done: int) -> None:
        """Begin the run's bar at `done` of `total` steps."""
        self._total = total
        if not self._is_main or self._quiet or not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
        )
        self._task = self._progress.add_task("train", total=total, completed=done, metrics="")
        self._progress.start()

    def advance(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Move the bar; `metrics` of a logged step are shown beside it."""
        line = _metric_line(metrics) if metrics else ""
        if self._progress is not None:
            fields = {"metrics": line} if line else {}
            self._progress.update(self._task, completed=step, **fields)
        elif line:
            self._plain_line(step, line)
        if line:
            self._write_log(f"step {step}/{self._total}  {line}")

    def stop_progress(self) -> None:
        """End the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _plain_line(self, step: int, line: str) -> None:
        now = time.monotonic()
        due = now - self._last_line >= PLAIN_LINE_SECONDS or step == self._total
        if self._is_main and not self._quiet and due:
            self._last_line = now
            self._console.print(Text(f"step {step}/{self._total}  {line}"))
            sys.stdout.flush()

    def _live_console(self) -> Console:
        return self._progress.console if self._progress is not None else self._console

    def _write_log(self, text: str) -> None:
        if self._log is None:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            self._log.write(f"{stamp} {clean(redact(text))}\n")
        except OSError as error:  # a full disk must not stop training
            self._log = None
            self.warn(f"training.log can't be written any more: {error}")


def _metric_line(metrics: Mapping[str, float]) -> str:
    shown = {
        "loss": ("Training/Loss", "{:.4f}"),
        "held-out": ("Eval/Loss", "{:.4f}"),
        "lr": ("Training/Learning_Rate", "{:.2e}"),
        "grad": ("Training/Gradient_Norm", "{:.2f}"),
        "tok/s": ("Throughput/Tokens_Per_Second", "{:.0f}"),
    }
    parts = [
        f"{name} {form.format(metrics[tag])}"
        for name, (tag, form) in shown.items()
        if tag in metrics
    ]
    return "  ".join(parts)
