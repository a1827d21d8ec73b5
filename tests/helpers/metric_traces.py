"""Metrics of a run as it should go, with faults put into them."""

import math

import numpy as np

from finetuning.monitoring.alerts import AlertMonitor

LENGTH = 1000
FAULT = 500  # the logged step at which a fault begins


def clean_trace(seed, length=LENGTH):
    """A healthy run: falling loss, noisy gradients, warm caches, two GPUs, probes now and then."""
    rng = np.random.default_rng(seed)
    trace = []
    for step in range(1, length + 1):
        rate = 1e-4 * min(step / 50, (length + 1 - step) / length)
        row = {
            "Training/Loss": (1 + 1.2 * math.exp(-step / 150)) * math.exp(0.05 * rng.normal()),
            "Training/Gradient_Norm": 0.6 * math.exp(0.3 * rng.normal()),
            "Training/Learning_Rate": rate,
            "Memory/Host_RSS_MB": 6000 + 800 * (1 - math.exp(-step / 60)) + 20 * rng.normal(),
            "Memory/Host_Percent": 40 + rng.normal(),
            "Memory/GPU_Allocated_MB": 22_000 + 300 * rng.normal(),
            "Memory/GPU_Peak_MB": 60_000 + 500 * rng.normal(),
            "Memory/GPU_Total_MB": 80_000.0,
            "Memory/GPU_Utilization_Percent": 78 + rng.normal(),
            "Throughput/Step_Seconds_Data": 0.02 + 0.01 * rng.random(),
            "Throughput/Step_Seconds_Forward_Backward": 0.9 + 0.1 * rng.random(),
            "Throughput/Step_Seconds_Optimizer": 0.05,
            "Throughput/Step_Seconds_Logging": 0.005,
            "Throughput/Straggler_Percent": abs(3 * rng.normal()),
            "Monitoring/NonFinite_Steps": 0.0,
        }
        for gpu in range(2):
            row[f"GPU_{gpu}/Temperature_C"] = 74 + 2 * rng.normal()
            row[f"GPU_{gpu}/Utilization_Percent"] = 95 + 2 * rng.normal()
        if step % 50 == 0:
            row["Eval/Loss"] = 1.1 + 1.2 * math.exp(-step / 150) + 0.003 * rng.normal()
            row["Forgetting/General_Loss"] = 1.8 - 0.1 * (1 - math.exp(-step / 150))
            row["Eval/Think_Length_Ratio"] = 1 + 0.08 * rng.normal()
            row["Eval/Format_Valid_Rate"] = 0.9 + 0.05 * rng.normal()
        trace.append((step, row))
    return trace


def play(trace, monitor=None):
    monitor = monitor or AlertMonitor()
    raised = []
    for step, row in trace:
        raised += monitor.observe(step, row, {})
    return monitor, raised


def set_to(name, value):
    return lambda step, row: row.update({name: value})


def add(name, per_step):
    return lambda step, row: row.update({name: row[name] + per_step * (step - FAULT)})


def scale(name, factor, only=None):
    def change(step, row):
        if name in row and (only is None or step == only):
            row[name] *= factor

    return change


def held_out_rises(step, row):
    if "Eval/Loss" in row:
        row["Eval/Loss"] *= 1 + 0.0005 * (step - FAULT)


def busy_elsewhere(step, row):
    row["GPU_1/Utilization_Percent"] = 45.0
    row["Throughput/Step_Seconds_Logging"] = 0.3


FAULTS = {  # detector: (change of a row, logged steps until it must have spoken)
    "Gradient_Explosion": (scale("Training/Gradient_Norm", 50), 1),
    "Loss_Spike": (scale("Training/Loss", 2, only=FAULT), 1),
    "NonFinite": (set_to("Training/Loss", math.nan), 1),
    "Divergence": (add("Training/Loss", 0.005), 120),
    "Memory_Leak": (add("Memory/Host_RSS_MB", 4.0), 400),
    "GPU_Overheat": (set_to("GPU_1/Temperature_C", 90.0), 1),
    "Data_Starvation": (set_to("Throughput/Step_Seconds_Data", 1.5), 10),
    "Low_GPU_Utilization": (busy_elsewhere, 10),
    "OOM_Risk": (set_to("Memory/GPU_Utilization_Percent", 98.0), 1),
    "Thinking_Collapse": (scale("Eval/Think_Length_Ratio", 0.35), 50),
    "Overfitting": (held_out_rises, 200),
    "Forgetting": (scale("Forgetting/General_Loss", 1.1), 50),
    "Slow_Rank": (set_to("Throughput/Straggler_Percent", 60.0), 5),
}
