"""What only a GPU can show, in one command that fits a few minutes of one; the most valuable first.

    python -m scripts.gpu_check --out DIR --budget 300             # as much as fits
    python -m scripts.gpu_check --out DIR --only facts "step*"     # by name
    python -m scripts.gpu_check --out DIR --small --device cpu     # tries this script, without a GPU
    python -m scripts.gpu_check --keep DIR/result.json             # into benchmarks/results/

Every phase is a process of its own with a limit of its own; one that fails or hangs costs itself only.
All share one compile cache. `result.json` is written anew after each phase, so that whatever ends the
command leaves what was known. At the end the figures are compared with the last ones kept for the same
kind of GPU, and what got worse is named. Besides result.json there are log.txt, the profiles and the
run's metrics.jsonl.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUNDLED = ROOT / "data" / "raw"
PYTHON = (sys.executable, "-u")
# Figures that are compared, by the end of their name, and whether more is better.
FIGURES = {
    "tokens_per_second": True,
    "matmul_tflops": True,
    "copy_tb_s": True,
    "step_ms": False,
    "host_ms": False,
    "gpu_busy_ms": False,
    "kernels": False,
    "peak_gib": False,
    "error": False,
}
AT_ONCE = 6  # processes that may be beside each other
# A program whose main thread is looked at twice a second, into the file that is its first argument. The one
# who looks holds the interpreter's lock: faulthandler's own thread does not, and ended the program.
WATCHED = """
import runpy, sys, threading, time, traceback

main, start, path = threading.get_ident(), time.monotonic(), sys.argv[1]

def watch():
    with open(path, "w") as seen:
        while True:
            stack = "".join(traceback.format_stack(sys._current_frames()[main]))
            print(f"--- {time.monotonic() - start:.1f} s", stack, sep="\\n", file=seen, flush=True)
            time.sleep(0.5)

threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TOLERANCE = 0.03  # of a figure; two runs on one machine differ by less


@dataclass(frozen=True)
class Phase:
    """One process.

    Args:
        limit: seconds after which it is ended.
        needs: seconds without which it is not begun.
        read: its output, and when it began, -> facts; what raises here is a failure of the phase.
        beside: it asks what is right and how much memory it takes: its neighbours in the list run at the
            same time, and no rate of it is kept.
    """

    name: str
    command: Sequence[str]
    limit: float
    needs: float
    read: Callable[[str, float], dict]
    beside: bool = False


def last_json(said: str, _: float = 0) -> dict:
    """The last line that is an object."""
    return json.loads([line for line in said.splitlines() if line.startswith("{")][-1])


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
        limit, began = min(phase.limit, self.budget - self.seconds() - 3), time.time()
        if limit < phase.needs:
            self.note(phase.name, f"left out: {limit:.0f} s left of the {phase.needs:.0f} it needs")
            return
        begun = self.seconds()
        verdict, said, wrong = self._process(phase.command, limit)
        facts: dict = {}
        try:
            facts = phase.read(said, began) if verdict == "ok" else {}
            facts = without_rates(facts) if phase.beside else facts
        except (ValueError, KeyError, IndexError, OSError, AssertionError) as error:
            verdict = f"unreadable: {type(error).__name__}: {error}"[:300]
        if verdict != "ok":
            facts["last_lines"] = [li for li in (wrong or said).splitlines() if li.strip()][-12:]
        self.note(phase.name, verdict, took=round(self.seconds() - begun, 1), **facts)

    def run_all(self, phases: Sequence[Phase]) -> None:
        """One after the other; those that may be beside each other at once."""
        for beside, group in itertools.groupby(phases, key=lambda phase: phase.beside):
            with ThreadPoolExecutor(AT_ONCE if beside else 1) as threads:
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


# -----------------------------------------------------------------------------
# The phases


