"""How fast the statistics are, against the obvious single-threaded way, in one interleaved run.

    python -m benchmarks.stats_throughput                       stages, and the whole on 2 workers
    python -m benchmarks.stats_throughput --memory 1000 10000 100000    peak memory by samples

The obvious way to the same numbers: jieba with HMM for the words, one `in` per term and alias, the
same components and keys in a plain loop. Both ways read the same samples in turn, the median of
the rounds counts. The last line on stdout is JSON with `speedup_vs_naive` and `mb_per_second`.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import jieba
import tyro

from finetuning.analysis import crypto_terms, text_quality
from finetuning.analysis import facts as analysis_facts
from finetuning.analysis import statistics as analysis_statistics
from finetuning.data import near_duplicates
from finetuning.readers.dataset import read_samples
from finetuning.readers.sample import Sample

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jieba", "rjieba", "ahocorasick-rs", "rensa", "numpy", "scipy")


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    """Samples of the length and words of the bundled Q&A: its sentences, drawn anew."""
    bundled = read_samples([str(ROOT / "data" / "raw")]).samples
    answers = [line for s in bundled for line in s.answer.splitlines() if line.strip()]
    thoughts = [line for s in bundled for line in s.thinking.splitlines() if line.strip()]
    rng = random.Random(seed)
    return [
        Sample(
            question=f"{rng.choice(bundled).question}（{i}）",
            thinking="\n".join(rng.choices(thoughts, k=rng.randint(3, 12))),
            answer="\n".join(rng.choices(answers, k=rng.randint(2, 8))),
            source="made.jsonl",
            line=i + 1,
        )
        for i in range(count)
    ]


def text_of(sample: Sample) -> str:
    return f"{sample.question}\n{sample.thinking}\n{sample.answer}"


def naive_terms(text: str) -> set[str]:
    """One search per surface."""
    lowered = text.lower()
    return {
        term.name
        for term in crypto_terms.load_terms().values()
        if any(surface.lower() in lowered for surface in (term.name, *term.aliases))
    }


def naive_way(samples: list[Sample]) -> None:
    """`observe` with jieba's default words and an `in` loop over the terms."""
    fast_segment, fast_terms = text_quality.segment, crypto_terms.find_terms
    text_quality.segment = jieba.lcut
    crypto_terms.find_terms = lambda text: Counter(naive_terms(text))
    try:
        analysis_facts.observe(samples)
    finally:
        text_quality.segment, crypto_terms.find_terms = fast_segment, fast_terms


def stages() -> dict[str, tuple[Callable, Callable | None]]:
    """Name: (ours, the obvious way) per text."""
    return {
        "segmentation": (text_quality.segment, jieba.lcut),
        "terms": (crypto_terms.find_terms, naive_terms),
        "quality components": (text_quality.quality_components, None),
        "citations": (crypto_terms.citation_conflicts, None),
        "duplicate keys": (near_duplicates.text_key, None),
        "shingles": (near_duplicates.shingles, None),
    }


def seconds(function: Callable, *arguments, clock: Callable = time.perf_counter) -> float:
    start = clock()
    function(*arguments)
    return clock() - start


def loop(function: Callable, texts: list[str]) -> None:
    for text in texts:
        function(text)


def report_stages(texts: list[str], rounds: int) -> None:
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{'stage':<20}{'MB/s':>8}{'samples/s':>12}{'obvious MB/s':>14}{'ratio':>8}")
    for name, (ours, obvious) in stages().items():
        fast, slow = [], []
        for _ in range(rounds):
            fast.append(seconds(loop, ours, texts))
            slow += [seconds(loop, obvious, texts)] if obvious else []
        took = statistics.median(fast)
        line = f"{name:<20}{megabytes / took:>8.1f}{len(texts) / took:>12.0f}"
        if slow:
            other = statistics.median(slow)
            line += f"{megabytes / other:>14.1f}{other / took:>8.1f}"
        print(line)


def whole(samples: list[Sample], workers: int, rounds: int) -> dict[str, float]:
    """The pass over all samples, the same work in three ways, interleaved; near duplicates, for
    which there is no obvious way below n², apart."""
    ours, obvious, single, near, cpu = [], [], [], [], []
    for number in range(rounds):
        ours.append(seconds(the_pass, samples, workers))
        single.append(seconds(the_pass, samples, 1))
        texts = near_duplicates.Texts(samples, near_duplicates.pair_text)
        near.append(seconds(near_duplicates.near_duplicate_clusters, texts))
        part = samples[:: max(1, len(samples) // 1500)]  # it is slow; a share of them will do
        obvious.append(seconds(naive_way, part) * len(samples) / len(part))
        # Processor time of one process each, for a machine that is not idle.
        slow = seconds(naive_way, part, clock=time.process_time)
        cpu.append(slow / seconds(the_pass, part, 1, clock=time.process_time))
        print(
            f"round {number + 1}: {workers} workers {ours[-1]:.2f} s, one {single[-1]:.2f} s,"
            f" obvious way {obvious[-1]:.2f} s; near duplicates {near[-1]:.2f} s"
        )
    megabytes = sum(len(text_of(s).encode()) for s in samples) / 1e6
    took = statistics.median(ours)
    return {
        "speedup_vs_naive": statistics.median(obvious) / took,
        "speedup_of_one_process": statistics.median(obvious) / statistics.median(single),
        "speedup_of_one_process_in_cpu_time": statistics.median(cpu),
        "mb_per_second": megabytes / took,
        "samples_per_second": len(samples) / took,
        "naive_mb_per_second": megabytes / statistics.median(obvious),
        "samples": len(samples),
        "megabytes": megabytes,
        "workers": workers,
        "near_duplicate_mb_per_second": megabytes / statistics.median(near),
    }


def the_pass(samples: list[Sample], workers: int) -> None:
    facts = analysis_facts.Facts()
    for part in analysis_statistics.observed(samples, workers):
        facts.merge(part)


def peak_memory_mb(count: int) -> float:
    """Peak resident memory of the program in a process of its own, on a JSONL file of that size."""
    import psutil

    folder = Path(os.environ.get("TMPDIR", "/tmp" if os.name == "posix" else "."))
    path = folder / f"stats_memory_{os.getpid()}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, count, 10_000):
            for s in make_samples(min(10_000, count - start), seed=start):
                row = {
                    "question": f"{s.question}{start}",
                    "reasoning": s.thinking,
                    "answer": s.answer,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    command = [sys.executable, str(ROOT / "dataset_stats.py"), str(path), "--json"]
    try:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder) as process:
            watched, peak = psutil.Process(process.pid), 0
            while process.poll() is None:
                try:
                    peak = max(peak, watched.memory_info().rss)
                except psutil.NoSuchProcess:
                    break
                time.sleep(0.02)
    finally:
        path.unlink()
    return peak / 1e6


def main(
    samples: int = 20_000,
    rounds: int = 3,
    workers: int = 2,
    memory: Annotated[tuple[int, ...], tyro.conf.arg(help="Sample counts to measure.")] = (),
) -> None:
    """Print machine, stages and the whole; the last line is JSON."""
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    jieba.setLogLevel("ERROR")
    jieba.initialize()
    made = make_samples(samples)
    loop(text_quality.segment, ["预热"])
    report_stages([text_of(s) for s in made[:1500]], rounds)
    result = whole(made, workers, rounds)
    if memory:
        result["peak_memory_mb"] = {str(count): peak_memory_mb(count) for count in memory}
    print(json.dumps(result))


if __name__ == "__main__":
    tyro.cli(main)
