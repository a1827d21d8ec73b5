"""Work in a process of its own, with limits on memory and time: what it does wrong harms nobody else.

    python -m finetuning.common.limited PARENT MEMORY_BYTES CPU_SECONDS MODULE ARGUMENTS...

runs a module as `python -m MODULE ARGUMENTS...` does, within the limits, for as long as PARENT lives.
"""

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetuning.common.bounds import Bound

POLL_SECONDS = 0.1  # between two questions whether work is still wanted
STOPPED = -1  # the exit code of work that was ended: its time was up, or nobody wants it any more


@dataclass(frozen=True)
class Limits:
    """What the work may take, from the table of bounds."""

    memory: Bound  # bytes of address space
    cpu: Bound  # seconds
    wall: Bound  # seconds by the clock: more, for a machine that is busy


@dataclass(frozen=True)
class Ended:
    """How the work ended. code: 0 for well; `STOPPED`; a signal's number below 0."""

    code: int
    said: str  # what it wrote to standard output
    complaint: str  # the last line of what it wrote to standard error


def run_limited(
    module: str,
    arguments: tuple[str, ...],
    limits: Limits,
    *,
    given: bytes = b"",
    unwanted: Callable[[], bool] | None = None,
) -> Ended:
    """Run a module of ours in a process with these limits; it is ended when its time is up or it is
    unwanted.

    given: what it reads from standard input. Raises OSError where no process can be started.
    """
    command = [sys.executable, "-m", __name__, str(os.getpid())]
    command += [str(limits.memory.limit), str(limits.cpu.limit), module, *arguments]
    # Each thread of a numerical library would take some of the memory.
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    place = Path(__file__).parents[2]  # where this package is found
    with tempfile.TemporaryFile() as source:
        source.write(given)
        source.seek(0)
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        child = subprocess.Popen(command, cwd=place, env=os.environ | alone, stdin=source, **pipes)
    deadline = time.monotonic() + limits.wall.limit
    try:
        while True:
            left = max(0.0, deadline - time.monotonic())
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, complaint = child.communicate(
                    timeout=min(left, POLL_SECONDS) if unwanted else left
                )
                break
            if left == 0 or (unwanted and unwanted()):
                return Ended(STOPPED, "", "")
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
    lines = complaint.decode(errors="replace").strip().splitlines()
    return Ended(child.returncode, said.decode(errors="replace"), lines[-1] if lines else "")


def end_with(parent: int, how: int = getattr(signal, "SIGKILL", 0)) -> None:
    """From here on this process gets the signal `how` when its parent ends, however that ends (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, int(how))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended meanwhile
            os._exit(1)


def begin(parent: int, memory_bytes: int, cpu_seconds: int) -> None:
    """Set this process's limits, where the system has them. Ctrl-C is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
    with contextlib.suppress(OSError):  # where memory runs out, it is this process that goes
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        import resource
    except ImportError:  # Windows: the parent's clock remains
        return
    with contextlib.suppress(ValueError, OSError):  # macOS may refuse
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def main() -> None:
    """The command above."""
    parent, memory_bytes, cpu_seconds = map(int, sys.argv[1:4])
    begin(parent, memory_bytes, cpu_seconds)
    sys.argv = sys.argv[4:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
