"""Does a test see a planted bug? The tests run in a fork of a process that has the libraries already."""

import contextlib
import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutation.bugs import Bug

# What the tests import of others: seconds of processor time that each fork is spared.
_LIBRARIES = """
torch torch._dynamo torch.distributed.fsdp torch.nn.parallel numpy scipy.sparse.csgraph scipy.stats
transformers transformers.models.qwen3.modeling_qwen3 transformers.generation peft peft.tuners.lora
tokenizers safetensors.torch pyarrow.parquet jinja2 tensorboard.compat.proto.event_pb2
tensorboard.backend.event_processing.event_accumulator psutil pynvml hypothesis pytest tyro rich.console
markdown_it PIL.Image rensa ahocorasick_rs rjieba jieba matplotlib.figure
"""
_A_TEST_FAILED = 1
_COLLECTION_FAILED = 2


def load_libraries() -> None:
    """Import what all tests need; to be called once, before the first trial, and nothing of the project."""
    for name in _LIBRARIES.split():
        importlib.import_module(name)


@dataclass(frozen=True)
class Stage:
    """Test files that are tried together, and which of their tests."""

    files: tuple[str, ...]
    marked: str


def stages_for(path: str, tests: Sequence[str], *, thorough: bool) -> list[Stage]:
    """The tests that are tried on a bug in the file `path`, the nearest first; each stage has new ones only.

    Its own file of tests, its room, the runs that are compared with an independent reference, the quick tests
    of all other rooms, and the reference of several ranks and resumes. `thorough`: then everything but what
    is marked long.
    """
    name = Path(path).stem
    room = Path(path).parent.name if "/" in path else _room_at_the_root(name)
    own = [test for test in tests if Path(test).name in (f"test_{name}.py", f"test_{name}s.py")]
    near = [test for test in tests if Path(test).parts[1] == room]
    exact = [f"tests/runs/test_{kind}.py" for kind in ("reference", "metric_values")]
    quick, slow = "not slow and not long", "slow and not long"
    wanted = [(test, mark) for test in own for mark in (quick, slow)]
    compared = [(test, mark) for test in exact if test in tests for mark in (quick, slow)]
    wanted += (
        compared if room == "runs" else [(test, mark) for mark in (quick, slow) for test in near]
    )
    wanted += compared
    wanted += [(test, quick) for test in tests]
    of_ranks = [f"tests/runs/test_{kind}.py" for kind in ("reference_on_ranks", "counters")]
    wanted += [(test, slow) for test in of_ranks if test in tests]
    wanted += [(test, slow) for test in tests if thorough]
    return [
        Stage(tuple(test for test, _ in pairs), mark)
        for mark, pairs in itertools.groupby(dict.fromkeys(wanted), key=lambda pair: pair[1])
    ]


def _room_at_the_root(name: str) -> str:
    rooms = {"tb_logger": "events", "dataset_stats": "analysis", "convergence": "monitoring"}
    return rooms.get(name, "runs")


@dataclass(frozen=True)
class Verdict:
    """`seen_by` is the first test that failed; empty where none did."""

    bug: Bug
    killed: bool
    seen_by: str
    seconds: float


class Copy:
    """A copy of the repository in which one bug after another is planted."""

    def __init__(self, root: Path, place: Path) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=root, capture_output=True, check=True, text=True,
        ).stdout  # fmt: skip
        self.files = sorted(name for name in listed.split("\0") if name and (root / name).is_file())
        self.place = place
        for name in self.files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, place / name)
        # The tests ask git which files there are.
        for command in (["init", "-q"], ["add", "-A"]):
            subprocess.run(["git", *command], cwd=place, check=True)
        self._clock = int(time.time()) - 10_000_000

    def tests(self) -> list[str]:
        found = [name for name in self.files if Path(name).name.startswith("test_")]
        # The checks of the text itself would see every bug, and no user would.
        blind = ("tests/test_layout.py", "tests/test_mutation.py")
        return [name for name in found if name.startswith("tests/") and name not in blind]

    def write(self, path: str, text: str) -> None:
        """Each version of a file has a time of its own: a stale .pyc would hide a bug."""
        file = self.place / path
        file.write_text(text, encoding="utf-8")
        self._clock += 7
        os.utime(file, (self._clock, self._clock))

    def try_bug(self, bug: Bug, stages: Sequence[Stage], limit: float) -> Verdict:
        """Plant the bug, run the stages until a test fails, take the bug out.

        limit: seconds that a stage may take.
        """
        text = (self.place / bug.path).read_text(encoding="utf-8")
        started = time.monotonic()
        self.write(bug.path, bug.planted(text))
        try:
            for stage in stages:
                seen_by = self.first_failure(stage, limit)
                if seen_by:
                    return Verdict(bug, True, seen_by, time.monotonic() - started)
        finally:
            self.write(bug.path, text)
        return Verdict(bug, False, "", time.monotonic() - started)

    def first_failure(self, stage: Stage, limit: float) -> str:
        """The first test of a stage that fails, or "" where all pass.

        Raises RuntimeError where pytest itself could not do its work.
        """
        log = self.place.with_suffix(".log")
        child = os.fork()
        if child == 0:
            _run_pytest(self.place, stage, log)
        code = _wait(child, limit)
        if code is None:
            return f"no end within {limit:.0f} s"
        # 5: the stage has no test with such a mark.
        if code in (0, 5):
            return ""
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        if code not in (_A_TEST_FAILED, _COLLECTION_FAILED) and code > 0:
            raise RuntimeError(f"pytest ended with {code}: {lines[-5:]}")
        return failed[0] if failed else f"the tests' process ended with {code}"


def _run_pytest(place: Path, stage: Stage, log: Path) -> None:
    """Never returns: the process ends with pytest's exit code."""
    code = 99
    try:
        os.setsid()
        os.chdir(place)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "finetuning")]:
            del sys.modules[name]
        sys.path[:] = [
            str(place),
            *(entry for entry in sys.path if entry not in ("", str(Path.cwd()))),
        ]
        shutil.rmtree(place / ".hypothesis", ignore_errors=True)
        import pytest

        base = place.with_suffix(".tmp")
        options = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-m", stage.marked]
        code = int(pytest.main([*options, f"--basetemp={base}", *stage.files]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(child: int, limit: float) -> int | None:
    """The exit code of a child, or None where it had to be ended; what it started ends with it."""
    deadline = time.monotonic() + limit
    code = None
    while code is None and time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):  # it and all of its group have ended
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return code
