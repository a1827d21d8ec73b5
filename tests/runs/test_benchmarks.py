"""Every benchmark runs: the shortest form of each, to the end, with its last line read.

    uv run --group bench pytest tests/runs/test_benchmarks.py -m "long or not long"

The numbers don't matter here; that a benchmark still fits the program does. Those that take about a
minute or more are marked `long`, and not among what every change runs.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CASE = json.dumps({"hidden": 64, "layers": 2, "vocab": 512, "tokens": 512})

# (program and its arguments, what must stand in the last line)
SHORT = [
    ("faults.faults_hf_trainer --only F16", '"F16 a gradient is NaN"'),
    ("alert_quality --half judge --every 12", '"judge"'),
    (
        "alert_runs --only packed --seeds 1 --steps 3 --write FOLDER/runs.json.gz",
        '{"runs": 1}',
    ),
    ("forecast_quality FOLDER", "Cost:"),
    ("gpu_kernels --small --device cpu", '"gpu_kernels": [{"what": "q, k, v, forward"'),
    ("hardware_monitor", "read() while NVML hangs"),
    ("near_duplicates --counts 50 100", '"one pattern with 60 slots": {"cpu_s"'),
    ("row_proof", '"Gemma 3, 16384 tokens"'),
    ("reading --samples 60 --files 5 --repeats 1", '"peak_mib"'),
    (
        "faults.injected_faults --only healthy --write FOLDER/page.md",
        '{"healthy": {"found": true, "false": []}}',
    ),
    ("logger_cost --quick --tables histogram", '"histogram_10m_caller_ms"'),
    ("memory --axes length --lengths 256", '"mib_by_length"'),
    (f"memory_estimate --device cpu --case {CASE.replace(' ', '')}", '"seconds_estimated"'),
    ("scaling --pairs 2", '"losses_equal": true'),
    ("scaling --check", '"cases"'),
    ("scaling --table", "| 235B | 1,024 |"),
    ("signal_cost --pairs 2", '"signals_overhead_percent"'),
    ("startup --repeats 1", '"seconds"'),
    ("stats_throughput --samples 200 --rounds 1", '"speedup_vs_naive"'),
    ("train_cpu --steps 8 --repeats 1", '"losses_equal": true'),
    ("train_gpu --sides ours --steps 3", '"faults": []'),
]
LONG = {  # programs, or forms of one
    *("faults.faults_hf_trainer", "faults.injected_faults", "memory", "memory_estimate"),
    *("signal_cost", "startup", "train_cpu", "train_gpu", "scaling --check", "scaling --pairs 2"),
}
NEEDS = {"train_cpu": "trl", "logger_cost": "tensorboardX"}  # of the group `bench`


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a recorded loss curve."""
    rows = [f"{step},{1 + 2 / (1 + step / 20):.6f},0.0001" for step in range(1, 201)]
    (tmp_path / "01.csv").write_text("\n".join(["step,loss,learning_rate", *rows]))
    return tmp_path


def case(words: str, last: str) -> object:
    """The parameters of one form, marked if it takes long."""
    is_long = bool(LONG & {words.split()[0], words})
    return pytest.param(words, last, id=words, marks=[pytest.mark.long] if is_long else [])


@pytest.mark.parametrize(("words", "last"), [case(*form) for form in SHORT])
def test_a_benchmark_runs_to_its_end(words: str, last: str, folder: Path):
    name, *arguments = words.replace("FOLDER", str(folder)).split()
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed: uv run --group bench pytest")
    if name == "faults.faults_hf_trainer" and os.name == "nt":
        pytest.skip("the fault suite forks; Windows can't")
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert last in done.stdout.strip().splitlines()[-1], done.stdout[-1000:]


def test_no_benchmark_is_left_out():
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}
    # The fault suite itself runs, shortened, in tests/runs/test_faults.py.
    programs |= {"faults.faults_hf_trainer", "faults.injected_faults"}
    assert programs == {words.split()[0] for words, _ in SHORT}
