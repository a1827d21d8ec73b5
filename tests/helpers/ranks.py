"""The ranks of a group, forked from a process that has imported everything: a group begins in half a second.

Under torchrun every rank imports torch and transformers anew. Here a fork server (a fresh process, in which
no thread of torch's has run yet) imports them once a test session. Its children find the environment that
torchrun sets, and a store that outlives them, as torchrun's does. What a launcher does, such as restarts,
is tested with torchrun itself.
"""

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from unittest import mock

from torch.distributed import TCPStore

from finetuning.common.process import exit_process

ROOT = Path(__file__).parents[2]
PRELOADED = ("pytest", "direct_finetuning_with_existing_modules", "transformers.models.qwen3")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
GRACE_SECONDS = 20.0  # for the other ranks, once one has failed


@dataclass(frozen=True)
class Ended:
    """How a rank ended: -9 after a SIGKILL; what its work returned, None where it did not come so far."""

    exit_code: int
    result: object
    stdout: str
    stderr: str


def results_of(ranks: Sequence[Ended]) -> list:
    """What the work of each rank returned; none may have failed."""
    said = [f"rank {n}: {e.stdout[-2000:]}{e.stderr[-4000:]}" for n, e in enumerate(ranks)]
    assert [e.exit_code for e in ranks] == [0] * len(ranks), "\n".join(said)
    return [e.result for e in ranks]


def on_ranks(
    world_size: int,
    work: Callable,
    *arguments: object,
    timeout: float = 240.0,
    grace: float = GRACE_SECONDS,
) -> list[Ended]:
    """`work(*arguments)` in so many processes of one group, in rank order; 0: in one that knows no group.

    `work` is a function of a module's own, with arguments and a result that pickle takes. Ranks that hang
    are killed, and their exit code says so: after the timeout, or `grace` seconds after one has failed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _context().Process(
                target=_rank,
                args=(Path(folder) / str(n), _environment(n, world_size, store), work, arguments),
            )
            for n in range(max(world_size, 1))
        ]
        for rank in ranks:
            rank.start()
        try:
            _wait(ranks, time.monotonic() + timeout, grace)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        return [_ended(Path(folder) / str(n), rank.exitcode) for n, rank in enumerate(ranks)]


def _context() -> multiprocessing.context.BaseContext:
    """The fork server, running; it starts once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    # Not every Python hands the server this process's path for imports.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Asked of the driver, "is there a GPU?" makes it useless to who is forked later; NVML may be asked.
    ask = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", **ask):
        multiprocessing.forkserver.ensure_running()
    return context


def _environment(rank: int, world_size: int, store: TCPStore) -> dict[str, str]:
    """What torchrun tells a rank."""
    if not world_size:
        return {}
    numbers = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": store.port}
    local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size, "TORCHELASTIC_RESTART_COUNT": 0}
    names = {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "forked",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return {name: str(value) for name, value in {**numbers, **local, **names}.items()}


def _wait(ranks: Sequence[multiprocessing.Process], deadline: float, grace: float) -> None:
    """Until all have ended, or the time is over; it is short once one has failed."""
    running = {rank.sentinel: rank for rank in ranks}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in connection.wait(list(running), left):
            rank = running.pop(sentinel)
            rank.join()
            if rank.exitcode:
                deadline = min(deadline, time.monotonic() + grace)


def _rank(files: Path, environment: dict[str, str], work: Callable, arguments: tuple) -> None:
    """The life of a rank; what it leaves lies in files."""
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        with open(files.with_suffix(f".{name}"), "wb") as file:
            os.dup2(file.fileno(), number)
    code = 1
    try:
        result = work(*arguments)
        files.with_suffix(".result").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:  # whatever ends it, the one who waits for it wants to read it
        traceback.print_exc()
    exit_process(code)


def _ended(files: Path, exit_code: int) -> Ended:
    said = []
    for name in ("out", "err"):
        said.append("")
        with contextlib.suppress(FileNotFoundError):  # killed before it began
            said[-1] = files.with_suffix(f".{name}").read_text("utf-8", errors="replace")
    result = pickle.loads(files.with_suffix(".result").read_bytes()) if exit_code == 0 else None
    return Ended(exit_code, result, *said)


def modules_at_start() -> bool:
    """In a rank: whether all that takes long was imported before it began."""
    return all(name in sys.modules for name in PRELOADED)
