"""Do the alerts speak where something is wrong, and only there? Prints docs/alert_quality.md; last line JSON.

    uv run python -m benchmarks.alert_quality [FOLDER ...] > docs/alert_quality.md
    uv run python -m benchmarks.alert_quality --half tune --misses

The library: healthy runs, and faults put into them, of every kind, in several strengths and shapes of run.
The healthy ones are real small runs (`alert_runs.py`), each also as resumed; runs whose loss is that of
reinforcement learning; simulated runs of two kinds of rows and of equal sources; and the recorded curves of
each FOLDER, csv files. Limits were chosen on the half "tune"; the half "judge" holds other seeds and other
curves. To each run gauges of the machine are added.

A delay counts logged points from the first at which the detector's window can be full of the fault.
"""

import argparse
import gzip
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median

from benchmarks.alert_runs import RECORDED
from finetuning.common.errors import UserError
from finetuning.monitoring.alerts import NAMES, AlertMonitor
from finetuning.monitoring.chances import least_sigmas
from finetuning.monitoring.loss_curves import read_curve

Rows = list[tuple[int, dict]]
BROKEN = ("15_llama3", "18_tinyllama_rpg", "20_chatglm6b", "25_lyric", "26_arol")  # as the eye says
INTRODUCTION = """A delay counts logged points from the first at which the detector's
window can be full of the fault, or a drift is as large as the alert's own definition asks.

The limits were chosen on the first half. Before its last run the judging half had other small runs; a spike
that was missed in one of them led to the comparison with such rows, so those runs now stand in the first
half, and others, recorded afterwards, judge. The public curves and the real faults of both halves had been
played before. The runs of two kinds of rows (five shapes, four seeds each) and of equal sources (24) are
simulated; the rules that keep them silent were made for other such runs, and no constant was chosen on
these. How far a loss must stand out to be remembered as a peak (a quarter, not an eighth), and above what
(the lower quartile of 31 losses, not the median of 7), was chosen when the spikes of both halves had been
seen: with the median, 26 of the 33 of the judging half were found. Explosions after 2 to 12 logged losses are
among the faults of `Divergence`: a loss twice the highest of the first two or three is told up to 5 points
late. `Forgetting` is a loss on general text 2% above the base's; its faults multiply that loss.

The alerts were also tried on 232 recorded curves of 187 public repositories, which had been taken by the
names of their files and not by their looks, and which no limit had seen. On 15 curves an alert came. Eleven
of these were right by the eye: 3 runs diverge, 6 are flat after their first losses, 2 spike. Four were
false: three losses in a row that are the highest of 64, which come by chance in a run of thousands (2
runs), a last digit of 0.0001 that counted as a spike, and a run that falls slowly and was called stuck. One
divergence was missed, as the rise itself was counted as noise. All but the slow fall were mended
afterwards, so these curves can't judge again.
"""
TWO_KINDS = (  # easy and hard samples, and their losses
    (48, 16, 0.5, 1.7),
    (56, 6, 0.3, 1.6),
    (70, 3, 0.4, 2.2),
    (28, 28, 0.5, 1.4),
    (230, 9, 0.2, 1.3),
)
SPIKED = (
    "23_llama32",
    "35_llms",
    "09_ft",
)  # single spikes that the eye sees: left out of the healthy


@dataclass(frozen=True)
class Run:
    """A healthy run. settings: what the monitor is told; half: "tune" or "judge"."""

    name: str
    half: str
    rows: Rows
    settings: dict = field(default_factory=lambda: {"max_grad_norm": 1.0})


@dataclass(frozen=True)
class Case:
    """A run with or without a fault: the alert that must come, those that may, and from which row on."""

    run: Run
    expected: str = ""
    strength: str = ""
    allowed: frozenset = frozenset()
    onset: int = 0


# ------------------------------------------------------------------------------------ healthy runs


def recorded_runs() -> Iterator[Run]:
    """Real small runs, the healthy ones; each also as resumed from its middle."""
    for index, run in enumerate(_recorded()):
        if run["factor"] != 1:
            continue
        rows = [(step, dict(values)) for step, values in run["rows"]]
        half = "tune" if run["seed"] in (1, 2) else "judge"
        name = f"{run['shape']} {run['seed']}"
        yield Run(name, half, _with_machine(rows, index))
        if index % 3 == 0:
            middle = len(rows) // 2
            again = [*rows[: middle + 15], *rows[middle:]]
            yield Run(f"{name}, resumed", half, _with_machine(again, index))


