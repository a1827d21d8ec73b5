"""The preloaded C library that counts, logs, fails or signals at the k-th change to files.

`python -m benchmarks.faults` builds it and starts itself again under it; trials arm it in forked children.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OPEN, WRITE, SYNC, RENAME, UNLINK, MKDIR, TRUNCATE, LINK, READ = (1 << i for i in range(9))
ALL = 255  # changes
ONLY_LOG, KILL_BEFORE, FAIL, KILL_IN_HALF, KILL_AFTER, SIGNAL = range(6)
_SOURCE = Path(__file__).with_name("fault_hook.c")
FOREVER = 1 << 40


def build(folder: Path) -> Path | None:
    """Compile; None where there is no compiler or no LD_PRELOAD."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "fault_hook.so"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        str(library),
        str(_SOURCE),
        "-ldl",
        "-lrt",
    ]
    subprocess.run(command, check=True)
    return library


def restart(command: list[str]) -> None:
    """Replace this process by Python with `command`, under the library, on one thread, offline.

    FAULTS_WORK then names a new temporary directory, which the new process is to remove.
    """
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    library = build(work)
    environment = {
        **os.environ,
        "FAULTS_WORK": str(work),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if library is not None:
        environment["LD_PRELOAD"] = str(library)
    os.execve(sys.executable, [sys.executable, *command], environment)


def preloaded() -> bool:
    """Whether this process runs under the library."""
    return hasattr(ctypes.CDLL(None), "fault_arm") if os.name == "posix" else False


def arm(
    below: Path,
    *,
    action: int,
    first: int = 1,
    count: int = 1,
    operations: int = ALL,
    contains: str = "",
    number: int = 0,
    computing: float = 0.0,
    log: Path | None = None,
) -> None:
    """From now on, in this process: act on the `first`-th and the following `count` - 1 changes.

    number: FAIL's errno, SIGNAL's signal. computing: seconds that the process computes until SIGNAL's comes,
    so that it meets it anywhere, on a busy machine too.
    """
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if log else -1
    call = ctypes.CDLL(None).fault_arm
    call.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_uint,
        ctypes.c_long,
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
        ctypes.c_int,
    ]
    delay = int(computing * 1e9)
    place = os.fsencode(below), contains.encode(), operations
    call(*place, first, count, action, number, delay, handle)


def in_environment(
    below: Path, *, contains: str, operations: int, number: int, log: Path
) -> dict[str, str]:
    """Environment of a fresh process that gets a signal at its first such change."""
    fields = (below, contains, operations, 1, 1, SIGNAL, number, 0, log)
    return {"FAULT_HOOK": "|".join(map(str, fields))}


def changes(log: Path) -> list[tuple[str, str]]:
    """Call and path of everything that the library saw, in order."""
    return [tuple(line.split(" ", 2)[1:]) for line in lines(log)]


def disarm() -> None:
    """Nothing happens any more."""
    arm(Path("/"), action=ONLY_LOG, operations=0)


def lines(log: Path) -> list[str]:
    """What the library saw."""
    return log.read_text().splitlines() if log.exists() else []


def fired(log: Path) -> bool:
    """Whether the fault happened."""
    return any(line.startswith("FIRED") for line in lines(log))
