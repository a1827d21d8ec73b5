"""Tables of what `benchmarks.learning` has found: Markdown, and one JSON object as the last line.

uv run python -m benchmarks.learning.tables learning.jsonl
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.evaluation.exactness import wilson
from finetuning.training.peak_rate import automatic_rate

HIDDEN_SIZE = 576  # of SmolLM2-135M
Result = Mapping[str, Any]
Rows = list[list[str]]
SAME = ("max_seq_length", "precision")  # in all trials of a data set on two processors
UNSEEN = {
    "Unseen_General_Loss": "general, other half",
    "Docs_Loss": "docs",
    "Crypto_Loss": "crypto",
}
SHOWN_LOSSES = {"Forgetting/General_Loss": "general, gauge's half"} | UNSEEN


def read(path: Path) -> list[Result]:
    """Results without an error, the newest of a name."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        if "error" not in result:
            found[result["name"]] = result
    return list(found.values())


def setting(result: Result, name: str, default: Any = None) -> Any:
    """A setting of the trial."""
    return result["trial"]["settings"].get(name, default)


def of(results: Iterable[Result], *experiments: str, **fields: Any) -> list[Result]:
    """Those of some experiments whose trial has these fields."""
    return [
        r
        for r in results
        if r["trial"]["experiment"] in experiments
        and all(r["trial"][name] == value for name, value in fields.items())
    ]


def held_out(result: Result) -> float:
    return result["after"]["Eval/Loss"]


def kl(result: Result) -> float:
    return result["after"].get("Forgetting/KL_General", math.nan)