class Phases:
    """All of them, most valuable first."""

    def __init__(self, check: Check, device: str, small: bool) -> None:
        self.check, self.device, self.small = check, device, small

    def all(self) -> list[Phase]:
        """In this order."""
        return [
            self.own("model", "model", limit=90, needs=30),
            self.job("run 2048", limit=130, needs=60),
            self.job("run FP8 2048", "--precision", "fp8", limit=150, needs=50),
            self.watched(self.job("run again 2048", limit=100, needs=30)),
            self.own("answers", "answers", limit=90, needs=40),
            self.own("step 2048", "step", limit=100, needs=40),
            self.own("step FP8 2048", "step", "--fp8", limit=100, needs=40),
            self.bench("bench 2048", 2048, ["ours"], limit=80),
            self.own("step 8B", "step", "--shape", "8B", limit=100, needs=50),
            self.bench("bench 8192", 8192, ["ours"], limit=90),
            self.bench("bench FP8 2048", 2048, ["ours, FP8"], limit=80),
            self.bench("bench FP8 8192", 8192, ["ours, FP8"], limit=90),
            self.own("facts", "facts", limit=40, needs=12),
            self.own("step 2048 deterministic", "step", "--deterministic", limit=90, needs=45),
            self.own("attention", "attention", limit=60, needs=25),
            self.kernels(limit=90),
            self.own("step 8192", "step", "--row-tokens", "8192", limit=110, needs=60),
            self.job("run 8192", "--max-seq-length", "8192", limit=150, needs=70),
            self.job("run bundled 2048", "--data-path", str(BUNDLED), limit=100, needs=50),
            self.bench("bench 2048 without graph", 2048, ["ours, no graph"], limit=80),
            self.bench("bench 8192 without graph", 8192, ["ours, no graph"], limit=90),
            self.bench("peers 2048", 2048, ["HF Trainer + PEFT", "TRL + Liger"], limit=150),
            self.own("step 0.6B", "step", "--shape", "0.6B", limit=80, needs=40),
            *self.beside(),
        ]

    def beside(self) -> list[Phase]:
        """What fits beside each other: right or wrong, and how much memory."""
        rows = ((32768, 100), (65536, 150))
        small = ("--max-steps", "12")
        return [
            self.job(
                "run 4-bit", "--quantization", "4bit", *small, limit=120, needs=45, beside=True
            ),
            self.tests("tests", "not in_a_group and not all_weights", limit=150),
            self.job("run fsdp", "--parallel", "fsdp", *small, limit=120, needs=45, beside=True),
            *(
                replace(
                    self.own(f"row {n}", "long_row", "--row-tokens", str(n), limit=limit, needs=60),
                    beside=True,
                )
                for n, limit in rows
            ),
            self.tests("tests of runs", "in_a_group or all_weights", limit=240),
        ]

    def own(self, name: str, what: str, *more: str, limit: float, needs: float) -> Phase:
        """A phase of gpu_phases.py."""
        folders = ("--work", str(self.check.work), "--out", str(self.check.out))
        command = [*PYTHON, "-m", "scripts.gpu_phases", what, *folders, *more]
        return Phase(name, [*command, *["--small"] * self.small], limit, needs, last_json)

    def bench(self, name: str, row_tokens: int, sides: list[str], *, limit: float) -> Phase:
        """Sides of benchmarks/train_gpu.py."""
        size = ("512", "4") if self.small else (str(row_tokens), "34")
        command = [*PYTHON, "-m", "benchmarks.train_gpu", "--sides", *sides]
        command += ["--row-tokens", size[0], "--steps", size[1]]

        def read(said: str, _: float) -> dict:
            found = last_json(said)
            names = ("mfu_percent", "mfu_of_data_sheet_percent", "matmul_teraflops", "faults")
            return {"sides": found["sides"], **{n: found[n] for n in names}}

        return Phase(name, command, limit, 35, read)

    def kernels(self, *, limit: float) -> Phase:
        """Kernels side by side, benchmarks/gpu_kernels.py."""
        command = [*PYTHON, "-m", "benchmarks.gpu_kernels"]
        command += ["--small", "--device", self.device] if self.small else []
        return Phase("kernels", command, limit, 30, last_json)

    def job(self, name: str, *more: str, limit: float, needs: float, beside: bool = False) -> Phase:
        """The program itself from a fresh start; its speed after the warm-up."""
        folder = self.check.work / re.sub(r"\W+", "_", name)
        shutil.rmtree(folder, ignore_errors=True)
        options = {
            "--model-name": str(self.check.work / "model"),
            "--data-path": str(self.check.work / "documents.jsonl"),
            "--device": self.device,
            "--output-dir": str(folder),
            "--cache-dir": str(self.check.work / "cache"),
            "--eval-steps": "0",
            "--save-steps": "0",
            "--max-eval-samples": "4",
            "--num-probes": "0",
            "--logging-steps": "1" if self.small else "5",
            "--max-steps": "6" if self.small else "40",
            **dict(zip(more[::2], more[1::2], strict=True)),
        }
        pairs = [word for pair in options.items() for word in pair]
        program = str(ROOT / "direct_finetuning_with_existing_modules.py")
        command = [*PYTHON, program, *pairs]
        return Phase(name, command, limit, needs, partial(self.read_run, folder), beside)

    def watched(self, phase: Phase) -> Phase:
        """The same job, and a file that says where its start was at every second."""
        seen = str(self.check.out / f"stacks_{phase.name.replace(' ', '_')}.txt")
        program = phase.command[len(PYTHON) :]
        return replace(phase, command=[*PYTHON, "-c", WATCHED, seen, *program])

    def read_run(self, folder: Path, said: str, began: float) -> dict:
        """Rates by the run's own metrics, without the steps of the first third and the last one."""
        (lines,) = folder.glob("training_logs/*/metrics.jsonl")
        shutil.copy(lines, self.check.out / f"metrics_{folder.name}.jsonl")
        rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        held_out = {
            row["step"]: row["metrics"]["Eval/Loss"]
            for row in rows
            if "Eval/Loss" in row["metrics"]
        }
        first = next(row["time"] for row in rows if "Training/Loss" in row["metrics"])
        rows = [row for row in rows if row["metrics"].get("Throughput/Step_Seconds")]
        losses = {row["step"]: row["metrics"]["Training/Loss"] for row in rows}
        assert losses and all(loss is not None for loss in losses.values()), losses
        told = [line for line in said.splitlines() if line.startswith(("CUDA graph", "compiled"))]
        until = {"seconds_to_first_logged_step": first - began}
        return {**run_rates(rows), **until, "losses": losses, "held_out": held_out, "told": told}

    def tests(self, name: str, which: str, *, limit: float, needs: float = 60) -> Phase:
        """Those of test_cuda.py."""
        command = [*PYTHON, "-m", "pytest", "tests/runs/test_cuda.py", "-k", which, "-n", "8", "-v"]
        command += ["-p", "no:cacheprovider", "-rA", "--tb=short", "-m", "long or not long"]

        def read(said: str, _: float) -> dict:
            kinds = ("PASSED ", "FAILED ", "ERROR ", "SKIPPED ")
            return {
                "outcomes": [line[:200] for line in said.splitlines() if line.startswith(kinds)]
            }

        return Phase(name, command, limit, needs, read, beside=True)


