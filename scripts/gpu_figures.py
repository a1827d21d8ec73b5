"""The figures of the check for a GPU: which are compared, what got worse, what they say about the goals."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
OF_THE_LOSS = 0.01  # FP8's held-out loss may be that far from bf16's, a share
OF_LOGGING = 0.005  # share of the speed that logging may take


@dataclass(frozen=True)
class Figure:
    """A number that is compared.

    Args:
        more: more is better.
        apart: two runs on one machine differ by less; a share of the number, or with `whole` as it is.
        steady: it is the same beside other work.
    """

    more: bool = False
    apart: float = 0.03
    whole: bool = False
    steady: bool = False

    def change(self, old: float, new: float) -> float:
        """From old to new, as `apart` is meant."""
        if self.whole:
            return new - old
        return (new - old) / abs(old) if old else 0.0

    def is_worse(self, change: float) -> bool:
        """Whether that is more than chance."""
        return change < -self.apart if self.more else change > self.apart


# By the end of their name.
FIGURES = {
    **dict.fromkeys(
        (
            *("tokens_per_second", "mfu_percent", "mfu_of_data_sheet_percent"),
            *("matmul_tflops", "matmul_teraflops", "tflops", "copy_tb_s"),
        ),
        Figure(more=True),
    ),
    **dict.fromkeys(("step_ms", "passes_ms", "host_ms", "gpu_busy_ms", "kernels"), Figure()),
    **dict.fromkeys(("us", "ms_of_all_layers"), Figure()),
    **dict.fromkeys(("first_batch_seconds", "next_batch_seconds"), Figure()),
    "seconds_to_first_logged_step": Figure(apart=0.1),  # a file system takes part
    "logging_percent": Figure(apart=0.05, whole=True),
    **dict.fromkeys(("peak_gib", "reserved_gib"), Figure(steady=True)),
    "plan_error": Figure(apart=0.01, whole=True, steady=True),
    **dict.fromkeys(("held_out_first", "held_out_last"), Figure(apart=0.01, steady=True)),
}


def without_rates(facts: dict) -> dict:
    """The facts, and of the figures that are compared only those that neighbours leave alone."""
    return {
        name: without_rates(value) if isinstance(value, dict) else value
        for name, value in facts.items()
        if name not in FIGURES or FIGURES[name].steady
    }


def figures(record: dict, path: str = "") -> dict[str, float]:
    """`phase: place of the number` -> number, of those that are compared."""
    found: dict[str, float] = {}
    for name, value in record.items():
        place = f"{path}{': ' if path else ''}{name}"
        if isinstance(value, dict):
            found |= figures(value, place)
        elif name in FIGURES and isinstance(value, int | float):
            found[place] = value
    return found


def worse(now: dict[str, float], before: dict[str, float]) -> list[str]:
    """A line for every figure that is worse by more than chance."""
    lines = []
    for place in sorted(now.keys() & before.keys()):
        figure, old, new = FIGURES.get(place.rpartition(": ")[2]), before[place], now[place]
        if figure and figure.is_worse(change := figure.change(old, new)):
            lines.append(f"{place}: {old:.4g} -> {new:.4g} ({change:+.1%})")
    return lines


# -----------------------------------------------------------------------------
# The goals


def verdicts(phases: dict[str, dict]) -> list[str]:
    """What several numbers say together, a line each; nothing where one is missing."""
    return [*_memory(phases), *_losses(phases), *_logging(phases)]


def _memory(phases: dict[str, dict]) -> Iterator[str]:
    for name, facts in phases.items():
        if facts.get("planned_gib") and facts.get("peak_gib"):
            peak, planned = facts["peak_gib"], facts["planned_gib"]
            yield f"{name}: peak {peak:.2f} GiB, planned {planned:.2f} ({peak / planned - 1:+.1%})"


def _losses(phases: dict[str, dict]) -> Iterator[str]:
    """Of the same step only: a run that was cut short has no last loss."""
    plain, fp8 = (phases.get(f"run {name}2048", {}).get("held_out", {}) for name in ("", "FP8 "))
    step = max(plain.keys() & fp8.keys(), key=int, default=None)
    if step is not None and int(step):
        apart = fp8[step] / plain[step] - 1
        answer = "yes" if abs(apart) <= OF_THE_LOSS else "NO"
        yield (
            f"FP8's held-out loss within {OF_THE_LOSS:.0%} of bf16's at step {step}: {answer}, "
            f"{fp8[step]:.4f} against {plain[step]:.4f} ({apart:+.2%})"
        )


def _logging(phases: dict[str, dict]) -> Iterator[str]:
    always, seldom = (
        phases.get(f"run 2048 logged {word}", {}).get("wall_tokens_per_second")
        for word in ("always", "seldom")
    )
    if always and seldom:
        cost = 1 - always / seldom
        answer = "yes" if cost <= OF_LOGGING else "NO"
        yield (
            f"logging every step takes {OF_LOGGING:.1%} of the speed at most: {answer}, "
            f"{always:,.0f} against {seldom:,.0f} tokens/s ({cost:.2%})"
        )


# -----------------------------------------------------------------------------
# Keeping


def gpu_name() -> str:
    """Of the first GPU, by the driver's own program, or "none"."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none"
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.splitlines() or ["none"])[0].strip()


def kept_file(gpu: str) -> Path:
    """Where the figures of such a GPU are kept: h100.json."""
    word = gpu.lower().replace("nvidia", "").split()[0] if gpu.strip() else "unknown"
    return RESULTS / f"{re.sub(r'[^a-z0-9]', '', word)}.json"


def kept_figures(gpu: str) -> dict[str, float]:
    """The last ones of such a GPU."""
    file = kept_file(gpu)
    return json.loads(file.read_text(encoding="utf-8"))["figures"] if file.exists() else {}


def keep(path: Path) -> None:
    """Put a result's figures in the place of the last ones; what was not measured stays."""
    record = json.loads(path.read_text(encoding="utf-8"))
    target = kept_file(record["gpu"])
    kept = (
        json.loads(target.read_text(encoding="utf-8"))
        if target.exists()
        else {"figures": {}, "commits": {}}
    )
    kept["figures"] |= record["figures"]
    kept["commits"] |= dict.fromkeys(record["figures"], record["commit"])
    kept |= {name: record[name] for name in ("gpu", "versions", "date") if record[name]}
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(record['figures'])} figures of {record['gpu']} are now in {target}")
