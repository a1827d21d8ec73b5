"""Runs rows of the scorecard, their mutants, and writes docs/reliability.md.

The last line on standard output is JSON: tried, survived, lost, void.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

from . import hook, report
from .tally import SuiteError

MODULES = ("checkpoints", "interruptions", "numbers", "disks", "machine", "hostile", "peers")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every row with full counts")
    parser.add_argument("--quick", action="store_true", help="the rows for CI, small counts")
    parser.add_argument("--only", default="", help="rows, e.g. F01,F06")
    parser.add_argument("--counts", default="", help="counts of rows, e.g. F01=20,F10=50")
    parser.add_argument("--no-mutants", action="store_true", help="leave the mutants out")
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


def warm_up(rig) -> None:
    """Import in this process, once, what a run imports on its way; none of its code runs here."""
    from .rig import fork

    names = rig.root / "modules.txt"

    def collect() -> int:
        import direct_finetuning_with_existing_modules as program

        code = program.main(rig.arguments(rig.root / "warm" / "out", "--max-steps", "1"))
        names.write_text("\n".join(sys.modules))
        return code

    outcome = fork(rig.root / "warm.txt", collect).wait(300)
    if outcome.code:
        raise SystemExit(f"a plain run of the program fails here:\n{outcome.output[-3000:]}")
    for name in names.read_text().split("\n"):
        if name not in sys.modules and not name.startswith(("tests", "benchmarks")):
            try:
                importlib.import_module(name)
            except Exception:  # made at run time, or only importable on the way
                continue
    from finetuning.analysis import crypto_terms

    crypto_terms.load_terms()


def run_row(rig, row, count: int, with_mutants: bool):
    """The row's tally, its mutants included."""
    from .rig import fork
    from .tally import Tally

    tally, began = Tally(row.id), time.monotonic()
    row.run(rig, tally, count)
    for name, mutate in row.mutants.items() if with_mutants else ():
        place = rig.place("mutant")

        def mutant(mutate=mutate, place=place) -> None:
            mutate()
            result = Tally(row.id)
            row.run(rig, result, row.mutant_count)
            result.write(place / "tally.json")

        outcome = fork(place / "console.txt", mutant).wait(900)
        if outcome.code:
            tally.faults.append(f"mutant {name}: its test did not run\n{outcome.output[-1500:]}")
            tally.mutants[name] = False
        else:
            tally.mutants[name] = Tally.read(place / "tally.json").lost > 0
    tally.seconds = time.monotonic() - began
    return tally


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
        if (only and row.id not in only) or (options.quick and not only and not row.in_quick):
            continue
        default = row.quick if options.quick else row.full
        found.append((row, int(counts.get(row.id, default))))
    return found


def merge(options: argparse.Namespace) -> int:
    """One table of several runs, each with rows of its own."""
    from .tally import Tally

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
    from .rig import Rig

    try:
        rows = chosen_rows(options)
        rig = Rig(work / "rig")
        began = time.monotonic()
        warm_up(rig)
        rig.make_reference()
        print(
            f"ready in {time.monotonic() - began:.0f} s; a run takes {rig.reference.seconds:.1f} s",
            flush=True,
        )
        tallies = []
        for row, count in rows:
            tally = run_row(rig, row, count, not options.no_mutants)
            tallies.append(tally)
            print(report.line(row, tally), flush=True)
            for fault in tally.faults[:8]:
                print(f"    {fault}", flush=True)
            if options.json:  # after every row, so that a long run leaves something when it is cut
                Path(options.json).write_text(report.as_json(tallies))
        totals = report.totals(tallies)
        if options.report:
            write_report(options, tallies)
    except SuiteError:
        traceback.print_exc()
        print("the suite itself is broken: nothing is counted", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(totals), flush=True)
    clean = not totals["lost"] and not totals["void"]
    return 0 if clean and all(all(t.mutants.values()) for t in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
