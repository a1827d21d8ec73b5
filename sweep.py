"""Runs over rates, ranks or any other settings, and one table of what came of them.

    uv run python sweep.py learning-rate=1e-4,3e-4,1e-3 --seeds 1 2                  # one after the other
    uv run python sweep.py learning-rate=1e-4,3e-4 lora-r=4,16 --gpus 0 1 2 3        # one a GPU
    uv run python sweep.py learning-rate=1e-4,3e-4 --jobs 4 -- --data-path my.jsonl  # four at once

What stands behind `--` goes to every run of the training program. A second start of the same command does
only what is missing: a run that was broken off goes on from its newest checkpoint.
"""

# ruff: noqa: E402  what is slow to import comes once the command line is known to be right

from finetuning.common import process  # first: Ctrl-C gets an answer while the libraries are loaded

if __name__ == "__main__":
    process.imports_begin()

import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from finetuning.command_line import parse_command_line
from finetuning.common import language
from finetuning.common.arguments import parsed
from finetuning.common.errors import RunStopped, UserError, exit_code
from finetuning.common.files import atomic_write_text, json_text, read_json_object
from finetuning.common.fingerprint import text_digest
from finetuning.common.paths import check_name, check_place, expanded
from finetuning.common.text import clean_line
from finetuning.readers.files import check_paths

PROGRAM = Path(__file__).with_name("direct_finetuning_with_existing_modules.py")
RESERVED = ("--output-dir", "--resume", "--seed")  # of each run; the sweep sets them


@dataclass(frozen=True)
class Sweep:
    """Run every combination of some settings, then compare."""

    vary: tyro.conf.Positional[tuple[str, ...]]
    """Settings with their values: learning-rate=1e-4,3e-4 lora-r=4,16."""
    output_dir: str = "sweep_output"
    """One folder for each run, and sweep.json, below it."""
    seeds: tuple[int, ...] = (42,)
    """Every combination is run with each; two or more give an interval."""
    jobs: int = 0
    """Runs at the same time; 0: one for each of --gpus, else one."""
    gpus: tuple[str, ...] = ()
    """GPUs that the runs are dealt to; empty: all runs see all of them."""
    json: bool = False
    """Print the table as one JSON object."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its settings, seed and folder."""

    settings: Mapping[str, str]
    seed: int
    folder: Path

    def arguments(self, shared: Sequence[str]) -> list[str]:
        """Of the training program."""
        own = [word for name, value in self.settings.items() for word in (f"--{name}", value)]
        return [
            *(language.FLAG, language.current(), *shared, *own, "--seed", str(self.seed)),
            *("--output-dir", str(self.folder), "--resume", "auto", "--quiet"),
        ]


def members_of(sweep: Sweep) -> list[Member]:
    """All combinations with all seeds. Raises UserError where there is none."""
    values: dict[str, list[str]] = {}
    if not sweep.vary:
        raise UserError("nothing to vary: write a setting and its values: lora-r=4,16")
    for word in sweep.vary:
        name, equals, listed = word.partition("=")
        found = [value for value in listed.split(",") if value]
        if not (name.strip("-") and equals and found):
            raise UserError(f"{clean_line(word, 80)}: write a setting and its values: lora-r=4,16")
        name = name.strip("-").replace("_", "-")
        if f"--{name}" in RESERVED:
            raise UserError(f"{name} is set by the sweep itself: use --seeds and --output-dir")
        values[name] = list(dict.fromkeys(found))
    if not sweep.seeds:
        raise UserError("--seeds: give at least one")
    if sweep.jobs < 0:
        raise UserError(f"--jobs is {sweep.jobs}, must be at least 1, or 0")
    root, members = Path(expanded(sweep.output_dir, "--output-dir")), []
    for chosen in itertools.product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        for seed in dict.fromkeys(sweep.seeds):
            words = [f"{name}={value}" for name, value in settings.items()] + [f"seed={seed}"]
            folder = root / ",".join(words).replace("/", "_")
            members.append(Member(settings, seed, folder))
    return members


def check(members: Sequence[Member], shared: Sequence[str]) -> None:
    """Refuse what a run would refuse, and settings that the sweep sets itself, before anything starts."""
    taken = [word for word in shared if word.partition("=")[0].replace("_", "-") in RESERVED]
    if taken:
        raise UserError(f"{taken[0]} behind -- is set by the sweep itself; see sweep.py --help")
    settings = [parse_command_line(member.arguments(shared)).training for member in members]
    if any(one.mirror for one in settings):
        raise UserError("--mirror: runs of a sweep would resume from each other; leave it out")
    for one in {(one.data_path, one.eval_path): one for one in settings}.values():
        check_paths(one)


