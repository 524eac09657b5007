"""Figures as elements of a page: SVG text that takes its colours and its font from around it.

The page defines `--ink`, `--soft`, `--rule` and `--series-0` to `--series-7`, for light and for
dark; no figure names a colour. Heat maps are drawn here, in nine strengths of one colour with one
path per strength, so that 64 x 64 cells stay small; `page_svg` does the same for matplotlib.

Letters: R rows, C columns.
"""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from typing import Any

from moduli.inspect.charts import Bars, Chart, HeatMap
from moduli.inspect.text import shortened

# matplotlib wants colours; these stand for CSS variables of the page and are replaced in the SVG.
INK, RULE = "#010203", "#040506"
SERIES = tuple(f"#0708{i:02x}" for i in range(8))
VARIABLES = {
    INK: "var(--ink)",
    RULE: "var(--rule)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
}

STRENGTHS = 8
"""Of the colour of a heat map, besides none at all."""
EMPTY = -1
"""Stands for the strength of a cell without a value."""
EM = 5.2
"""Room for one character of a label, in the unit of the figures."""
LINE = 11.0
"""Height of a line of text."""


def style() -> AbstractContextManager[Any]:
    """What matplotlib needs set while a figure for a page is made."""
    import matplotlib as mpl

    return mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moduli", "font.size": 9.0})


def figure_svg(figure: Any, label: str) -> str:
    """A matplotlib figure that uses INK, RULE and SERIES only, as an element of a page."""
    buffer = io.StringIO()
    with style():
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return page_svg(buffer.getvalue(), label)


def page_svg(svg: str, label: str) -> str:
    """An SVG file as an element of a page: its colours and font become the page's."""
    body = svg[svg.index("<svg") :]
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # Height follows from the viewBox, so that the figure can shrink to a phone.
    body = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", body, count=1)
    return body.replace("<svg", f'<svg role="img" aria-label="{_escaped(label)}"', 1)


def chart_svg(chart: Chart, *, width: int = 300) -> str:
    """A chart as an element of a page.

    Args:
        chart: a heat map or bars.
        width: of the drawing in units in which text is 9 high; the page scales it.
    """
    return _bars(chart, width) if isinstance(chart, Bars) else _heat_map(chart, width)


def _heat_map(chart: HeatMap, width: int) -> str:
    R, C = len(chart.values), len(chart.values[0])
    rows = [shortened(name, 18) for name in chart.rows] or [str(r) for r in range(R)]
    columns = [shortened(name, 10) for name in chart.columns] or [str(c) for c in range(C)]
    left, top = 2 * LINE + EM * max(map(len, rows)), 1.8 * LINE
    across = (width - left - 4) / C
    if R == C:
        across = down = min(across, 3 * LINE)
    else:
        down = min(1.3 * LINE, max(2.0, 190 / R))
    bottom = top + down * R
    upright = bool(chart.columns) and EM * max(map(len, columns)) > across
    foot = bottom + (EM * max(map(len, columns)) + 4 if upright else LINE)
    parts = [_text(0.0, 9.0, chart.title, weight=600)]
    parts += [
        f'<g transform="translate({left:.5g} {top:.5g}) scale({across:.5g} {down:.5g})" '
        f'shape-rendering="crispEdges" style="fill:var(--series-0)">{_cells(chart)}</g>',
        f'<rect x="{left:.5g}" y="{top:.5g}" width="{across * C:.5g}" height="{down * R:.5g}" '
        'style="fill:none;stroke:var(--rule)" stroke-width=".8"/>',
    ]
    for r in range(0, R, _stride(R, down)):
        parts.append(_text(left - 3, top + (r + 0.5) * down + 3, rows[r], anchor="end"))
    for c in range(0, C, _stride(C, across, 1.0 if upright else len(columns[-1]) * 0.7)):
        x = left + (c + 0.5) * across
        if upright:
            parts.append(_text(x + 3, bottom + 3, columns[c], anchor="end", turn=True))
        else:
            parts.append(_text(x, bottom + 9, columns[c], anchor="middle"))
    parts.append(_text(8.0, (top + bottom) / 2, chart.y, anchor="middle", turn=True))
    parts.append(_text(left + across * C / 2, foot + 9, chart.x, anchor="middle"))
    parts += _scale(chart, left, foot + 1.6 * LINE, width)
    return _svg(chart.title, width, foot + 2.8 * LINE, parts)


