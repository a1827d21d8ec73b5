"""Limits on what a stranger's chat template may take in this process, for each conversation that it renders.

Jinja's sandbox keeps a template away from Python; it does not keep it from computing for ever or from
filling the memory, for one sample among all. Where the system has no such limits (Windows, a thread other
than the main one), the template was still tried once in a process of its own (`template_probe.py`).
"""

import importlib
import importlib.util
import os
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

from finetuning.common.bounds import TEMPLATE_CPU, TEMPLATE_MEMORY
from finetuning.common.errors import UserError

T = TypeVar("T")
# Windows has none.
resource = importlib.import_module("resource") if importlib.util.find_spec("resource") else None


class TemplateLimitError(UserError):
    """A template that takes too much: the run ends, as each sample would take as long again."""


class _TooLongError(BaseException):
    """The time is up. No template may catch it, and nothing that renders one."""


class _Alarm:
    """The clock of a rendering: the processor time of this process, so that no busy neighbour counts."""

    def __init__(self) -> None:
        self._runs = False
        self._is_set = False

    def run(self, action: Callable[[], T]) -> T:
        """What `action` returns. Raises _TooLongError when the time is up."""
        if not (hasattr(signal, "setitimer") and hasattr(signal, "SIGVTALRM")):
            return action()
        if threading.current_thread() is not threading.main_thread():
            return action()
        if not self._is_set:
            signal.signal(signal.SIGVTALRM, self._ring)
            self._is_set = True
        self._runs = True
        signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_CPU.limit)
        try:
            return action()
        finally:
            self._runs = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _ring(self, *_: object) -> None:
        if self._runs:
            raise _TooLongError


_ALARM = _Alarm()


def within_limits(action: Callable[[], T]) -> T:
    """What `action`, which renders a conversation, returns. Raises TemplateLimitError where it takes too
    much."""
    try:
        before = _tighten()
        try:
            return _ALARM.run(action)
        finally:
            if before is not None:
                resource.setrlimit(resource.RLIMIT_AS, before)
    except (_TooLongError, MemoryError) as error:
        raise TemplateLimitError(
            f"the model's chat template takes more than {TEMPLATE_CPU} or {TEMPLATE_MEMORY} for a "
            "conversation; use the model's original template, and don't trust this one"
        ) from error


def _tighten() -> tuple[int, int] | None:
    """Let this process grow by no more than the template may take; the limit before, None where there is
    none to be set."""
    if resource is None or _STATM is None:
        return None
    pages = int(os.pread(_STATM, 64, 0).split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * _PAGE + TEMPLATE_MEMORY.limit
    if before[0] != resource.RLIM_INFINITY:
        most = min(most, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    return before


def _open_statm() -> int | None:
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:  # not Linux
        return None


_STATM = _open_statm()
_PAGE = resource.getpagesize() if resource is not None else 0
