"""Plant small bugs, one at a time, and count how many the tests see.

uv run python -m tests.mutation                    # twenty bugs in the lines that differ from main
uv run python -m tests.mutation --since HEAD~3     # in the lines changed since then
uv run python -m tests.mutation --room model events --count 50
uv run python -m tests.mutation --list bugs.json   # bugs that somebody wrote: id, file, old, new, breaks

The same seed plants the same bugs. The table is by room; what no test saw is printed with its place, and is
either an assertion that is missing or a change that no user could notice.
"""

import argparse
import json
import multiprocessing
import random
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.mutation.bugs import Bug, bugs_of, bugs_of_list, sources
from tests.mutation.trial import Copy, Verdict, load_libraries, stages_for

ROOT = Path(__file__).parents[2]


def main() -> None:
    options = _parser().parse_args()
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in _program_files()}
    bugs = _chosen(options, texts)
    if not bugs:
        raise SystemExit(
            "no line of the program has changed there; --room or --since chooses others"
        )
    load_libraries()
    verdicts = []
    for verdict in _tried(bugs, options):
        verdicts.append(verdict)
        word = "killed  " if verdict.killed else "SURVIVED"
        print(
            f"{word} {verdict.seconds:4.0f} s  {verdict.bug.shown(texts[verdict.bug.path])}",
            flush=True,
        )
        if verdict.killed:
            print(f"    {verdict.seen_by[:150]}", flush=True)
        if options.results:
            _append(options.results, verdict)
    print(_table(verdicts))


def _parser() -> argparse.ArgumentParser:
    shown_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown_as_written)
    add = parser.add_argument
    add("--since", default="main", help="a commit: the lines that differ from it")
    add("--room", nargs="+", default=[], help="whole rooms instead; root: the programs")
    add("--list", type=Path, help="a file of bugs that somebody wrote, instead")
    add("--only", nargs="+", default=[], help="ids of the list")
    add("--count", type=int, default=20, help="how many bugs are planted")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=2, help="bugs that are tried at a time")
    add("--limit", type=float, default=600, help="seconds after which the tests count as failed")
    add("--thorough", action="store_true", help="also the slow tests of other rooms")
    add("--results", type=Path, help="a file to which each verdict is appended as JSON")
    return parser


def _program_files() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return sources(ROOT, listed.splitlines())


def _room(path: str) -> str:
    parts = Path(path).parts
    return "root" if len(parts) == 1 else parts[1].removesuffix(".py")


def _chosen(options: argparse.Namespace, texts: dict[str, str]) -> list[Bug]:
    if options.list:
        entries = json.loads(options.list.read_text(encoding="utf-8"))
        return list(
            bugs_of_list([e for e in entries if not options.only or e["id"] in options.only], texts)
        )
    from finetuning.config import DirectTrainingConfig
    from tests.mutation.bugs import defaults_of_settings

    settings = defaults_of_settings(DirectTrainingConfig)
    if options.room:
        lines = {path: range(10**6) for path in texts if _room(path) in options.room}
    else:
        lines = _changed_lines(options.since)
    found = [
        bug
        for path in sorted(lines)
        if path in texts
        for bug in bugs_of(path, texts[path], settings)
        if bug.line in lines[path]
    ]
    return _sample(found, options.count, options.seed)


def _sample(found: Sequence[Bug], count: int, seed: int) -> list[Bug]:
    """As many bugs of each kind as the count allows, so that the many constants are not all."""
    drawn = random.Random(seed)
    kinds: dict[str, list[Bug]] = defaultdict(list)
    for bug in found:
        kinds[bug.kind].append(bug)
    for bugs in kinds.values():
        drawn.shuffle(bugs)
    order = sorted(kinds)
    drawn.shuffle(order)
    chosen: list[Bug] = []
    while len(chosen) < min(count, len(found)):
        for kind in order:
            if kinds[kind] and len(chosen) < count:
                chosen.append(kinds[kind].pop())
    return chosen


def _changed_lines(since: str) -> dict[str, set[int]]:
    """The numbers of the lines that are new or changed since a commit, the working tree included."""
    command = ["git", "diff", "--unified=0", "--no-color", "--no-ext-diff", since, "--", "*.py"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    lines: dict[str, set[int]] = defaultdict(set)
    path = ""
    for line in text.splitlines():
        if line.startswith("+++ "):
            path = line.removeprefix("+++ ").removeprefix("b/")
        elif place := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, number = int(place[1]), int(place[2] or 1)
            lines[path] |= set(range(first, first + number))
    return lines


def _tried(bugs: Sequence[Bug], options: argparse.Namespace) -> Iterator[Verdict]:
    """The verdicts as they come, from `jobs` copies of the repository."""
    forked = multiprocessing.get_context("fork")
    waiting, done = forked.SimpleQueue(), forked.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        workers = [
            forked.Process(
                target=_work, args=(Path(place) / f"copy{number}", bugs, waiting, done, options)
            )
            for number in range(min(options.jobs, len(bugs)))
        ]
        for worker in workers:
            worker.start()
        for number in [*range(len(bugs)), *[None] * len(workers)]:
            waiting.put(number)
        for _ in bugs:
            answer = done.get()
            if isinstance(answer, Exception):
                for worker in workers:
                    worker.terminate()
                raise answer
            yield answer
        for worker in workers:
            worker.join()


def _work(place: Path, bugs: Sequence[Bug], waiting, done, options: argparse.Namespace) -> None:
    try:
        copy = Copy(ROOT, place)
        while (number := waiting.get()) is not None:
            stages = stages_for(bugs[number].path, copy.tests(), thorough=options.thorough)
            done.put(copy.try_bug(bugs[number], stages, options.limit))
    except Exception as error:  # told by the process that waits for it
        done.put(error)


def _append(file: Path, verdict: Verdict) -> None:
    bug = verdict.bug
    row = {
        "place": f"{bug.path}:{bug.line}",
        "kind": bug.kind,
        "new": bug.new,
        "killed": verdict.killed,
    }
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row | {"seen_by": verdict.seen_by}, ensure_ascii=False) + "\n")


def _table(verdicts: Sequence[Verdict]) -> str:
    rooms: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        rooms[_room(verdict.bug.path)].append(verdict.killed)
    rooms["all"] = [verdict.killed for verdict in verdicts]
    rows = [
        f"{room:12} {len(killed):7} {sum(killed):7} {100 * sum(killed) / len(killed):6.0f}%"
        for room, killed in rooms.items()
    ]
    return "\n".join([f"{'room':12} planted  killed  score", *rows])


if __name__ == "__main__":
    main()
