"""Statistics of a data set for people: Markdown tables, a terminal report, an HTML page, pictures.

Everything here reads the dictionary of `DatasetStatistics.to_json` and computes no statistic itself.
"""

import html
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from finetuning.analysis import crypto_terms
from finetuning.common.formatting import UNKNOWN, grouped, percent
from finetuning.common.html import cell, table
from finetuning.common.language import current, translated
from finetuning.common.text import clean_line, table_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Report = dict[str, Any]
Row = tuple[str, ...]
Table = tuple[str, Row, list[Row]]  # title, header, rows

_TOP = 15  # terms and findings shown
# A run packs what trains alone, so its rows are filled otherwise.
_PACKED = "packing efficiency of all these samples"
# 商用密码 is no occurrence of 密码.
_HOLDING = "samples, the longest term counts"
_BAR = 24  # columns of a full bar
_FINDING_TITLES = {
    "train_eval_leaks": "Held-out samples that repeat training samples",
    "conflicting_answers": "Several answers to one question",
    "citation_conflicts": "Citations of a standard about something else",
    "exact_duplicates": "Exact duplicates",
    "near_duplicates": "Near duplicates",
    "answer_copied": "Answers copied into the thinking",
}
# Columns that hold texts of the program, no name of a file or of a term.
_OWN_COLUMNS = {
    "Overview": (0, 1),
    "Comparison": (0, 1, 2),
    "Lengths": (0,),
    "Difficulty and quality levels": (2,),
    "Quality by component": (0,),
    "Weakest texts": (2, 3),
    "Records that could not be read": (1,),
    "Samples in both": (1,),
    **dict.fromkeys(_FINDING_TITLES.values(), (1,)),
}
_CATEGORY_NAMES = {
    "基础概念": "basics",
    "对称算法": "symmetric",
    "非对称算法": "public key",
    "杂凑与消息鉴别": "hash and MAC",
    "签名与身份鉴别": "signature and identity",
    "密钥管理": "key management",
    "随机数": "random numbers",
    "证书与PKI": "certificates",
    "协议": "protocols",
    "密评与标准": "evaluation and standards",
    "攻击与分析": "attacks",
    "后量子与隐私计算": "post-quantum and privacy",
    "产品与工程": "products",
}
_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
    "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei",
    "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Heiti TC", "STHeiti", "Arial Unicode MS",
    "Droid Sans Fallback",
)  # fmt: skip

# -----------------------------------------------------------------------------
# Tables, the one content of all forms


def tables(report: Report) -> list[Table]:
    """Every table of the report: (title, header, rows)."""
    return [_told(*table) for table in _tables(report)]


def _told(title: str, header: Row, rows: list[Row]) -> Table:
    """In the language of the reader: heads, and columns that are the program's own."""
    own = _OWN_COLUMNS.get(title.partition(" (")[0], ())
    rows = [tuple(translated(c) if i in own else c for i, c in enumerate(row)) for row in rows]
    return translated(title), tuple(map(translated, header)), rows


def _tables(report: Report) -> list[Table]:
    return [
        ("Overview", ("", "value"), _overview(report)),
        ("Files", ("file", "samples"), _files(report)),
        ("Lengths", ("", "mean", "p50", "p90", "p99", "max"), _lengths(report)),
        ("Sequence length", ("tokens", "longer samples", _PACKED), _fit(report)),
        (
            "Difficulty and quality levels",
            ("level", "difficulty", "output quality"),
            _levels(report),
        ),
        ("Quality by component", ("component", "mean"), _components(report)),
        ("Categories of terms", ("category", "occurrences"), _categories(report)),
        (
            _cut_title("Terms", _TOP, len(report["terms"])),
            ("#", "term", "category", "level", _HOLDING),
            _terms(report),
        ),
        *_finding_tables(report),
        ("Weakest texts", ("quality", "where", "part", "weakest", "text"), _worst(report)),
    ]