def without_rates(facts: dict) -> dict:
    """The facts, and of the figures that are compared only memory."""
    return {
        name: without_rates(value) if isinstance(value, dict) else value
        for name, value in facts.items()
        if name not in FIGURES or name == "peak_gib"
    }


def run_rates(rows: list[dict]) -> dict:
    """Tokens a second between two logged steps: by the sum of the steps' times, and by the wall."""
    first, last = rows[len(rows) // 3], rows[-2] if len(rows) > 3 else rows[-1]
    seen = [row["metrics"]["Throughput/Tokens_Seen"] for row in (first, last)]
    between = [row for row in rows if first["step"] < row["step"] <= last["step"]]
    seconds, before = 0.0, first["step"]
    for row in between:
        seconds += row["metrics"]["Throughput/Step_Seconds"] * (row["step"] - before)
        before = row["step"]
    wall = last["time"] - first["time"]
    tags = ("Throughput/MFU_Percent", "Memory/GPU_Peak_MB", "Memory/GPU_Reserved_MB")
    tags += tuple(f"Throughput/Step_Seconds{part}" for part in ("", "_Data", "_Forward_Backward"))
    tags += ("Throughput/Step_Seconds_Optimizer", "Throughput/Step_Seconds_Logging")
    return {
        "steps": [first["step"], last["step"]],
        "tokens_per_second": (seen[1] - seen[0]) / seconds if seconds else None,
        "wall_tokens_per_second": (seen[1] - seen[0]) / wall if wall else None,
        "last": {tag: last["metrics"].get(tag) for tag in tags},
    }


# -----------------------------------------------------------------------------
# Comparing


def figures(record: dict, path: str = "") -> dict[str, float]:
    """`phase: place of the number` -> number, of those that are compared."""
    found: dict[str, float] = {}
    for name, value in record.items():
        place = f"{path}{': ' if path else ''}{name}"
        if isinstance(value, dict):
            found |= figures(value, place)
        elif name in FIGURES and isinstance(value, int | float):
            found[place] = value
    return found


def worse(now: dict[str, float], before: dict[str, float]) -> list[str]:
    """A line for every figure that is worse by more than the tolerance."""
    lines = []
    for place in sorted(now.keys() & before.keys()):
        name, old, new = place.rpartition(": ")[2], before[place], now[place]
        change = (new - old) / abs(old) if old else 0.0
        if (change < -TOLERANCE) if FIGURES[name] else (change > TOLERANCE):
            lines.append(f"{place}: {old:.4g} -> {new:.4g} ({change:+.1%})")
    return lines


def kept_file(gpu: str) -> Path:
    """Where the figures of such a GPU are kept: h100.json."""
    word = gpu.lower().replace("nvidia", "").split()[0] if gpu.strip() else "unknown"
    return RESULTS / f"{re.sub(r'[^a-z0-9]', '', word)}.json"


def gpu_name() -> str:
    """Of the first GPU, by the driver's own program, or "none"."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none"
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.splitlines() or ["none"])[0].strip()


def keep(path: Path) -> None:
    """Put a result's figures in the place of the last ones; what was not measured stays."""
    record = json.loads(path.read_text(encoding="utf-8"))
    target = kept_file(record["gpu"])
    kept = (
        json.loads(target.read_text(encoding="utf-8"))
        if target.exists()
        else {"figures": {}, "commits": {}}
    )
    kept["figures"] |= record["figures"]
    kept["commits"] |= dict.fromkeys(record["figures"], record["commit"])
    kept |= {name: record[name] for name in ("gpu", "versions", "date") if record[name]}
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(record['figures'])} figures of {record['gpu']} are now in {target}")