def _recorded() -> list[dict]:
    with gzip.open(RECORDED, "rt", encoding="utf-8") as file:
        return json.load(file)


def reinforced_runs() -> Iterator[Run]:
    """Losses around zero and norms that are 0 where all answers are alike, as GRPO logs them."""
    for seed in range(4):
        rng = random.Random(seed)
        rows: Rows = []
        for step in range(1, 301):
            nothing = rng.random() < 0.2
            norm = 0.0 if nothing else 0.2 * math.exp(0.7 * rng.gauss(0, 1))
            loss = 0.0 if nothing else 0.02 * rng.gauss(0, 1)
            rate = 1e-5 * min(step / 30, 1)
            values = {"Training/Loss": loss, "Training/Gradient_Norm": norm}
            rows.append((step, values | {"Training/Learning_Rate": rate}))
        yield Run(f"GRPO-like {seed}", ("tune", "judge")[seed % 2], _with_machine(rows, seed))


def curve_runs(folders: list[Path]) -> Iterator[Run]:
    """Recorded public curves; the first folder is for tuning, the others for judging."""
    for place, folder in enumerate(folders):
        for index, path in enumerate(sorted(folder.glob("*.csv"))):
            if path.stem.startswith((*BROKEN, *SPIKED)):
                continue
            try:
                points = read_curve(path).points
            except UserError:  # a negative loss: no curve of ours
                continue
            rows = [(int(p["step"]), {k: v for k, v in p.items() if k != "step"}) for p in points]
            half = "judge" if place else "tune"
            yield Run(path.stem, half, _with_machine(rows, index), {})


def two_kinds_runs() -> Iterator[Run]:
    """Simulated runs of one row a step, whose hard samples, few or many, lie far above a template's."""
    for place, shape in enumerate(TWO_KINDS):
        for seed in range(4):
            name = f"two kinds {shape[0]}+{shape[1]} {seed}"
            rows = _two_kinds(random.Random(100 * place + seed), *shape)
            yield Run(name, ("tune", "judge")[seed % 2], _with_machine(rows, seed))


def _two_kinds(rng: random.Random, easy: int, hard: int, low: float, high: float) -> Rows:
    """Every sample has a level of its own, that falls with each epoch, that of the easy ones faster."""
    number, rows, order, tokens = easy + hard, [], [], 0
    levels = [low * math.exp(0.2 * rng.gauss(0, 1)) for _ in range(easy)]
    levels += [high * math.exp(0.25 * rng.gauss(0, 1)) for _ in range(hard)]
    for step in range(1, 401):
        order = order or rng.sample(range(number), number)
        sample = order.pop()
        learned = (0.5 if sample < easy else 0.1) * step / number + 0.05 * rng.gauss(0, 1)
        loss = levels[sample] * math.exp(-learned) * (1 + 0.4 * math.exp(-step / 20))
        norm = math.exp(0.3 * rng.gauss(0, 1)) * (0.6 if sample < easy else 1.5)
        tokens += rng.randrange(300, 400) if sample < easy else rng.randrange(200, 900)
        values = {
            "Training/Loss": loss,
            "Training/By_Source/a.jsonl": loss,
            "Training/Gradient_Norm": norm,
            "Training/Epoch": step / number,
        }
        values |= {
            "Throughput/Tokens_Seen": float(tokens),
            "Training/Learning_Rate": 2e-4 * (1 - step / 400),
        }
        rows.append((step, values))
    return rows


def equal_sources_runs() -> Iterator[Run]:
    """Simulated runs of sources that differ in nothing but chance, some of them long."""
    for place, (sources, sigma, steps) in enumerate(
        (n, sigma, steps) for n in (3, 7) for sigma in (0.1, 0.15, 0.3) for steps in (300, 1000)
    ):
        for half, seed in (("tune", 200 + place), ("judge", 300 + place)):
            rng, rows = random.Random(seed), []
            for step in range(1, steps + 1):
                fall = 1 + 0.8 * math.exp(-step / 40)
                losses = {
                    f"Training/By_Source/{n}": fall * math.exp(sigma * rng.gauss(0, 1))
                    for n in range(sources)
                }
                values = {"Training/Loss": sum(losses.values()) / sources, **losses}
                rows.append((step, values | {"Training/Learning_Rate": 2e-4 * (1 - step / steps)}))
            yield Run(f"{sources} equal sources {sigma:g} {steps}", half, _with_machine(rows, seed))


