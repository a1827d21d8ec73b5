"""This process: memory settings from before the import of torch, signals that ask it to stop, and its end."""

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from finetuning.common.language import translated


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


def is_first_rank() -> bool:
    """Whether this process is rank 0, or alone, by torchrun's environment."""
    return os.environ.get("RANK", "0") == "0"


def _leave(number: int, _frame: object) -> NoReturn:
    """End at once with a word: there is nothing to save, and threads of libraries are not waited for."""
    text = translated("interrupted before anything was to save")
    os.write(2, f"{text}\n".encode())
    os._exit(128 + number)


def imports_begin() -> None:
    """A signal that asks the process to end gets one line and its exit code (Ctrl-C: 130), no traceback
    through the imports. What was ignored at the start stays so."""
    for number in _signals():
        if signal.getsignal(number) is _usual_handler(number):
            signal.signal(number, _leave)


def imports_are_done() -> None:
    """Collect garbage as usual from now on, but never look at what the imports have made; signals do what
    they usually do."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    for number in _signals():
        if signal.getsignal(number) is _leave:
            signal.signal(number, _usual_handler(number))


def _signals() -> Iterator[int]:
    """Those that ask a process to end; Windows has few."""
    for name in StopSignal.NAMES:
        if number := getattr(signal, name, None):
            yield number


def _usual_handler(number: int) -> object:
    return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process at once. `code`: its exit code, 128 and the signal's number."""

    def __init__(self, number: int, *, second: bool) -> None:
        name = signal.Signals(number).name
        again = "ended at once by a second signal, without saving"
        super().__init__(f"{name}: {again if second else 'interrupted before the first step'}")
        self.code, self.second = 128 + number, second


class StopSignal:
    """Within it, a signal that asks the process to end is an exception while there is nothing to save
    (`Interrupted`); later it leaves its name here, and the loop looks at it, saves and ends.

    SIGUSR1, SIGUSR2 and SIGXCPU are how schedulers say that the time of a job is nearly over. What was
    ignored at the start, as under nohup or in the background of a script, stays ignored. The same signal
    again, or Ctrl-C after another one, ends at once; not within `AGAIN_SECONDS`, as a launcher passes on
    what the terminal has sent already, and not SIGXCPU, which the kernel repeats each second.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    AGAIN_SECONDS = 0.5

    def __init__(self) -> None:
        self.name = ""
        self._waits = self._leaves = False  # for the loop; the block that it is in
        self._since = 0.0
        self._former: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # no other one may set handlers
            for number in _signals():
                if signal.getsignal(number) in (signal.SIG_IGN, None):
                    continue
                self._former[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def wait_for_loop(self) -> None:
        """From here on there is something to save."""
        self._waits = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal leaves the block at once, one that follows another, too; what comes after
        it sees the first one's name."""
        self._leaves = True
        try:
            yield
        except Interrupted as end:
            if end.second:
                raise
        finally:
            self._leaves = False

    def _take(self, number: int, _frame: object) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.name:
            self.name, self._since = name, now
            if not self._waits or self._leaves:
                raise Interrupted(number, second=False)
            return
        if name == "SIGXCPU" or now - self._since < self.AGAIN_SECONDS:
            return
        if self._leaves:
            self._since = now
            raise Interrupted(number, second=False)
        if number == signal.SIGINT or name == self.name:
            signal.signal(number, signal.SIG_DFL)  # a third one waits for nothing
            raise Interrupted(number, second=True)


def exit_process(code: int) -> NoReturn:
    """End the process with this exit code, after what `atexit` knows of, without the interpreter's own end.

    That end waits for threads: for ever for the one of a pool that reads what a worker was writing when it
    was ended. And it now and then aborts a process in which a thread of gloo's or autograd's still holds a
    tensor (pytorch#38228, pytorch#179291): a rank whose work is done would count as failed, and torchrun
    would end the others, which may still be writing.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # who read it has gone; the code is that of the interpreter's end
            code = 120
    os._exit(code)


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
# Without a home directory the hub's library would make a folder that is called "~".
if not os.path.isabs(os.path.expanduser("~")):
    user = os.getuid() if hasattr(os, "getuid") else "all"
    os.environ.setdefault("HF_HOME", os.path.join(tempfile.gettempdir(), f"huggingface-{user}"))