def conclude(check: Check) -> None:
    """Print the figures, beside the last ones kept, and name what got worse."""
    now, kept = figures(check.phases), kept_file(check.what["gpu"])
    before = json.loads(kept.read_text(encoding="utf-8"))["figures"] if kept.exists() else {}
    slower = worse(now, before)
    check.write(worse=slower)
    for place, value in now.items():
        was = f" (was {before[place]:.6g})" if place in before else ""
        print(f"{place} = {value:.6g}{was}")
    print("worse than the last kept: " + ("; ".join(slower) or "nothing"))


def commit_of_the_tree() -> str:
    """What is checked out; empty outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_check"))
    parser.add_argument("--budget", type=float, default=300, help="seconds for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a model of thousands of weights")
    parser.add_argument(
        "--only", nargs="+", default=[], help="phases by the beginning of their names"
    )
    parser.add_argument("--commit", default="", help="where the tree is no repository")
    parser.add_argument("--keep", type=Path, help="a result.json whose figures are to be kept")
    arguments = parser.parse_args()
    if arguments.keep:
        keep(arguments.keep)
        return
    if arguments.out is None:
        parser.error("--out is where the results go")
    commit = arguments.commit or commit_of_the_tree()
    check = Check(arguments.out, arguments.work, arguments.budget, commit)
    phases = Phases(check, arguments.device, arguments.small).all()
    wanted = arguments.only or ["*"]
    check.run_all([p for p in phases if any(fnmatch(p.name, name) for name in wanted)])
    conclude(check)


if __name__ == "__main__":
    main()
