"""What only a GPU can show, in one command that fits a few minutes of one; the most valuable first.

    python -m scripts.gpu_check --out DIR --budget 300             # as much as fits
    python -m scripts.gpu_check --out DIR --only facts step        # by the beginning of names
    python -m scripts.gpu_check --out DIR --small --device cpu     # tries this script, without a GPU
    python -m scripts.gpu_check --keep DIR/result.json             # into benchmarks/results/

Every phase (`gpu_commands.py`) is a process of its own with a limit of its own; one that fails or hangs
costs itself only. All share one compile cache. `result.json` is written anew after each phase, so that
whatever ends the command leaves what was known. At the end the figures are compared with the last ones
kept for the same kind of GPU, what got worse is named, and what they say about the goals. Besides
result.json there are log.txt, the profiles and the runs' metrics.jsonl.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from scripts.gpu_commands import AT_ONCE_GIB, ROOT, Phase, Phases
from scripts.gpu_figures import (
    figures,
    gpu_name,
    keep,
    kept_figures,
    verdicts,
    without_rates,
    worse,
)

LAST_LINES = 15  # of each stream that are kept of what failed


# -----------------------------------------------------------------------------
# Running


class Check:
    """Runs phases one after the other and keeps the record."""

    def __init__(self, out: Path, work: Path, budget: float, commit: str = "") -> None:
        self.out, self.work, self.start, self.budget = out, work, time.monotonic(), budget
        self.what = {
            "gpu": gpu_name(),
            "commit": commit,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        self.phases: dict[str, dict] = {}
        self._writing = threading.Lock()
        for directory in (out, work):
            directory.mkdir(parents=True, exist_ok=True)

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.start

    def run(self, phase: Phase) -> None:
        """One phase, if time is left for it."""
        limit = min(phase.limit, self.budget - self.seconds() - 3)
        if limit < phase.needs:
            self.note(phase.name, f"left out: {limit:.0f} s left of the {phase.needs:.0f} it needs")
            return
        if phase.anew:
            shutil.rmtree(phase.anew, ignore_errors=True)
        begun, began = self.seconds(), time.time()
        verdict, said, wrong = self._process(phase.command, limit)
        facts: dict = {}
        try:
            facts = phase.read(said, began)
            facts = without_rates(facts) if phase.gib else facts
        except (ValueError, KeyError, IndexError, OSError, AssertionError) as error:
            if verdict == "ok":  # else it may have left nothing to read
                verdict = f"unreadable: {type(error).__name__}: {error}"[:300]
        fault = facts.pop("fault", "")
        if verdict == "ok" and fault:
            verdict = f"failed: {fault}"[:300]
        if verdict != "ok":
            streams = {"stdout": said, "stderr": wrong}
            facts["last_lines"] = {name: last_lines(text) for name, text in streams.items()}
        self.note(phase.name, verdict, took=round(self.seconds() - begun, 1), **facts)

    def run_all(self, phases: Sequence[Phase]) -> None:
        """One after the other; those that may be beside each other at once."""
        for group in groups(phases):
            with ThreadPoolExecutor(len(group)) as threads:
                list(threads.map(self.run, group))

    def _process(self, command: Sequence[str], limit: float) -> tuple[str, str, str]:
        """(verdict, stdout, stderr); a command that hangs is ended with everything that it started."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        try:
            said, wrong = process.communicate(timeout=limit)
            code = process.returncode
            verdict = f"exit code {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            started = psutil.Process(process.pid)
            for one in (*started.children(recursive=True), started):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
                    one.kill()
            said, wrong = process.communicate()
            verdict = f"not done within {limit:.0f} s"
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(
                f"\n===== {' '.join(command)}\n{said[-60_000:]}\n--- stderr\n{wrong[-30_000:]}\n"
            )
        return verdict, said, wrong

    def _environment(self) -> dict[str, str]:
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo"),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }

    def note(self, name: str, verdict: str, **facts: object) -> None:
        """Into the record, and onto the terminal."""
        with self._writing:
            self.phases[name] = {"verdict": verdict, **facts}
            print(f"[{self.seconds():6.1f} s] {name}: {verdict}", flush=True)
            self.write()

    def write(self, **more: object) -> None:
        """result.json, whole or not at all."""
        record = {
            **self.what,
            "versions": self.phases.get("facts", {}).get("versions"),
            "seconds": round(self.seconds(), 1),
            "figures": figures(self.phases),
            **more,
            "phases": self.phases,
        }
        part = self.out / "result.json.part"
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        part.replace(self.out / "result.json")


def groups(phases: Sequence[Phase]) -> list[list[Phase]]:
    """What runs at once: neighbours that may, as long as a card has room for what they plan."""
    found: list[list[Phase]] = []
    for phase in phases:
        beside = found[-1] if found and phase.gib and found[-1][-1].gib else None
        if beside and sum(one.gib for one in beside) + phase.gib <= AT_ONCE_GIB:
            beside.append(phase)
        else:
            found.append([phase])
    return found


def last_lines(text: str) -> list[str]:
    """Without empty ones."""
    return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]


# -----------------------------------------------------------------------------
# The program


def conclude(check: Check) -> None:
    """Print the figures, beside the last ones kept, name what got worse, and what is known of the goals."""
    now, before = figures(check.phases), kept_figures(check.what["gpu"])
    lines, slower = verdicts(check.phases), worse(now, before)
    check.write(worse=slower, verdicts=lines)
    for place, value in now.items():
        was = f" (was {before[place]:.6g})" if place in before else ""
        print(f"{place} = {value:.6g}{was}")
    print(*lines, "worse than the last kept: " + ("; ".join(slower) or "nothing"), sep="\n")


def commit_of_the_tree() -> str:
    """What is checked out; empty outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_check"))
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a model of thousands of weights")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="names of phases, beginnings of them or patterns"
    )
    parser.add_argument("--commit", default="", help="where the tree is no repository")
    parser.add_argument("--keep", type=Path, help="a result.json whose figures are to be kept")
    arguments = parser.parse_args()
    if arguments.keep:
        keep(arguments.keep)
        return
    if arguments.out is None:
        parser.error("--out is where the results go")
    all_phases = Phases(arguments.work, arguments.out, arguments.device, arguments.small)
    try:
        phases = all_phases.chosen(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    commit = arguments.commit or commit_of_the_tree()
    check = Check(arguments.out, arguments.work, arguments.budget, commit)
    check.run_all(phases)
    conclude(check)


if __name__ == "__main__":
    main()
