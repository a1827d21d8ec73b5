"""Damaged files of every kind: samples or one clear line, no traceback, no hang over 5 s, no gigabyte.

FUZZ_SECONDS says how long; CONTRIBUTING.md has the command of a night.
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


PARQUET = """
import pathlib, sys
from tests.helpers.fuzz_readers import SEEDS, check
path = pathlib.Path(sys.argv[1])
for whole in SEEDS[".parquet"]:
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for place in range(len(whole) - footer, len(whole) - 8, 2):
        for bit in (0, 1, 3):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            check(path)
"""


@pytest.mark.slow
def test_what_a_parquet_file_says_about_its_columns_may_be_wrong(tmp_path):
    """In a process of its own, which pyarrow would end without an exception."""
    done = subprocess.run(
        [sys.executable, "-c", PARQUET, str(tmp_path / "a.parquet")],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.long
def test_damaged_files_for_a_minute():
    """In a process of its own, with a seed of its own."""
    seconds = os.environ.get("FUZZ_SECONDS", "60")
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.fuzz_readers", seconds],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