def _with_machine(rows: Rows, seed: int) -> Rows:
    """The rows with gauges of two busy GPUs, and evaluations every 20 rows."""
    rng = random.Random(seed)
    level, made = None, []
    for i, (step, values) in enumerate(rows):
        row = dict(values)
        loss = row.get("Training/Loss")
        if loss is not None and math.isfinite(loss):
            level = loss if level is None else 0.9 * level + 0.1 * loss
        row["Memory/Host_RSS_MB"] = 6000 + 800 * (1 - math.exp(-i / 60)) + 20 * rng.gauss(0, 1)
        row["Memory/GPU_Utilization_Percent"] = 78 + rng.gauss(0, 1)
        row["Throughput/Step_Seconds_Data"] = 0.02 + 0.01 * rng.random()
        row["Throughput/Step_Seconds_Forward_Backward"] = 0.9 + 0.1 * rng.random()
        row["Throughput/Straggler_Percent"] = abs(3 * rng.gauss(0, 1))
        for gpu in range(2):
            row[f"GPU_{gpu}/Temperature_C"] = 74 + 2 * rng.gauss(0, 1)
            row[f"GPU_{gpu}/Utilization_Percent"] = 95 + 2 * rng.gauss(0, 1)
        if i % 20 == 0 and level is not None and level > 0:
            row["Eval/Think_Length_Ratio"] = 1 + 0.08 * rng.gauss(0, 1)
            row["Eval/Format_Valid_Rate"] = sum(rng.random() < 0.9 for _ in range(4)) / 4
            row["Forgetting/General_Loss"] = 1.8 * (1 - 0.05 * i / len(rows)) + 0.003 * rng.gauss(
                0, 1
            )
        made.append((step, row))
    return made


# ------------------------------------------------------------------------------------------ faults


def changed(run: Run, at: int, change: Callable[[int, dict], None], **case: object) -> Case:
    """A case whose rows from `at` on are changed by `change(rows since then, row)`."""
    rows = [(step, dict(values)) for step, values in run.rows]
    for i, (_, row) in enumerate(rows[at:]):
        change(i, row)
    settings = case.pop("settings", run.settings)
    return Case(Run(run.name, run.half, rows, settings), onset=case.pop("onset", at), **case)


def usual(run: Run, at: int, tag: str) -> float:
    """The 95th percentile of a tag's last 61 values before row `at`: the top of what is usual."""
    values = sorted(row[tag] for _, row in run.rows[:at][-61:] if row.get(tag) is not None)
    return values[int(0.95 * (len(values) - 1))]


def put(tag: str, value: float) -> Callable[[int, dict], None]:
    return lambda i, row: row.update({tag: value})


def put_once(tag: str, value: float) -> Callable[[int, dict], None]:
    return lambda i, row: row.update({tag: value}) if i == 0 else None


def scaled(row: dict, factor: float) -> None:
    """All training losses of a row, of whatever rows."""
    for tag in row:
        if tag == "Training/Loss" or tag.startswith("Training/By_"):
            row[tag] *= factor


AROUND_A_RISE = frozenset(
    {"Loss_Spike", "Gradient_Explosion", "Source_Regression", "Overfitting", "Clipping"}
)


