"""How good are forecast, score and alerts on recorded loss curves? Prints the tables of the docs.

    uv run python -m benchmarks.forecast_quality [FOLDER] > docs/forecast_quality.md

FOLDER holds csv files with the columns step, loss and, where known, learning_rate and grad_norm;
without it, the recorded curves beside the checkout. Every forecast is for the last step, made from
the first half. Controls: holding the last smoothed loss, a plain saturating fit in twenty lines,
and the score 0.7 max(0, -slope) + 0.3 / (1 + variance) of an earlier project.
"""

import datetime
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import scipy

from finetuning.monitoring.convergence import ConvergenceMonitor, describe
from finetuning.monitoring.loss_curves import Curve, read_curve

RECORDED = Path(__file__).resolve().parents[2] / "shared" / "data" / "loss_curves"
BROKEN = ("15", "18", "20", "26")  # what the eye says: diverged, restarted, stuck, spiking


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


def old_score(losses) -> float:
    window = losses[-50:]
    slope = np.polyfit(np.arange(len(window)), window, 1)[0] if len(window) > 1 else 0.0
    return float(0.7 * max(0.0, -slope) + 0.3 / (1 + window.var()))


def forecast_row(curve: Curve, upto: float) -> dict:
    """Errors as signed percent of the total fall."""
    start, end = start_and_end(curve)
    steps, losses = losses_of(curve, upto)
    ours = describe(curve, upto)
    if ours["forecast"] is None:
        return {}
    controls = {"hold": hold, "plain": plain_fit}
    forecasts = {name: f(steps, losses, curve.total_steps) for name, f in controls.items()}
    forecasts["ours"] = ours["forecast"]
    row = {name: 100 * (value - end) / (start - end) for name, value in forecasts.items()}
    inside = ours["forecast_low"] <= end <= ours["forecast_high"]
    return (
        row
        | {"inside": inside, "negative": ours["forecast_low"] < 0, "real": end}
        | {k: ours[k] for k in ("forecast", "forecast_low", "forecast_high")}
    )


def forecast_table(curves: dict[str, Curve], upto: float) -> None:
    print(f"\n## Forecast of the last step from the first {upto:.0%}\n")
    print("Errors in percent of the total fall, + is too high.\n")
    print("| curve | real end | forecast (80%) | ours | hold | plain fit | inside |")
    print("|---|---|---|---|---|---|---|")
    rows = {name: forecast_row(curve, upto) for name, curve in curves.items()}
    for name, r in rows.items():
        if r:
            interval = f"{r['forecast']:.3f} ({r['forecast_low']:.3f} to {r['forecast_high']:.3f})"
            errors = " | ".join(f"{r[k]:+.1f}" for k in ("ours", "hold", "plain"))
            print(f"| {name} | {r['real']:.3f} | {interval} | {errors} | {'yes' * r['inside']} |")
    print(summary([row for row in rows.values() if row]))


def summary(rows: list[dict]) -> str:
    if not rows:
        return ""
    medians = {k: np.median([abs(r[k]) for r in rows]) for k in ("ours", "hold", "plain")}
    better = sum(abs(r["ours"]) < abs(r["hold"]) for r in rows)
    close = sum(abs(r["ours"]) <= 15 for r in rows)
    return (
        f"\nMedian |error|: ours {medians['ours']:.1f}%, hold {medians['hold']:.1f}%, plain "
        f"fit {medians['plain']:.1f}%; within 15%: {close} of {len(rows)}; better than holding: "
        f"{better} of {len(rows)}; inside the 80% interval: {sum(r['inside'] for r in rows)} of "
        f"{len(rows)}; below zero: {sum(r['negative'] for r in rows)}."
    )


def score_table(curves: dict[str, Curve]) -> None:
    print("\n## Score along the run, and the alerts\n")
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
    """Milliseconds of processor time per logged step, fit included, at the run's full length."""
    monitor = ConvergenceMonitor(curve.total_steps)
    for point in curve.points:
        if "Training/Loss" in point:
            monitor.observe(
                point["step"], point["Training/Loss"], point.get("Training/Learning_Rate")
            )
    last, begin = monitor.recent[-1], time.process_time()
    for extra in range(1, 101):
        monitor.observe(last[0] + extra, last[1], last[2])
        monitor.scalars()
    return 10 * (time.process_time() - begin)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDED
    curves = {path.stem: read_curve(path) for path in sorted(folder.glob("*.csv"))}
    if not curves:
        sys.exit(f"{folder} holds no csv files")
    today = datetime.date.today()
    print("# Forecasts on recorded runs\n")
    print("`uv run python -m benchmarks.forecast_quality > docs/forecast_quality.md`, ", end="")
    print(f"{today}; numpy {np.__version__}, scipy {scipy.__version__}.")
    falling = {n: c for n, c in curves.items() if n[:2] not in BROKEN}
    with warnings.catch_warnings():  # the plain fit has no covariance at times; only it warns
        warnings.simplefilter("ignore", scipy.optimize.OptimizeWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        for upto in (0.5, 0.3, 0.75):
            forecast_table(falling, upto)
    score_table(curves)
    longest = max(curves.values(), key=lambda c: len(c.points))
    print(f"\nCost: {cost(longest):.1f} ms of one core per logged step, at any length of the run.")


if __name__ == "__main__":
    main()