def _overview(report: Report) -> list[Row]:
    rows = [
        ("Samples", grouped(report["total_samples"])),
        ("Records that could not be read", grouped(len(report["broken"]))),
        (
            "With thinking",
            f"{report['thinking_samples']} ({percent(report['thinking_samples_percent'])})",
        ),
        ("Thinking / answer length, median", grouped(report.get("thinking_answer_ratio_p50"))),
        ("Quality of the questions", _judged(report.get("avg_instruction_quality"))),
        ("Quality of the outputs", _judged(report.get("avg_output_quality"))),
        ("Outputs in a language that is not judged", grouped(report["outputs_not_judged"])),
        ("Complexity by terms", grouped(report.get("avg_crypto_complexity"), 3)),
        ("Exact duplicates", grouped(report["exact_duplicates"])),
        ("Near duplicates", grouped(report["near_duplicates"])),
        ("Questions with several answers", grouped(report["conflicting_answers"])),
        ("Citation conflicts", grouped(report["citation_conflicts"])),
        ("Answers copied into the thinking", grouped(report["answer_copied_into_thinking"])),
        ("Advised max_seq_length", grouped(report["advised_max_seq_length"])),
    ]
    if "train_eval_leaks" in report:
        rows.insert(7, ("Held-out samples seen in training", grouped(report["train_eval_leaks"])))
    return rows


def _judged(quality: float | None) -> str:
    return "not judged" if quality is None else grouped(quality, 3)


def _files(report: Report) -> list[Row]:
    return [(name, grouped(count)) for name, count in report["samples_per_file"].items()]


def _lengths(report: Report) -> list[Row]:
    keys = ("mean", "p50", "p90", "p99", "max")
    unit = "tokens" if report["tokens_are_exact"] else "tokens, estimated"
    rows = {f"{name}, characters": s for name, s in report["characters"].items()}
    rows |= {f"{name}, {unit}": s for name, s in report["tokens"].items()}
    return [(n, *(grouped(s[k], 1) for k in keys)) for n, s in rows.items() if s]


def _fit(report: Report) -> list[Row]:
    packing = report["packing_efficiency_percent_by_length"]
    return [
        (n, percent(over), percent(packing[n]) if n in packing else UNKNOWN)
        for n, over in report["exceeding_percent"].items()
    ]


def _levels(report: Report) -> list[Row]:
    return [
        (
            str(k),
            f"{grouped(report[f'difficulty_{k}_count'])}"
            f" ({percent(report[f'difficulty_{k}_percent'])})",
            _judged(None)
            if f"quality_level_{k}_count" not in report
            else f"{grouped(report[f'quality_level_{k}_count'])}"
            f" ({percent(report[f'quality_level_{k}_percent'])})",
        )
        for k in range(1, 5)
    ]


def _components(report: Report) -> list[Row]:
    names = [n for n in report if n.startswith("quality_") and not n.startswith("quality_level_")]
    return [(n.removeprefix("quality_").replace("_", " "), f"{report[n]:.3f}") for n in names]


def _categories(report: Report) -> list[Row]:
    return [
        (
            name if current() == "zh" else f"{name} ({_CATEGORY_NAMES.get(name, name)})",
            grouped(count),
        )
        for name, count in report["terms_by_category"].items()
    ]


def _terms(report: Report) -> list[Row]:
    known = crypto_terms.load_terms()
    return [
        (str(place), name, known[name].category, str(known[name].level), grouped(count))
        for place, (name, count) in enumerate(list(report["terms"].items())[:_TOP], 1)
    ]


def _finding_tables(report: Report) -> list[Table]:
    findings = {**report["findings"], "broken": report["broken"]}
    titles = {"broken": "Records that could not be read", **_FINDING_TITLES}
    header = ("where", "what")
    result = []
    for kind, title in titles.items():
        rows = [
            (f"{f['source']}:{f['line']}", clean_line(f.get("note") or f.get("reason"), 200))
            for f in findings.get(kind, [])[:_TOP]
        ]
        if rows:
            total = max(len(findings[kind]), report.get(_COUNTS.get(kind, kind)) or 0)
            result.append((_cut_title(title, len(rows), total), header, rows))
    return result


