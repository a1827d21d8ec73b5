"""Every tag of a run with its unit, meaning and source: one table for the logger, tests and the guide.

In a tag `<i>` and `<k>` stand for a number, `<name>` for any text.
"""

import functools
import re
from dataclasses import dataclass

from finetuning.common import language
from finetuning.events import metric_rows

QUIET = "once above 0"


@dataclass(frozen=True, slots=True)
class Metric:
    """One tag or pattern of tags."""

    tag: str
    unit: str  # "" for a number without one
    when: str  # under which condition a run writes it; "always" for every run
    source: str  # the file of the package that measures it, as room.file
    meaning: str
    kind: str  # scalar, detail (metrics.jsonl only), text, histogram, image


def _rows(table: str, kind: str) -> tuple[Metric, ...]:
    heads, meanings = table.strip().splitlines()[::2], table.strip().splitlines()[1::2]
    rows = [[cell.strip() for cell in re.split(r" \|", head)] for head in heads]
    return tuple(Metric(*row, m.strip(), kind) for row, m in zip(rows, meanings, strict=True))


METRICS: tuple[Metric, ...] = (
    *_rows(metric_rows.SCALARS, "scalar"),
    *_rows(metric_rows.DETAILS, "detail"),
    *_rows(metric_rows.TEXTS, "text"),
    *_rows(metric_rows.HISTOGRAMS, "histogram"),
    *_rows(metric_rows.IMAGES, "image"),
)

# CUSTOM SCALARS: {category: {chart: regular expressions of its tags}}. TensorBoard merges the layouts of
# several runs by title, so titles never change.
LAYOUT = {
    "Loss": {
        "Training and evaluation": [r"^Training/Loss$", r"^Eval/Loss$", r"^Epoch/Average_Loss$"],
        "Thinking against answer": [r"^Thinking/Loss$", r"^Answer/Loss$"],
        "The ends: of thinking and of the answer": [r"^Boundary/.*_Loss$"],
        "Held out: thinking against answer": [r"^Eval/Thinking_Loss$", r"^Eval/Answer_Loss$"],
        "Learnt and forgotten": [r"^Eval/Loss$", r"^Forgetting/General_Loss$"],
        "Distance from the base (KL)": [r"^Forgetting/KL_.*"],
        "Loss and its forecast": [r"^Training/Loss$", r"^Monitoring/Forecast_Final_Loss"],
        "Token accuracy": [r"^(Training|Eval)/Token_Accuracy$", r"^(Thinking|Answer)/Accuracy$"],
    },
    "Optimizer": {
        "Learning rate": [r"^Training/Learning_Rate$"],
        "Gradient norm": [r"^Training/Gradient_Norm$"],
        "Convergence": [r"^Monitoring/Convergence_Score"],
        "Trend of the loss": [r"^Monitoring/Loss_Trend$"],
    },
    "Hardware": {
        "Utilisation of all GPUs (%)": [r"^GPU_\d+/Utilization_Percent$"],
        "Memory of all GPUs (%)": [r"^GPU_\d+/Memory_Usage_Percent$"],
        "Temperature with its limit (°C)": [r"^GPU_\d+/Temperature(_Limit)?_C$"],
        "Power of all GPUs (W)": [r"^GPU_\d+/Power_W$"],
        "Where a step's time goes (s)": [r"^Throughput/Step_Seconds_.*"],
    },
    "Alerts": {"Alerts (1 = raised)": [r"^Alerts/.*"]},
}

# Columns of the HPARAMS tab. One run's list counts for the table of all runs, so it is the same in each.
HPARAM_METRICS = (
    "Training/Final_Loss",
    "Training/Loss",
    "Training/Token_Accuracy",
    "Eval/Loss",
    "Eval/Thinking_Loss",
    "Eval/Answer_Loss",
    "Eval/Format_Valid_Rate",
    "Throughput/Tokens_Per_Second",
    "Monitoring/Convergence_Score",
)


@functools.cache
def _patterns() -> tuple[tuple[re.Pattern[str], Metric], ...]:
    compiled = []
    for metric in METRICS:
        pattern = re.escape(metric.tag)
        pattern = re.sub(r"<[ik]>", r"\\d+", pattern).replace("<name>", ".+")
        compiled.append((re.compile(pattern), metric))
    return tuple(compiled)


def find_metric(tag: str) -> Metric | None:
    """The row of `tag`; an exact row goes before a pattern. None for a tag that is not in the table."""
    matches = [metric for pattern, metric in _patterns() if pattern.fullmatch(tag)]
    return min(matches, key=lambda metric: "<" in metric.tag, default=None)


@functools.cache
def is_detail(tag: str) -> bool:
    """Whether a number is written to metrics.jsonl only."""
    metric = find_metric(tag)
    return metric is not None and metric.kind == "detail"


@functools.cache
def is_quiet(tag: str) -> bool:
    """Whether a number has a chart only from its first value above 0 on: a count of what should not be."""
    metric = find_metric(tag)
    return metric is not None and metric.when == QUIET


@functools.cache
def is_custom(tag: str) -> bool:
    """Whether a tag is a user's own: neither of the table, nor one by which a plugin keeps its settings."""
    return find_metric(tag) is None and not tag.startswith(("_hparams_/", "custom_scalars__"))


def description(tag: str) -> str:
    """Markdown behind the (i) of a chart, in the language of the program; empty for an unknown tag."""
    metric = find_metric(tag)
    if metric is None:
        return ""
    chinese = language.meanings("metrics_zh.tsv").get(metric.tag)
    if language.current() == "zh" and chinese:
        unit = f"单位：{language.translated(metric.unit)}。" if metric.unit else ""
        return f"{chinese}。{unit}来源：`{metric.source}`。"
    unit = f" Unit: {metric.unit}." if metric.unit else ""
    return f"{metric.meaning}{unit} Source: `{metric.source}`."