def loss_faults(run: Run, at: int) -> Iterator[Case]:
    """Of the training loss and its gradient."""
    norm = any(row.get("Training/Gradient_Norm") for _, row in run.rows)
    top = usual(run, at, "Training/Loss")
    spiked = run.rows[at][1]["Training/Loss"]
    allowed = frozenset({"Loss_Spike"})
    for times in (2, 4, 10):

        def spike(i: int, row: dict, times: float = times) -> None:
            if i == 0:
                scaled(row, times * top / max(spiked, 1e-9))

        yield changed(run, at, spike, expected="Loss_Spike", strength=f"× {times}")

        def jump(i: int, row: dict, times: float = times) -> None:
            level = max(row["Training/Loss"], 1e-9)
            scaled(row, (times * top + 0.1 * level) / level)

        yield changed(
            run, at, jump, expected="Divergence", strength=f"jump × {times}",
            allowed=AROUND_A_RISE, onset=at + 2,
        )  # fmt: skip
    for percent in (3, 10):

        def drift(i: int, row: dict, percent: float = percent) -> None:
            scaled(row, 1 + percent / 100 * i)

        until = next(i for i in range(10_000) if level_rises(run, at, percent, i))
        if at + until + 3 < len(run.rows):
            yield changed(
                run, at, drift, expected="Divergence", strength=f"{percent}% a point",
                allowed=AROUND_A_RISE, onset=at + until,
            )  # fmt: skip
    yield changed(
        run, at, put_once("Training/Loss", math.nan), expected="NonFinite", strength="loss"
    )
    yield changed(
        run,
        at,
        put("Monitoring/NonFinite_Steps", 1.0),
        expected="NonFinite",
        strength="update left out",
    )
    if not norm:
        return
    high = usual(run, at, "Training/Gradient_Norm")
    for times in (6, 15, 60):
        one = put_once("Training/Gradient_Norm", times * high)
        yield changed(
            run, at, one, expected="Gradient_Explosion", strength=f"× {times}", allowed=allowed
        )
    usual_norm = median(
        row["Training/Gradient_Norm"] for _, row in run.rows if row.get("Training/Gradient_Norm")
    )
    late = [r.get("Training/Gradient_Norm") or 0 for _, r in run.rows]
    for times in (8, 20):
        limit = usual_norm / times
        full = next((i for i in range(50, len(late)) if clipped(late[i - 49 : i + 1], limit)), None)
        if full is not None:
            yield Case(
                Run(run.name, run.half, run.rows, {"max_grad_norm": limit}), "Clipping",
                f"usual norm × {times}", onset=full,
            )  # fmt: skip


def clipped(norms: list[float], limit: float) -> bool:
    return sum(n > limit for n in norms) >= 0.95 * len(norms) and median(norms) > 5 * limit


def early_faults(run: Run) -> Iterator[Case]:
    """An explosion after a run's first few losses."""
    places = [i for i, (_, row) in enumerate(run.rows) if row.get("Training/Loss") is not None]
    for few in (2, 3, 4, 6, 9, 12):
        top = max(run.rows[i][1]["Training/Loss"] for i in places[:few])
        for times in (2, 5):

            def explode(i: int, row: dict, times: float = times, top: float = top) -> None:
                if row.get("Training/Loss"):
                    scaled(row, (times * top + 0.1 * row["Training/Loss"]) / row["Training/Loss"])

            yield changed(
                run, places[few], explode, expected="Divergence", strength=f"× {times} after {few}",
                allowed=AROUND_A_RISE, onset=places[few] + 2,
            )  # fmt: skip


def spikes_after_an_epoch(run: Run) -> Iterator[Case]:
    """Single spikes and long gradients once every row has been seen, in the first hundred logged steps."""
    passed = [row.get("Training/Epoch", 0.0) >= 1.1 for _, row in run.rows]
    first = max(34, passed.index(True) if True in passed else len(passed))
    for at in range(first, 95, 20):
        top, level = usual(run, at, "Training/Loss"), run.rows[at][1]["Training/Loss"]
        for times in (2, 4):

            def spike(i: int, row: dict, factor: float = times * top / level) -> None:
                if i == 0:
                    scaled(row, factor)

            where = f"at row {at}"
            yield changed(run, at, spike, expected="Loss_Spike", strength=f"× {times} {where}")
        norm = 15 * usual(run, at, "Training/Gradient_Norm")
        long = put_once("Training/Gradient_Norm", norm)
        yield changed(run, at, long, expected="Gradient_Explosion", strength=f"× 15 {where}")


