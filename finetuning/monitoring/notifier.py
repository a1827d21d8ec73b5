"""News go out beside the training: a queue and a thread for each channel, and nothing waits for them.

A notice that does not arrive is tried again, after longer and longer pauses, until `NOTICE_PATIENCE` is
over; what the other side refuses for good is not. Of all that is lost on a channel, one line tells.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from finetuning.common.bounds import NOTICE_END, NOTICE_PATIENCE, NOTICES
from finetuning.monitoring.channels import Channel, Notice, Undelivered

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries; each is twice the one before
LAST_PAUSE = 0.5  # while the end of the run waits


class Notifier:
    """Tells every channel. `warn` hears once of each channel on which something was lost."""

    def __init__(self, channels: Sequence[Channel], warn: Callable[[str], None]) -> None:
        self._lines = [_Line(channel, warn) for channel in channels]

    def __bool__(self) -> bool:
        """Whether anybody is told."""
        return bool(self._lines)

    def tell(self, notice: Notice) -> None:
        """Put it into the queues; returns at once."""
        for line in self._lines:
            line.put(notice)

    def close(self) -> None:
        """Wait for what is under way, no longer than `NOTICE_END` for all channels together."""
        deadline = time.monotonic() + NOTICE_END.limit
        for line in self._lines:
            line.ends_by(deadline)
        for line in self._lines:
            line.join()


class _Line:
    """One channel's queue and thread. The thread begins with the first notice."""

    def __init__(self, channel: Channel, warn: Callable[[str], None]) -> None:
        self._channel, self._warn = channel, warn
        self._waiting: deque[Notice] = deque(maxlen=NOTICES.limit)  # the oldest makes room
        self._changed = threading.Condition()
        self._deadline: float | None = None  # of the end of the run
        self._told, self._last_fault = False, ""
        name = f"notify {channel.service}"
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def put(self, notice: Notice) -> None:
        with self._changed:
            self._waiting.append(notice)
            self._changed.notify()
        if self._thread.ident is None:
            self._thread.start()

    def ends_by(self, deadline: float) -> None:
        """Nothing comes any more, and nobody waits longer than until then."""
        with self._changed:
            self._deadline = deadline
            self._changed.notify()

    def join(self) -> None:
        """Wait until all is told, or the deadline."""
        if self._thread.ident is None:
            return
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            self._lost(self._last_fault or f"no answer within {NOTICE_END}")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._deadline is not None)
                if not self._waiting:
                    return
                notice = self._waiting.popleft()
            try:
                self._deliver(notice)
            except Exception as error:  # a mistake of ours is told as well, and the next one goes
                self._lost(type(error).__name__)

    def _deliver(self, notice: Notice) -> None:
        gives_up, pause = time.monotonic() + NOTICE_PATIENCE.limit, FIRST_PAUSE
        while True:
            try:
                self._channel.deliver(notice)
                self._last_fault = ""
                return
            except Undelivered as fault:
                self._last_fault = str(fault)
                if fault.lasting or self._is_late(gives_up):
                    self._lost(self._last_fault)
                    return
            with self._changed:
                self._changed.wait_for(lambda: self._deadline is not None, pause)
                ends = self._deadline is not None
            if ends:
                time.sleep(min(LAST_PAUSE, FIRST_PAUSE))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _is_late(self, gives_up: float) -> bool:
        """At the end of the run the newest notice is worth another try, older ones are not."""
        with self._changed:
            if self._deadline is None:
                return time.monotonic() >= gives_up
            return bool(self._waiting) or time.monotonic() >= self._deadline

    def _lost(self, reason: str) -> None:
        if not self._told:
            self._told = True
            self._warn(
                f"notify {self._channel.service}: a notice did not arrive ({reason}); the run goes on, "
                "and no other loss is told"
            )
