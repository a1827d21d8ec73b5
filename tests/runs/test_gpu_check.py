"""The check for a GPU runs without one, compares figures, and says what got worse.

uv run pytest tests/runs/test_gpu_check.py -m "long or not long"
"""

import importlib
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetuning.command_line import parse_command_line
from finetuning.evaluation.generation import WARM
from scripts import gpu_check, gpu_commands, gpu_figures

ROOT = Path(__file__).parents[2]

KEPT = {
    "bench 2048: sides: ours: tokens_per_second": 12_000.0,
    "bench 2048: sides: ours: peak_gib": 14.5,
    "step 2048: graph: step_ms": 80.0,
}


@pytest.fixture
def phases(tmp_path: Path) -> gpu_commands.Phases:
    return gpu_commands.Phases(tmp_path / "work", tmp_path / "out", "cuda", small=False)


# -----------------------------------------------------------------------------
# Figures


def test_what_got_worse_is_named_with_both_figures():
    now = {
        "bench 2048: sides: ours: tokens_per_second": 11_000.0,
        "bench 2048: sides: ours: peak_gib": 14.6,
        "step 2048: graph: step_ms": 90.0,
        "step 8192: graph: step_ms": 300.0,
    }
    assert gpu_figures.worse(now, KEPT) == [
        "bench 2048: sides: ours: tokens_per_second: 1.2e+04 -> 1.1e+04 (-8.3%)",
        "step 2048: graph: step_ms: 80 -> 90 (+12.5%)",
    ]
    assert gpu_figures.worse(KEPT, KEPT) == []


def test_the_plans_error_is_compared_as_it_is():
    """Of a small number three hundredths are nothing."""
    before = {"run 2048: plan_error": 0.04, "run 4-bit: plan_error": 0.04, "gone: old_name": 1.0}
    now = {"run 2048: plan_error": 0.045, "run 4-bit: plan_error": 0.055, "gone: old_name": 2.0}
    assert gpu_figures.worse(now, before) == ["run 4-bit: plan_error: 0.04 -> 0.055 (+1.5%)"]


def test_figures_are_found_wherever_they_lie():
    found = {
        "bench 2048": {
            "verdict": "ok",
            "sides": {"ours": {"tokens_per_second": 12_000.0, "peak_gib": 14.5, "mean_loss": 2.0}},
        },
        "step 2048": {"verdict": "ok", "graph": {"step_ms": 80.0}, "waits": "nowhere"},
    }
    assert gpu_figures.figures(found) == KEPT


def test_beside_others_only_memory_and_losses_are_kept():
    facts = {"peak_gib": 4.0, "held_out_last": 2.0, "step_ms": 80.0, "a": {"tokens_per_second": 9}}
    assert gpu_figures.without_rates(facts) == {"peak_gib": 4.0, "held_out_last": 2.0, "a": {}}


@pytest.mark.parametrize(
    ("gpu", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "h100.json"),
        ("NVIDIA A100-SXM4-40GB", "a100sxm440gb.json"),
        ("none", "none.json"),
    ],
)
def test_a_kind_of_gpu_has_a_file_of_its_own(gpu: str, file: str):
    assert gpu_figures.kept_file(gpu).name == file


def test_keeping_replaces_what_was_measured_and_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_figures, "RESULTS", tmp_path / "results")
    record = {"gpu": "NVIDIA H100", "versions": {"torch": "2"}, "date": "2026-11-26"}
    for commit, figures in (("a", KEPT), ("b", {"step 2048: graph: step_ms": 70.0})):
        path = tmp_path / "result.json"
        path.write_text(json.dumps(record | {"commit": commit, "figures": figures}))
        gpu_figures.keep(path)
        record["versions"] = None  # the phase that tells them was left out
    kept = json.loads((tmp_path / "results" / "h100.json").read_text())
    assert kept["versions"] == {"torch": "2"}
    assert kept["commits"] == dict.fromkeys(KEPT, "a") | {"step 2048: graph: step_ms": "b"}
    assert kept["figures"] == KEPT | {"step 2048: graph: step_ms": 70.0}
    assert gpu_figures.kept_figures("NVIDIA H100") == kept["figures"]


@pytest.mark.parametrize(("last", "answer"), [(2.019, "yes"), (1.97, "NO")])
def test_a_line_says_whether_fp8_learns_as_bf16_does(last: float, answer: str):
    runs = {"run 2048": {"held_out": {0: 9.0, 40: 2.0}}, "run FP8 2048": {"held_out": {0: 9.0}}}
    assert gpu_figures.verdicts(runs) == [], "a run that was cut short has no last loss"
    runs["run FP8 2048"]["held_out"][40] = last
    (line,) = gpu_figures.verdicts(runs)
    assert f"at step 40: {answer}, {last:.4f} against 2.0000" in line