_COUNTS = {"broken": "broken_samples", "answer_copied": "answer_copied_into_thinking"}  # by finding


def _cut_title(title: str, shown: int, total: int) -> str:
    """A table that does not hold everything says so."""
    return title if total <= shown else f"{title} ({shown} of {total:,})"


def _worst(report: Report) -> list[Row]:
    return [
        (
            f"{w['quality']:.3f}",
            f"{w['source']}:{w['line']}",
            w["part"],
            w["weakest"].replace("_", " "),
            clean_line(w["excerpt"], 60),
        )
        for w in report["worst_samples"][:10]
    ]


def markdown(report: Report) -> str:
    """Warnings, then every table, in Markdown; text of the data is escaped."""
    parts = [f"## {translated('Data set')}"]
    if report["warnings"]:
        parts.append("\n".join(f"- **{table_cell(translated(w))}**" for w in report["warnings"]))
    for title, header, rows in tables(report):
        lines = [header, tuple("---" for _ in header), *(map(table_cell, row) for row in rows)]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts.append(f"### {title}\n\n{body}")
    return "\n\n".join(parts) + "\n"


# -----------------------------------------------------------------------------
# Terminal


def print_report(report: Report) -> None:
    """The tables with bars, the warnings last, where a reader's eye is; with "compare" both."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    overview, *others = tables(report)
    for title, header, rows in others:
        if rows:
            console.print(_rich_table(title, header, rows))
    console.print(_rich_table(*overview))
    if "compare" in report:
        console.print(_rich_table(*_comparison(report)))
    for warning in report["warnings"]:
        console.print(Text(translated(f"warning: {clean_line(warning)}"), style="yellow"))


def _rich_table(title: str, header: Row, rows: list[Row]) -> "RenderableType":
    from rich.table import Table as RichTable
    from rich.text import Text

    bars = _bars(header, rows)
    table = RichTable(title=title, title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    if bars:
        table.add_column("", no_wrap=True)
    for row, bar in zip(rows, bars or [None] * len(rows), strict=True):
        cells = [Text(clean_line(cell)) for cell in row]
        table.add_row(*cells, *([] if bar is None else [Text("█" * round(bar * _BAR), "cyan")]))
    return table


_BAR_COLUMNS = {"samples", "occurrences", "mean", _PACKED, _HOLDING, "difficulty"}


def _bars(header: Row, rows: list[Row]) -> list[float]:
    """Share of the largest per row, for tables with one column that is worth a bar."""
    columns = [i for i, name in enumerate(header) if name in map(translated, _BAR_COLUMNS)]
    if not columns or "p50" in header:
        return []
    values = [_leading_number(row[columns[0]]) for row in rows]
    top = max(values, default=0)
    return [value / top if top else 0.0 for value in values]


def _leading_number(cell: str) -> float:
    first = cell.split()[0].replace(",", "")
    return 0.0 if first == UNKNOWN else float(first)


def _comparison(report: Report) -> Table:
    other = report["compare"]
    rows = [
        (name, left, right)
        for (name, left), (_, right) in zip(_overview(report), _overview(other), strict=True)
    ]
    leaks = ("Samples that (nearly) repeat the first", "", grouped(other["leaks"]))
    return _told("Comparison", ("", "first", "second"), [*rows, leaks])


# -----------------------------------------------------------------------------
# HTML


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:.5rem 0 2rem}
td,th{padding:.2rem .7rem;border-bottom:1px solid #8884;text-align:left;vertical-align:top}
.bar{background:#2a7fb8;height:.8rem;border-radius:2px}
.warning{border-left:4px solid #d08700;padding:.2rem .8rem;margin:.4rem 0}
:root{color-scheme:light dark}
"""


def html_page(report: Report) -> str:
    """One page that needs no other file and runs no script."""
    warnings = "".join(f'<p class="warning">{cell(translated(w))}</p>' for w in report["warnings"])
    shown = tables(report) + ([_comparison(report)] if "compare" in report else [])
    if "compare" in report:
        leaks = report["compare"]["leak_findings"][:_TOP]
        rows = [(f"{f['source']}:{f['line']}", f["note"]) for f in leaks]
        shown.append(_told("Samples in both", ("where", "what"), rows))
    sections = "".join(_html_table(*table) for table in shown if table[2])
    title = translated("Data set")
    return (
        f'<!doctype html><html lang="{current()}"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>{warnings}{sections}</html>\n"
    )


