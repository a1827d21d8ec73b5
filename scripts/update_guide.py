"""The tables of tags (docs/tags.md) and of charts (the guide), written from the metric table and in Chinese.

    uv run python scripts/update_guide.py            rewrites what stands between the marks
    uv run python scripts/update_guide.py --check    exit code 1 where a document is not up to date

`docs/metrics_zh.tsv` holds the Chinese meanings; a tag without one is shown with its English meaning.
"""

import csv
import re
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetuning.events.metric_table import LAYOUT, METRICS, Metric  # noqa: E402

MEANINGS = ROOT / "docs" / "metrics_zh.tsv"
TABS = {
    "scalar": "SCALARS 与 Time Series",
    "detail": "metrics.jsonl（不在 TensorBoard 里；一部分也在 report.html 里）",
    "text": "TEXT",
    "histogram": "HISTOGRAMS",
    "image": "IMAGES",
}
CONDITIONS = {
    "always": "总是",
    "at the end": "结束时",
    "once above 0": "第一次大于 0 之后",
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
CHARTS = {  # titles, which TensorBoard shows as they are
    "Training and evaluation": "训练与评估",
    "Thinking against answer": "思考对答案",
    "The ends: of thinking and of the answer": "两处结束：思考的与答案的",
    "Held out: thinking against answer": "留出集上的思考对答案",
    "Learnt and forgotten": "学到的与忘记的",
    "Distance from the base (KL)": "与基座的距离（KL）",
    "Loss and its forecast": "损失与预测",
    "Token accuracy": "token 准确率",
    "Learning rate": "学习率",
    "Gradient norm": "梯度范数",
    "Convergence": "收敛分数",
    "Trend of the loss": "损失的趋势",
    "Utilisation of all GPUs (%)": "所有 GPU 的利用率",
    "Memory of all GPUs (%)": "所有 GPU 的显存",
    "Temperature with its limit (°C)": "温度与上限",
    "Power of all GPUs (W)": "所有 GPU 的功耗",
    "Where a step's time goes (s)": "一步的时间花在哪",
    "Alerts (1 = raised)": "发生过的报警（1 = 正在发生）",
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


def charts() -> str:
    """A row for each chart of the ready dashboard; raises KeyError for a title without Chinese words."""
    rows = ["| 分类 | 图 | 含义 | 标签 |", "|---|---|---|---|"]
    for category, titles in LAYOUT.items():
        for title, patterns in titles.items():
            matching = [
                f"`{metric.tag}`"
                for metric in METRICS
                if any(re.search(p, metric.tag.replace("<i>", "0")) for p in patterns)
                and metric.kind == "scalar"
            ]
            tags = (
                "、".join(matching) if len(matching) < 6 else f"{matching[0]} 等 {len(matching)} 个"
            )
            rows.append(f"| {category} | {title} | {CHARTS[title]} | {tags} |")
    return "\n".join(rows)


PAGES = {  # file: the name of its marks, and what stands between them
    ROOT / "docs" / "tags.md": ("tags", tables),
    ROOT / "TENSORBOARD_GUIDE.md": ("charts", charts),
}


def updated(text: str, name: str, content: str) -> str:
    """A document with `content` between its marks of this name; ValueError where these are missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    first, last = text.index(begin) + len(begin), text.index(end)
    return f"{text[:first]}\n\n{content}\n\n{text[last:]}"


def main(arguments: list[str]) -> int:
    """Rewrite or check; the exit code."""
    missing = [metric.tag for metric in METRICS if metric.tag not in meanings()]
    if missing:
        print(f"no Chinese meaning in {MEANINGS.name}: {', '.join(missing)}")
    old = {path: path.read_text(encoding="utf-8") for path in PAGES}
    new = {path: updated(old[path], name, made()) for path, (name, made) in PAGES.items()}
    stale = [path for path in PAGES if new[path] != old[path]]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} is not up to date: run `uv run python scripts/update_guide.py`")
        return int(bool(stale))
    for path in stale:
        path.write_text(new[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