def markdown(title: str, header: Sequence[str], rows: Rows) -> str:
    """A titled table; nothing where it has no rows."""
    if not rows:
        return ""
    lines = [f"### {title}\n", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def rate_of(result: Result) -> float:
    """The peak learning rate, also where it was left to the rule of its time."""
    rate = setting(result, "learning_rate")
    return result["facts"]["learning_rate"] if rate == "auto" else rate


def rule_of(result: Result) -> float:
    """The rate that the rule gives today for such a training."""
    size, trains_all = result["facts"], setting(result, "lora_r") == 0
    often = size["epochs"], size["tokens_per_update"]
    return automatic_rate(HIDDEN_SIZE, *often, trains_all=trains_all)


def by_rate(results: Sequence[Result], groups: Callable[[Result], str], title: str) -> str:
    """Held-out loss, KL and unseen general loss, a row a group and a column a rate; the best is bold.

    The last column is the automatic rate and, where it was tried, how far above the best its loss is.
    """
    rates = sorted(set(map(rate_of, results)))
    rows = []
    for group in dict.fromkeys(map(groups, results)):
        mine = {rate_of(r): r for r in results if groups(r) == group}
        best = min(map(held_out, mine.values()))
        first = next(iter(mine.values()))["before"]["Eval/Loss"]
        cells = [_measured(mine[rate], best) if rate in mine else "" for rate in rates]
        rows.append([group, f"{first:.3f}", *cells, _automatic(mine)])
    header = ["", "before", *(f"{rate:g}" for rate in rates), "auto"]
    return markdown(title, header, rows)


def _measured(result: Result, best: float) -> str:
    loss, general = held_out(result), result["after"]["Unseen_General_Loss"]
    mark = "**" if loss == best else ""
    return f"{mark}{loss:.3f}{mark} / {kl(result):.3f} / {general:.3f}"


def above_best(mine: Mapping[float, Result]) -> tuple[float, float | None]:
    """The automatic rate, and how far above the best its loss is, as a share; None where it was not tried."""
    rate = rule_of(next(iter(mine.values())))
    best = min(map(held_out, mine.values()))
    return rate, held_out(mine[rate]) / best - 1 if rate in mine else None


def _automatic(mine: Mapping[float, Result]) -> str:
    rate, share = above_best(mine)
    return f"{rate:g}" if share is None else f"{rate:g}, {100 * share:+.1f}%"


def by_passes(results: Sequence[Result]) -> str:
    """Held-out loss, a row a data set and a column a rate; the best is bold, the automatic rate is last."""
    rates = sorted(set(map(rate_of, results)))
    rows = []
    by_often = sorted(results, key=lambda r: r["facts"]["epochs"])
    for data in dict.fromkeys(r["trial"]["data"] for r in by_often):
        mine = {rate_of(r): r for r in of(results, "cpu_passes", data=data)}
        best = min(map(held_out, mine.values()))
        losses = {rate: f"{held_out(result):.3f}" for rate, result in mine.items()}
        cells = [losses.get(rate, "") for rate in rates]
        cells = [f"**{cell}**" if cell == f"{best:.3f}" else cell for cell in cells]
        first = next(iter(mine.values()))
        size, before = first["facts"], first["before"]["Eval/Loss"]
        counts = (f"{size['epochs']:.1f}", f"{size['tokens_per_update']:.0f}")
        rows.append([f"cpu_passes {data}", *counts, f"{before:.3f}", *cells, _automatic(mine)])
    names = (f"{rate:g}" for rate in rates)
    header = ["data", "passes", "tokens an update", "before", *names, "auto"]
    return markdown("Passes: held-out loss", header, rows)


def group_of(result: Result) -> str:
    """Data set, seed and what else is set."""
    size = result["facts"]
    words = _told(result["trial"], ("learning_rate", "max_steps"))
    return f"{', '.join(words)} ({size['updates']} × {size['samples_per_update']:.1f} samples)"


def of_the_base(results: Sequence[Result]) -> list[Result]:
    """Trials of the base whose other half of the general text was not trained."""
    return [r for r in results if r["trial"]["model"] == "base" and not setting(r, "replay")]


def gauge_points(results: Sequence[Result], text: str) -> list[tuple[float, float]]:
    """KL on general text and the change of the loss on another, of the trials that have measured both."""
    measured = (r for r in results if text in r["after"])
    pairs = [(kl(r), r["after"][text] - r["before"][text]) for r in measured]
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def gauge_fit(results: Sequence[Result], text: str) -> dict[str, float]:
    """How well KL on general text tells the change of the loss on another: R² of a quadratic, and of a
    line in the root of KL."""
    points = gauge_points(results, text)
    if len(points) < 4:
        return {}
    x, y = np.array(points).T
    return {"runs": len(points), **{f"R2_{n}": _r2(f, y) for n, f in _curves(x).items()}}


def _curves(x: np.ndarray) -> dict[str, np.ndarray]:
    one = np.ones_like(x)
    root = np.sqrt(np.maximum(x, 0))
    return {
        "line": np.stack([one, x], 1),
        "quadratic": np.stack([one, x, x**2], 1),
        "root": np.stack([one, root, x], 1),
    }


def _r2(columns: np.ndarray, y: np.ndarray) -> float:
    fitted = columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    return float(1 - ((y - fitted) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def share(count: int, of_all: int) -> str:
    """A rate with Wilson's 95% interval."""
    low, high = wilson(count, of_all)
    return f"{100 * count / of_all:.0f}% ({100 * low:.0f}–{100 * high:.0f})"


def thinking_rows(results: Sequence[Result]) -> Rows:
    """What answer-only data do to a model that thinks."""
    rows = []
    for result in results:
        given, trial = result["answers"], result["trial"]
        rows.append(
            [
                f"{trial['experiment']} {trial['data']}",
                str(trial["seed"]),
                str(setting(result, "empty_thinking", "")),
                f"{setting(result, 'learning_rate'):g}",
                share(given["thinking"], given["questions"]),
                share(given["right"], given["questions"]),
                f"{given['thinking_tokens']:.0f}",
                f"{held_out(result):.3f}",
            ]
        )
    return rows


def changes(results: Sequence[Result], title: str) -> str:
    """Held out, KL, and the changes of the losses on other texts, a row a trial; a text that a replay trains
    has none."""
    shown = [n for n in SHOWN_LOSSES if any(n in r["after"] for r in results)]
    rows = []
    for result in results:
        before, after, cells = result["before"], result["after"], []
        for name in shown:
            trained = setting(result, "replay") and name == "Unseen_General_Loss"
            cells.append("trained" if trained else f"{after[name] - before[name]:+.3f}")
        rows.append([settings_of(result), f"{held_out(result):.3f}", f"{kl(result):.3f}", *cells])
    header = ["", "held out", "KL", *(f"Δ {SHOWN_LOSSES[name]}" for name in shown)]
    return markdown(title, header, rows)


def main() -> None:
    results = read(Path(sys.argv[1]))
    told = "held-out loss / KL on general text / loss on general text that is not the gauge's"
    beside = of(results, "cpu_rate", data="crypto_answers", seed=1)
    plain = [r for r in beside if setting(r, "learning_rate") == 1e-3]  # without a replay
    docs = of(results, "cpu_rate", data="docs", seed=1)
    fast = [r for r in docs if setting(r, "learning_rate") == 2e-3]  # without an anchor
    sections = [
        by_rate(of(results, "rate"), group_of, f"Rates, adapters of rank 16: {told}"),
        by_rate(of(results, "full"), group_of, "Rates, all weights"),
        by_rate(of(results, "updates"), group_of, "Fewer and more updates"),
        by_rate(of(results, "batch"), group_of, "Samples per update"),
        by_rate(of(results, "rank"), group_of, "Ranks"),
        by_passes(of(results, "cpu_passes")),
        by_rate(of(results, "cpu_rate"), group_of, f"Rates, two processors: {told}"),
        by_rate(of(results, "cpu_batch"), group_of, "Four rows an update, two processors"),
        by_rate(of(results, "cpu_rank"), group_of, "Ranks, two processors"),
        changes(of(results, "anchor"), "Anchor"),
        changes([*fast, *of(results, "cpu_anchor")], "Anchor, two processors"),
        changes(of(results, "replay"), "Replay of docs"),
        changes([*plain, *of(results, "cpu_replay")], "Replay of general text, two processors"),
        markdown(
            "Thinking: valid and right answers of held-out sums, 95% intervals",
            ["data", "seed", "empty block", "rate", "thinks", "right", "tokens", "held out"],
            thinking_rows(of(results, "teach", "thinking", "cpu_teach", "cpu_thinking")),
        ),
    ]
    print("\n".join(filter(None, sections)))
    fits = {text: gauge_fit(of_the_base(results), text) for text in UNSEEN}
    print(json.dumps({"trials": len(results), "gauge": fits}))


def settings_of(result: Result) -> str:
    """Data set, seed and all that the trial sets."""
    trial = result["trial"]
    return ", ".join([*_told(trial), *[f"replay {trial['replay']}"] * bool(trial["replay"])])


def _told(trial: Mapping[str, Any], hidden: Sequence[str] = ()) -> list[str]:
    """Data set, seed and settings."""
    hidden = (*hidden, *SAME) if trial["experiment"].startswith("cpu_") else hidden
    words = (f"{k} {v}" for k, v in trial["settings"].items() if k not in hidden)
    return [trial["data"], f"seed {trial['seed']}", *words]


if __name__ == "__main__":
    main()