def known(root: Path, shared: Sequence[str]) -> str:
    """What all runs share, as a digest, since it may hold a secret. UserError where other runs are."""
    check_name(root, "--output-dir")
    path, digest = root / "sweep.json", text_digest(*shared)
    check_place(path, "--output-dir")
    if not path.is_file():
        return digest
    begun_with = read_json_object(path).get("arguments")
    if not isinstance(begun_with, str):
        raise UserError(
            f"{path}: not the record of a sweep, or of an older version; use another --output-dir"
        )
    if begun_with != digest:
        raise UserError(
            f"{path}: this sweep was begun with other arguments behind --; use another --output-dir"
        )
    return digest


def remember(root: Path, shared: Sequence[str]) -> None:
    """Keep what all runs share, to know it again."""
    record = {"arguments": known(root, shared)}
    root.mkdir(parents=True, exist_ok=True)
    atomic_write_text(root / "sweep.json", json_text(record))


@dataclass(frozen=True)
class Asked:
    """A command line that was found right."""

    sweep: Sweep
    members: Sequence[Member]
    shared: Sequence[str]
    """Arguments of every run."""

    @property
    def root(self) -> Path:
        return Path(expanded(self.sweep.output_dir, "--output-dir"))


def asked(arguments: Sequence[str]) -> Asked:
    """Read a command line. UserError for what can be known to be wrong before anything starts."""
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    sweep, shared = parsed("sweep.py", Sweep, arguments[:cut]), arguments[cut + 1 :]
    found = Asked(sweep, members_of(sweep), shared)
    check(found.members, shared)
    known(found.root, shared)
    return found


if __name__ == "__main__":  # help, and what is wrong, need none of the slow imports
    if refused := exit_code(lambda: asked(sys.argv[1:])):
        sys.exit(refused)

from rich.console import Console

from finetuning.common.formatting import UNKNOWN, shown
from finetuning.runs.comparison import rich_tables, told
from finetuning.runs.recorded import RecordedRun, find_runs, read_recorded

process.imports_are_done()

POLL_SECONDS = 0.2
# Two-sided 95% quantiles of Student's t by degrees of freedom; above, the normal one.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
COLUMNS = {
    "held-out loss": "Eval/Loss",
    "KL, held out": "Forgetting/KL_Held_Out",
    "KL, general text": "Forgetting/KL_General",
    "general loss": "Forgetting/General_Loss",
    "exact answers": "Eval/Exact_Answer",
}


# -----------------------------------------------------------------------------
# Running


def recorded(member: Member) -> RecordedRun | None:
    """Its newest run; None where there is none yet."""
    if not (member.folder / "training_logs").is_dir():
        return None
    try:
        return read_recorded(find_runs([member.folder])[-1])
    except UserError:
        return None  # broken off before its first number


def is_over(member: Member) -> bool:
    """Whether it has come to its end."""
    run = recorded(member)
    return run is not None and run.is_over


