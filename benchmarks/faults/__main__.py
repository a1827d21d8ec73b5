"""Runs rows of the scorecard, their mutants, and writes docs/reliability.md.

The last line on standard output is JSON: tried, survived, lost, void. Exit code 1: something was lost
or void, or a mutant not caught; 2: the suite itself is broken.
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from . import hook, report
from .tally import Caught, SuiteError, Tally

HANGS = 3600.0  # seconds after which a row is given up
MODULES = (
    *("checkpoints", "interruptions", "numbers", "disks", "machine", "hostile", "peers"),
    *("bounds", "actions", "caches", "waiting"),
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every row with full counts")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="every row and every kind of trial; positions are drawn",
    )
    parser.add_argument("--only", default="", help="rows, e.g. F01,F06")
    parser.add_argument("--counts", default="", help="counts of rows, e.g. F01=20,F10=50")
    parser.add_argument("--no-mutants", action="store_true", help="leave the mutants out")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="rows and mutants at once"
    )
    parser.add_argument("--json", default="", help="write every row's numbers here")
    parser.add_argument(
        "--report", default="", help="write the table here; --all: docs/reliability.md"
    )
    parser.add_argument(
        "--peer", default="", help="last line of benchmarks.faults.faults_hf_trainer, a column"
    )
    parser.add_argument(
        "--merge", nargs="*", default=[], help="no run: a table of these JSON files"
    )
    options = parser.parse_args()
    if not (options.all or options.quick or options.only or options.merge):
        parser.error("say --all, --quick, --only or --merge")
    if options.merge and not options.report:
        parser.error("--merge needs --report")
    if options.all and not options.report:
        options.report = str(Path(__file__).parents[2] / "docs" / "reliability.md")
    return options


def write_report(options: argparse.Namespace, tallies: list) -> None:
    """The table as Markdown, with the options that decided what was tried."""
    chosen = [f"--{name}" for name in ("all", "quick") if getattr(options, name)] or ["--all"]
    chosen += [f"--{k} {v}" for k in ("only", "counts") if (v := getattr(options, k))]
    peer = json.loads(Path(options.peer).read_text()) if options.peer else {}
    rows = {row.id: row for row in all_rows()}
    text = report.markdown(
        [rows[t.row] for t in tallies], tallies, " ".join(chosen), peer, len(options.merge)
    )
    Path(options.report).write_text(text, encoding="utf-8")


def make_rig(work: Path, rows: list):
    """Model, data, reference and what else these rows need, by the program as it is."""
    from .rig import Rig

    began = time.monotonic()
    work.chmod(0o755)  # one trial is somebody else's
    rig = Rig(work / "rig")
    rig.make_reference()
    for make in dict.fromkeys(make for row in rows for make in row.needs):
        make(rig)
    print(
        f"ready in {time.monotonic() - began:.0f} s; "
        f"a run takes {rig.cpu_seconds:.1f} s of processor time",
        flush=True,
    )
    return rig


class Job:
    """One row, or one mutant of a row, in a process of its own."""

    def __init__(self, rig, row, count: int, mutant: str = "") -> None:
        from .rig import fork

        self.row, self.mutant = row, mutant
        self._result = rig.place(f"job-{row.id}") / "tally.json"
        self._began = time.monotonic()

        def action() -> None:
            tally = Tally(row.id, ends_at_a_loss=bool(mutant))
            if mutant:
                row.mutants[mutant]()
            with contextlib.suppress(Caught):
                row.run(rig, tally, row.mutant_count if mutant else count)
            tally.write(self._result)

        self._child = fork(self._result.with_name("console.txt"), action)

    def running(self) -> bool:
        """Whether it has not come to its end."""
        return self._child.running()

    def result(self) -> Tally:
        """What it found. Raises SuiteError where it found nothing."""
        outcome = self._child.wait()
        if outcome.code:
            name = f"{self.row.id} {self.mutant}".strip()
            raise SuiteError(f"{name}: exit {outcome.code}\n{outcome.output[-3000:]}")
        tally = Tally.read(self._result)
        if not tally.tried and not tally.skipped:
            raise SuiteError(f"{self.row.id}: no trial was made")
        tally.seconds = time.monotonic() - self._began
        tally.cpu_seconds = outcome.cpu_seconds
        return tally

    def end(self) -> None:
        """Give it up."""
        self._child.kill(signal.SIGKILL)


def run_all(rig, chosen: list, options: argparse.Namespace) -> list[Tally]:
    """Every row and every mutant, so many at once; rows in the order of the scorecard."""
    from .rig import wait_until

    waiting = [(row, count, "") for row, count in chosen]
    if not options.no_mutants:
        waiting += [(row, 0, name) for row, _ in chosen for name in row.mutants]
    running: list[Job] = []
    done: dict[str, Tally] = {}
    caught: dict[str, dict[str, Tally]] = {row.id: {} for row, _ in chosen}
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                row, count, mutant = waiting.pop(0)
                running.append(Job(rig, row, count, mutant))
            wait_until(lambda: not all(job.running() for job in running), HANGS)
            for job in [job for job in running if not job.running()] or running:
                running.remove(job)
                of_row = caught[job.row.id] if job.mutant else done
                of_row[job.mutant or job.row.id] = job.result()
                if not job.mutant:
                    print(report.line(job.row, done[job.row.id]), flush=True)
            if options.json:  # so that a long run leaves something when it is cut
                Path(options.json).write_text(report.as_json(_joined(chosen, done, caught)))
    finally:
        for job in running:
            job.end()
    tallies = _joined(chosen, done, caught)
    for tally in tallies:
        print(report.mutants(tally), end="", flush=True)
    return tallies


def _joined(chosen: list, done: dict, caught: dict) -> list[Tally]:
    """The rows' tallies with their mutants."""
    for row, tally in done.items():
        for name, result in caught[row].items():
            tally.mutants[name] = result.faults[-1] if result.lost else ""
        tally.seconds += sum(result.seconds for result in caught[row].values())
        tally.cpu_seconds += sum(result.cpu_seconds for result in caught[row].values())
        caught[row] = {}
    return [done[row.id] for row, _ in chosen if row.id in done]


