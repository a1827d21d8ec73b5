"""What the search for near duplicates costs, in CPU seconds, for texts that resemble each other in five ways.

    uv run python -m benchmarks.near_duplicates

Each search takes place in a fresh interpreter; its imports and the texts are not counted. Up to 10,000 texts
the join is exact where that compares few pairs; beyond, MinHash proposes them. The last line is JSON.
"""

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[1]
SIGNS = [chr(0x4E00 + i) for i in range(2000)]
SEARCH = """
import sys, time
from benchmarks.near_duplicates import texts_of
from finetuning.data.near_duplicates import near_duplicate_clusters
import rensa, scipy.sparse.csgraph

texts = texts_of(sys.argv[1], int(sys.argv[2]))
before = time.process_time()
found = near_duplicate_clusters(texts)
print(time.process_time() - before, len(set(found.tolist())))
"""


def _text(drawn: random.Random, length: int) -> str:
    return "".join(drawn.choices(SIGNS, k=length))


def _slots(slots: int, fixed: int, filled: Callable[[random.Random, int], str]) -> Callable:
    """Texts of one frame, whose slots are filled anew for each."""
    drawn = random.Random(1)
    frame = [_text(drawn, fixed) for _ in range(slots)]
    return lambda i, rng: "".join(part + filled(rng, slot) for slot, part in enumerate(frame))


def _phrases() -> Callable[[random.Random, int], str]:
    drawn = random.Random(2)
    phrases = [[_text(drawn, 12) for _ in range(3)] for _ in range(20)]
    return lambda rng, slot: rng.choice(phrases[slot])


def _arithmetic(i: int, rng: random.Random) -> str:
    numbers = [rng.randint(10, 99) for _ in range(3)]
    return "请计算{}乘以{}再加上{}，结果等于多少，请写出过程".format(*numbers)


_SAME = _text(random.Random(3), 395)
KINDS: dict[str, Callable[[int, random.Random], str]] = {
    "random": lambda i, rng: _text(rng, 400),
    "form letters, 20 slots of three phrases": _slots(20, 20, _phrases()),
    "one line of arithmetic, other numbers": _arithmetic,
    "one text, a number at its end": lambda i, rng: f"{_SAME}{i:06d}",
    "one pattern with 60 slots": _slots(60, 20, lambda rng, slot: _text(rng, 6)),
}
"""The i-th text of each kind."""


def texts_of(kind: str, count: int) -> list[str]:
    """So many texts of a kind, the same each time."""
    rng = random.Random(4)
    return [KINDS[kind](i, rng) for i in range(count)]


def measured(kind: str, count: int) -> tuple[float, int]:
    """CPU seconds of a search, and the clusters that it found."""
    command = [sys.executable, "-c", SEARCH, kind, str(count)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    spent, clusters = done.stdout.split()
    return float(spent), int(clusters)


def main(
    counts: Annotated[tuple[int, ...], tyro.conf.arg(help="how many texts")] = (
        2500,
        10_000,
        40_000,
    ),
) -> None:
    """The command above."""
    print(
        "| texts | characters |",
        *(f" {count:,} |" for count in counts),
        " exponent | clusters |",
        sep="",
    )
    print("|---" * (len(counts) + 4), "|", sep="")
    results = {}
    for kind in KINDS:
        found = [measured(kind, count) for count in counts]
        seconds, clusters = zip(*found, strict=True)
        exponent = math.log(seconds[-1] / seconds[0]) / math.log(counts[-1] / counts[0])
        results[kind] = {"cpu_s": dict(zip(counts, seconds, strict=True)), "exponent": exponent}
        length = round(sum(map(len, texts_of(kind, 100))) / 100)
        cells = [
            kind,
            f"{length:,}",
            *(f"{s:.1f}" for s in seconds),
            f"{exponent:.2f}",
            f"{clusters[-1]:,}",
        ]
        print("|", " | ".join(cells), "|", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    tyro.cli(main)