def _cells(chart: HeatMap) -> str:
    """One path per strength, on a grid of unit cells; equal neighbours in a row are one stroke."""
    paths: dict[int, list[str]] = {}
    scale = STRENGTHS / chart.end if chart.end > 0 else 0.0
    for r, row in enumerate(chart.values):
        levels = [EMPTY if v is None else min(STRENGTHS, round(scale * v)) for v in row]
        start = 0
        for c in range(1, len(levels) + 1):
            if c == len(levels) or levels[c] != levels[start]:
                run = f"M{start} {r}h{c - start}v1H{start}"
                paths.setdefault(levels[start], []).append(run)
                start = c
    return "".join(
        f'<path {_fill(level)} d="{"".join(runs)}"/>'
        for level, runs in sorted(paths.items())
        if level
    )


def _fill(level: int) -> str:
    if level == EMPTY:
        return 'style="fill:var(--rule)"'
    return f'fill-opacity="{level / STRENGTHS:.3g}"'


def _scale(chart: HeatMap, x: float, y: float, width: int) -> list[str]:
    """What the strengths of a heat map mean."""
    side, meaning = 8.0, f"{chart.end:.3g} {chart.unit}"
    x = max(LINE, min(x, width - side * (STRENGTHS + 1) - EM * len(meaning)))
    swatches = "".join(
        f'<path {_fill(level)} d="M{level} 0h1v1H{level}"/>' for level in range(STRENGTHS + 1)
    )
    end = x + side * (STRENGTHS + 1)
    return [
        _text(x - 3, y + 7.5, "0", anchor="end"),
        f'<g transform="translate({x:.5g} {y:.5g}) scale({side:.5g})" '
        f'shape-rendering="crispEdges" style="fill:var(--series-0)">{swatches}</g>',
        f'<rect x="{x:.5g}" y="{y:.5g}" width="{side * (STRENGTHS + 1):.5g}" height="{side:.5g}" '
        'style="fill:none;stroke:var(--rule)" stroke-width=".8"/>',
        _text(end + 3, y + 7.5, meaning),
    ]


def _bars(chart: Bars, width: int) -> str:
    C, end = len(chart.values), chart.end
    highest = f"{end:.3g}"
    left, top, height = 2 * LINE + EM * len(highest), 1.8 * LINE, 56.0
    across, bottom = (width - left - 4) / C, top + height

    def level(value: float) -> float:
        return bottom - (height * value / end if end > 0 else 0.0)

    gap = min(1.0, 0.15 * across)
    bars = "".join(
        f"M{left + c * across + gap:.5g} {bottom:.5g}V{level(value):.5g}"
        f"h{across - 2 * gap:.4g}V{bottom:.5g}z"
        for c, value in enumerate(chart.values)
    )
    right, line = left + across * C, level(chart.line)
    parts = [
        _text(0.0, 9.0, chart.title, weight=600),
        f'<path d="{bars}" style="fill:var(--series-0)"/>',
        f'<path d="M{left:.5g} {bottom:.5g}H{right:.5g}" style="stroke:var(--rule)"/>',
        f'<path d="M{left:.5g} {line:.5g}H{right:.5g}" style="stroke:var(--ink)" '
        'stroke-dasharray="4 3" stroke-width=".8"/>',
        _text(left - 3, top + 5, highest, anchor="end"),
        _text(left - 3, bottom + 1, "0", anchor="end"),
        _text(8.0, (top + bottom) / 2, chart.unit, anchor="middle", turn=True),
        _text(left, bottom + 2.1 * LINE, f"{chart.x}; dashed: {chart.line_label}"),
    ]
    for c in range(0, C, _stride(C, across, len(str(C)) * 0.7)):
        parts.append(_text(left + (c + 0.5) * across, bottom + 9, str(c), anchor="middle"))
    return _svg(chart.title, width, bottom + 2.6 * LINE, parts)


def _stride(count: int, size: float, lines: float = 1.0) -> int:
    """Every how many cells there is room for a label that is so many lines high or wide."""
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 256, 500, 512, 1000)
    return next((s for s in steps if s * size >= LINE * lines), count)


def _text(
    x: float, y: float, text: str, *, anchor: str = "", weight: int = 0, turn: bool = False
) -> str:
    extra = f' text-anchor="{anchor}"' if anchor else ""
    extra += f' font-weight="{weight}"' if weight else ""
    extra += f' transform="rotate(-90 {x:.5g} {y:.5g})"' if turn else ""
    return f'<text x="{x:.5g}" y="{y:.5g}"{extra}>{_escaped(text)}</text>'


def _svg(label: str, width: int, height: float, parts: list[str]) -> str:
    return (
        f'<svg role="img" aria-label="{_escaped(label)}" viewBox="0 0 {width:.5g} {height:.5g}" '
        'style="fill:var(--ink);font-size:9px">' + "".join(parts) + "</svg>"
    )


def _escaped(text: str) -> str:
    from markupsafe import escape

    return str(escape(shortened(text, 200)))
