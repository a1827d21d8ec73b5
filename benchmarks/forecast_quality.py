"""How good are the forecasts on recorded training curves? Prints the tables of the docs.

    uv run python -m benchmarks.forecast_quality [FOLDER ...] [--chosen-on FOLDER] > docs/forecast_quality.md

A FOLDER holds csv files with the columns step, loss and, where known, learning_rate, grad_norm and epoch;
without one, the recorded curves beside the checkout. Every forecast is for the last step, made from the first
half, and so on. Controls: holding the last smoothed loss, a plain saturating fit in twenty lines, a law of
annealing (Tissue et al. 2024, arXiv:2408.11029) that is told the learning rates to come, and the score
0.7 max(0, -slope) + 0.3 / (1 + variance) of an earlier project.

--chosen-on: curves by which constants are chosen, those of the program and 199 sets that are drawn at random;
what the best three of them are worth on the other folders is printed, too.
"""

import argparse
import datetime
import itertools
import random
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import scipy
from scipy.optimize import nnls

from finetuning.common.errors import UserError
from finetuning.monitoring.convergence import ConvergenceMonitor, describe
from finetuning.monitoring.curve_fit import BELIEFS, Beliefs, Fit, fit_curve
from finetuning.monitoring.loss_curves import Curve, read_curve

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RECORDED = [DATA / "loss_curves", DATA / "loss_curves_more"]
# What the eye says: diverged, restarted, stuck, spiking, diverged.
BROKEN = ("15_llama3", "18_tinyllama", "20_chatglm6b", "26_arol", "25_lyric")
SHARES = (0.5, 0.3, 0.75)
DRAWN = {  # constants of the forecast, and values that they are drawn from
    "annealing": [(0.03, 0.03), (0.06, 0.03), (0.06, 0.06), (0.08, 0.06), (0.1, 0.06), (0.1, 0.1)],
    "stairs": [
        ((0.1, 0.06, 0.1, 0.06), (0.03, 0.2, 0.3, 0.2)),
        ((0.2, 0.03, 0.1, 0.06), (0.05, 0.2, 0.3, 0.2)),
    ],
    "wander": [(0.01, 0.03), (0.01, 0.04), (0.015, 0.05), (0.01, 0.02), (0.02, 0.06)],
    "flat": [0.1, 0.3, 0.5],
    "skip": [0.01, 0.02, 0.04],
    "recency": [0.3, 0.6, 1.0, 1.5],
    "trust": [(0.7, 0.3), (0.85, 0.3), (0.85, 0.6), (1.0, 0.05), (1.0, 0.3), (1.0, 0.6)],
    "trust_noise": [0.03, 0.1],
    "unknown": [0.015, 0.02, 0.025, 0.03],
}
SETS = 200
SHOWN = 3  # of the best sets
REACH = (0, 1, 3, 10**9)  # % of the fall by which holding is off