def chosen_rows(options: argparse.Namespace) -> list:
    """(row, count) in the order of the scorecard."""
    rows = all_rows()
    only = set(filter(None, options.only.split(",")))
    counts = dict(item.partition("=")[::2] for item in filter(None, options.counts.split(",")))
    unknown = (only | set(counts)) - {row.id for row in rows}
    if unknown:
        raise SystemExit(f"no such row: {', '.join(sorted(unknown))}")
    if not all(map(str.isdigit, counts.values())):
        raise SystemExit(
            f"--counts {options.counts}: give a number to each row, e.g. F01=20,F10=50"
        )
    found = []
    for row in sorted(rows, key=lambda row: row.id):
        if only and row.id not in only:
            continue
        default = row.quick if options.quick else row.full
        found.append((row, int(counts.get(row.id, default))))
    return found


def merge(options: argparse.Namespace) -> int:
    """One table of several runs, each with rows of its own."""
    tallies = [
        Tally(**item) for path in options.merge for item in json.loads(Path(path).read_text())
    ]
    tallies.sort(key=lambda tally: tally.row)
    write_report(options, tallies)
    print(json.dumps(report.totals(tallies)))
    return 0


def all_rows() -> list:
    """Every row of the scorecard."""
    return [
        row for name in MODULES for row in importlib.import_module(f"benchmarks.faults.{name}").ROWS
    ]


def main() -> int:
    """0 when nothing was lost, nothing void and every mutant was caught; 2 for an error of the suite."""
    options = arguments()
    if options.merge:
        return merge(options)
    if "FAULTS_WORK" not in os.environ:
        hook.restart(["-m", "benchmarks.faults", *sys.argv[1:]])
    work = Path(os.environ["FAULTS_WORK"])
    try:
        chosen = chosen_rows(options)
        tallies = run_all(make_rig(work, [row for row, _ in chosen]), chosen, options)
        if options.report:
            write_report(options, tallies)
    except SuiteError:
        traceback.print_exc()
        print("the suite itself is broken: nothing is counted", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(report.totals(tallies)), flush=True)
    return 0 if all(map(report.is_clean, tallies)) else 1


if __name__ == "__main__":
    sys.exit(main())
