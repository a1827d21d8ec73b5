"""The tag tables of docs/tags.md, written from the metric table and its Chinese meanings.

    uv run python scripts/update_guide.py            rewrites what stands between the two marks
    uv run python scripts/update_guide.py --check    exit code 1 where the guide is not up to date

`docs/metrics_zh.tsv` holds the Chinese meanings; a tag without one is shown with its English meaning.
"""

import csv
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetuning.events.metric_table import METRICS, Metric  # noqa: E402

GUIDE, MEANINGS = ROOT / "docs" / "tags.md", ROOT / "docs" / "metrics_zh.tsv"
BEGIN, END = "<!-- tags: begin -->", "<!-- tags: end -->"
TABS = {
    "scalar": "SCALARS 与 Time Series",
    "detail": "metrics.jsonl 与 report.html（不在 TensorBoard 里）",
    "text": "TEXT",
    "histogram": "HISTOGRAMS",
    "image": "IMAGES",
}
CONDITIONS = {
    "always": "总是",
    "at the end": "结束时",
    "evaluation": "每次评估",
    "evaluation after step 0": "第 0 步之后的评估",
    "evaluation, end of an epoch": "评估与 epoch 结束",
    "measured forgetting": "测量遗忘时（`--forgetting`）",
    "generation probes": "有生成探针时",
    "judged probes": "有可评判的探针时",
    "logged weights": "`--log-weight-histograms`",
    "several ranks": "多个 rank 时",
    "alerts": "有报警时",
    "GPU": "有 GPU 时",
    "GPU, at the end": "有 GPU，结束时",
    "GPU with ECC": "GPU 有 ECC 时",
    "known GPU": "已知型号的 GPU",
    "disk counters": "系统有磁盘计数器时",
    "network counters": "系统有网络计数器时",
}
UNITS = {
    **{"fraction": "比例 0–1", "steps": "步", "samples": "样本", "characters": "字符"},
    **{"questions": "问题", "0 to 1": "0–1", "0 or 1": "0/1", "count": "个", "level": "级"},
    **{"alerts": "个"},
    **{"loss/100 steps": "损失/100 步", "epochs": "遍", "errors": "次"},
}


def meanings() -> dict[str, str]:
    """Chinese meaning by tag."""
    with open(MEANINGS, encoding="utf-8", newline="") as file:
        return dict(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def tables() -> str:
    """A table for each group of tags, under a heading for each tab."""
    chinese, parts = meanings(), []
    for kind, metrics in groupby(METRICS, key=lambda metric: metric.kind):
        parts.append(f"## {TABS[kind]}")
        for group, rows in groupby(metrics, key=lambda metric: metric.tag.partition("/")[0]):
            heads = [f"**{group}**", "", "| 标签 | 单位 | 何时 | 含义 |", "|---|---|---|---|"]
            parts.append("\n".join([*heads, *(_row(metric, chinese) for metric in rows)]))
    return "\n\n".join(parts)


def _row(metric: Metric, chinese: dict[str, str]) -> str:
    meaning = chinese.get(metric.tag, metric.meaning).replace("<", "\\<").replace("|", "\\|")
    unit, when = UNITS.get(metric.unit, metric.unit), CONDITIONS.get(metric.when, metric.when)
    return f"| `{metric.tag}` | {unit or '–'} | {when} | {meaning} |"


def updated(guide: str) -> str:
    """The guide with its tables as the metric table has them."""
    before, _, rest = guide.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Rewrite or check; the exit code."""
    guide = GUIDE.read_text(encoding="utf-8")
    new = updated(guide)
    missing = [metric.tag for metric in METRICS if metric.tag not in meanings()]
    if missing:
        print(f"no Chinese meaning in {MEANINGS.name}: {', '.join(missing)}")
    if "--check" in arguments:
        if new != guide:
            print(f"{GUIDE.name} is not up to date: run `uv run python scripts/update_guide.py`")
        return int(new != guide)
    GUIDE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
