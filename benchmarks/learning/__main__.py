"""What teaches and what forgets, on a real small model: rates, batches, ranks, thinking, anchor, replay.

    uv run python -m benchmarks.learning FOLDER --out learning.jsonl          # minutes on a large GPU
    uv run python -m benchmarks.learning FOLDER --out learning.jsonl --only rate "updates docs"
    uv run python -m benchmarks.learning FOLDER --out learning.jsonl --few 2  # two steps: does it run?
    uv run python -m benchmarks.learning.tables learning.jsonl                # tables of what is there

FOLDER: a chat model without thinking, such as SmolLM2-135M-Instruct. Every trial trains it on one data set
with one seed through the program's own parts, in one of several processes that share the GPU. A result is
appended to the file when its trial is done, and a second start does only what is missing.
"""

import finetuning.common.process  # noqa: F401, I001  before torch
import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.learning.data_sets import write_all
from benchmarks.learning.experiments import experiments, shortened
from benchmarks.learning.trial import Place, Trial, guarded, make_thinking_base, names


def ready(trials: Iterable[Trial], place: Place) -> list[Trial]:
    """Those whose model is there."""
    return [t for t in trials if (place.model_of(t.model) / "config.json").exists()]


def run_all(
    trials: list[Trial], place: Place, out: Path, *, workers: int, seconds: float
) -> tuple[int, int]:
    """Run them side by side until the time is over; how many are done, and how many failed."""
    deadline, waiting = time.monotonic() + seconds, list(trials)
    running: dict[Future, Trial] = {}
    done = failed = 0
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        while (waiting or running) and time.monotonic() < deadline:
            for trial in ready(waiting, place)[: workers - len(running)]:
                waiting.remove(trial)
                running[pool.submit(guarded, trial, place)] = trial
            if not running:
                print(f"{len(waiting)} trials wait for a model that no trial has made", flush=True)
                break
            finished, _ = wait(
                running, max(0.0, deadline - time.monotonic()), return_when=FIRST_COMPLETED
            )
            for future in finished:
                trial, result = running.pop(future), future.result()
                done, failed = done + 1, failed + ("error" in result)
                with open(out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
                print(f"{seconds - deadline + time.monotonic():6.1f} s  {told(result)}", flush=True)
    finally:
        processes = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
    return done, failed


def told(result: dict[str, Any]) -> str:
    """A line about a result."""
    if "error" in result:
        return f"{result['name']}: {result['error']}\n{result['trace']}"
    before, after, seconds = result["before"], result["after"], result["seconds"]
    shown = ("Eval/Loss", "Forgetting/KL_General", "Unseen_General_Loss")
    changes = (f"{n} {before[n]:.3f} -> {after[n]:.3f}" for n in shown if n in after)
    text = f"{result['name']}: {', '.join(changes)}"
    if given := result.get("answers"):
        text += f"; thinking {given['thinking']}, right {given['right']} of {given['questions']}"
    return f"{text} ({seconds['to_train']} + {seconds['training']} s, {seconds['all']} in all)"


def done_already(out: Path) -> set[str]:
    """Names of the trials whose results are in the file."""
    if not out.exists():
        return set()
    results = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    return {result["name"] for result in results if "error" not in result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/learning"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument(
        "--light", action="store_true", help="without the losses on other data sets"
    )
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of trial names")
    parser.add_argument("--few", type=int, default=0, help="steps of each trial, to see if it runs")
    options = parser.parse_args()

    place = Place(options.model.resolve(), options.work, options.device, options.light)
    write_all(place.work / "data", share=0.1 if options.few else 1.0)
    make_thinking_base(place.model, place.model_of("thinking_base"))
    trials = experiments()
    if options.few:
        trials = shortened(trials, options.few, 4)
    names(trials)
    over = done_already(options.out)
    wanted = [t for t in trials if t.name.startswith(tuple(options.only)) and t.name not in over]
    started = time.monotonic()
    counts = run_all(wanted, place, options.out, workers=options.workers, seconds=options.seconds)
    summary = {
        "trials": len(wanted),
        "done": counts[0],
        "failed": counts[1],
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
