"""The picture of docs/recipes.md: held-out loss by learning rate, and what the distance from the base costs.

uv run python -m benchmarks.learning.picture benchmarks/results/learning*.jsonl docs/images/learning_rates.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.learning.tables import (
    Result,
    above_best,
    gauge_points,
    held_out,
    of,
    of_the_base,
    rate_of,
    read,
)


def draw(results: Sequence[Result]) -> Figure:
    """Two panels: above the best of its row by rate, and the change of the loss on general text by KL."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_rate, by_distance = figure.subplots(1, 2)
    _losses(by_rate, of(results, "rate", "cpu_rate"))
    _distances(by_distance, gauge_points(of_the_base(results), "Unseen_General_Loss"))
    return figure


def _losses(axes: Axes, results: Sequence[Result]) -> None:
    def row_of(result: Result) -> tuple[str, str, int]:
        trial = result["trial"]
        return trial["experiment"], trial["data"], trial["seed"]

    for row in dict.fromkeys(map(row_of, results)):
        tried = {rate_of(r): r for r in results if row_of(r) == row}
        rates, best = sorted(tried), min(map(held_out, tried.values()))
        experiment, data, seed = row
        place = "two processors" if experiment == "cpu_rate" else "H200"
        (line,) = axes.plot(
            rates, [100 * (held_out(tried[rate]) / best - 1) for rate in rates],
            "--" if seed == 2 else "-", marker=".", label=f"{data}, {place}, seed {seed}",
        )  # fmt: skip
        rate, share = above_best(tried)
        if share is not None:
            axes.plot(rate, 100 * share, "*", markersize=13, color=line.get_color())
    axes.set(
        xscale="log", ylim=(-1, 20), xlabel="learning rate (stars: the automatic one)",
        ylabel="held-out loss above the row's best, %",
    )  # fmt: skip
    axes.legend(fontsize=8)


def _distances(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.plot(*zip(*points, strict=True), "o", markersize=5, alpha=0.7)
    axes.set(
        xlabel="KL(base‖tuned) on the gauge's half of the general text",
        ylabel="loss on the other half, against before",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw([result for path in options.results for result in read(path)]).savefig(
        options.picture, dpi=110
    )


if __name__ == "__main__":
    main()
