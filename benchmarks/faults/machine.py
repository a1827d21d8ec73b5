"""F18, F19: a driver and a clock that lie."""

import contextlib
import datetime
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pynvml

from finetuning.runs import build, directory, record
from tests.helpers import fake_nvml

from .checkpoints import stop_at
from .rig import Rig, after_step, nothing_lost, replaced, steps_done, strict_json, wait_until
from .tally import Row, Tally, Trial

# -----------------------------------------------------------------------------
# F18: NVML

CODES = {
    3: "not supported",
    4: "no permission",
    15: "lost",
    18: "version mismatch",
    9: "driver not loaded",
    999: "unknown",
}
CALLS = {
    "nvmlInitWithFlags": "",
    "nvmlDeviceGetHandleByIndex_v2": "",
    "nvmlDeviceGetUtilizationRates": "Utilization_Percent",
    "nvmlDeviceGetMemoryInfo": "Memory_Usage_Percent",
    "nvmlDeviceGetTemperatureV": "",
    "nvmlDeviceGetPowerUsage": "Power_W",
}


READINGS = [call for call in CALLS if call.startswith("nvmlDeviceGet") and "Handle" not in call]
_INSTALLED = contextlib.ExitStack()  # of a child; a fake that nobody holds is gone at once


def under_driver(library: Path, state: Path, lines: dict[str, int], later: dict[str, int]) -> None:
    """In a child: the monitor asks the real bindings, and these the fake driver."""
    if lines.get("missing"):

        def absent() -> None:
            state.with_name("told").write_text("missing 1\n")
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

        replaced(pynvml, "nvmlInit", absent)
    else:
        os.environ["FAKE_NVML_TOLD"] = str(state.with_name("told"))
        changing = _INSTALLED.enter_context(fake_nvml.installed(library, state))
        changing.set({"count": 2, **lines})
        if later:
            after_step(7, lambda: changing.set(later))
    after_step(20, lambda: wait_until(lambda: has_told(state, lines, later), 60))
    monitor = build.SystemMonitor

    def watching(gpu_uuids, disk_path, interval_s, first_gpu_index, **options):
        return monitor(None, disk_path, 0.05, first_gpu_index, **options)

    replaced(build, "SystemMonitor", watching)