def losses_of(curve: Curve, upto: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rows = [p for p in curve.points if "Training/Loss" in p]
    rows = [p for p in rows if p["step"] <= upto * curve.total_steps]
    return np.array([p["step"] for p in rows]), np.array([p["Training/Loss"] for p in rows])


def start_and_end(curve: Curve) -> tuple[float, float]:
    """Medians of the first three losses and of the last twentieth (at least three)."""
    losses = losses_of(curve)[1]
    return float(np.median(losses[:3])), float(np.median(losses[-max(3, len(losses) // 20) :]))


def hold(steps, losses, total: float) -> float:
    return float(np.median(losses[-max(3, len(losses) // 20) :]))


def plain_fit(steps, losses, total: float) -> float:
    """Power law, exponential or constant by BIC, on at most 60 binned medians."""
    n = min(60, len(losses))
    x = np.array([part.mean() for part in np.array_split(steps, n)]) / steps[-1]
    y = np.array([np.median(part) for part in np.array_split(losses, n)])

    def bic(residual, parameters):
        return n * np.log((residual**2).mean() + 1e-12) + parameters * np.log(n)

    found = [(bic(y - np.median(y), 1), float(np.median(y)))]
    shapes = (
        (lambda x, c, a, k: c + a * np.exp(-k * x), (y[-1], y[0] - y[-1], 3.0)),
        (lambda x, c, a, k: c + a * (x + 1e-9) ** -k, (y[-1], 0.1, 0.5)),
    )
    for shape, guess in shapes:
        try:
            p, _ = scipy.optimize.curve_fit(shape, x, y, guess, maxfev=4000)
        except RuntimeError:  # it did not converge; the others remain
            continue
        found.append((bic(y - shape(x, *p), 3), float(shape(total / steps[-1], *p))))
    return min(found)[1]


def annealing_law(curve: Curve, upto: float) -> float | None:
    """L0 + A S1^-a - C S2, all >= 0, by least squares over the losses so far; None without learning rates.

    S1: sum of the learning rates; S2: the area of their annealing, which fades by 0.999 a step.
    """
    rows = [p for p in curve.points if "Training/Loss" in p]
    if any("Training/Learning_Rate" not in p for p in rows):
        return None
    steps = np.array([p["step"] for p in rows])
    rate = np.array([p["Training/Learning_Rate"] for p in rows])
    losses = np.array([p["Training/Loss"] for p in rows])
    apart = np.diff(steps, prepend=0.0)
    lowered, fading, area = -np.diff(rate, prepend=rate[0]), 0.0, []
    for drop, gap in zip(lowered, apart, strict=True):
        fading = fading * 0.999**gap + drop
        area.append(fading * gap)
    s1 = np.cumsum(rate * apart) + 1e-12
    s1, s2 = s1 / s1[-1], np.cumsum(area)
    s2 = s2 / max(1e-12, np.abs(s2).max())
    seen = steps <= upto * curve.total_steps
    fits = []
    for power in np.arange(0.1, 1.05, 0.1):
        design = np.stack([np.ones(len(s1)), np.maximum(s1, 1e-3) ** -power, -s2], 1)
        found, error = nnls(design[seen], losses[seen])
        fits.append((error, float(design[-1] @ found)))
    return min(fits)[1]


def old_score(losses) -> float:
    window = losses[-50:]
    slope = np.polyfit(np.arange(len(window)), window, 1)[0] if len(window) > 1 else 0.0
    return float(0.7 * max(0.0, -slope) + 0.3 / (1 + window.var()))


def watched(curve: Curve, upto: float) -> ConvergenceMonitor:
    """A monitor that has seen the first share of a run."""
    monitor = ConvergenceMonitor(curve.total_steps, curve.steps_per_epoch)
    for p in curve.points:
        if "Training/Loss" in p and p["step"] <= upto * curve.total_steps:
            monitor.observe(p["step"], p["Training/Loss"], p.get("Training/Learning_Rate"))
    return monitor


def fit_of(monitor: ConvergenceMonitor, beliefs: Beliefs = BELIEFS) -> Fit | None:
    """Its fit; None with too few losses."""
    if monitor.count < 8:
        return None
    return fit_curve(
        monitor.bins,
        start_loss=float(np.median(monitor.first)),
        now=monitor.recent[-1][0],
        total=monitor.total_steps,
        steps_per_epoch=monitor.steps_per_epoch,
        beliefs=beliefs,
    )


def forecast_row(curve: Curve, upto: float) -> dict:
    """Errors as signed percent of the total fall."""
    start, end = start_and_end(curve)
    steps, losses = losses_of(curve, upto)
    ours = fit_of(watched(curve, upto))
    if ours is None:
        return {}
    forecasts = {
        "ours": ours.forecast,
        "hold": hold(steps, losses, curve.total_steps),
        "plain": plain_fit(steps, losses, curve.total_steps),
        "law": annealing_law(curve, upto),
    }
    row = {n: None if v is None else 100 * (v - end) / (start - end) for n, v in forecasts.items()}
    return row | {
        "inside": ours.forecast_low <= end <= ours.forecast_high,
        "width": 100 * (ours.forecast_high - ours.forecast_low) / abs(start - end),
        "real": end,
        "fit": ours,
    }


def forecast_table(curves: dict[str, Curve], upto: float) -> None:
    print(f"\n### From the first {upto:.0%}\n")
    print("| curve | real end | forecast (80%) | ours | hold | plain fit | law | inside |")
    print("|---|---|---|---|---|---|---|---|")
    rows = {name: forecast_row(curve, upto) for name, curve in curves.items()}
    for name, r in rows.items():
        if r:
            fit = r["fit"]
            interval = f"{fit.forecast:.3f} ({fit.forecast_low:.3f} to {fit.forecast_high:.3f})"
            names = ("ours", "hold", "plain", "law")
            errors = " | ".join("–" if r[k] is None else f"{r[k]:+.1f}" for k in names)
            print(f"| {name} | {r['real']:.3f} | {interval} | {errors} | {'yes' * r['inside']} |")
    print(summary([row for row in rows.values() if row]))


def summary(rows: list[dict]) -> str:
    if not rows:
        return ""
    errors = {
        k: [abs(r[k]) for r in rows if r[k] is not None] for k in ("ours", "hold", "plain", "law")
    }
    medians = {k: np.median(v) if v else float("nan") for k, v in errors.items()}
    better = sum(abs(r["ours"]) < abs(r["hold"]) for r in rows)
    return (
        f"\nMedian |error|: ours {medians['ours']:.1f}%, hold {medians['hold']:.1f}%, plain fit "
        f"{medians['plain']:.1f}%, law {medians['law']:.1f}% (of {len(errors['law'])}); better than holding: "
        f"{better} of {len(rows)}; inside the 80% interval: {sum(r['inside'] for r in rows)} of {len(rows)}, "
        f"its median width {np.median([r['width'] for r in rows]):.1f}%."
    )


def drawn_sets() -> list[Beliefs]:
    """The constants of the program, and random ones."""
    rng = random.Random(0)
    drawn = ({name: rng.choice(values) for name, values in DRAWN.items()} for _ in range(SETS - 1))
    return [BELIEFS, *(Beliefs(**values) for values in drawn)]


def judged_rows(curves: dict[str, Curve], beliefs: Beliefs) -> dict[float, list[dict]]:
    """What a set of constants is worth on each curve, by the share that is seen."""
    rows: dict[float, list[dict]] = {share: [] for share in SHARES}
    for curve in curves.values():
        start, end = start_and_end(curve)
        for upto, own in rows.items():
            fit = fit_of(watched(curve, upto), beliefs)
            if fit:
                level = hold(*losses_of(curve, upto), curve.total_steps)
                own.append(judged(fit, start, end, 100 * abs(level - end) / abs(start - end)))
    return rows


def chosen_table(chosen_on: dict[str, Curve], folders: list[dict[str, Curve]]) -> None:
    """Constants that are chosen on some curves, on others."""
    sets = drawn_sets()
    found = [judged_rows(chosen_on, beliefs) for beliefs in sets]
    costs = [np.mean([row["cost"] for own in rows.values() for row in own]) for rows in found]
    order = np.argsort(costs)
    print(
        f"{SETS} sets of constants, the program's among them, in the order of what they are worth on "
        f"{len(chosen_on)} curves; and what the best of them are worth on all others.\n"
    )
    print("| constants | curves | from | median error | better than holding | inside | width |")
    print("|---|---|---|---|---|---|---|")
    for index in dict.fromkeys([0, *order[:SHOWN]]):
        place = int(np.flatnonzero(order == index)[0]) + 1
        others = [judged_rows(curves, sets[index]) for curves in folders]
        parts = {f"chosen on, {len(chosen_on)}": found[index]}
        if index == 0:
            names = (f"folder {n}, {len(curves)}" for n, curves in enumerate(folders, 1))
            parts |= dict(zip(names, others, strict=True))
        together = {share: [row for rows in others for row in rows[share]] for share in SHARES}
        parts[f"all others, {sum(map(len, folders))}"] = together
        for name, rows in parts.items():
            what = f"number {place}" + ", the program's" * int(index == 0)
            for upto in SHARES:
                print(unseen_row(what, name, upto, rows[upto]))
    print()


def reach_table(folders: list[dict[str, Curve]]) -> None:
    """How often the forecast is better than holding, by how far holding is off."""
    rows = [judged_rows(curves, BELIEFS) for curves in folders]
    print("| from | holding is off by | curves | forecast is better |")
    print("|---|---|---|---|")
    for upto in SHARES:
        every = [row for own in rows for row in own[upto]]
        for low, high in itertools.pairwise(REACH):
            own = [row["better"] for row in every if low <= row["held"] < high]
            told = f"over {low}%" if high == REACH[-1] else f"{low} to {high}%"
            print(f"| {upto:.0%} | {told} | {len(own)} | {sum(own)} ({np.mean(own):.0%}) |")


def judged(fit: Fit, start: float, end: float, held: float) -> dict:
    """Error and width in percent of the fall, and what both cost: large errors count by their logarithm."""
    error = 100 * abs(fit.forecast - end) / abs(start - end)
    width = 100 * (fit.forecast_high - fit.forecast_low) / abs(start - end)
    outside = max(0.0, error - width / 2)
    cost = 8 * np.log1p(error) + 0.1 * min(width + 10 * outside, 150) + 4 * (error > held + 0.3)
    return {
        "error": error,
        "width": width,
        "inside": outside == 0,
        "better": error < held,
        "held": held,
        "cost": cost,
    }


def unseen_row(chosen: str, forecast: str, upto: float, rows: list) -> str:
    rows = [row for row in rows if row]
    share = {k: sum(row[k] for row in rows) for k in ("better", "inside")}
    error, width = (np.median([row[k] for row in rows]) for k in ("error", "width"))
    counts = " | ".join(f"{share[k]} of {len(rows)} ({share[k] / len(rows):.0%})" for k in share)
    return f"| {chosen} | {forecast} | {upto:.0%} | {error:.1f}% | {counts} | {width:.1f}% |"


def score_table(curves: dict[str, Curve], number: int) -> None:
    print(f"\n## Folder {number}: score along the run, and the alerts\n")
    print(
        "–: up to ten losses, not known yet. The old score, in brackets, is not bounded and ",
        end="",
    )
    print("does not rise.\n")
    print("| curve | 25% | 50% | 75% | 100% | alerts |")
    print("|---|---|---|---|---|---|")
    for name, curve in curves.items():
        results = [describe(curve, upto) for upto in (0.25, 0.5, 0.75, 1.0)]
        old = [old_score(losses_of(curve, upto)[1]) for upto in (0.25, 0.5, 0.75, 1.0)]
        ours = ["–" if r["score"] is None else f"{r['score']:.2f}" for r in results]
        cells = [f"{score} ({o:.2f})" for score, o in zip(ours, old, strict=True)]
        alerts = ", ".join(results[-1]["alerts"]) or "none"
        print(f"| {name} | {' | '.join(cells)} | {alerts} |")


def cost(curve: Curve) -> float:
    """Milliseconds of processor time per logged step, as a run asks, fits included, over the whole run."""
    monitor = ConvergenceMonitor(curve.total_steps)
    rows = [p for p in curve.points if "Training/Loss" in p]
    begin = time.process_time()
    for p in rows:
        monitor.observe(p["step"], p["Training/Loss"], p.get("Training/Learning_Rate"))
        if monitor.is_due():
            monitor.scalars()
    return 1000 * (time.process_time() - begin) / len(rows)


def curves_of(folder: Path) -> dict[str, Curve]:
    """The csv files of a folder; those with a negative loss are left out."""
    curves = {}
    for path in sorted(folder.glob("*.csv")):
        try:
            curves[path.stem] = read_curve(path)
        except UserError:
            continue
    if not curves:
        sys.exit(f"{folder} holds no csv files")
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=RECORDED, metavar="FOLDER")
    parser.add_argument("--chosen-on", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    folders = [curves_of(folder) for folder in options.folders]
    today = datetime.date.today()
    print("# Forecasts on recorded runs\n")
    given = " FOLDER" * len(options.folders) + " --chosen-on FOLDER" * bool(options.chosen_on)
    print(f"`uv run python -m benchmarks.forecast_quality{given}`, ", end="")
    print(f"{today}; numpy {np.__version__}, scipy {scipy.__version__}.")
    print("Errors in percent of the total fall, + is too high.")
    falling = [{n: c for n, c in f.items() if not n.startswith(BROKEN)} for f in folders]
    with warnings.catch_warnings():  # the plain fit has no covariance at times; only it warns
        warnings.simplefilter("ignore", scipy.optimize.OptimizeWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        print("\n## On curves that the constants have not seen\n")
        if options.chosen_on:
            chosen_table(curves_of(options.chosen_on), falling)
        reach_table(falling)
        for number, curves in enumerate(falling, 1):
            print(f"\n## Folder {number}: forecast of the last step, with the program's constants")
            for upto in SHARES:
                forecast_table(curves, upto)
    for number, curves in enumerate(folders, 1):
        score_table(curves, number)
    every = [curve for curves in folders for curve in curves.values()]
    costs = [cost(curve) for curve in every]
    print(
        f"\nCost: {np.median(costs):.1f} ms of one core per logged step; {max(costs):.1f} ms in the shortest."
    )


if __name__ == "__main__":
    main()
