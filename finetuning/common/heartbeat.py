"""A sign of life where there is no terminal: a line at least every ten seconds, whatever is being done."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from finetuning.common.bounds import SILENCE

POLL_SECONDS = 0.5
SHORTEST = 2.0  # seconds after which an activity is told; before, what it is a part of
PATIENCE = SILENCE.limit - 3.0  # seconds without a line; a busy machine takes its time to say one


@dataclass
class Activity:
    """Something that is being done. total: 0 where it is not known how much there is of it."""

    what: str
    done: int = 0
    total: int = 0
    since: float = field(default_factory=time.monotonic)

    def report(self, done: int, total: int) -> None:
        """So much of it is done."""
        self.done, self.total = done, total

    def line(self) -> str:
        """What is told of it."""
        seconds = time.monotonic() - self.since
        share = f" {self.done:,} of {self.total:,}," if self.total else ""
        return f"{self.what}:{share} {seconds:.0f} s so far"


class Heartbeat:
    """Tells the innermost activity that is not over in a moment when nothing else was said for a while.

    say: writes a line. silent_since: when the last line was written, in seconds of `time.monotonic`.
    A thread lives as long as there is an activity.
    """

    def __init__(self, say: Callable[[str], None], silent_since: Callable[[], float]) -> None:
        self._say, self._silent_since = say, silent_since
        self._doing: list[Activity] = []
        self._over = threading.Event()

    @contextmanager
    def doing(self, what: str) -> Iterator[Activity]:
        """While it lasts, `what` is done."""
        activity = self.begin(what)
        try:
            yield activity
        finally:
            self.end(activity)

    def begin(self, what: str) -> Activity:
        """From here on `what` is done, until `end`."""
        activity = Activity(what)
        self._doing.append(activity)
        if len(self._doing) == 1:
            self._over = threading.Event()
            threading.Thread(target=self._beat, args=(self._over,), daemon=True).start()
        return activity

    def end(self, activity: Activity) -> None:
        """It is over, with all that was begun in it."""
        if activity in self._doing:
            del self._doing[self._doing.index(activity) :]
        if not self._doing:
            self._over.set()

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(POLL_SECONDS):
            doing = self._doing[-1:]  # the other thread may end it meanwhile
            now = time.monotonic()
            silent = now - self._silent_since()
            if not doing or silent < PATIENCE:
                continue
            long = [activity for activity in self._doing if now - activity.since >= SHORTEST]
            if long or silent >= PATIENCE + SHORTEST:
                self._say((long or doing)[-1].line())