def gpu_tags(output: Path) -> dict[str, set[str]]:
    """GPU number -> tags in metrics.jsonl."""
    found: dict[str, set[str]] = {}
    for path in (output / "training_logs").glob("*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            for tag in json.loads(line)["metrics"]:
                if tag.startswith("GPU_"):
                    found.setdefault(tag.partition("/")[0], set()).add(tag.partition("/")[2])
    return found


def has_told(state: Path, lines: dict[str, int], later: dict[str, int]) -> bool:
    """Whether it has given all of these answers, and any of the later ones: a lost board is asked no more."""
    given = told(state)
    first, then = ({f"{key} {value}" for key, value in d.items()} for d in (lines, later))
    return first <= given and (not then or bool(then & given))


def told(state: Path) -> set[str]:
    """What the fake driver has answered otherwise than a healthy one, as `error.<call> 3`."""
    path = state.with_name("told")
    return set(path.read_text().splitlines()) if path.exists() else set()


def driver(
    rig: Rig, library: Path, lines: dict[str, int], absent: str, later: dict[str, int] | None = None
) -> Trial:
    """A run under a driver that fails in one way: the same run, the field absent, a word about it."""
    output = rig.place("f18") / "out"
    state = output.with_name("nvml")
    patch = lambda: under_driver(library, state, lines, later or {})  # noqa: E731
    outcome = rig.run(output, patch=patch)
    problems = nothing_lost(output, rig.reference, outcome)
    tags = gpu_tags(output)
    fired = has_told(state, lines, later or {}) and bool(tags or lines or later)
    if absent and any(absent in of_one for of_one in tags.values()) and not later:
        problems.append(f"{absent} has a value")
    if outcome.output.count("warning: ") > 8:
        problems.append(f"{outcome.output.count('warning: ')} warnings")
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def f18(rig: Rig, tally: Tally, count: int) -> None:
    """Error codes of each call, hanging calls, no library, MIG, boards that come and go."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        tally.skip("needs a C compiler for the fake driver")
        return
    library = fake_nvml.build(rig.place("nvml"))
    cases: list[tuple[str, dict[str, int], str, dict[str, int] | None]] = [
        ("as it should be", {}, "", None),
        ("no library", {"missing": 1}, "Utilization_Percent", None),
        ("a call hangs", {"hang.nvmlDeviceGetPowerUsage": 1}, "Power_W", None),
        ("MIG", {"mig.0": 2}, "", None),
        ("a board goes", {}, "", {f"error.{call}.1": 15 for call in READINGS}),
        ("lost in the run", {}, "", {"error.nvmlDeviceGetUtilizationRates": 15}),
    ]
    cases += [
        (f"{call}: {text}", {f"error.{call}": code}, absent, None)
        for call, absent in CALLS.items()
        for code, text in CODES.items()
    ]
    first, rest = cases[:6], cases[6:]
    random.Random(18).shuffle(rest)
    of_a_call = {name.partition(":")[0]: case for case in rest for name in [case[0]]}
    rest = [*of_a_call.values(), *(case for case in rest if case not in of_a_call.values())]
    for name, lines, absent, later in (first + rest)[:count]:  # 12: one code of every call
        trial = lambda s=lines, a=absent, t=later: driver(rig, library, s, a, t)  # noqa: E731
        tally.attempt(name, trial)


def errors_are_raised() -> None:
    """Mutant: the loop asks the driver itself and takes no for an answer from nobody."""
    real = record.RunRecord.log

    def asks(self, step, metrics):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetPowerUsage(handle)
        if step < 3:
            pynvml.nvmlDeviceGetMemoryInfo(handle)
        return real(self, step, metrics)

    replaced(record.RunRecord, "log", asks)


# -----------------------------------------------------------------------------
# F19: the wall clock


def clock(rig: Rig, shift: Callable[[int, int], float]) -> Trial:
    """A run whose wall clock is moved by `shift(calls, step)` seconds; a resume under the same clock."""
    output = rig.place("f19") / "out"
    fired = output.with_name("fired")

    def patch() -> None:
        real, calls, done = time.time, [], steps_done()

        def lying() -> float:
            calls.append(1)
            moved = shift(len(calls), done())
            if moved:
                fired.touch()
            return max(0.0, real() + moved)

        replaced(time, "time", lying)
        strftime, localtime = time.strftime, time.localtime
        replaced(
            time, "strftime", lambda form, moment=None: strftime(form, moment or localtime(lying()))
        )

        class Lying(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromtimestamp(lying(), tz)

        replaced(directory, "datetime", Lying)

    def stopped() -> None:
        patch()
        stop_at(12)

    first = rig.run(output, patch=stopped)
    problems = [] if first.code == 0 else [f"exit {first.code}: {first.output[-400:]}"]
    second = rig.run(output, patch=patch)
    problems += nothing_lost(output, rig.reference, second)
    if not second.code:
        statistics = strict_json(output / "training_statistics.json")
        problems += [f"{k} is {v}" for k, v in _durations(statistics) if not 0 <= v < 600]
    happened = fired.exists()
    shutil.rmtree(output.parent, ignore_errors=True)
    return happened, problems


def _durations(value: dict, prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for key, item in value.items():
        if isinstance(item, dict):
            found += _durations(item, f"{prefix}{key}.")
        elif "second" in key.lower().replace("per_second", "") and isinstance(item, (int, float)):
            found.append((prefix + key, item))
    return found


def f19(rig: Rig, tally: Tally, count: int) -> None:
    """Jumps by hours and years, backwards, frozen, slow; seen from Python."""
    hour, year = 3600.0, 31_557_600.0
    now = time.time()
    cases: list[tuple[str, Callable[[int, int], float]]] = [  # the first four: every kind
        ("an hour back in the run", lambda n, step: -hour if step >= 6 else 0.0),
        ("ten years on", lambda n, step: 10 * year),
        ("frozen", lambda n, step: now - time.clock_gettime(0)),
        ("to and fro", lambda n, step: hour * (-1) ** n),
        ("an hour on in the run", lambda n, step: hour if step >= 6 else 0.0),
        ("ten years back", lambda n, step: -10 * year),
        ("ten years back in the run", lambda n, step: -10 * year if step >= 6 else 0.0),
        ("backwards at every look", lambda n, step: -3.0 * n),
        ("1970", lambda n, step: -now + 5.0),
        ("a day further at every look", lambda n, step: 86_400.0 * n),
    ]
    for name, shift in cases[:count]:
        tally.attempt(name, lambda s=shift: clock(rig, s))
    tally.skip("the clock is moved under Python's time and datetime, not under the kernel's")


def newest_by_time() -> None:
    """Mutant: run time is taken from the wall clock."""
    replaced(time, "monotonic", lambda: time.time())


ROWS = [
    Row(
        "F18",
        "NVML: errors, hanging calls, no library, MIG, boards that go",
        f18,
        full=42,
        quick=12,
        mutants={"errors are raised": errors_are_raised},
        mutant_count=2,
    ),
    Row(
        "F19",
        "wall clock: jumps, backwards, frozen",
        f19,
        full=10,
        quick=4,
        mutants={"durations by the wall clock": newest_by_time},
        mutant_count=1,
    ),
]
