"""This process: memory settings that must precede the import of torch, and signals that ask it to stop."""

import ctypes
import gc
import os
import signal
import sys
import threading


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them to the kernel at every step.

    A training step frees and takes the same large tensors again; each return costs a page fault per
    4 KiB on the next touch. mallopt(M_TRIM_THRESHOLD = -1, ...) and mallopt(M_MMAP_THRESHOLD = -3, ...).
    Users who set the MALLOC_ variables keep their own values.
    """
    named = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    if not sys.platform.startswith("linux") or any(name in os.environ for name in named):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(-1, 2**31 - 1)
        mallopt(-3, 2**30)


def imports_are_done() -> None:
    """Collect garbage as usual from now on, but never look at what the imports have made."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


class StopSignal:
    """Within it, a signal that asks the process to end only leaves its name here; the loop looks at it."""

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP")

    def __init__(self) -> None:
        self.name = ""
        self._former: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # no other one may set handlers
            for name in self.NAMES:
                if hasattr(signal, name):  # Windows has no SIGHUP
                    number = getattr(signal, name)
                    self._former[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _take(self, number: int, _frame: object) -> None:
        self.name = signal.Signals(number).name


_keep_freed_memory()
# Importing torch and transformers makes a million objects that stay. The collector would search them
# for garbage again and again, a sixth of the time that the imports take.
_THRESHOLDS = gc.get_threshold()
gc.set_threshold(200_000, 50, 50)
# The tokenizer's own threads and forked workers don't go together; it warns at length otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait hold up the ones they wait for as soon as anything else wants a core:
# measured on two cores with one busy neighbour, generation took 13 to 20 times, training 2.5 to 3.4 times
# as long as with threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