def level_rises(run: Run, at: int, percent: float, i: int) -> bool:
    """Has a drift come to what `Divergence` is: a mean of 15 that is 30% and beyond chance above the best?"""
    losses = [row["Training/Loss"] for _, row in run.rows if "Training/Loss" in row]
    if at + i >= len(losses):
        return True
    drifted = [x * (1 + percent / 100 * max(0, j - at)) for j, x in enumerate(losses[: at + i + 1])]
    means = [sum(sorted(drifted[j - 14 : j + 1])[1:-1]) / 13 for j in range(14, len(drifted))]
    before = drifted[-64:-15]
    centre = sum(before) / len(before)
    error = math.sqrt(sum((x - centre) ** 2 for x in before) / len(before) / 15)
    best = min(means)
    return means[-1] > best + max(0.3 * best, least_sigmas(len(drifted)) * error, 0.02 * means[0])


def stuck(run: Run, at: int) -> Iterator[Case]:
    """A loss that stays where it began, with the noise of the run."""
    rng = random.Random(at)
    first = run.rows[1][1]["Training/Loss"]
    rates = [row.get("Training/Learning_Rate") for _, row in run.rows]
    for sigma in (0.003, 0.02):

        def flat(i: int, row: dict, sigma: float = sigma) -> None:
            if "Training/Loss" in row:
                scaled(
                    row, first * math.exp(sigma * rng.gauss(0, 1)) / max(row["Training/Loss"], 1e-9)
                )
            row.pop("Eval/Loss", None)

        onset = waited(rates)
        if onset is not None and onset + 3 < len(run.rows):
            yield changed(
                run, 0, flat, expected="Stagnation", strength=f"noise {sigma:g}", onset=onset
            )


def waited(rates: list[float | None]) -> int | None:
    """The row at which a stuck run has waited long enough to be called so."""
    warm, peak, before = 0, 0.0, math.inf
    for i, rate in enumerate(rates):
        if rate is None:
            warm += 1
        else:
            warm += not rate > before
            before, peak = rate, max(peak, rate)
        spent = 1 - rate / peak if rate is not None and peak else 0.0
        if warm >= (600 if 0 < spent < 0.1 else 200) or (warm >= 40 and spent >= 0.25):
            return i
    return None


def model_faults(run: Run, at: int) -> Iterator[Case]:
    """Of what is learned and forgotten."""
    evaluations = [i for i, (_, row) in enumerate(run.rows) if "Eval/Think_Length_Ratio" in row]
    later = [i for i in evaluations if i >= at]
    for factor in (0.5, 0.3, 0.1):

        def short(i: int, row: dict, factor: float = factor) -> None:
            if "Eval/Think_Length_Ratio" in row:
                row["Eval/Think_Length_Ratio"] *= factor

        yield changed(
            run,
            at,
            short,
            expected="Thinking_Collapse",
            strength=f"length × {factor}",
            onset=later[0],
        )
    level = run.rows[at][1].get("Training/Loss") or 1.0
    for percent in (4, 10):

        def rising(i: int, row: dict, percent: float = percent) -> None:
            row.pop("Eval/Loss", None)
            if (at + i) in evaluations:
                row["Eval/Loss"] = level * (1 + percent / 100 * (at + i - later[0]) / 20)

        falls = usual(run, at, "Training/Loss") > usual(run, len(run.rows), "Training/Loss")
        if falls:
            yield changed(
                run, 0, rising if at == 0 else _from(at, rising), expected="Overfitting",
                strength=f"{percent}% an evaluation", onset=later[2],
            )  # fmt: skip
    for accuracy in (0.996, 1.0):
        yield changed(
            run, at, put("Training/Token_Accuracy", accuracy), expected="Saturation",
            strength=f"{accuracy}", onset=at + 9,
        )  # fmt: skip
    for factor in (1.1, 1.5):

        def drifted(i: int, row: dict, factor: float = factor) -> None:
            if "Forgetting/General_Loss" in row:
                row["Forgetting/General_Loss"] *= factor

        yield changed(
            run, at, drifted, expected="Forgetting", strength=f"loss × {factor}", onset=later[0]
        )
    sources = sorted({t for _, row in run.rows for t in row if t.startswith("Training/By_Source/")})
    if len(sources) > 1:
        own = [i for i in range(at, len(run.rows)) if sources[-1] in run.rows[i][1]]
        for percent in (5, 20):

            def worse(i: int, row: dict, percent: float = percent) -> None:
                if sources[-1] in row:
                    row[sources[-1]] *= 1 + percent / 100 * i

            yield changed(
                run, at, worse, expected="Source_Regression", strength=f"{percent}% a point", onset=own[5],
            )  # fmt: skip
    adapters = [
        t
        for _, row in run.rows
        for t in row
        if t.startswith("LoRA/") and t.endswith("/Update_Ratio")
    ]
    groups = sorted({t.split("/")[1] for t in adapters})
    for group in groups[:3]:

        def dead(i: int, row: dict, group: str = group) -> None:
            for tag in row:
                if tag.startswith(f"LoRA/{group}/"):
                    row[tag] = 0.0

        moved = [
            i
            for i, (_, row) in enumerate(run.rows)
            if any(row.get(t, 0) > 0 for t in set(adapters))
        ]
        yield changed(run, 0, dead, expected="Dead_Adapter", strength=group, onset=moved[1])


