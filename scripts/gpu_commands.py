"""The phases of the check for a GPU, the most valuable first: the command of each, and what is read of it.

What the commands of `gpu_phases.py` do is told there; the others are the program, benchmarks and tests.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "data" / "raw"
PYTHON = (sys.executable, "-u")
PROGRAM = str(ROOT / "direct_finetuning_with_existing_modules.py")
TESTS = "tests/runs/test_cuda.py"
AT_ONCE_GIB = 60  # that phases beside each other plan; the smallest card in use has 78
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
PRODUCTS = {  # inputs and outputs of Qwen3-4B's products, by the names of benchmarks/gpu_kernels.py
    "q, k, v": (2560, 6144),
    "o": (4096, 2560),
    "gate, up": (2560, 19456),
    "down": (9728, 2560),
}
TOLD = ("CUDA graph", "compiled", "attention", "gradient checkpointing")  # lines of a start
ENDS = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")


@dataclass(frozen=True)
class Phase:
    """One process.

    Args:
        limit: seconds after which it is ended.
        needs: seconds without which it is not begun.
        read: its output, and when it began, -> facts; what raises here is a failure of the phase, and so
            is a `fault` among the facts. It also reads what a phase that failed has left.
        model: the folder of weights that its command reads, where it reads one.
        makes: the one that it writes, whole or not at all.
        anew: a folder that is removed before.
        gib: above 0: it asks what is right and how much memory it takes, and plans so much of it; its
            neighbours in the list that do so too run at the same time, and no rate of it is kept.
    """

    name: str
    command: Sequence[str]
    limit: float
    needs: float
    read: Callable[[str, float], dict]
    model: Path | None = None
    makes: Path | None = None
    anew: Path | None = None
    gib: float = 0


def last_json(said: str, _: float = 0) -> dict:
    """The last line that is an object."""
    return json.loads([line for line in said.splitlines() if line.startswith("{")][-1])


class Phases:
    """All of them.

    Args:
        work: folder of models, data, caches and runs.
        out: what is to be kept.
        small: a model of thousands of weights and few steps: this tries the check itself.
    """

    def __init__(self, work: Path, out: Path, device: str, small: bool) -> None:
        self.work, self.out, self.device, self.small = work, out, device, small

    def all(self) -> list[Phase]:
        """In this order."""
        return [
            self.makes_model("4B"),
            self.own("facts", "facts", limit=40, needs=12),
            self.job("run 2048", limit=130, needs=60),
            self.job("run FP8 2048", "--precision", "fp8", limit=150, needs=50),
            self.watched(self.job("run again 2048", limit=100, needs=30)),
            self.own("answers", "answers", limit=120, needs=60),
            self.fp8_adapters(limit=230),
            *self.at_once(),
            self.own("row 65536", "long_row", "--row-tokens", "65536", limit=160, needs=120),
            self.own("step 2048", "step", limit=100, needs=40),
            self.own("step FP8 2048", "step", "--fp8", limit=100, needs=40),
            self.makes_model("0.6B"),
            self.all_weights(limit=150),
            *self.logging(),
            self.bench("bench 2048", 2048, ["ours"], limit=80),
            self.bench("bench FP8 2048", 2048, ["ours, FP8"], limit=80),
            self.job("run 8192", "--max-seq-length", "8192", limit=150, needs=70),
            self.tests("tests of runs", "in_a_group or all_weights", limit=240),
            self.own("step 8B", "step", "--shape", "8B", limit=100, needs=50),
            self.bench("bench 8192", 8192, ["ours"], limit=90),
            self.bench("bench FP8 8192", 8192, ["ours, FP8"], limit=90),
            self.own("step 2048 deterministic", "step", "--deterministic", limit=90, needs=45),
            self.own("row 32768", "long_row", "--row-tokens", "32768", limit=100, needs=60),
            self.own("attention", "attention", limit=60, needs=25),
            self.kernels(limit=90),
            self.own("step 8192", "step", "--row-tokens", "8192", limit=110, needs=60),
            self.job("run bundled 2048", "--data-path", str(BUNDLED), limit=100, needs=50),
            self.bench("bench 2048 without graph", 2048, ["ours, no graph"], limit=80),
            self.bench("bench 8192 without graph", 8192, ["ours, no graph"], limit=90),
            self.bench("peers 2048", 2048, ["HF Trainer + PEFT", "TRL + Liger"], limit=150),
            self.own("step 0.6B", "step", "--shape", "0.6B", limit=80, needs=40),
        ]

    def at_once(self) -> list[Phase]:
        """What runs beside each other: right or wrong, and how much memory."""
        few = ("--max-steps", "12")
        by_4_bits = ("--quantization", "4bit", "--gradient-checkpointing", "on")
        return [
            replace(self.job("run 4-bit", *by_4_bits, *few, limit=120, needs=45), gib=10),
            self.tests("tests", "not in_a_group and not all_weights", limit=150, gib=20),
            replace(self.job("run fsdp", "--parallel", "fsdp", *few, limit=120, needs=45), gib=25),
        ]

    def chosen(self, wanted: Sequence[str]) -> list[Phase]:
        """Those named, and the models they need where these are not there. Raises ValueError for a name
        that is nobody's.

        A whole name is that phase; else it is a pattern, or the beginning of names.
        """
        phases = self.all()
        names, picked = [phase.name for phase in phases], set()
        for name in wanted:
            of_it = [name] if name in names else [n for n in names if fnmatch(n, f"{name}*")]
            if not of_it:
                raise ValueError(f"no phase is called {name}; there are: {', '.join(names)}")
            picked.update(of_it)
        needed = {p.model for p in phases if p.name in picked and p.model and not p.model.is_dir()}
        picked |= {phase.name for phase in phases if phase.makes in needed}
        return [phase for phase in phases if phase.name in picked]

    def model_folder(self, shape: str) -> Path:
        """Where its weights lie."""
        return self.work / f"model_{shape}{'_small' * self.small}"

    # -------------------------------------------------------------------------
    # Kinds of commands

    def own(self, name: str, what: str, *more: str, limit: float, needs: float) -> Phase:
        """A phase of gpu_phases.py."""
        folders = ("--work", str(self.work), "--out", str(self.out))
        command = [*PYTHON, "-m", "scripts.gpu_phases", what, *folders, *more]
        return Phase(name, [*command, *["--small"] * self.small], limit, needs, last_json)

    def makes_model(self, shape: str) -> Phase:
        """The weights that runs read."""
        name, folder = "model" if shape == "4B" else f"model {shape}", self.model_folder(shape)
        more = ("--shape", shape, "--folder", str(folder))
        return replace(self.own(name, "model", *more, limit=90, needs=30), makes=folder)

    def bench(self, name: str, row_tokens: int, sides: list[str], *, limit: float) -> Phase:
        """Sides of benchmarks/train_gpu.py."""
        size = ("512", "4") if self.small else (str(row_tokens), "34")
        command = [*PYTHON, "-m", "benchmarks.train_gpu", "--sides", *sides]
        command += ["--row-tokens", size[0], "--steps", size[1]]
        return Phase(name, command, limit, 35, read_bench)

    def kernels(self, *, limit: float) -> Phase:
        """Kernels side by side, benchmarks/gpu_kernels.py."""
        command = [*PYTHON, "-m", "benchmarks.gpu_kernels"]
        command += ["--small", "--device", self.device] if self.small else []
        parts = ["--only", "lora", "attention", "loss", "fp8", "layer"]
        return Phase("kernels", [*command, *parts], limit, 30, partial(read_kernels, self.small))

    def fp8_adapters(self, *, limit: float) -> Phase:
        """Products in FP8 with their adapters, as the program makes them and by two candidates."""
        command = [*PYTHON, "-m", "benchmarks.gpu_kernels", "--only", "fp8 adapters"]
        command += ["--rows", "2048", "--limit", "200"]
        command += ["--small", "--device", self.device] if self.small else []
        return Phase("kernels FP8 adapters", command, limit, 90, read_fp8_adapters)

    def job(
        self,
        name: str,
        *more: str,
        limit: float,
        needs: float,
        shape: str = "4B",
        window: tuple[int, int] | None = None,
    ) -> Phase:
        """The program itself from a fresh start. window: steps between which its speed is measured; by
        itself what is behind the warm-up."""
        folder, model = self.work / re.sub(r"\W+", "_", name), self.model_folder(shape)
        options = {
            "--model-name": str(model),
            "--data-path": str(self.work / "documents.jsonl"),
            "--device": self.device,
            "--output-dir": str(folder),
            "--cache-dir": str(self.work / "cache"),
            "--eval-steps": "0",
            "--save-steps": "0",
            "--max-eval-samples": "4",
            "--num-probes": "0",
            "--logging-steps": "5",
            "--max-steps": "40",
            **dict(zip(more[::2], more[1::2], strict=True)),
        }
        if self.small:  # what no CPU has is left out, and rows are short
            options |= {"--max-steps": "6", "--precision": "auto", "--quantization": "none"}
            options |= {"--max-seq-length": "512", "--max-eval-samples": "1"}
            options["--logging-steps"] = "1" if int(options["--logging-steps"]) < 10 else "2"
        pairs = [word for pair in options.items() for word in pair]
        read = partial(read_run, folder, self.out, window if not self.small else None)
        command = [*PYTHON, PROGRAM, *pairs]
        return Phase(name, command, limit, needs, read, model=model, anew=folder)

    def all_weights(self, *, limit: float) -> Phase:
        """Full fine-tuning: does the peak stay within the plan?"""
        more = ("--lora-r", "0", "--max-steps", "12")
        return self.job("run all weights 0.6B", *more, limit=limit, needs=50, shape="0.6B")

    def logging(self) -> list[Phase]:
        """The same run with every step logged and with almost none: nothing switches logging off."""
        return [
            self.job(
                f"run 2048 logged {word}",
                *("--logging-steps", steps, "--max-steps", "201"),
                limit=120,
                needs=60,
                window=(100, 200),
            )
            for word, steps in (("always", "1"), ("seldom", "100"))
        ]

    def watched(self, phase: Phase) -> Phase:
        """The same job, and where it was at every half second."""
        seen = self.out / f"stacks_{phase.name.replace(' ', '_')}.txt"
        command = [*PYTHON, "-c", WATCHED, str(seen), *phase.command[len(PYTHON) :]]

        def read(said: str, began: float) -> dict:
            return phase.read(said, began) | {
                "seconds_in": seconds_in(seen.read_text(encoding="utf-8"))
            }

        return replace(phase, command=command, read=read)

    def tests(self, name: str, which: str, *, limit: float, gib: float = 0) -> Phase:
        """Those of test_cuda.py; every worker takes what comes next."""
        command = [*PYTHON, "-m", "pytest", TESTS, "-k", which, "-n", "8", "--dist", "worksteal"]
        command += ["-v", "-p", "no:cacheprovider", "--tb=short", "-m", "long or not long"]
        return Phase(name, command, limit, 60, read_tests, gib=gib)


# -----------------------------------------------------------------------------
# What is read of their output


def read_bench(said: str, _: float) -> dict:
    """Sides, and those that gave nothing as a fault."""
    found = last_json(said)
    names = ("mfu_percent", "mfu_of_data_sheet_percent", "matmul_teraflops", "faults")
    errors = [f"{n}: {side['error']}" for n, side in found["sides"].items() if "error" in side]
    fault = {"fault": "; ".join(errors)} if errors else {}
    return {"sides": found["sides"], **{n: found[n] for n in names}, **fault}


def read_kernels(small: bool, said: str, _: float) -> dict:
    """Microseconds by their names, and of plain products and those in FP8 the rate."""
    cases: dict[str, dict[str, float]] = {}
    for case in last_json(said)["gpu_kernels"]:
        name = f"{case['what']}, {case['rows']} rows, {case['variant']}"
        cases[name] = {"us": case["microseconds"]}
        flops = product_flops(case)
        if flops and not small:
            cases[name]["tflops"] = flops / case["microseconds"] / 1e6
    left_out = [line for line in said.splitlines() if "left out: " in line]
    return {"cases": cases, "left_out": left_out}


def product_flops(case: dict) -> float:
    """Of what is one plain product; else 0."""
    what, _, direction = case["what"].rpartition(", ")
    if case["variant"] == "none" and direction in ("forward", "backward"):
        inputs, outputs = PRODUCTS[what]
    elif case["what"].removeprefix("fp8 ") in PRODUCTS:
        inputs, outputs = PRODUCTS[case["what"].removeprefix("fp8 ")]
    else:
        return 0
    return 2 * case["rows"] * inputs * outputs


def read_fp8_adapters(said: str, _: float) -> dict:
    """What the products of all layers take by each way, and which variants were wrong or left out."""
    words = ("FP8 with adapters", "WRONG", "left out: ")
    told = [line for line in said.splitlines() if any(word in line for word in words)]
    ways = {}
    for line in (line for line in told if line.startswith("FP8 with adapters")):
        for part in line.partition("ms: ")[2].split(", "):
            way, _, time = part.rpartition(" ")
            ways[way] = {"ms_of_all_layers": float(time)}
    return {"ways": ways, "told": told, "cases": last_json(said)["gpu_kernels"]}


def read_tests(said: str, _: float) -> dict:
    """The end of each test, and those that had begun and not ended; skipped ones alone show nothing."""
    lines = said.splitlines()
    named = [re.match(rf"\[gw\d+\] +\[ *\d+%\] ({'|'.join(ENDS)}) (\S+)", line) for line in lines]
    ends = {found[2]: found[1] for found in named if found}
    begun = {line.strip() for line in lines if re.fullmatch(rf"{re.escape(TESTS)}::\S+\s*", line)}
    counts = {end: list(ends.values()).count(end) for end in ENDS if end in ends.values()}
    fault = {} if {"PASSED", "FAILED", "ERROR"} & counts.keys() else {"fault": "no test ran"}
    outcomes = {end: [name for name in ends if ends[name] == end] for end in counts}
    return {"counts": counts, "unfinished": sorted(begun - ends.keys()), **outcomes, **fault}


def read_run(
    folder: Path, out: Path, window: tuple[int, int] | None, said: str, began: float
) -> dict:
    """Rates, losses and memory by the run's own records."""
    (lines,) = folder.glob("training_logs/*/metrics.jsonl")
    shutil.copy(lines, out / f"metrics_{folder.name}.jsonl")
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    held_out = {
        row["step"]: row["metrics"]["Eval/Loss"] for row in rows if "Eval/Loss" in row["metrics"]
    }
    first = min(row["time"] for row in rows if "Training/Loss" in row["metrics"])
    rows = [row for row in rows if row["metrics"].get("Throughput/Step_Seconds")]
    losses = {row["step"]: row["metrics"]["Training/Loss"] for row in rows}
    assert losses and all(loss is not None for loss in losses.values()), losses
    told = [line for line in said.splitlines() if line.startswith(TOLD)]
    return {
        **run_rates(rows, window),
        **run_memory(rows, (lines.parent / "training.log").read_text(encoding="utf-8")),
        "seconds_to_first_logged_step": first - began,
        "held_out_first": held_out.get(0),
        "held_out_last": held_out.get(max(losses)),
        "losses": losses,
        "held_out": held_out,
        "told": told,
    }


