"""A program of ours in this process, as if it had been started from the command line."""

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from finetuning.common import process


@dataclass(frozen=True)
class Done:
    """What a program printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def run_program(path: Path, *arguments: str, cwd: Path) -> Done:
    """Run the file as `__main__` in the folder `cwd`; imports that are done already cost nothing."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        mock.patch.object(process, "exit_process", sys.exit),  # this process is not the program's
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())
