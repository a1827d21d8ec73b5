"""Damaged files of every kind: samples or one clear line, no traceback, no hang over 5 s, no gigabyte.

FUZZ_SECONDS=1200 runs it for a night.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fuzz_readers import fuzz

ROOT = Path(__file__).parents[2]


def test_damaged_files_give_a_result_or_a_clear_error(tmp_path):
    assert fuzz(4, seed=1, folder=tmp_path) > 50


@pytest.mark.long
def test_damaged_files_for_a_minute():
    """In a process of its own, with a seed of its own."""
    seconds = os.environ.get("FUZZ_SECONDS", "60")
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.fuzz_readers", seconds],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
