"""One trouble after the other, each with the alert that it raises and the step at which it does."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tb_logger
from finetuning.monitoring.system_monitor import SystemMonitor
from finetuning.runs.directory import new_run
from finetuning.runs.record import RunRecord
from tests.helpers.checked_values import Ledger, Values, by_step, table_rows


@dataclass
class Scene:
    """Values of some tags, step after step, and the alert that they raise; other tags are absent."""

    rows: list[dict[str, float]]
    raised: dict[str, list[int]]  # alert -> 0 or 1 at each step


def of(tag: str, *values: float) -> list[dict[str, float]]:
    return [{tag: float(value)} for value in values]


def plain_scenes() -> list[Scene]:
    """Where each step says by itself, or with a few before it, what is wrong."""
    parts = ("Data", "Forward_Backward")
    starved = [
        {f"Throughput/Step_Seconds_{part}": s for part, s in zip(parts, pair, strict=True)}
        for pair in [(0.4, 0.6)] * 5 + [(0.0, 1.0)] * 5
    ]
    memory = "Memory/GPU_"
    return [
        Scene(
            of("GPU_3/Temperature_C", 84, 86, 83, 81, 86, 79, 84),
            {"GPU_Overheat": [0, 1, 1, 1, 1, 0, 0]},  # until it is below 80
        ),
        Scene(
            [
                *of(f"{memory}Utilization_Percent", 94, 96, 93, 91),
                *of("Memory/Host_Percent", 96, 50),
                {f"{memory}Peak_MB": 77.0, f"{memory}Total_MB": 80.0},
                {f"{memory}Peak_MB": 40.0, f"{memory}Total_MB": 80.0},
            ],
            {"OOM_Risk": [0, 1, 1, 0, 1, 0, 1, 0]},  # until it is below 92
        ),
        Scene(
            of("Throughput/Straggler_Percent", *[30] * 5, *[10] * 3),
            {"Slow_Rank": [0, 0, 0, 0, 1, 1, 1, 0]},  # the median of five
        ),
        Scene(
            of("Forgetting/General_Loss", 2.0, 1.8, 2.03, 2.05, 2.06, 2.0),
            {"Forgetting": [0, 0, 0, 1, 1, 0]},  # 2% above the first
        ),
        Scene(
            of("GPU_1/Utilization_Percent", *[70] * 10, *[100] * 4),
            {"Low_GPU_Utilization": [0] * 9 + [1, 1, 1, 1, 0]},  # the mean of ten
        ),
        Scene(starved, {"Data_Starvation": [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]}),  # the median of ten
        Scene(
            [
                *of("Monitoring/NonFinite_Steps", 0, 2, 2),
                *of("Training/Gradient_Norm", math.inf, *[1] * 98, 2.2, 5.1, 1),
            ],
            {
                "NonFinite": [0, 1, 0, 1, *[0] * 101],
                "Gradient_Explosion": [0] * 103 + [1, 0],  # five times the usual
            },
        ),
        Scene(
            of("Eval/Think_Length_Ratio", 1, 1.2, 1, 0.61, 0.59, 0.7),
            {"Thinking_Collapse": [0, 0, 0, 0, 1, 0]},
        ),
    ]


def scenes_of_learning() -> list[Scene]:
    """What is learned by heart, forgotten, contradicted, left at zero, clipped."""
    source, adapter = "Training/By_Source/", "LoRA/{}/Update_Ratio"
    worse = [{f"{source}a": 1.0, f"{source}b": b} for b in [1.0] * 20 + [1.3] * 8 + [1.0] * 4]
    ratios = [{adapter.format("q_proj"): 0.1, adapter.format("k_proj"): k} for k in (0, 0, 0, 0.05)]
    return [
        Scene(of("Training/Token_Accuracy", *[0.996] * 10, 0.99), {"Saturation": [0] * 9 + [1, 0]}),
        # The mean log of ten: seven are 0.3 higher.
        Scene(worse, {"Source_Regression": [0] * 26 + [1] * 5 + [0]}),
        Scene(ratios, {"Dead_Adapter": [0, 1, 1, 0]}),
        # Two of fifty are not longer than 1: the scenes before left 1, 2.2, 5.1, 1 as the last four.
        Scene(
            of("Training/Gradient_Norm", *[6] * 50, 1, 1, 1),
            {"Clipping": [0] * 45 + [1] * 7 + [0]},
        ),
    ]


def scene_of_losses() -> Scene:
    """A spike; a jump that is a spike at first and a divergence later; no progress for 200 losses; then some,
    while the held-out loss rises."""
    losses = [*[2.0] * 98, 2.49, 2.51, *[2.0] * 38, *[3.0] * 12, *[2.0] * 50]
    assert len(losses) == 200
    rows = of("Training/Loss", *losses, *[1.9] * 15, *[1.8] * 15)
    spike, divergence, stagnation = ([0] * len(rows) for _ in range(3))
    spike[99] = 1
    spike[138] = 1  # until a loss before it was as high
    divergence[140:156] = [1] * 16  # from the third on, until less than 9 of the last 15 are
    stagnation[199:207] = [
        1
    ] * 8  # until 8 of 30 are better, of which the three lowest do not count
    rows[210]["Eval/Loss"] = 1.0
    for at in (224, 226):  # twice more than 2% above the best, and the training loss has fallen
        rows[at]["Eval/Loss"] = 1.03
    rows[228]["Eval/Loss"] = 1.01
    overfitting = [0] * 226 + [1, 1] + [0] * 2
    return Scene(
        rows,
        {
            "Loss_Spike": spike,
            "Divergence": divergence,
            "Stagnation": stagnation,
            "Overfitting": overfitting,
        },
    )


def scene_of_a_leak() -> Scene:
    """4 MB more at each step; a hundred steps are enough to be sure."""
    rows = of("Memory/Host_RSS_MB", *(1000 + 4 * i for i in range(110)))
    return Scene(rows, {"Memory_Leak": [0] * 99 + [1] * 11})


# What is told once an episode: alert, its times, last value and limit.
TOLD = {
    "GPU_Overheat": (1, 86, 85),
    "OOM_Risk": (1, 96, 95),
    "Slow_Rank": (1, 30, 20),
    "Forgetting": (1, 2.05, 2.04),
    "Low_GPU_Utilization": (1, 70, 80),
    "Data_Starvation": (1, 0.4, 0.3),
    "NonFinite": (1, 2, 0),
    "Gradient_Explosion": (1, 5.1, 5),
    "Thinking_Collapse": (1, 0.59, 0.6),
    "Loss_Spike": (2, 3, 2.51 * 1.25**0.5),  # of the second: above the highest before
    "Divergence": (1, 3, 2.739),  # a tenth above the highest but one before
    "Stagnation": (1, 0, 0.01),
    "Overfitting": (1, 1.03, 1.02),
    "Memory_Leak": (1, 192, 50),  # over the 24 pairs of the last half
    "Saturation": (1, 0.996, 0.995),
    "Source_Regression": (1, 1.3**0.7 - 1, 0.2),
    "Dead_Adapter": (1, 0, 1e-7),
    "Clipping": (1, 6, 5),
}


@dataclass
class Troubles:
    """The scenes one after the other, as a run records them."""

    values: Values
    scenes: list[Scene]

    def steps(self) -> Iterator[tuple[int, Scene]]:
        """The first step of each scene."""
        first = 1
        for scene in self.scenes:
            yield first, scene
            first += len(scene.rows)


def do_troubles(ledger: Ledger, folder: Path) -> Troubles:
    run = new_run(folder)
    scenes = [*plain_scenes(), *scenes_of_learning(), scene_of_losses(), scene_of_a_leak()]
    record = RunRecord(
        run,
        tb_logger.TensorBoardLogger(run.tensorboard),
        SystemMonitor((), folder),
        resume_step=None,
        alert_state={},
        alert_actions={},
        warn=lambda text: None,
    )
    record.cite({"max_grad_norm": 1.0})
    for step, row in enumerate((row for scene in scenes for row in scene.rows), start=1):
        record.log(step, row)
    record.close("success")
    return Troubles(Values(ledger, run.tensorboard), scenes)


def alerts_at_every_step(troubles: Troubles) -> None:
    total = sum(len(scene.rows) for scene in troubles.scenes)
    active = Counter(dict.fromkeys(range(1, total + 1), 0))
    for name in TOLD:
        every = dict.fromkeys(range(1, total + 1), 0.0)
        for first, scene in troubles.steps():
            every |= by_step(scene.raised.get(name, []), first)
        active.update(every)
        begun = min(step for step, raised in every.items() if raised)
        expected = {step: raised for step, raised in every.items() if step >= begun}
        troubles.values.scalars(f"Alerts/{name}", expected)
    assert 0 < sum(map(bool, active.values())) < total, "nothing to count"
    troubles.values.scalars("Monitoring/Alerts_Active", dict(active))
    assert set(TOLD) == {t.partition("/")[2] for t in troubles.values.beginning("Alerts/")}


def the_table_of_alerts(troubles: Troubles) -> None:
    """A row a kind, in the order of their first steps; what ends for less than ten steps is told once."""
    begun = {}
    for first, scene in troubles.steps():
        for name, raised in scene.raised.items():
            starts = [
                first + i for i, now in enumerate(raised) if now and not (i and raised[i - 1])
            ]
            begun[name] = starts[: TOLD[name][0]]
    expected, rows = {}, {}
    for step, name in sorted((s, n) for n, starts in begun.items() for s in starts):
        rows[name] = [s for s in begun[name] if s <= step]
        times, value, limit = TOLD[name]
        if len(rows[name]) < times:
            value, limit = 2.51, 2.5  # a quarter above the usual
        rows[name] = (name, rows[name], value, limit)
        expected[step] = list(rows.values())
    assert len(expected) == 19, len(expected)

    def table(text: str) -> list[tuple]:
        return [
            (name, [int(step) for step in steps.split(", ")], float(value), float(limit))
            for name, times, steps, value, limit, *_ in table_rows(text)
            if int(times) == len(steps.split(", "))
        ]

    troubles.values.texts("Alerts/Table", expected, table, nearly_told)


def nearly_told(rows: list[tuple]) -> list[tuple]:
    return [
        (n, s, *(pytest.approx(x, rel=1e-3, abs=1e-9) for x in numbers)) for n, s, *numbers in rows
    ]


CHECKS = (
    alerts_at_every_step,
    the_table_of_alerts,
)
