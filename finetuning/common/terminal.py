"""What a person sees while a run goes on: lines, warnings, one live panel; and the lines in a log file.

On a terminal rich draws the panel; elsewhere (a file, a scheduler's log) rare plain lines appear.
Everything passes `redact`, so neither control characters of the data nor secrets get out.
"""

import math
import os
import re
import sys
import textwrap
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetuning.common.formatting import duration
from finetuning.common.heartbeat import Activity, Heartbeat
from finetuning.common.language import translated
from finetuning.common.text import clean_line, redact

PLAIN_LINE_SECONDS = 5.0  # between progress lines where there is no terminal
REFRESHES_PER_SECOND = 2
FLAT_TREND = 0.005  # of the loss, per 100 steps: a smaller change is no trend
SHOWN_GPUS = 4
PACE_STEPS = 64  # by which the time left is told
MOST_UNLOGGED = 1000  # lines that wait for the log file
ROOM_FOR_KEYS = 8  # columns right of the panel, where a terminal shows Ctrl-C as ^C

Report = Callable[[int, int], None]  # (done, total)


class Terminal:
    """The terminal of one rank; silent on ranks other than 0."""

    def __init__(self, *, quiet: bool = False, is_main: bool = True) -> None:
        # A console that lacks a character must end no run; what is wrong is told to the letter.
        for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=errors)
        self._quiet, self._is_main = quiet, is_main
        self._log: TextIO | None = None
        self._unlogged: list[str] = []  # what was said before there was a log file
        style = {"highlight": False, "soft_wrap": True}
        self._console = Console(file=_LastingStream(sys.stdout, self._write_log), **style)
        self._errors = Console(file=_LastingStream(sys.stderr, self._write_log), **style)
        self._panel: RunPanel | None = None
        self._heartbeat = Heartbeat(self._say_alive, lambda: self._console.file.written_at)
        self._training: Activity | None = None  # where there is no panel
        self._live: Live | None = None  # what is drawn again and again: the panel, or a bar
        self._total, self._last_line = 0, 0.0

    @property
    def _shows(self) -> bool:
        return self._is_main and not self._quiet

    def open_log(self, path: Path) -> None:
        """Everything said so far, and from here on, is also appended to `path`."""
        if self._is_main:
            self._log = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            self._log.writelines(self._unlogged)
            self._unlogged = []

    def info(self, text: str, style: str = "") -> None:
        """One line, or several; nothing where there is no text."""
        if not text:
            return
        self._write_log(text)
        if self._shows:
            _print(self._console, translated(text), style)

    def final(self, text: str) -> None:
        """A closing line; shown even when quiet."""
        self._write_log(text)
        if self._is_main:
            _print(self._console, translated(text))

    def warning(self, text: str) -> None:
        """Something that a person should look at; training goes on."""
        self._write_log(f"warning: {text}")
        if self._is_main:
            console = self._console if self._live else self._errors
            _print(console, translated(f"warning: {text}"), "yellow")
        if self._panel is not None:
            self._panel.warning = clean_line(redact(translated(text)))

    def error(self, text: str) -> None:
        """Why the program ends, on standard error."""
        self._write_log(f"error: {text}")
        _print(self._errors, translated(f"error: {text}"), "bold red")

    def table(
        self, title: str, rows: Iterable[tuple[str, object]], *, always: bool = False
    ) -> None:
        """Name and value, line by line; `always`: even when quiet."""
        rows = [(name, redact(str(value))) for name, value in rows]
        for name, value in rows:
            self._write_log(f"{name}: {value}")
        if self._is_main and (always or not self._quiet):
            rows = [(translated(name), translated(value)) for name, value in rows]
            width = max(cell_len(name) for name, _ in rows) + 2
            self._console.print(Text(translated(title), style="italic"))
            for name, value in rows:
                value = _wrapped(self._console, value, indent=width)
                space = " " * (width - cell_len(name))
                self._console.print(Text.assemble((name + space, "bold"), value))

    # -- work that takes a while --------------------------------------------

    @contextmanager
    def working(self, what: str) -> Iterator[Report]:
        """While it lasts, `what` is shown with a bar; call the result with (done, total) to move it.

        In the panel where there is one. Without a terminal, a line now and then, and one after work that
        took long.
        """
        started, told = time.monotonic(), translated(what)
        if self._panel is not None:
            with self._panel.working(told) as report:
                yield report
            return
        if self._shows and _moves(self._console) and self._live is None:
            with self._bar(told) as report:
                yield report
        elif self._shows:
            with self._heartbeat.doing(what) as activity:
                yield activity.report
        else:
            yield _ignore
        seconds = time.monotonic() - started
        if seconds >= PLAIN_LINE_SECONDS:
            self.info(f"{what}: {seconds:.0f} s")

    @contextmanager
    def _bar(self, what: str) -> Iterator[Report]:
        columns = (SpinnerColumn(), TextColumn(what), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(what, total=None)
            self._live = progress.live
            try:
                yield lambda done, total: progress.update(task, completed=done, total=total)
            finally:
                self._live = None

    # -- the run -------------------------------------------------------------

    def start_progress(self, total: int, done: int, steps_per_epoch: int) -> None:
        """Begin the run's panel at `done` of `total` steps."""
        self._total = total
        if self._shows and _moves(self._console):
            self._panel = RunPanel(total, done, steps_per_epoch)
            self._live = Live(
                self._panel, console=self._console, refresh_per_second=REFRESHES_PER_SECOND
            )
            self._live.start()
        elif self._shows:
            self._training = self._heartbeat.begin("training")
            self._training.report(done, total)

    def advance(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Move the bars; `metrics` of a logged step are shown below them."""
        line = _metric_line(metrics) if metrics else ""
        if self._training is not None:
            self._training.report(step, self._total)
        if self._panel is not None:
            self._panel.advance(step, metrics or {})
        elif line:
            self._plain_line(step, line, always=step == self._total or "Eval/Loss" in metrics)
        if line:
            self._write_log(f"step {step}/{self._total}  {line}")

    def stop_progress(self) -> None:
        """End the panel; its last state stays on the screen."""
        if self._training is not None:
            self._heartbeat.end(self._training)
            self._training = None
        if self._panel is not None:
            self._live.stop()
            self._panel = self._live = None

    def _say_alive(self, line: str) -> None:
        self._console.print(Text(translated(line)))
        self._console.file.flush()

    def _plain_line(self, step: int, line: str, always: bool) -> None:
        now = time.monotonic()
        if self._shows and (always or now - self._last_line >= PLAIN_LINE_SECONDS):
            self._last_line = now
            self._console.print(Text(translated(f"step {step}/{self._total}  {line}")))
            self._console.file.flush()

    def _write_log(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {redact(text)}\n"
        if self._log is None:
            self._unlogged = [*self._unlogged, line][-MOST_UNLOGGED:]
            return
        try:
            self._log.write(line)
        except OSError as error:  # a full disk must not stop training
            self._log = None
            self.warning(f"training.log can't be written any more: {error}")


class RunPanel:
    """The live view of a run; rich asks it for its lines from a thread of its own."""

    def __init__(self, total: int, done: int, steps_per_epoch: int) -> None:
        self.total, self.step, self.steps_per_epoch = total, done, steps_per_epoch
        self.metrics: dict[str, float] = {}  # newest value of each tag
        self.warning = ""
        self._work: tuple[str, int, int] | None = None  # what is done beside training: done, total
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_STEPS)  # when which step was over

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """The run has come to `step`; `metrics` may be empty."""
        now = (time.monotonic(), step)
        if step < self.step:  # gone back to a checkpoint
            self._pace = deque([now], maxlen=PACE_STEPS)
        else:
            self._pace.append(now)
        self.step = step
        self.metrics.update(metrics)

    @contextmanager
    def working(self, what: str) -> Iterator[Report]:
        """A third bar for as long as it lasts."""
        before = self._work

        def report(done: int, total: int) -> None:
            self._work = (what, done, total)

        report(0, 0)
        try:
            yield report
        finally:
            self._work = before

    def seconds_left(self) -> float | None:
        """At the pace of the last steps; None before there is one. What came before the first step,
        an evaluation for example, is no part of it."""
        pace = self._pace
        if len(pace) < 2:
            return None
        (then, first), (now, last) = pace[0], pace[-1]
        return (now - then) / (last - first) * (self.total - self.step)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Panel]:
        texts = [
            ("", translated(_metric_line(self.metrics, with_trend=True))),
            *(("cyan", translated(line)) for line in gpu_lines(self.metrics)),
            ("yellow", self.warning),
        ]
        lines = [
            Text(line, style, no_wrap=True, overflow="ellipsis") for style, line in texts if line
        ]
        width = max(options.max_width - ROOM_FOR_KEYS, 20)
        title = translated("training")
        yield Panel(Group(self._bars(), *lines), title=title, title_align="left", width=width)

    def _bars(self) -> Table:
        epochs = math.ceil(self.total / self.steps_per_epoch)
        epoch = min(self.step // self.steps_per_epoch, epochs - 1)
        first = epoch * self.steps_per_epoch
        length = min(self.steps_per_epoch, self.total - first)
        left = self.seconds_left()
        time_left = "" if left is None else translated(f"{duration(left)} left")
        rows = [
            (translated(f"epoch {epoch + 1}/{epochs}"), self.step - first, length, ""),
            (translated("run"), self.step, self.total, time_left),
        ]
        if self._work is not None:
            rows.append((*self._work, ""))
        table = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            table.add_column(ratio=ratio, no_wrap=True)
        for name, done, total, note in rows:
            bar = ProgressBar(total or None, done, pulse=not total)
            table.add_row(name, bar, f"{done}/{total}" if total else "", note)
        return table


class _LastingStream:
    """A stream whose reader may go away, as a terminal that is closed or the end of a pipe that has enough:
    then the rest goes nowhere, `tell` hears of it, and the run goes on."""

    def __init__(self, stream: TextIO, tell: Callable[[str], None]) -> None:
        self._stream, self._tell = stream, tell
        self.written_at = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a stream does it."""
        self.written_at = time.monotonic()
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """As a stream does it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what libraries print would fail as well
        os.close(nowhere)
        self._tell(f"warning: {self._stream.name} can't be written any more: {error}")


def _moves(console: Console) -> bool:
    """Whether lines can be drawn again: FORCE_COLOR and the like give colours to a file, no cursor."""
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(Text(_wrapped(console, redact(text)), style=style))


def _wrapped(console: Console, text: str, indent: int = 0) -> str:
    """Broken between words on a terminal, further lines indented; a path, which is one word, is whole."""
    if not _moves(console):
        return text
    width = max(console.width - indent, 20)
    lines = [
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    ]
    return "\n".join(lines).replace("\n", "\n" + " " * indent)


def gpu_lines(metrics: Mapping[str, float]) -> list[str]:
    """A line for each of the first GPUs in `metrics`."""
    numbers = sorted({int(m[1]) for m in map(re.compile(r"GPU_(\d+)/").match, metrics) if m})
    gauges = (
        ("Utilization_Percent", "{:.0f} % busy"),
        ("Memory_Usage_Percent", "{:.0f} % of memory"),
        ("Temperature_C", "{:.0f} °C"),
        ("Power_W", "{:.0f} W"),
    )
    lines = [
        "  ".join(
            [f"GPU {number}"]
            + [
                form.format(metrics[tag])
                for name, form in gauges
                if (tag := f"GPU_{number}/{name}") in metrics
            ]
        )
        for number in numbers[:SHOWN_GPUS]
    ]
    return lines + [f"{len(numbers) - SHOWN_GPUS} more GPUs"] * (len(numbers) > SHOWN_GPUS)


def trend_arrow(metrics: Mapping[str, float]) -> str:
    """Whether the loss falls, stays or rises; empty where the trend is not known."""
    trend, loss = metrics.get("Monitoring/Loss_Trend"), metrics.get("Training/Loss")
    if trend is None or loss is None or not math.isfinite(trend):
        return ""
    return "→" if abs(trend) < FLAT_TREND * abs(loss) else "↗" if trend > 0 else "↘"


def _metric_line(metrics: Mapping[str, float], with_trend: bool = False) -> str:
    shown = {
        "loss": ("Training/Loss", "{:.4f}"),
        "held-out": ("Eval/Loss", "{:.4f}"),
        "lr": ("Training/Learning_Rate", "{:.2e}"),
        "grad": ("Training/Gradient_Norm", "{:.2f}"),
        "tok/s": ("Throughput/Tokens_Per_Second", "{:.0f}"),
    }
    ends = {"loss": trend_arrow(metrics)} if with_trend else {}
    parts = [
        f"{name} {form.format(metrics[tag])} {ends.get(name, '')}".rstrip()
        for name, (tag, form) in shown.items()
        if tag in metrics
    ]
    return "  ".join(parts)


def _ignore(done: int, total: int) -> None:
    """There is no bar to move."""


def show_crash(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """`sys.excepthook`: the usual traceback without secrets and control characters."""
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(redact(text))