def _from(at: int, change: Callable[[int, dict], None]) -> Callable[[int, dict], None]:
    """The change from row `at` on; before it, rows lose their held-out losses."""

    def both(i: int, row: dict) -> None:
        if i >= at:
            change(i - at, row)
        else:
            row.pop("Eval/Loss", None)

    return both


def machine_faults(run: Run, at: int) -> Iterator[Case]:
    """Of the hardware."""
    simple = (
        ("GPU_Overheat", "GPU_1/Temperature_C", (87, 92, 99), 0),
        ("OOM_Risk", "Memory/GPU_Utilization_Percent", (95.5, 97, 99.9), 0),
        ("Slow_Rank", "Throughput/Straggler_Percent", (25, 60), 2),
        ("Low_GPU_Utilization", "GPU_1/Utilization_Percent", (60, 30), 9),
        ("Data_Starvation", "Throughput/Step_Seconds_Data", (0.6, 3.0), 5),
    )
    for expected, tag, strengths, window in simple:
        for value in strengths:
            yield changed(
                run, at, put(tag, value), expected=expected, strength=f"{value:g}", onset=at + window,
                allowed=frozenset({"Low_GPU_Utilization"}) if expected == "Data_Starvation" else frozenset(),
            )  # fmt: skip
    for rate in (4, 15):

        def leak(i: int, row: dict, rate: float = rate) -> None:
            row["Memory/Host_RSS_MB"] += rate * i

        yield changed(run, 0, leak, expected="Memory_Leak", strength=f"{rate} MB a point", onset=99)


def real_faults() -> Iterator[Case]:
    """Real runs whose learning rate was multiplied at step 150."""
    for index, run in enumerate(_recorded()):
        if run["factor"] != 1:
            rows = [(step, dict(values)) for step, values in run["rows"]]
            at = next(i for i, (step, _) in enumerate(rows) if step == 151)
            half = ("tune", "judge")[index % 2]
            yield Case(
                Run(run["shape"], half, _with_machine(rows, index)), "Divergence",
                f"learning rate × {run['factor']:g}", AROUND_A_RISE | {"NonFinite"}, at + 2,
            )  # fmt: skip