class Pool:
    """Runs side by side, each a process of the training program; their output goes into their folders."""

    def __init__(self, jobs: int, gpus: Sequence[str]) -> None:
        self._jobs, self._gpus = jobs, gpus
        self._running: dict[subprocess.Popen, tuple[Member, str]] = {}

    def run(self, members: Sequence[Member], shared: Sequence[str]) -> list[Member]:
        """Run all; those that failed. A signal ends the runs, which save, and then the sweep."""
        waiting, failed = list(members), []
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._jobs:
                    self._start(waiting.pop(0), shared)
                time.sleep(POLL_SECONDS)
                failed += self._ended(len(waiting))
        finally:
            for process in self._running:
                process.terminate()
            for process in self._running:
                process.wait()
            signal.signal(signal.SIGTERM, before)
        return failed

    def _start(self, member: Member, shared: Sequence[str]) -> None:
        used = [gpu for _, gpu in self._running.values()]
        gpu = min(self._gpus, key=used.count) if self._gpus else ""
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        member.folder.mkdir(parents=True, exist_ok=True)
        with open(member.folder / "sweep.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *member.arguments(shared)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self._running[process] = member, gpu
        _say(f"{member.folder.name}: started; its output: {member.folder / 'sweep.log'}")

    def _ended(self, waiting: int) -> list[Member]:
        """Take out the runs that are over; those of them that failed."""
        failed = []
        for done in [p for p in self._running if p.poll() is not None]:
            member, _ = self._running.pop(done)
            good = done.returncode == 0
            said = "done" if good else f"failed with code {done.returncode}: {_last_line(member)}"
            left = f"{waiting + len(self._running)} left"
            _say(f"{member.folder.name}: {said} ({left})")
            failed += [] if good else [member]
        return failed


def _say(text: str) -> None:
    print(language.translated(text), file=sys.stderr, flush=True)


def _last_line(member: Member) -> str:
    lines = (member.folder / "sweep.log").read_text(encoding="utf-8", errors="replace").split("\n")
    return clean_line(next((line for line in reversed(lines) if line.strip()), ""), 200)


# -----------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Row:
    """A combination: the numbers of its seeds, one list a column; errors: of the held-out losses."""

    settings: Mapping[str, str]
    numbers: Mapping[str, Sequence[float]]
    seconds: Sequence[float]
    errors: Sequence[float] = ()

    def mean(self, column: str = "held-out loss") -> float:
        found = self.numbers[column]
        return statistics.fmean(found) if found else math.nan

    def half_interval(self, column: str = "held-out loss") -> float:
        """Half of the 95% interval of the mean over seeds (Student); NaN for one seed."""
        found = self.numbers[column]
        if len(found) < 2:
            return math.nan
        quantile = STUDENT.get(len(found) - 1, 1.96)
        return quantile * statistics.stdev(found) / math.sqrt(len(found))

    def text(self, column: str) -> str:
        if not self.numbers[column]:
            return UNKNOWN
        half = self.half_interval(column)
        return shown(self.mean(column)) + (f" ± {shown(half)}" if math.isfinite(half) else "")


def rows_of(members: Sequence[Member]) -> list[Row]:
    """What the finished runs have come to, the lowest held-out loss first."""
    found: dict[tuple[str, ...], Row] = {}
    for member in members:
        key = tuple(member.settings.values())
        empty = Row(member.settings, {column: () for column in COLUMNS}, ())
        row, run = found.setdefault(key, empty), recorded(member)
        if run is None or not run.is_over:
            continue
        numbers = {
            column: (*values, value)
            if (value := run.last(COLUMNS[column])) is not None and math.isfinite(value)
            else tuple(values)
            for column, values in row.numbers.items()
        }
        error = run.last("Eval/Loss_Error")
        errors = row.errors if error is None else (*row.errors, error)
        seconds = (*row.seconds, run.seconds)
        found[key] = replace(row, numbers=numbers, seconds=seconds, errors=errors)
    return sorted(found.values(), key=lambda row: (math.isnan(row.mean()), row.mean()))


def verdict(rows: Sequence[Row]) -> str:
    """The winner, and whether the runner-up could as well be it."""
    known = [row for row in rows if math.isfinite(row.mean())]
    if not known:
        return "no run has a held-out loss yet"
    best = known[0]
    named = " ".join(f"--{name} {value}" for name, value in best.settings.items())
    text = f"lowest held-out loss: {named}, {best.text('held-out loss')}"
    if math.isnan(best.half_interval()):
        error = f" ± {shown(2 * best.errors[0])} over the held-out samples" if best.errors else ""
        return f"{text}{error}. Only --seeds 1 2 3 tell whether another order would choose it, too"
    near = [row for row in known[1:] if row.mean() - _reach(row) <= best.mean() + _reach(best)]
    return f"{text}; {len(near)} others are not told apart from it by these seeds"


def _reach(row: Row) -> float:
    half = row.half_interval()
    return half if math.isfinite(half) else 0.0


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The table for programs."""
    return {
        "rows": [
            {
                "settings": dict(row.settings),
                "seeds": len(row.seconds),
                **{
                    column: {"mean": row.mean(column), "half_interval": row.half_interval(column)}
                    for column in COLUMNS
                    if row.numbers[column]
                },
            }
            for row in rows
        ],
        "verdict": verdict(rows),
    }


def show(rows: Sequence[Row]) -> None:
    """The table on the terminal, a column a combination."""
    names = [" ".join(f"{k}={v}" for k, v in row.settings.items()) for row in rows]
    table = [("seeds", [str(len(row.seconds)) for row in rows])]
    for column in COLUMNS:
        if any(row.numbers[column] for row in rows):
            table.append((column, [row.text(column) for row in rows]))
    seconds = [statistics.fmean(row.seconds) if row.seconds else None for row in rows]
    table.append(("seconds of training", [shown(value) for value in seconds]))
    console = Console(highlight=False)
    title = "Sweep, the lowest held-out loss first"
    for part in rich_tables(title, names, told(table), console.width):
        console.print(part)
    console.print(language.translated(verdict(rows)), markup=False)


# -----------------------------------------------------------------------------
# Command line


def main(arguments: Sequence[str]) -> None:
    """Run what is missing, then compare. Raises RunStopped where a run has failed."""
    command = asked(arguments)
    sweep, members, shared = command.sweep, command.members, command.shared
    remember(command.root, shared)
    missing = [member for member in members if not is_over(member)]
    failed = Pool(sweep.jobs or len(sweep.gpus) or 1, sweep.gpus).run(missing, shared)
    rows = rows_of(members)
    if sweep.json:
        print(json.dumps(as_json(rows), ensure_ascii=False).replace("NaN", "null"))
    else:
        show(rows)
    if failed:
        raise RunStopped(f"{len(failed)} of {len(members)} runs failed; their sweep.log says why")


if __name__ == "__main__":
    process.exit_process(exit_code(lambda: main(sys.argv[1:])))
