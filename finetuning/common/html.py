"""Pages, tables and curves for a browser: without a script, without a request, for light and dark screens."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from finetuning.common import language
from finetuning.common.formatting import axis_number
from finetuning.common.text import clean_line

Points = Sequence[tuple[float, float]]  # (x, y), x rises; a y that is not finite breaks the line

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 24  # around the plot
COLUMNS = 500  # beyond so many points a line is drawn by the lowest and highest of each column
COLORS = (  # each stands out from white and from black
    "#2a7fb8", "#d9622b", "#3a9a54", "#a05ab4", "#b08a10", "#2a9a9a", "#c2497a", "#7a7a7a",
)  # fmt: skip
PAGE_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,"Noto Sans CJK SC",sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;
overflow-wrap:anywhere}
h1{margin-bottom:.2rem}h2{margin-top:2.5rem;border-bottom:1px solid #8886}
table{display:block;overflow-x:auto;border-collapse:collapse;margin:.5rem 0 1rem;font-size:.93em}
td,th{padding:.2rem .7rem;border-bottom:1px solid #8884;text-align:left;vertical-align:top;
overflow-wrap:break-word;max-width:min(34rem,60vw)}
td:has(br){min-width:min(15rem,55vw)}td:first-child{white-space:nowrap;max-width:none}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0}
.card{border:1px solid #8886;border-radius:.5rem;padding:.5rem 1rem}
.card b{display:block;font-size:1.25rem}.card span{opacity:.7;font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr));gap:1.5rem}
.status{border-radius:1rem;padding:.1rem .7rem;background:#8883}
.completed{background:#3a9a5444}.failed{background:#d9622b55}.running{background:#2a7fb844}
pre{background:#8882;padding:.6rem;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
.picture{background:#fff;max-width:40rem}.picture svg{width:100%;height:auto}
footer{margin-top:3rem;opacity:.7;font-size:.85rem}
"""
CHART_STYLE = """
.chart{max-width:100%;height:auto;font:11px system-ui,sans-serif}
.chart text{fill:currentColor}.chart .grid{stroke:currentColor;opacity:.15}
.chart path{fill:none;stroke-width:1.6;stroke-linejoin:round}
.legend span{display:inline-block;margin-right:1rem;font-size:.85rem;overflow-wrap:anywhere}
.legend svg{width:1.8rem;height:.3rem;margin-right:.3rem;vertical-align:middle}
figure{margin:0;min-width:0}figcaption{font-weight:600;margin:.2rem 0}
"""
# Even if something slipped through the escaping: no script, no request to anywhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# -----------------------------------------------------------------------------
# Pages and tables


def html_page(title: str, body: str) -> str:
    """A whole page around `body`, which is HTML, with the style that tables and charts need."""
    return (
        f'<!doctype html><html lang="{language.current()}"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{PAGE_STYLE}{CHART_STYLE}</style></head><body>{body}</body></html>\n"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A `<table>`. header: plain texts; rows: their cells, which are HTML (`cell` makes it of a text)."""
    head = "".join(f"<th>{cell(language.translated(name))}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{content}</td>" for content in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def cell(text: str, limit: int | None = None) -> str:
    """A text as the content of a cell: on one line, escaped, cut to `limit` characters."""
    return html.escape(clean_line(text, limit))


# -----------------------------------------------------------------------------
# Curves


def line_chart(title: str, lines: Mapping[str, Points], *, x_name: str = "step") -> str:
    """A `<figure>` with one curve for each name; empty where no value is finite.

    The page needs `CHART_STYLE`.
    """
    title = language.translated(title)
    finite = [(x, y) for points in lines.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    xs, ys = zip(*finite, strict=True)
    x_range, y_range = _padded(min(xs), max(xs), 0), _padded(min(ys), max(ys), 0.05)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_range[1] - y) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = [_grid(x_range, y_range, place, language.translated(x_name))]
    for number, (name, points) in enumerate(lines.items()):
        drawn = thinned(points)
        parts.append(
            f'<path {_stroke(number)} d="{_path(drawn, place)}"><title>{html.escape(name)}</title></path>'
        )
        parts += [
            f'<circle cx="{p[0]}" cy="{p[1]}" r="2.2" fill="{_color(number)}"/>'
            for p in (place(*point).split(",") for point in _lonely(drawn))
        ]
    label = html.escape(title, quote=True)
    svg = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
    )
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}{_legend(lines)}</figure>"


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most two points for each of `COLUMNS` columns, their lowest and highest, so that no spike
    is lost; what is not finite stays."""
    if len(points) <= 2 * COLUMNS:
        return list(points)
    kept: list[tuple[float, float]] = []
    size = math.ceil(len(points) / COLUMNS)
    for start in range(0, len(points), size):
        column = list(points[start : start + size])
        broken = [p for p in column if not math.isfinite(p[1])]
        whole = [p for p in column if math.isfinite(p[1])]
        ends = {min(whole, key=lambda p: p[1]), max(whole, key=lambda p: p[1])} if whole else set()
        kept += sorted([*broken[:1], *ends], key=lambda p: p[0])
    return kept


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _stroke(number: int) -> str:
    """How a curve is drawn, no two alike: solid in each color, then dashes, with one more dot a round."""
    rounds = number // len(COLORS)
    dashes = " ".join(["6 3"] + ["2 3"] * (rounds - 1)) if rounds else "none"
    return f'stroke="{_color(number)}" stroke-dasharray="{dashes}"'


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with some air, and never empty."""
    if high <= low:
        air = abs(low) * 0.1 or 1.0
        return low - air, low + air
    return low - share * (high - low), high + share * (high - low)


def _grid(x_range: tuple, y_range: tuple, place, x_name: str) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for y in ticks(*y_range):
        down = place(x_range[0], y).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{down}" y2="{down}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{down}" dy=".32em" text-anchor="end">{axis_number(y)}</text>'
        )
    for x in ticks(*x_range, 7):
        across = place(x, y_range[0]).split(",")[0]
        parts.append(f'<line class="grid" x1="{across}" x2="{across}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text x="{across}" y="{HEIGHT - 8}" text-anchor="middle">{axis_number(x)}</text>'
        )
    parts.append(f'<text x="2" y="{HEIGHT - 8}" opacity=".6">{html.escape(x_name)}</text>')
    return "".join(parts)


def _path(points: Points, place) -> str:
    """SVG path data; a gap where a value is not finite."""
    commands, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        commands.append(pen + place(x, y))
        pen = "L"
    return "".join(commands)


def _lonely(points: Points) -> list[tuple[float, float]]:
    """Points without a finite neighbour, which a line would not show."""
    ok = [False, *(math.isfinite(y) for _, y in points), False]
    return [p for i, p in enumerate(points, 1) if ok[i] and not ok[i - 1] and not ok[i + 1]]


def _legend(lines: Mapping[str, Points]) -> str:
    if len(lines) < 2:
        return ""
    items = (
        f'<span><svg viewBox="0 0 24 4"><line x2="24" y1="2" y2="2" stroke-width="4" {_stroke(i)}/>'
        f"</svg>{html.escape(name)}</span>"
        for i, name in enumerate(lines)
    )
    return f'<div class="legend">{"".join(items)}</div>'