def library(folders: list[Path]) -> list[Case]:
    """All cases, the healthy ones first."""
    healthy = [*recorded_runs(), *reinforced_runs(), *curve_runs(folders)]
    simulated = [*two_kinds_runs(), *equal_sources_runs()]
    cases = [Case(run) for run in [*healthy, *simulated]]
    for index, run in enumerate(healthy):
        at = min(len(run.rows) // 2 + index % 17, len(run.rows) - 61)
        loss = "GRPO" not in run.name and "resumed" not in run.name and at > 100
        if loss and index % 4 == 0:
            cases += early_faults(run)
        if loss and index % 3 == 0:
            cases += spikes_after_an_epoch(run)
        if loss and index % 2:
            cases += [*loss_faults(run, at), *stuck(run, at)]
        if at > 100 and (index % 5 == 0 or "adapters" in run.name or "mixed" in run.name):
            cases += model_faults(run, at) if "GRPO" not in run.name else []
        if at > 100 and index % 6 == 1:
            cases += machine_faults(run, at)
    return [*cases, *real_faults()]


# ----------------------------------------------------------------------------------------- judging


def play(case: Case) -> list[tuple[int, str]]:
    """(row, alert) of all that was raised."""
    monitor = AlertMonitor(settings=case.run.settings)
    return [
        (i, alert.name)
        for i, (step, row) in enumerate(case.run.rows)
        for alert in monitor.observe(step, row, {})
    ]


def judged(cases: list[Case], show: bool) -> dict:
    """Counts per detector, {name: {"cases", "found", "false", "delays"}}; the healthy runs that are loud."""
    counts = {name: {"cases": 0, "found": 0, "false": 0, "delays": []} for name in NAMES}
    loud = []
    for case in cases:
        raised = play(case)
        own = [
            i
            for i, name in raised
            if name == case.expected and i >= min(case.onset, len(case.run.rows)) - 60
        ]
        others = {name for _, name in raised if name != case.expected and name not in case.allowed}
        for name in others:
            counts[name]["false"] += 1
        if case.expected:
            row = counts[case.expected]
            row["cases"] += 1
            row["found"] += bool(own)
            if own and case.onset >= 0:
                row["delays"].append(max(0, own[0] - case.onset))
        elif others:
            loud.append(case.run.name)
        if show and (others or (case.expected and not own)):
            places = [(i, n) for i, n in raised if n in others]
            missed = "missed" if case.expected and not own else ""
            what = f"{case.run.name} [{case.run.half}] {case.expected} {case.strength}"
            print(f"{what} onset {case.onset}: {missed} false {places}", file=sys.stderr)
    return {"counts": counts, "loud": loud, "healthy": sum(not c.expected for c in cases)}


def rates(row: dict) -> tuple[float, float, float]:
    """Precision, recall, F1."""
    spoke = row["found"] + row["false"]
    precision = row["found"] / spoke if spoke else 1.0
    recall = row["found"] / row["cases"] if row["cases"] else 1.0
    return (
        precision,
        recall,
        2 * precision * recall / (precision + recall) if precision + recall else 0.0,
    )


def summary(result: dict) -> dict:
    """Over all detectors."""
    total = {
        k: sum(row[k] for row in result["counts"].values()) for k in ("cases", "found", "false")
    }
    precision, recall, f1 = rates(total)
    delays = [d for row in result["counts"].values() for d in row["delays"]]
    late = sum(d > 3 for d in delays)
    return total | {
        "healthy": result["healthy"], "loud": result["loud"], "precision": precision, "recall": recall,
        "f1": f1, "late": late, "delays": len(delays),
    }  # fmt: skip


def table(result: dict) -> str:
    """Markdown."""
    lines = [
        "| alert | faults | found | false | precision | recall | F1 | delay, median (most) |",
        "|---" * 8 + "|",
    ]
    for name, row in result["counts"].items():
        if not row["cases"]:
            continue
        delays = row["delays"]
        delay = f"{median(delays):g} ({max(delays)})" if delays else "–"
        numbers = " | ".join(f"{value:.2f}" for value in rates(row))
        lines.append(
            f"| {name} | {row['cases']} | {row['found']} | {row['false']} | {numbers} | {delay} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Both halves, or one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, help="recorded curves: for tuning, then for judging"
    )
    parser.add_argument("--half", choices=("tune", "judge"), nargs="*", default=["tune", "judge"])
    parser.add_argument("--every", type=int, default=1, help="only each n-th case")
    parser.add_argument(
        "--misses", action="store_true", help="name every miss and false alarm on stderr"
    )
    options = parser.parse_args()
    cases = library(options.folders)[:: options.every]
    print("# Alerts on runs with and without faults\n")
    print(
        "`uv run python -m benchmarks.alert_quality FOLDER ... > docs/alert_quality.md`, ", end=""
    )
    print(f"{date.today()}, with {len(options.folders)} folders of recorded public curves;")
    print("without a FOLDER the small runs of the repository are played alone.\n")
    print(INTRODUCTION)
    record = {}
    for half in options.half:
        result = judged([case for case in cases if case.run.half == half], options.misses)
        record[half] = total = summary(result)
        print(
            f"## The half {'for tuning' if half == 'tune' else 'that judges'}\n\n{table(result)}\n"
        )
        print(
            f"{total['cases']} faults: precision {total['precision']:.3f}, recall {total['recall']:.3f}, F1 "
            f"{total['f1']:.3f}; {total['late']} of {total['delays']} found ones more than 3 points late. "
            f"{total['healthy']} healthy runs, {len(total['loud'])} with an alert.\n"
        )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
