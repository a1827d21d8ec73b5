"""A run of the real loop on a pretended machine: two ranks, GPUs, and losses on a known curve."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, combinations
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from unittest import mock

import direct_finetuning_with_existing_modules as program
from finetuning.config import DirectTrainingConfig
from finetuning.runs.directory import new_run
from finetuning.runs.metrics import MetricsProcessor
from finetuning.runs.plan import plan_run
from finetuning.runs.record import RunRecord
from finetuning.runs.session import SessionStart, logger_options
from tb_logger import TensorBoardLogger
from tests.helpers import fake_nvml
from tests.helpers.checked_values import Ledger, Values, table_rows
from tests.helpers.hand_machine import MB, HandMachine, Reading
from tests.helpers.pretended_gpus import (
    Device,
    NoEvaluator,
    ScriptedEngine,
    ScriptedStep,
    cuda,
    two_ranks,
)
from tests.helpers.tiny_model import make_tiny_data
from tests.runs.metric_values.cpu_run import host_reading

GPUS = [f"GPU-{n:08x}-0000-0000-0000-000000000000" for n in (1, 2)]
LAST, HALF, ROW = 240, 160, 768  # steps; every second is logged. At HALF the forecast is read
FLOOR, FALL = 1.0, 2.0
# The curve's time in steps. At HALF 78 bins of the loss make one unit of the fit, in which the member of
# its family that is this curve has a tau of 0.05 * 120 ** (6 / 15).
TAU = 2 * 78 * 0.05 * 120 ** (6 / 15)
SPIKES, INFINITE, DIVIDED, GRAPH = (180, 192, 204), (101, 150), 120, 100
POINTS = range(2, LAST + 1, 2)


def curve(step: int) -> float:
    """The loss of a logged step and of the one before it."""
    logged = step + step % 2
    return (FLOOR + FALL * math.exp(-logged / TAU)) * (1.5 if logged in SPIKES else 1.0)


def scripted(step: int) -> ScriptedStep:
    norm = math.inf if step in INFINITE else 1.0 + (step * 7 % 5) / 8
    return ScriptedStep(
        own_loss=curve(step) - 0.25,
        other_loss=curve(step) + 0.25,
        norm=norm,
        data=0.25 + step % 3 / 8,
        own=1.0 + step % 4 / 8,
        waiting=0.5,
        optimizer=0.125 + step % 2 / 8,
        flops=1e14 * (1 + step % 5),
    )


def memory_of(read: int) -> dict[str, int]:
    """MB; the pressure rises through all its levels."""
    free = 2000 * (4 - read % 5) + 100 * (read % 7)
    return {
        "free": free,
        "total": 10000,
        "allocated": 3000 + read,
        "reserved": 4000 + read,
        "peak": 5000 + 10 * (read % 9),
    }


THROTTLED = {"SW_Power_Cap": 0x04, "HW_Slowdown": 0x08, "SW_Thermal": 0x20}
THROTTLED |= {"HW_Thermal": 0x40, "Power_Brake": 0x80}


def gpu_lines(gpu: int, read: int, look: int) -> dict[str, int]:
    """What the driver says of a GPU; the reasons to slow down take turns, two at once at most."""
    bits = [*THROTTLED.values()]
    reasons = 0x1 | (bits[(read + gpu) % 5] if look == 0 and read % 2 else 0)
    if look == 1 and read % 3 == 0:
        reasons |= bits[read % 5] | bits[(read + 2) % 5]
    return {
        f"utilization.{gpu}": (40 + read % 30, 90 - read % 11)[look] + gpu,
        f"memory_used.{gpu}": (20 + read % 40 + look) << 30,
        f"temperature.{gpu}": (50 + read % 13, 58 - read % 7)[look] + gpu,
        f"power.{gpu}": 200_000 + 1000 * read + 500 * look,
        f"clock.{gpu}": 1500 + read + 10 * look,
        f"throttle.{gpu}": reasons,
        f"ecc_corrected.{gpu}": read // 2 + look,
        f"ecc_uncorrected.{gpu}": read // 7 + look,
        f"energy.{gpu}": 10**12 + energy(gpu, read, look),
    }


def energy(gpu: int, read: int, look: int) -> int:
    """mJ since some time; later reads use more."""
    return (2 * read + look) ** 2 * 1000 + gpu * read * 700


def gpu_looks() -> list[list[Reading]]:
    """Two looks before each read, the one at the end included."""
    return [
        [
            dataclasses.replace(
                host_reading(read, look), nvml=gpu_lines(0, read, look) | gpu_lines(1, read, look)
            )
            for look in range(2)
        ]
        for read in range(len(POINTS) + 1)
    ]


@dataclass
class GpuRun:
    """A run of the real loop over scripted steps."""

    values: Values
    tokens: list[int]  # of each step

    def logged(self, value: Callable[[int], float]) -> dict[int, float]:
        return {step: value(step) for step in POINTS}


def do_gpu_run(ledger: Ledger, folder: Path, model: Path, cache: Path, library: Path) -> GpuRun:
    data = make_tiny_data(folder / "data.jsonl", LAST)
    config = DirectTrainingConfig(
        model_name=str(model),
        data_path=(str(data),),
        eval_fraction=0.0,
        max_seq_length=ROW,
        packing=False,
        num_epochs=1,
        logging_steps=2,
        save_steps=0,
        lr_schedule="constant",
        warmup_ratio=0.0,
        nonfinite="skip",
        device="cpu",
        output_dir=str(folder / "out"),
        cache_dir=str(cache),
    )
    trainer = program.DirectTrainer(config, quiet=True)
    with mock.patch("finetuning.training.forecast.matmul_rate", return_value=1e9):  # 0.2 s
        trainer.plan = plan_run(config, trainer.dist, trainer.terminal)
    assert trainer.plan.steps.num_steps == trainer.plan.steps.steps_per_epoch == LAST
    trainer.dist, trainer.logs_late, trainer.reads_are_free = two_ranks(), True, False
    device, run = Device(), new_run(folder / "out")
    with (
        fake_nvml.installed(library, folder / "state") as nvml,
        HandMachine(gpu_looks(), nvml).installed() as machine,
        cuda(device, lambda: memory_of(machine.reads - 1)),
    ):
        options = {"resume_step": None, "alert_state": {}, "alert_actions": {}, "warn": print}
        start = SessionStart(None, "", trainer.state)
        logger = TensorBoardLogger(**logger_options(start, run, config, trainer.plan, print))
        trainer.record = RunRecord(run, logger, machine.monitor(GPUS), **options)
        trainer.metrics = MetricsProcessor(trainer.plan, trainer.dist, trainer.state)
        trainer.evaluator = NoEvaluator()
        trainer.engine = engine = ScriptedEngine(scripted, device, trainer)
        measures = {
            DIVIDED: lambda: setattr(trainer.state, "micro_batch_splits", 1),
            GRAPH: lambda: setattr(engine, "captured", SimpleNamespace(peak_bytes=5050 * MB)),
        }
        engine.before = lambda step: measures.get(step, lambda: None)()
        trainer.loop()
        trainer.finish()
        trainer.record.close("success")
    lengths = trainer.plan.data.train.tokens.lengths
    steps = [trainer.plan.steps[step].documents for step in range(1, LAST + 1)]
    return GpuRun(Values(ledger, run.tensorboard), [int(lengths[list(d)].sum()) for d in steps])


def losses_of_two_ranks(gpus: GpuRun) -> None:
    gpus.values.scalars("Training/Loss", gpus.logged(curve))
    finite = [curve(step) for step in range(1, LAST + 1) if step not in INFINITE]
    gpus.values.scalars("Epoch/Average_Loss", {LAST: fmean(finite)})
    seen = list(accumulate(gpus.tokens))
    gpus.values.scalars("Throughput/Tokens_Seen", gpus.logged(lambda step: seen[step - 1]))
    full = 100 * sum(gpus.tokens) / (LAST * ROW)  # a document a row
    gpus.values.scalars("Throughput/Packing_Efficiency_Percent", gpus.logged(lambda _: full))


def steps_without_a_finite_gradient(gpus: GpuRun) -> None:
    norms = gpus.logged(lambda step: scripted(step).norm)
    assert norms[150] == math.inf
    gpus.values.scalars("Training/Gradient_Norm", norms)
    pairs = {step: [scripted(s).norm for s in (step - 1, step)] for step in POINTS}
    highest = {step: max(filter(math.isfinite, pair)) for step, pair in pairs.items()}
    gpus.values.scalars("Training/Gradient_Norm_Max", highest)
    counted = gpus.logged(lambda step: sum(bad <= step for bad in INFINITE))
    gpus.values.scalars("Monitoring/NonFinite_Steps", counted)
    divided = {step: 0.5 for step in POINTS if step >= DIVIDED}
    gpus.values.scalars("Config/Batch_Size", divided)


def rates_of_two_ranks(gpus: GpuRun) -> None:
    def seconds(step: int) -> float:
        s = scripted(step)
        return s.data + s.own + s.waiting + s.optimizer

    def pair(value: Callable[[int], float]) -> dict[int, float]:
        return gpus.logged(lambda step: value(step - 1) + value(step))

    time, flops = pair(seconds), pair(lambda step: scripted(step).flops)
    tokens = pair(lambda step: gpus.tokens[step - 1])
    rate = {step: tokens[step] / time[step] for step in POINTS}
    gpus.values.scalars("Throughput/Tokens_Per_Second", rate)
    mfu = {step: 100 * flops[step] / time[step] / (2 * 989.4e12) for step in POINTS}
    gpus.values.scalars("Throughput/MFU_Percent", mfu)
    forward = pair(lambda step: (scripted(step).own + scripted(step).waiting) / 2)
    gpus.values.scalars("Throughput/Step_Seconds_Forward_Backward", forward)
    own = pair(lambda step: (scripted(step).own + scripted(step).data) / 2)
    assert max(own.values()) < 2, "the other rank is the slowest"
    late = {step: 100 * (2 / ((own[step] + 2) / 2) - 1) for step in POINTS}
    gpus.values.scalars("Throughput/Straggler_Percent", late)
    used = {}
    for read, step in enumerate(POINTS):
        if read:
            joules = sum(energy(g, read, 1) - energy(g, read - 1, 1) for g in (0, 1)) / 1000
            used[step] = 1000 * joules / tokens[step]
    gpus.values.scalars("Throughput/Energy_J_Per_1K_Tokens", used)


def memory_of_the_device(gpus: GpuRun) -> None:
    found = {step: memory_of(read) for read, step in enumerate(POINTS)}
    percent = {step: 100 * (1 - m["free"] / m["total"]) for step, m in found.items()}
    levels = {step: (p >= 60) + (p >= 80) + (p >= 90) for step, p in percent.items()}
    assert set(levels.values()) == {0, 1, 2, 3}
    values = gpus.values
    values.scalars("Memory/GPU_Utilization_Percent", percent)
    values.scalars("Memory/Pressure_Level", levels)
    for tag, name in (("Allocated", "allocated"), ("Reserved", "reserved"), ("Total", "total")):
        values.scalars(f"Memory/GPU_{tag}_MB", {step: m[name] for step, m in found.items()})
    # From GRAPH on, a graph uses at each step what it used when it was recorded.
    peaks = {s: max(m["peak"], 5050 if s >= GRAPH else 0) for s, m in found.items()}
    values.scalars("Memory/GPU_Peak_MB", peaks)


def gpu_gauges(gpu: int, read: int) -> dict[str, float]:
    """What two looks at a GPU make together."""
    first, second = (
        {line.partition(".")[0]: v for line, v in gpu_lines(gpu, read, look).items()}
        for look in (0, 1)
    )
    looks = (first, second)

    def average(name: str, unit: float = 1.0) -> float:
        return fmean(look[name] / unit for look in looks)

    found = {
        "Utilization_Percent": average("utilization"),
        "Utilization_Percent_Min": min(look["utilization"] for look in looks),
        "Utilization_Percent_Max": max(look["utilization"] for look in looks),
        "Memory_Usage_Percent": 100 * average("memory_used", 80 * 2**30),
        "Temperature_C": max(look["temperature"] for look in looks),
        "Temperature_Limit_C": 92,
        "Power_W": average("power", 1000),
        "SM_Clock_MHz": average("clock"),
        "ECC_Corrected": second["ecc_corrected"],
        "ECC_Uncorrected": second["ecc_uncorrected"],
        "Energy_J": (energy(gpu, read, 1) - energy(gpu, 0, 0)) / 1000,
        "Throttle_Reasons": max((look["throttle"] & ~1).bit_count() for look in looks),
    }
    for name, bit in THROTTLED.items():
        found[f"Throttle_{name}"] = float(any(look["throttle"] & bit for look in looks))
    return found


def gauges_of_gpus(gpus: GpuRun) -> None:
    for gpu in (0, 1):
        series: dict[str, dict[int, float]] = {}
        for read, step in enumerate(POINTS):
            for name, value in gpu_gauges(gpu, read).items():
                series.setdefault(name, {})[step] = value
        assert {0, 1, 2} <= set(series["Throttle_Reasons"].values())
        for name, points in series.items():
            gpus.values.scalars(f"GPU_{gpu}/{name}", points)
        check_end(gpus, gpu, {name: list(points.values()) for name, points in series.items()})
    gpus.values.scalars("GPU_8/Temperature_C", dict.fromkeys(POINTS, 51))  # of another node
    for name in ("Temperature_C", "Temperature_C_Max"):
        gpus.values.scalars(f"Final_GPU_8/{name}", {LAST: 51})


def check_end(gpus: GpuRun, gpu: int, series: dict[str, list[float]]) -> None:
    """Means and peaks over all logged steps, not the last reading."""
    means = ("Utilization_Percent", "Memory_Usage_Percent", "Temperature_C", "Power_W")
    expected = {name: fmean(series[name]) for name in (*means, "SM_Clock_MHz")}
    expected |= {f"{name}_Max": max(series[name]) for name in (*means[1:], "Throttle_Reasons")}
    expected |= {
        "Utilization_Percent_Max": max(series["Utilization_Percent_Max"]),
        "Energy_J": series["Energy_J"][-1],
    }
    for name, value in expected.items():
        gpus.values.scalars(f"Final_GPU_{gpu}/{name}", {LAST: value})


def what_slowed_the_gpus(gpus: GpuRun) -> None:
    rows = []
    for gpu in (0, 1):
        looks = {step: gpu_gauges(gpu, read) for read, step in enumerate(POINTS)}
        for name in sorted(THROTTLED):
            slowed = [step for step, look in looks.items() if look[f"Throttle_{name}"]]
            if slowed:
                words, share = name.replace("_", " "), f"{len(slowed)} of {len(POINTS)}"
                rows.append([str(gpu), words, share, str(slowed[0])])
    assert len(rows) > 1, "nothing to see"
    gpus.values.texts("GPU/Throttling", {LAST: rows}, table_rows)


def convergence_on_a_known_curve(gpus: GpuRun) -> None:
    """The curve falls to FLOOR for ever, at a constant learning rate: what will be is known."""
    values, start, now = gpus.values, curve(4), curve(HALF)  # the median of the first three
    score = (start - now) / (start - FLOOR)
    values.scalars_at("Monitoring/Convergence_Score", {10: 0, 20: 0, HALF: score}, rel=0.005)
    # n sudden rises, each by its place in the run, divide the score by 1 + (n / 3) ** 2.
    rises = sum(SPIKES) / LAST
    calm = (start - curve(LAST)) / (start - FLOOR) / (1 + (rises / 3) ** 2)
    assert calm < 0.7
    values.scalars_at("Monitoring/Convergence_Score", {LAST: calm}, rel=0.01)
    # Of every fit 3% is unknown.
    ends = {"Low": score * (1 - 1.2816 * 0.03), "High": min(1.0, score * (1 + 1.2816 * 0.03))}
    for end, value in ends.items():
        values.scalars_at(f"Monitoring/Convergence_Score_{end}", {HALF: value}, rel=0.005)
    # The forecast is of the last twentieth of the run.
    forecast, fall = FLOOR + FALL * math.exp(-0.975 * LAST / TAU), start - now
    close = {"rel": 0, "abs": 0.005 * fall}
    values.scalars_at("Monitoring/Forecast_Final_Loss", {HALF: forecast, LAST: forecast}, **close)
    spread = 1.2816 * 0.025 * fall  # of what no model knows; the models agree on such a curve
    for end, sign in (("Low", -1), ("High", 1)):
        tag = f"Monitoring/Forecast_Final_Loss_{end}"
        values.scalars_at(tag, {HALF: forecast + sign * spread}, rel=0, abs=0.01 * fall)
    target = start - 0.99 * (start - FLOOR)
    left = -TAU * math.log((target - FLOOR) / FALL) - HALF
    assert left > 20
    # The median over models, which differ more about so small a rest than about the loss.
    values.scalars_at("Monitoring/Steps_To_99_Percent", {HALF: left}, rel=0.3)


def trend_of_the_loss(gpus: GpuRun) -> None:
    """The median of the slopes between all pairs, over the last quarter of what is smoothed."""
    losses, expected = [curve(step) for step in POINTS], {}
    smooth = [(POINTS[i], sorted(losses[i - 1 : i + 2])[1]) for i in range(1, len(losses) - 1)]
    for count in range(5, len(smooth) + 1):
        window = smooth[:count][-max(8, count // 4) :]
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(window, 2)]
        expected[POINTS[count + 1]] = 100 * median(slopes)
    gpus.values.scalars("Monitoring/Loss_Trend", expected)


def monitoring_at_the_end(gpus: GpuRun) -> None:
    """The newest points once more."""
    for tag in gpus.values.beginning("Final_Monitoring/"):
        newest = gpus.values.last(tag.removeprefix("Final_"))
        gpus.values.scalars(tag, {LAST: newest})
    names = ("Convergence_Score", "Loss_Trend", "Forecast_Final_Loss", "Forecast_Final_Loss_Low")
    for name in names:
        assert f"Final_Monitoring/{name}" in gpus.values.beginning("Final_Monitoring/")


CHECKS = (
    losses_of_two_ranks,
    steps_without_a_finite_gradient,
    rates_of_two_ranks,
    memory_of_the_device,
    gauges_of_gpus,
    what_slowed_the_gpus,
    convergence_on_a_known_curve,
    trend_of_the_loss,
    monitoring_at_the_end,
)
