"""What a run tells people who are not there: that it has begun, an alert, how it ended."""

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from finetuning.common.errors import RunStopped, UserError
from finetuning.common.language import translated
from finetuning.common.text import clean_line
from finetuning.monitoring.alerts import Alert
from finetuning.monitoring.channels import Notice, read_channels
from finetuning.monitoring.notifier import Notifier
from finetuning.runs.before_after import TAGS, changes
from finetuning.runs.directory import RUN_PREFIX, RunDirectory
from finetuning.runs.recorded import read_recorded

# Of the table at the start.
TOLD_ROWS = ("model", "samples", "steps", "learning rate", "training and evaluation")
FIRST_ROWS = 5  # of before and after


class RunNews:
    """The news of one session; an error that leaves the block is told, too. Silent without channels.

    Args:
        notify: channels, as the setting names them.
        warn: told once of each channel on which something was lost.
    """

    def __init__(self, notify: Sequence[str], warn: Callable[[str], None]) -> None:
        self._notifier = Notifier(read_channels(notify), warn)
        self._run = RUN_PREFIX.rstrip("_")  # its name, once it has one

    def __enter__(self) -> "RunNews":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.interrupted(str(error))
        elif error is not None:
            ours = isinstance(error, (UserError, RunStopped))
            reason = str(error) if ours else f"{type(error).__name__}: {error}"
            self._tell("run failed", [clean_line(reason, 500)])
        self._notifier.close()

    def begun(self, run: str, resume_step: int | None, rows: Iterable[tuple[str, object]]) -> None:
        """A run has begun, or goes on. rows: of the table at the start."""
        self._run = run
        goes_on = resume_step is not None and resume_step >= 0
        told = f"run goes on from step {resume_step}" if goes_on else "run begun"
        rows = [(name, str(value)) for name, value in rows if name in TOLD_ROWS]
        self._tell(told, [f"{translated(name)}: {translated(value)}" for name, value in rows])

    def alerts(self, alerts: Sequence[Alert]) -> None:
        """Those that one step has raised."""
        if alerts:
            names = ", ".join(alert.name for alert in alerts)
            self._tell(f"alert {names}", [translated(alert.line()) for alert in alerts])

    def interrupted(self, text: str) -> None:
        """A signal has ended the session; `text` says how to go on."""
        self._tell("run interrupted", [translated(text)])

    def done(self, run: RunDirectory, lines: Sequence[str]) -> None:
        """The run is finished. lines: what it has come to."""
        if self._notifier:
            self._tell("run done", [*map(translated, lines), *_rows(run)])

    def _tell(self, what: str, lines: Sequence[str]) -> None:
        if self._notifier:
            self._notifier.tell(Notice(f"{translated(what)} {self._run}", tuple(lines)))


def _rows(run: RunDirectory) -> list[str]:
    """The first rows of base against tuned, as lines."""
    try:
        rows = changes(read_recorded(run, TAGS.__contains__).series)[:FIRST_ROWS]
    except (UserError, OSError) as error:
        return [clean_line(str(error), 300)]
    verdicts = (f" ({translated(row.verdict)})" if row.verdict else "" for row in rows)
    lines = (f"{translated(row.name)}: {' → '.join(row.texts)}" for row in rows)
    return [line + verdict for line, verdict in zip(lines, verdicts, strict=True)]
