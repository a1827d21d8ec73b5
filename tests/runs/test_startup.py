"""What is imported when: seconds before the first step are spent on nothing that can wait.

uv run pytest -m "not long" tests/runs/test_startup.py
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = "direct_finetuning_with_existing_modules.py"
HEAVY = ("torch", "transformers", "peft", "numpy", "scipy", "tensorboard", "datasets", "matplotlib")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


COMMAND = f"""
import runpy, sys
from finetuning.common import process
process.exit_process = sys.exit
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    heavy = [name for name in {HEAVY} if name in sys.modules]
    print("\\nheavy:", heavy)
    raise
"""


@pytest.mark.parametrize(
    "arguments,code,said",
    [
        (["--help"], 0, "--max-seq-length"),
        (["--lora-r", "-2"], 2, "lora_r"),
        (["--config", "nowhere.toml"], 2, "nowhere.toml"),
        (["--no-such-setting", "1"], 2, "no-such-setting"),
        (["--data-path", "data/rwa"], 2, "is data/raw meant?"),
        (["--data-path", "elsewhere/raw"], 2, "no folder elsewhere"),
        (["--data-path", "my_qa.jsonl"], 2, "there is no my_qa.jsonl"),
        (["--mirror", "nosuch://place"], 2, "Protocol not known"),
        (["--output-dir", "out", "--mirror", "out/copy"], 2, "give the mirror a place of its own"),
        (["--notify", "slack=env:NO_SUCH_ROBOT"], 2, "no variable NO_SUCH_ROBOT"),
        (["--eval-path", "data/raw/01_symmetric.pdf"], 2, "there is no data/raw/01_symmetric.pdf"),
    ],
)
def test_help_and_wrong_settings_are_answered_before_torch(arguments, code, said):
    answered_at_once(SCRIPT, *arguments, code=code, said=said)


def answered_at_once(program: str, *arguments: str, code: int, said: str) -> None:
    """In a word, and before anything slow is imported."""
    done = python(COMMAND, program, *arguments)
    assert done.returncode == code, done.stderr[-2000:]
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert "heavy: []" in done.stdout
    assert not code or done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ask.py q --adapter nope", "--adapter nope: no such folder"),
        ("ask.py q --output-dir nope", "train first"),
        ("ask.py q --temperature -1", "--temperature"),
        ("ask.py q --device gpu", "device is 'gpu'"),
        ("ask.py q --base-model ./nope", "--base-model ./nope: no such folder"),
        (
            "ask.py q --base-model embedded",
            "--base-model embedded: a run makes the demonstration model",
        ),
        ("ask.py --compare", "--compare needs a question"),
        ("export.py --output x --adapter nope", "--adapter nope: no such folder"),
        ("export.py --output docs", "docs: exists; choose one that does not"),
        ("export.py --output x --precision int8", "invalid choice 'int8'"),
        ("dataset_stats.py data/rwa", "is data/raw meant?"),
        ("dataset_stats.py data/raw --compare nope", "there is no nope"),
        ("dataset_stats.py data/raw --tokenizer nope", "nope is no folder of a model"),
        ("dataset_stats.py data/raw --html docs", "--html docs: can't be written"),
        ("dataset_stats.py data/raw --workers 0", "workers is 0, must be at least 1"),
        ("sweep.py", "nothing to vary"),
        ("sweep.py lora-r=-3", "lora_r is -3"),
        ("sweep.py lora-r=4 -- --data-path data/rwa", "is data/raw meant?"),
    ],
)
def test_other_programs_refuse_before_their_slow_imports(words: str, said: str):
    answered_at_once(*words.split(" "), code=2, said=said)


@pytest.mark.parametrize("program", ["compare_runs.py", "convergence.py"])
def test_what_reads_runs_needs_no_torch(program: str):
    done = python(COMMAND, program, "nope")
    assert done.returncode == 2 and "nope: no such" in done.stderr
    assert not re.search("torch|transformers|peft", done.stdout.partition("heavy:")[2])


def test_the_program_imports_nothing_that_can_wait():
    code = f"""
import gc, sys
before = gc.get_threshold()
from {SCRIPT.removesuffix(".py")} import DirectTrainer, DirectTrainingConfig
late = ("matplotlib", "rjieba", "jieba", "datasets", "pandas", "pyarrow")
print([name for name in late if name in sys.modules], gc.get_threshold() == before, gc.isenabled())
"""
    done = python(code)
    assert done.stdout.split("\n")[-2:] == ["[] True True", ""], done.stdout + done.stderr[-2000:]


def test_the_kernels_need_only_torch_transformers_and_peft():
    code = """
import sys
absent = ("jieba", "rjieba", "tyro", "datasets", "rich", "tensorboard", "matplotlib", "zstandard",
          "ahocorasick_rs", "rensa", "pyarrow", "google_crc32c")
sys.modules.update(dict.fromkeys(absent))  # importing one of them now fails
from finetuning.data import packing
from finetuning.model import attention, flops, fused_lora, loss, packed_model
from finetuning.training import optimizer
print("imported")
"""
    done = python(code)
    assert done.stdout.split("\n")[-2:] == ["imported", ""], done.stderr[-2000:]


def test_some_rooms_load_no_torch():
    """What reads data, watches a run or writes events serves without the model, as in a worker process."""
    code = """
import importlib, pathlib, sys
for room in ("readers", "monitoring", "events"):
    for path in sorted(pathlib.Path("finetuning", room).glob("*.py")):
        importlib.import_module(f"finetuning.{room}.{path.stem}")
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    done = python(code)
    assert done.stdout.split("\n")[-2:] == ["[]", ""], done.stdout + done.stderr[-2000:]