def _html_table(title: str, header: Row, rows: list[Row]) -> str:
    bars = [
        [f'<div class="bar" style="width:{bar * 16:.2f}rem"></div>'] for bar in _bars(header, rows)
    ]
    lines = [
        [*map(cell, row), *bar] for row, bar in zip(rows, bars or [[]] * len(rows), strict=True)
    ]
    names = (*header, "") if bars else header
    return f"<h2>{html.escape(title)}</h2>{table(names, lines)}"


# -----------------------------------------------------------------------------
# Pictures


def figures(report: Report) -> "dict[str, Figure]":
    """`pictures`, drawn."""
    return {tag: draw() for tag, draw in pictures(report).items()}


def pictures(report: Report) -> "dict[str, Callable[[], Figure]]":
    """Functions that draw, by tag: lengths of the segments in tokens, and the most frequent terms."""
    return {
        "Dataset/Length_Distribution": partial(_length_figure, report),
        "Dataset/Term_Distribution": partial(_term_figure, report),
    }


def _new_figure(width: float, height: float) -> "tuple[Figure, Any]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and pyplot's global state stays untouched
    return figure, figure.add_subplot()


def _length_figure(report: Report) -> "Figure":
    figure, axes = _new_figure(8, 4.5)
    histogram = report["token_histogram"]
    used = [i for i in range(len(_BIN_NAMES)) if any(bins[i] for bins in histogram.values())]
    shown = range(min(used), max(used) + 1) if used else range(0)
    width = 0.8 / max(1, len(histogram))
    for number, (name, bins) in enumerate(histogram.items()):
        places = [i + number * width for i in range(len(shown))]
        axes.bar(places, [bins[i] for i in shown], width, label=name)
    middle = width * (len(histogram) - 1) / 2
    axes.set_xticks([i + middle for i in range(len(shown))], [_BIN_NAMES[i] for i in shown])
    about = "" if report["tokens_are_exact"] else " (estimated)"
    axes.set(xlabel=f"tokens{about}, up to", ylabel="samples", title="Lengths")
    axes.legend()
    return figure


_BIN_NAMES = [*(str(2**k) for k in range(4, 17)), "more"]


def _term_figure(report: Report) -> "Figure":
    terms = list(report["terms"].items())[:20]
    figure, axes = _new_figure(8, 1.5 + 0.28 * len(terms))
    font = cjk_font()
    names = [term_label(name, place, font is not None) for place, (name, _) in enumerate(terms, 1)]
    axes.barh(range(len(terms)), [count for _, count in terms])
    axes.set_yticks(range(len(terms)), names, **({"fontfamily": font} if font else {}))
    axes.invert_yaxis()
    axes.set(xlabel="samples that hold the term", title="Most frequent cryptographic terms")
    return figure


@cache
def cjk_font() -> str | None:
    """A font of this machine that has Chinese characters, None where there is none."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    if not any(font.name in _CJK_FONTS for font in manager.ttflist):
        # matplotlib keeps its list for good: it does not know a font that was installed since.
        for path in set(font_manager.findSystemFonts()) - known:
            with suppress(OSError, RuntimeError):  # not a font that matplotlib can read
                manager.addfont(path)
    available = {font.name for font in manager.ttflist}
    return next((name for name in _CJK_FONTS if name in available), None)


def term_label(name: str, place: int, chinese: bool) -> str:
    """The term as a picture can show it; without a font: an ASCII alias, else its number in the
    table of terms with its category."""
    if chinese or name.isascii():
        return name
    term = crypto_terms.load_terms()[name]
    alias = next((alias for alias in term.aliases if alias.isascii()), None)
    return alias or f"#{place} ({_CATEGORY_NAMES.get(term.category, 'term')})"
