"""From the command to the first optimizer step, against the bare imports that any such program pays.

    uv run python -m benchmarks.startup               # about 2 minutes
    uv run python -m benchmarks.startup --repeats 3 --model-name FOLDER --data-path FILES

Four programs take turns, each in a fresh interpreter: this program until its first update has been
done (data, tokens, statistics, model, evaluation before the first step and its log included),
`import torch, transformers, peft`, this program's `--help`, and the imports of all modules that the
help loads and that are not this program's. The first round fills the caches, with Python's bytecode
in a folder of its own, and is not counted. Medians of wall time and of the process's CPU time. The
model is a Qwen3 of a few thousand weights, so that what remains is the program's own. The last line
is JSON.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "direct_finetuning_with_existing_modules.py"
LIBRARIES = ("torch", "transformers", "peft")

CPU_TIME = "\nimport os, time; os.write(1, f' {time.process_time()}'.encode()); os._exit(0)"
# Runs the program as the command does; after the first update it says its CPU time and is gone.
FIRST_STEP = f"""
import finetuning.common.process
import os, runpy, sys, time
sys.argv[0] = {SCRIPT!r}
def leave(*_):
    sys.stdout.flush()
    os.write(1, f" {{time.process_time()}}".encode())
    os._exit(0)
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(leave)
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""
HELP = f"""
import runpy, sys, time
sys.argv[:] = [{SCRIPT!r}, "--help"]
try:
    runpy.run_path({SCRIPT!r}, run_name="__main__")
except SystemExit:
    print("", time.process_time())
"""
LOADED = "\nimport sys; print('\\n' + ','.join(sys.modules))"


def output_of(code: str, *arguments: str, environment: dict[str, str]) -> str:
    """What `python -c code` prints; its failure ends the benchmark."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        sys.exit(f"exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def imports_of_help(environment: dict[str, str]) -> str:
    """An import statement for what `--help` loads of others, and Python itself does not."""
    loaded, bare = (
        set(output_of(code + LOADED, environment=environment).split("\n")[-2].split(","))
        for code in (HELP, "")
    )
    own = {path.stem for path in ROOT.glob("*.py")} | {"finetuning"}
    modules = sorted(name for name in loaded - bare - own if name.replace(".", "").isidentifier())
    return "import " + ", ".join(modules)


def make_inputs(folder: Path) -> dict[str, list[str]]:
    """The model and the data of the tests, written below `folder`."""
    from tests.helpers.tiny_model import make_tiny_data, make_tiny_model

    model, data = make_tiny_model(folder / "model"), make_tiny_data(folder / "data.jsonl")
    return {"--model-name": [str(model)], "--data-path": [str(data)]}


def take_turns(folder: Path, inputs: dict[str, list[str]], repeats: int) -> dict[str, list]:
    """(wall, CPU) seconds of every run but the first round, by program."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPYCACHEPREFIX": str(folder / "pyc")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    imports = f"import {', '.join(LIBRARIES)}"
    arguments = [word for name, values in inputs.items() for word in (name, *values)]
    arguments += ["--output-dir", str(folder / "out"), "--cache-dir", str(folder / "cache")]
    programs = {
        "command to first step": (FIRST_STEP, *arguments, "--num-probes", "0"),
        imports: (imports + CPU_TIME,),
        "--help": (HELP,),
        "imports of --help": (imports_of_help(environment) + CPU_TIME,),
    }
    times: dict[str, list] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, (code, *words) in programs.items():
            start = time.perf_counter()
            cpu = float(output_of(code, *words, environment=environment).split()[-1])
            wall = time.perf_counter() - start
            print(f"{turn or 'warm-up'}: {name}: {wall:.2f} s, CPU {cpu:.2f} s", flush=True)
            if turn:
                times[name].append((wall, cpu))
    return times


def result_of(times: dict[str, list]) -> dict:
    """The table on the terminal; the numbers of the last line."""
    medians = {
        name: tuple(statistics.median(column) for column in zip(*pairs, strict=True))
        for name, pairs in times.items()
    }
    print(f"\n{'median':40}{'wall s':>9}{'CPU s':>9}")
    for name, (wall, cpu) in medians.items():
        print(f"{name:40}{wall:9.2f}{cpu:9.2f}")
    step, imports, help_, help_imports = medians.values()
    return {
        "first_step_over_imports": step[0] / imports[0],
        "first_step_over_imports_cpu": step[1] / imports[1],
        "help_over_its_imports": help_[0] / help_imports[0],
        "help_over_its_imports_cpu": help_[1] / help_imports[1],
        "seconds": {name: {"wall": w, "cpu": c} for name, (w, c) in medians.items()},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {n: importlib.metadata.version(n) for n in (*LIBRARIES, "tyro", "rich")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model-name", help="a model folder instead of the tiny one")
    parser.add_argument("--data-path", nargs="+", help="data instead of sixty short samples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        inputs = make_inputs(Path(name))
        if options.model_name:
            inputs["--model-name"] = [str(Path(options.model_name).resolve())]
        if options.data_path:
            inputs["--data-path"] = [str(Path(path).resolve()) for path in options.data_path]
        times = take_turns(Path(name), inputs, options.repeats)
    print(json.dumps(result_of(times)))


if __name__ == "__main__":
    main()
