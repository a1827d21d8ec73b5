"""An export that is killed leaves nothing under its name, or all of it; and it does not hinder the next one.

uv run --extra gguf pytest -m "not long" tests/runs/test_export_kill.py
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest

from export import main
from tests.helpers.ranks import on_ranks, results_of

pytest.importorskip("gguf", reason="needs the package gguf: uv run --extra gguf")

POINTS = 10
NAMES = {"hf": "merged", "gguf": "model.gguf", "ollama": "served"}


def export_until(arguments: list[str], place: str, point: int) -> tuple[int, int]:
    """Exit code of an export, and how often it touched a file below `place`; it dies at touch `point`."""
    touches = 0

    def touched(event: str, values: tuple) -> None:
        nonlocal touches
        if any(
            isinstance(value, (str, bytes, os.PathLike)) and place in str(value) for value in values
        ):
            touches += 1
            if touches == point:
                os.kill(os.getpid(), signal.SIGKILL)

    from gguf import GGUFWriter

    write = GGUFWriter.write_tensor_data
    GGUFWriter.write_tensor_data = lambda writer, *data: (
        sys.audit("tensor", place),
        write(writer, *data),
    )
    sys.addaudithook(touched)
    return main(arguments), touches


def content(place: Path) -> dict[str, str]:
    """Name below the place -> digest of what is there."""
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_a_killed_export_is_whole_or_not_there(kind: str, adapter: Path, tmp_path: Path):
    def arguments(folder: Path) -> list[str]:
        output = folder / NAMES[kind]
        return [
            "--adapter",
            str(adapter),
            "--output",
            str(output),
            "--format",
            kind,
            "--device",
            "cpu",
        ]

    whole = tmp_path / "whole"
    whole.mkdir()
    ((code, touches),) = results_of(on_ranks(0, export_until, arguments(whole), str(whole), -1))
    assert code == 0 and touches > POINTS
    expected, seen = content(whole / NAMES[kind]), []
    for number in range(POINTS):
        point = 1 + number * (touches - 1) // (POINTS - 1)
        folder = tmp_path / str(number)
        folder.mkdir()
        (ended,) = on_ranks(0, export_until, arguments(folder), str(folder), point)
        assert ended.exit_code == -signal.SIGKILL
        seen.append((folder / NAMES[kind]).exists())
        assert not seen[-1] or content(folder / NAMES[kind]) == expected
        if seen[-1]:
            continue
        assert main(arguments(folder)) == 0
        assert content(folder / NAMES[kind]) == expected
        assert [path.name for path in folder.iterdir()] == [NAMES[kind]], "nothing is left behind"
    assert seen == sorted(seen) and not seen[-2], "the name comes last"