def seconds_in(stacks: str) -> dict[str, float]:
    """Seconds by the innermost function of the project's that the main thread was in, longest first."""
    found: dict[str, float] = {}
    looks = re.split(r"^--- ([\d.]+) s$", stacks, flags=re.MULTILINE)
    times, texts = [float(time) for time in looks[1::2]], looks[2::2]
    for time, until, text in zip(times, times[1:], texts, strict=False):
        ours = re.findall(
            rf'File "(?:{re.escape(str(ROOT))}/)?([\w/]+\.py)", line \d+, in (\S+)', text
        )
        place = ": ".join(ours[-1]) if ours else "Python"
        found[place] = found.get(place, 0.0) + until - time
    return {p: round(s, 1) for p, s in sorted(found.items(), key=lambda item: -item[1])}


def run_rates(rows: list[dict], window: tuple[int, int] | None = None) -> dict:
    """Tokens a second between two logged steps: by the sum of the steps' times, and by the wall.

    By itself without the first third, which warms up, and the last one, which evaluates.
    """
    by_step = {row["step"]: row for row in rows}
    first, last = rows[len(rows) // 3], rows[-2] if len(rows) > 3 else rows[-1]
    if window:
        first, last = (by_step[step] for step in window)
    seen = [row["metrics"]["Throughput/Tokens_Seen"] for row in (first, last)]
    between = [row for row in rows if first["step"] < row["step"] <= last["step"]]
    seconds, before = 0.0, first["step"]
    for row in between:
        seconds += row["metrics"]["Throughput/Step_Seconds"] * (row["step"] - before)
        before = row["step"]
    wall, steps = last["time"] - first["time"], last["step"] - first["step"]
    tags = [f"Throughput/Step_Seconds{part}" for part in ("", "_Data", "_Forward_Backward")]
    tags += ["Throughput/Step_Seconds_Optimizer", "Throughput/Step_Seconds_Logging"]
    return {
        "steps": [first["step"], last["step"]],
        "tokens_per_second": (seen[1] - seen[0]) / seconds if seconds else None,
        "wall_tokens_per_second": (seen[1] - seen[0]) / wall if wall else None,
        "step_ms": 1000 * seconds / steps if steps else None,
        "mfu_percent": last["metrics"].get("Throughput/MFU_Percent"),
        "logging_percent": last["metrics"].get("Monitoring/Logging_Overhead_Percent"),
        "last": {tag: last["metrics"].get(tag) for tag in tags},
    }


def run_memory(rows: list[dict], log: str) -> dict:
    """Highest in any step, in GiB, and beside it what the plan had said."""
    planned = re.search(r"^\S+ \S+ memory: ([\d.]+) (GiB|MiB) of ", log, re.MULTILINE)
    found: dict[str, float] = {}
    for name, tag in (("peak_gib", "GPU_Peak_MB"), ("reserved_gib", "GPU_Reserved_MB")):
        values = [row["metrics"].get(f"Memory/{tag}") for row in rows]
        values = [value / 1024 for value in values if value is not None]
        found |= {name: max(values)} if values else {}
    if planned:
        found["planned_gib"] = float(planned[1]) / (1 if planned[2] == "GiB" else 1024)
    if planned and "peak_gib" in found:
        found["plan_error"] = abs(found["peak_gib"] / found["planned_gib"] - 1)
    return found