def test_lines_say_what_logging_takes_and_how_far_the_plan_was_off():
    runs = {
        "run 2048": {"peak_gib": 14.7, "planned_gib": 15.4},
        "run 2048 logged always": {"wall_tokens_per_second": 24_900.0},
        "run 2048 logged seldom": {"wall_tokens_per_second": 25_000.0},
    }
    memory, logging = gpu_figures.verdicts(runs)
    assert memory == "run 2048: peak 14.70 GiB, planned 15.40 (-4.5%)"
    assert "yes, 24,900 against 25,000 tokens/s (0.40%)" in logging


# -----------------------------------------------------------------------------
# What is read


def row(step: int, time: float, **metrics: float) -> dict:
    rates = {"Throughput/Tokens_Seen": 2_000.0 * step, "Throughput/Step_Seconds": 0.25}
    return {"step": step, "time": time, "metrics": {**rates, "Training/Loss": 2.0, **metrics}}


def test_the_speed_of_a_run_is_tokens_over_the_time_of_its_steps():
    """Three of six logged steps count: the first third warms up, the last one evaluates."""
    rows = [row(5 * i, 100.0 + 2 * i) for i in range(1, 7)]
    rates = gpu_commands.run_rates(rows)
    assert rates["steps"] == [15, 25]
    assert rates["tokens_per_second"] == pytest.approx(20_000 / (10 * 0.25))
    assert rates["wall_tokens_per_second"] == pytest.approx(20_000 / 4)
    assert rates["step_ms"] == pytest.approx(250)
    assert gpu_commands.run_rates(rows, (10, 30))["steps"] == [10, 30]


def test_the_peak_of_a_run_stands_beside_its_plan():
    """The highest of all steps, whatever the last one needed."""
    tags = ("Memory/GPU_Peak_MB", "Memory/GPU_Reserved_MB")
    rows = [
        row(5, 1.0, **{tag: 16_384.0 for tag in tags}),
        row(9, 2.0, **{t: 9.0 for t in tags}),
    ]
    log = "2026-11-27 20:24:53 memory: 15.4 GiB of 78.2 GiB free on cuda (an estimate)\n"
    found = gpu_commands.run_memory(rows, log)
    assert (found["peak_gib"], found["reserved_gib"], found["planned_gib"]) == (16.0, 16.0, 15.4)
    assert found["plan_error"] == pytest.approx(16 / 15.4 - 1)
    in_mib = gpu_commands.run_memory([row(5, 1.0)], log.replace("15.4 GiB", "512.0 MiB"))
    assert in_mib == {"planned_gib": 0.5}


@pytest.mark.slow
def test_a_real_run_is_read(finished: Path, tmp_path: Path):
    found = gpu_commands.read_run(finished, tmp_path, None, "CUDA graph  no", 0.0)
    assert 0.01 < found["planned_gib"] < 4 and found["step_ms"] > 0
    assert found["held_out_first"] > 0 and found["held_out_last"] > 0
    assert found["seconds_to_first_logged_step"] > 1e9 and found["told"] == ["CUDA graph  no"]
    assert "logging_percent" in gpu_figures.FIGURES and found["logging_percent"] > 0


def test_kernels_have_names_and_products_a_rate():
    names = ("what", "rows", "variant", "microseconds")
    cases = [
        ("gate, up, forward", 2048, "none", 300.0),
        ("gate, up, forward", 2048, "joined", 310.0),
        ("fp8 down", 2048, "by row", 100.0),
        ("loss", 2048, "kernel", 900.0),
    ]
    table = json.dumps({"gpu_kernels": [dict(zip(names, case, strict=True)) for case in cases]})
    found = gpu_commands.read_kernels(False, "45 s; left out: layer, 8192, joined\n" + table, 0)
    figures = gpu_figures.figures({"kernels": found})
    place = "kernels: cases: gate, up, forward, 2048 rows"
    assert figures[f"{place}, none: us"] == 300.0
    assert figures[f"{place}, none: tflops"] == pytest.approx(
        2 * 2048 * 2560 * 19456 / 300e-6 / 1e12
    )
    rates = [name for name in figures if name.endswith("tflops")]
    assert len(rates) == 2 and "kernels: cases: fp8 down, 2048 rows, by row: tflops" in rates
    assert len(figures) == 6 and found["left_out"] == ["45 s; left out: layer, 8192, joined"]
    small = gpu_commands.read_kernels(True, table, 0)["cases"]
    assert all("tflops" not in case for case in small.values())


