"""What is imported when: seconds before the first step are spent on nothing that can wait.

uv run pytest -m "not long" tests/runs/test_startup.py
"""

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
sys.argv[0] = {SCRIPT!r}
try:
    runpy.run_path({SCRIPT!r}, run_name="__main__")
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
    done = python(COMMAND, *arguments)
    assert done.returncode == code, done.stderr[-2000:]
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert "heavy: []" in done.stdout


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
