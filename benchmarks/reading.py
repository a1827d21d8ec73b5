"""What reading costs, in CPU seconds: large files of three forms, and thousands of tiny ones.

    uv run python -m benchmarks.reading                       absolute figures of this checkout
    uv run python -m benchmarks.reading --against f258937     side by side with another revision

Each reading takes place in a fresh interpreter with an empty cache and one worker; with `--against` both
checkouts take turns. The imports are not counted. The median of the repeats counts. The last line is JSON.
"""

import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[1]
READ = """
import sys, tempfile, time
from pathlib import Path
from finetuning.readers.dataset import read_samples
import pyarrow

def peak_mib():
    status = Path("/proc/self/status")  # what getrusage says holds the parent's peak, too
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)

with tempfile.TemporaryDirectory() as cache:
    before = time.process_time()
    found = read_samples([sys.argv[1]], cache_dir=Path(cache))
    spent = time.process_time() - before
assert not found.broken and len(found.samples) == int(sys.argv[2]), (len(found.samples), found.broken[:3])
print(spent, peak_mib())
"""


def records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions, reasonings and answers made of the bundled sentences; about 1,950 bytes each."""
    from finetuning.readers.dataset import read_samples

    bundled = read_samples([str(ROOT / "data" / "raw")]).samples
    thoughts = [line for s in bundled for line in s.thinking.splitlines() if line.strip()]
    answers = [line for s in bundled for line in s.answer.splitlines() if line.strip()]
    rng = random.Random(seed)
    return [
        {
            "question": f"{rng.choice(bundled).question}（{i}）",
            "thinking": "\n".join(rng.choices(thoughts, k=rng.randint(3, 12))),
            "answer": "\n".join(rng.choices(answers, k=rng.randint(2, 8))),
        }
        for i in range(count)
    ]


def write_data(folder: Path, samples: int, files: int) -> dict[str, tuple[Path, int]]:
    """Title to (path, samples) of every kind of data."""
    made = records(samples)
    turns = [
        [
            {"role": "user", "content": record["question"]},
            {
                "role": "assistant",
                "content": f"<think>\n{record['thinking']}\n</think>\n\n{record['answer']}",
            },
        ]
        for record in made
    ]
    _write_lines(folder / "qa.jsonl", made)
    _write_lines(folder / "messages.jsonl", [{"messages": messages} for messages in turns])
    with open(folder / "qa.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(made[0])
        writer.writerows(record.values() for record in made)
    tiny = folder / "tiny"
    tiny.mkdir()
    for i, record in enumerate(made[:files]):
        _write_lines(tiny / f"{i:06d}.jsonl", [{**record, "thinking": "短。", "answer": "短。"}])
    found = {
        "JSON lines": (folder / "qa.jsonl", samples),
        "messages": (folder / "messages.jsonl", samples),
        "CSV": (folder / "qa.csv", samples),
    }
    return {**found, f"{files:,} tiny files": (tiny, min(files, samples))} if files else found


def _write_lines(path: Path, items: list) -> None:
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    path.write_text(text, encoding="utf-8", newline="\n")


def reading(tree: Path, path: Path, samples: int) -> tuple[float, int]:
    """(CPU seconds, peak in MiB) of one reading by the code of a checkout."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(samples)],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{tree}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    spent, peak = done.stdout.split()
    return float(spent), int(peak)


def check_out(revision: str, folder: Path) -> Path:
    """The files of a revision in a folder of their own."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, stdout=subprocess.PIPE)
    if archive.returncode:
        sys.exit(f"git knows no revision {revision}")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def main(
    samples: int = 30_000,
    files: Annotated[int, tyro.conf.arg(help="Tiny files.")] = 3_000,
    repeats: int = 5,
    against: Annotated[str, tyro.conf.arg(help="Revision to compare with.")] = "",
) -> None:
    """Print a table; the last line is JSON."""
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        trees = {"here": ROOT}
        if against:
            trees[against] = check_out(against, Path(folder, "checkout"))
        data = Path(folder, "data")
        data.mkdir()
        for title, (path, count) in write_data(data, samples, files).items():
            rounds = [
                {name: reading(tree, path, count) for name, tree in trees.items()}
                for _ in range(repeats)
            ]
            shown, medians = [], {}
            for name in trees:
                spent = statistics.median(r[name][0] for r in rounds)
                peak = statistics.median(r[name][1] for r in rounds)
                medians[name] = {"cpu_s": round(spent, 3), "peak_mib": round(peak)}
                shown.append(f"{name} {spent:.3f} s, {peak:.0f} MiB")
            if against:
                ratio = statistics.median(r["here"][0] / r[against][0] for r in rounds)
                medians["ratio"] = round(ratio, 3)
                shown.append(f"ratio {ratio:.2f}")
            print(f"{title:>20}: {'; '.join(shown)}", flush=True)
            result[title] = medians
    print(json.dumps(result))


if __name__ == "__main__":
    tyro.cli(main)
