"""Results of a function, computed by worker processes and given back in order."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import resource_tracker

from finetuning.common.limited import end_with

END_SECONDS = 1.0  # for a pool that is not wanted any more; it takes milliseconds


def in_order(
    function: Callable,
    jobs: Iterable[tuple],
    workers: int,
    initializer: Callable | None = None,
    initargs: tuple = (),
) -> Iterator:
    """Results of function(*job) in the order of the jobs, computed by worker processes."""
    # Not forked: the parent may hold threads and a device context that don't survive it.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future] = deque()  # a few jobs ahead only, so that memory stays flat
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, begin_worker, (os.getpid(), initializer, initargs))
    try:
        for job in jobs:
            with (
                _signals_wait(),
                _main_stays_out(),
            ):  # a process is started by the job that needs it
                waiting.append(pool.submit(function, *job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BaseException:  # an error, a signal, or nobody wants the rest: nobody waits for it
        _end(pool, set(multiprocessing.active_children()) - others)
        raise
    pool.shutdown()


def _end(pool: ProcessPoolExecutor, workers: set[multiprocessing.Process]) -> None:
    """End the workers, and wait for the pool's own thread: it closes what the process would close at its
    end, too, and of two that close one thing, one shows a traceback.

    It reads for ever where a worker was writing a large result; that it is not waited for.
    """
    ending = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
    ending.start()
    for worker in workers:
        worker.terminate()
    ending.join(END_SECONDS)


def begin_worker(parent: int, initializer: Callable | None, initargs: tuple) -> None:
    """A worker ends with its parent, however that ends; Ctrl-C is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
    if initializer is not None:
        initializer(*initargs)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Handlers of signals run after it: an exception of theirs between the start of a process and the end
    of what it is sent would leave one that complains about half a message, and that nobody knows of.

    Processes started meanwhile never hear of Ctrl-C, not even before `begin_worker`.
    """
    came: list[int] = []
    holds = True
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other one may set handlers
        found = {number: signal.getsignal(number) for number in signal.valid_signals()}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}

    def take(number: int, frame: object) -> None:
        if holds:
            came.append(number)
        else:  # an exception came between this block's end and the return of the handlers
            handlers[number](number, frame)

    mask = getattr(signal, "pthread_sigmask", None)  # Windows has none, and no tracker of resources
    before = mask(signal.SIG_BLOCK, ()) if mask else None
    try:
        for number in handlers:
            signal.signal(number, take)
        if mask:
            resource_tracker.ensure_running()  # started by the first process, it would undo the mask
            mask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)
        holds = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            handlers[number](number, None)


@contextlib.contextmanager
def _main_stays_out() -> Iterator[None]:
    """Processes started meanwhile import what their function needs, and not the program itself:
    that one imports torch, which takes longer than the work on ten thousand samples."""
    main = sys.modules["__main__"].__dict__
    hidden = {name: main.get(name) for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = main["__file__"] = None
    try:
        yield
    finally:
        del main["__spec__"], main["__file__"]
        main.update(hidden)
