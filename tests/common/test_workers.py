"""Worker processes import only what their task needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

LIGHT = """
import sys
import torch_of_the_program

if __name__ == "__main__":
    from finetuning.analysis.facts import observe_span
    from finetuning.common.workers import in_order
    from finetuning.readers.sample import Sample

    samples = [Sample(question="问", thinking="想", answer="答")]
    jobs = [(samples, 0, 1)]
    (facts,) = in_order(observe_span, jobs, 1)
    assert facts.counts["samples"] == 1
    names = ("torch", "transformers", "torch_of_the_program", "pandas", "scipy", "matplotlib")
    found = f"[n for n in {names} if n in __import__('sys').modules]"
    (there,) = in_order(eval, [(f"(__import__('finetuning.analysis.facts'), {found})[1]",)], 1)
    assert there == [], there
    main = sys.modules["__main__"]
    assert main.__file__ == sys.argv[0] and main.__spec__ is None
"""


def test_workers_import_neither_the_program_nor_torch(tmp_path):
    (tmp_path / "torch_of_the_program.py").write_text("")
    (tmp_path / "program.py").write_text(LIGHT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