def test_the_ways_of_fp8_adapters_are_figures():
    from benchmarks.candidates.fp8_group import step_times

    timed = [("fp8 adapters, o, forward", 2048, way, 10.0) for way in ("alone", "added", "x, 16")]
    said = "\n".join(
        [*step_times(timed, 36), "o, x, 32: WRONG, 3%", json.dumps({"gpu_kernels": []})]
    )
    found = gpu_commands.read_fp8_adapters(said, 0)
    ways = {"alone", "added", "x", "the best for each shape"}
    assert found["ways"] == {way: {"ms_of_all_layers": 0.36} for way in ways}
    assert len(found["told"]) == 2


# -----------------------------------------------------------------------------
# Phases


def process(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def check(tmp_path: Path) -> gpu_check.Check:
    return gpu_check.Check(tmp_path / "out", tmp_path / "work", 60)


def test_a_phase_that_hangs_costs_itself_only(check: gpu_check.Check):
    def run(name: str, code: str, limit: float, needs: float = 1) -> None:
        check.run(gpu_commands.Phase(name, process(code), limit, needs, gpu_commands.last_json))

    run("hangs", "import time; print('{\"step_ms\": 4}', flush=True); time.sleep(60)", 2)
    run("fails", "print('the cause'); 1/0", 20)
    run("good", "print('{\"step_ms\": 3}')", 20)
    run("late", "print('{\"step_ms\": 3}')", 90, needs=80)
    verdicts = {name: phase["verdict"] for name, phase in check.phases.items()}
    assert verdicts["hangs"] == "not done within 2 s" and verdicts["fails"] == "exit code 1"
    assert verdicts["good"] == "ok" and verdicts["late"].startswith("left out")
    last = check.phases["fails"]["last_lines"]
    assert "ZeroDivisionError" in last["stderr"][-1] and last["stdout"] == ["the cause"]
    assert check.phases["hangs"]["step_ms"] == 4, "what was told before the limit is kept"
    assert json.loads((check.out / "result.json").read_text())["phases"] == check.phases


def test_a_side_that_failed_is_a_failure(check: gpu_check.Check):
    sides = {"ours": {"tokens_per_second": 9.0}, "TRL": {"error": "not installed: trl"}}
    table = {"sides": sides, "mfu_percent": 40.0, "matmul_teraflops": 700.0, "faults": []}
    said = json.dumps(table | {"mfu_of_data_sheet_percent": 30.0})
    command = process(f"print('''{said}''')")
    check.run(gpu_commands.Phase("peers", command, 20, 1, gpu_commands.read_bench))
    assert check.phases["peers"]["verdict"] == "failed: TRL: not installed: trl"
    assert check.phases["peers"]["sides"] == sides


def test_names_match_by_their_beginning(phases: gpu_commands.Phases):
    def named(*wanted: str) -> list[str]:
        return [phase.name for phase in phases.chosen(wanted)]

    everything = [phase.name for phase in phases.all()]
    assert len(set(everything)) == len(everything) and named("*") == everything
    runs = [name for name in everything if name.startswith("run")]
    assert len(runs) > 5 and {"run FP8 2048", "run 4-bit"} < set(runs)
    assert set(named("run")) == {"model", "model 0.6B", *runs}
    assert named("step", "facts")[:2] == ["facts", "step 2048"]
    assert named("tests") == ["tests"], "a whole name is that phase alone"
    assert named("*FP8 8192") == ["bench FP8 8192"]
    with pytest.raises(ValueError, match=r"no phase is called steps; .*facts, run 2048"):
        phases.chosen(["facts", "steps"])


def test_a_model_is_made_where_it_is_not_there(phases: gpu_commands.Phases):
    assert [p.name for p in phases.chosen(["run fsdp"])] == ["model", "run fsdp"]
    wanted = ["run all weights 0.6B", "facts"]
    assert [p.name for p in phases.chosen(wanted)] == ["facts", "model 0.6B", wanted[0]]
    phases.model_folder("4B").mkdir(parents=True)
    assert [p.name for p in phases.chosen(["run fsdp"])] == ["run fsdp"]
    assert [p.name for p in phases.chosen(["model"])] == ["model"], "asked for, it is made anew"


def test_an_unknown_name_is_one_line(tmp_path: Path):
    command = [sys.executable, "-m", "scripts.gpu_check", "--out", str(tmp_path), "--only", "stop"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "no phase is called stop; there are: model, facts" in done.stderr
    )


def test_what_runs_at_once_fits_a_card(phases: gpu_commands.Phases):
    found = [[phase.name for phase in group] for group in gpu_check.groups(phases.all())]
    assert ["run 4-bit", "tests", "run fsdp"] in found
    assert ["row 65536"] in found and ["row 32768"] in found
    (two, one) = gpu_check.groups([replace(phases.all()[0], gib=gib) for gib in (20, 40, 1)])
    assert [phase.gib for phase in two] == [20, 40] and [phase.gib for phase in one] == [1]


FAKE_TESTS = """
import time
import pytest

@pytest.mark.parametrize("n", range(4))
def test_passes(n):
    time.sleep(0.3)

def test_fails():
    assert False

def test_is_skipped():
    pytest.skip("none here")

def test_hangs():
    time.sleep(60)
"""


def phase_of_tests(phases: gpu_commands.Phases, folder: Path, which: str) -> gpu_commands.Phase:
    """The phase for a file of that name, with two workers, beside this project's own defaults."""
    file = folder / gpu_commands.TESTS
    file.parent.mkdir(parents=True)
    file.write_text(FAKE_TESTS)
    defaults = re.search(r"^addopts = .*loadfile.*$", (ROOT / "pyproject.toml").read_text(), re.M)[
        0
    ]
    (folder / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\n{defaults}\n")
    phase = phases.tests("tests", which, limit=12)
    command = ["2" if word == "8" else word for word in phase.command]
    return replace(phase, command=command, needs=1)


@pytest.mark.slow
def test_outcomes_of_tests_are_read_at_the_limit_too(check, phases, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    check.run(phase_of_tests(phases, tmp_path, "test_"))
    found = check.phases["tests"]
    assert found["verdict"] == "not done within 12 s"
    assert found["counts"] == {"PASSED": 4, "FAILED": 1, "SKIPPED": 1}
    assert found["FAILED"] == [f"{gpu_commands.TESTS}::test_fails"]
    assert found["unfinished"] == [f"{gpu_commands.TESTS}::test_hangs"]
    workers = set(re.findall(r"\[(gw\d)\]", (check.out / "log.txt").read_text()))
    assert workers == {"gw0", "gw1"}, "one file's tests are spread over all workers"


@pytest.mark.slow
def test_skipped_tests_show_nothing(check, phases, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    check.run(phase_of_tests(phases, tmp_path, "is_skipped"))
    assert check.phases["tests"]["verdict"] == "failed: no test ran"


def test_reading_the_gpus_tests_asks_no_gpu(monkeypatch):
    """Each worker reads them; a question to the driver makes a context, memory and time in each."""
    from tests.runs import test_cuda

    for name in ("is_available", "get_device_capability", "device_count", "init"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: pytest.fail(f"cuda.{name}"))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    importlib.reload(test_cuda)
    assert test_cuda.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# -----------------------------------------------------------------------------
# Without a GPU, each command as far as that goes


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module of the phases, writing into a temporary folder."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the check itself does all this, with the sizes of a real model")
    from scripts import gpu_phases

    monkeypatch.setattr(gpu_phases, "tell", lambda found: json.dumps(found))
    return gpu_phases


def facts_of(own: types.ModuleType, folder: Path, *words: str) -> dict:
    command = [*words, "--small", "--work", str(folder), "--out", str(folder)]
    arguments = own.parse_arguments(command)
    return own.PHASES[arguments.phase](arguments)


@pytest.mark.slow
def test_each_function_of_the_phases_runs(own: types.ModuleType, tmp_path: Path):
    found = {
        name: facts_of(own, tmp_path, name) for name in own.PHASES.keys() - {"model", "answers"}
    }
    assert found.keys() | {"model", "answers"} == {
        *("facts", "model", "step", "attention", "long_row", "answers")
    }
    assert found["facts"]["versions"]["torch"]
    assert found["step"]["plain_against_plain"] == {"loss": 0, "norm": 0, "weights": 0}
    assert found["long_row"]["graph"]["passes_ms"] > 0
    assert found["long_row"]["without graph"]["passes_ms"] > 0
    json.dumps(found)
    made = facts_of(own, tmp_path, "model", "--folder", str(tmp_path / "model"))
    assert made["gib"] > 0 and torch.get_default_dtype() == torch.float32
    assert {"config.json", "tokenizer.json"} <= {f.name for f in (tmp_path / "model").iterdir()}
    assert (tmp_path / "documents.jsonl").read_text(encoding="utf-8").count("\n") == 60


@pytest.mark.slow
def test_answers_are_drawn_as_a_run_draws(own: types.ModuleType, tmp_path: Path, monkeypatch):
    told: list[dict] = []
    used: list[object] = []

    class Noted(own.Decoder):
        def __init__(self, *args: object, sampling: object) -> None:
            super().__init__(*args, sampling=sampling)
            used.append(sampling)

    monkeypatch.setattr(own, "Decoder", Noted)
    monkeypatch.setattr(own, "tell", lambda found: told.append(json.loads(json.dumps(found))))
    found = facts_of(own, tmp_path, "answers")
    assert [(s.temperature, s.top_p) for s in used] == [(WARM, 0.95), (0.0, 0.95)]
    figures = gpu_figures.figures({"answers": found})
    batches = ("first_batch_seconds", "next_batch_seconds")
    assert figures.keys() == {f"answers: {w}: {b}" for w in ("drawn", "greedy") for b in batches}
    assert found["drawn"]["written"] == found["greedy"]["written"] == [4, 24]
    assert [one.keys() for one in told] == [{"drawn"}, {"drawn", "greedy"}]


def parses(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Read a phase's command line as its program does; which program that is."""
    from benchmarks import gpu_kernels, train_gpu
    from scripts import gpu_phases

    if gpu_commands.PROGRAM in command:
        arguments = command[command.index(gpu_commands.PROGRAM) + 1 :]
        parse_command_line(list(arguments))
        return "the program"
    assert command[: len(gpu_commands.PYTHON) + 1] == [*gpu_commands.PYTHON, "-m"]
    module, *arguments = command[len(gpu_commands.PYTHON) + 1 :]
    if module == "benchmarks.train_gpu":
        sides = train_gpu.parse_arguments(arguments).sides
        assert set(sides) <= set(train_gpu.GROUPS["all"])
    elif module == "benchmarks.gpu_kernels":
        monkeypatch.setattr(sys, "argv", ["gpu_kernels", *arguments])
        gpu_kernels.parse_arguments()
    elif module == "scripts.gpu_phases":
        gpu_phases.parse_arguments(arguments)
    else:
        assert module == "pytest"
    return module


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True])
def test_each_command_line_is_one_of_its_program(small: bool, tmp_path: Path, monkeypatch):
    phases = gpu_commands.Phases(tmp_path, tmp_path, "cpu", small)
    for shape in ("4B", "0.6B"):
        phases.model_folder(shape).mkdir()
    programs = [parses(list(phase.command), monkeypatch) for phase in phases.all()]
    assert set(programs) == {
        *("the program", "pytest", "scripts.gpu_phases"),
        *("benchmarks.train_gpu", "benchmarks.gpu_kernels"),
    }


@pytest.mark.slow
def test_each_phase_of_tests_selects_some(phases: gpu_commands.Phases):
    """Both by one process, as importing takes the longest."""
    own = len([*gpu_commands.PYTHON, "-m", "pytest"])
    more = ["--collect-only", "-q", "-q", "-n", "0"]
    commands = [[*phase.command[own:], *more] for phase in phases.chosen(["tests*"])]
    code = f"import pytest; [print('code', int(pytest.main(c))) for c in {commands}]"
    outside = {n: value for n, value in os.environ.items() if n != "PYTEST_ADDOPTS"}
    options = {"env": outside, "cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run(process(code), **options)
    one, other, _ = done.stdout.split("code 0\n")
    chosen = [part.count(f"{gpu_commands.TESTS}::") for part in (one, other)]
    assert min(chosen) > 2 and sum(chosen) > 25


@pytest.mark.slow
def test_a_side_that_fails_says_why_in_several_lines():
    from benchmarks import train_gpu

    found = train_gpu.child("nobody", train_gpu.parse_arguments([]))
    assert found["error"] == "KeyError: 'nobody'"
    assert len(found["last_lines"]) > 3 and found["last_lines"][-1] == found["error"]


@pytest.mark.long
def test_every_phase_runs_without_a_gpu(tmp_path: Path):
    only = ["facts", "step 2048", "bench 2048", "run 2048", "run all", "row 32768", "kernels FP8"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "scripts.gpu_check", "--small", "--device", "cpu"),
            *("--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")),
            *("--budget", "600", "--only", *only),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=700,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {p["verdict"] for p in result["phases"].values()} == {"ok"}, result["phases"]
    assert result["figures"]["run 2048: tokens_per_second"] > 0
    assert (tmp_path / "out" / "log.txt").stat().st_size > 0
