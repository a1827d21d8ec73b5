"""A command of the user's that an alert starts: bounded in time and words, and ended with the run."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from finetuning.common.bounds import ACTION_END, ACTION_OUTPUT, ACTION_TIME
from finetuning.common.errors import UserError
from finetuning.common.language import translated
from finetuning.common.text import REDACTED, redact, without
from finetuning.monitoring.alerts import Alert

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_SUPERVISED = sys.platform.startswith("linux")


class AlertCommand:
    """A command at work, which has the alert as one line of JSON on its standard input.

    It is split as a shell would and run without a shell, so nothing in the alert is ever interpreted. What
    it prints is dropped; a failure is one line on stderr. It and the processes that it started are ended
    after `timeout_s` seconds, where it says too much, and with the run, however that ends (Linux). Raises
    UserError for an empty command or one with an open quote.
    """

    def __init__(
        self, command: str | Sequence[str], alert: Alert, timeout_s: float = ACTION_TIME.limit
    ) -> None:
        self._words = _words(command)
        self._timeout_s = timeout_s
        self._ended_for = ""  # why it was ended
        self._payload = json.dumps(alert.record(), ensure_ascii=True, allow_nan=False).encode()
        self._watch = threading.Thread(target=self._attend, daemon=True)
        try:
            # Of this thread's, which lives as long as the run: the kernel ends a child with its thread.
            self._child = subprocess.Popen(
                self._started_as(),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            self._tell(f"failed: {error.strerror or error}")
        else:
            self._watch.start()

    def _started_as(self) -> list[str]:
        own = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(os.getpid())]
        return [*own, *self._words] if _SUPERVISED else self._words

    def is_alive(self) -> bool:
        """Whether it is still at work."""
        return self._watch.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait so many seconds for its end."""
        if self.is_alive():
            self._watch.join(timeout_s)

    def end(self, reason: str) -> None:
        """End it and what it started. `reason` is told: "was ended …"."""
        self._ended_for = self._ended_for or reason
        with suppress(ProcessLookupError, PermissionError):
            if _SUPERVISED:
                self._child.terminate()
            elif hasattr(os, "killpg") and hasattr(signal, "SIGKILL"):
                os.killpg(self._child.pid, signal.SIGKILL)  # the group of its own session
            else:
                self._child.kill()

    def _attend(self) -> None:
        """In a thread: give it the alert, hear what it says, tell what went wrong."""
        late = threading.Timer(
            self._timeout_s, self.end, [f"was ended after {self._timeout_s:g} s"]
        )
        late.daemon = True
        late.start()
        try:
            with suppress(OSError), self._child.stdin as source:  # it may not want to know
                source.write(self._payload + b"\n")
            said = self._child.stderr.read(ACTION_OUTPUT.limit + 1)
            if len(said) > ACTION_OUTPUT.limit:
                self.end(f"was ended: it wrote more than {ACTION_OUTPUT} of messages")
            code = self._child.wait()
        finally:
            late.cancel()
            self._child.stderr.close()
        if self._ended_for:
            self._tell(self._ended_for)
        elif code:
            self._tell(f"exited {code}: {said.decode(errors='replace')}")

    def _tell(self, what: str) -> None:
        """One line on stderr that shows none of the command's arguments, which may hold a secret."""
        program, *arguments = self._words
        name = redact(Path(program).name)
        line = f"alert command {name!r} {without(what, *arguments)}"
        print(translated(line), file=sys.stderr)


def _words(command: str | Sequence[str]) -> list[str]:
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError as error:
        raise UserError(f"an alert's command: {error}; check its quotes") from error
    if not words:
        raise UserError("the alert command is empty; name a program or leave the option out")
    return words


def end_commands(commands: Iterable[AlertCommand], *, at_once: bool) -> None:
    """At the end of a run: those that are still at work get a few seconds, or none, and are ended."""
    deadline = time.monotonic() + (0 if at_once else ACTION_END.limit)
    for command in commands:
        command.join(max(0.0, deadline - time.monotonic()))
        if command.is_alive():
            command.end("was ended with the run")
            command.join(1.0)


def program_of(command: str) -> str:
    """What records show of an action: the word, or a command's program; its arguments may hold secrets."""
    try:
        words = shlex.split(command)
    except ValueError:
        return REDACTED
    return Path(words[0]).name if words else ""
