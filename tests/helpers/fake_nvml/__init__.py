"""Builds the fake `libnvidia-ml.so.1` and puts it under the real nvidia-ml-py bindings."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")


def build(folder: Path, *flags: str) -> Path:
    """Compile into `folder`; skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.name == "nt":
        pytest.skip("no C compiler here to build the fake libnvidia-ml.so.1")
    library = folder / "libnvidia-ml.so.1"
    options = ["-shared", "-fPIC", "-Wall", "-Werror", *flags]
    subprocess.run([compiler, *options, "-o", str(library), str(SOURCE)], check=True)
    return library


class State:
    """The file that the fake reads at every call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, int] = {}
        self.set()

    def clear(self) -> None:
        """Two healthy boards, as at the beginning."""
        self._lines = {}
        self.set()

    def set(self, lines: dict[str, int] | None = None) -> None:
        """Add or change lines; seen whole by the next call, since a rename is atomic."""
        self._lines |= lines or {}
        fresh = self._path.with_suffix(".new")
        fresh.write_text("".join(f"{key} {value}\n" for key, value in self._lines.items()))
        fresh.replace(self._path)


@contextlib.contextmanager
def installed(library: Path, state_path: Path) -> Iterator[State]:
    """`pynvml` calls the fake inside, and whatever it called before outside."""
    bindings = (pynvml.nvmlLib, dict(pynvml._nvmlGetFunctionPointer_cache))
    environment = os.environ.get("FAKE_NVML_STATE")
    state = State(state_path)
    os.environ["FAKE_NVML_STATE"] = str(state_path)
    pynvml.nvmlLib = ctypes.CDLL(str(library))
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        yield state
    finally:
        pynvml.nvmlLib, cache = bindings
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml._nvmlGetFunctionPointer_cache.update(cache)
        if environment is None:
            del os.environ["FAKE_NVML_STATE"]
        else:
            os.environ["FAKE_NVML_STATE"] = environment
