"""Figures of the report: SVG text that takes its colours and its font from the page around it."""

from __future__ import annotations

import io
import re

from moduli.study.table import Row, Table

# matplotlib wants colours; these stand for CSS variables of the page and are replaced in the SVG.
INK, RULE, SERIES = "#010203", "#040506", ("#070809", "#0a0b0c", "#0d0e0f", "#101112")
VARIABLES = {
    INK: "var(--ink)",
    RULE: "var(--rule)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
}


def difference_plot(table: Table) -> str:
    """Per-seed differences to the first row: a dot per seed, the mean and its interval.

    Args:
        table: its rows after the first are drawn, merged ones with hollow dots.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = table.rows[1:]
    scale, what = (100, "points above") if table.metric.share else (1, "difference to")
    step = 0.8 / max(1, len(rows))
    height = 0.75 + len(table.columns) * max(0.42, 0.23 * len(rows)) + 0.17 * len(rows)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moduli", "font.size": 9.0}):
        figure = Figure(figsize=(4.7, height), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        for i, row in enumerate(rows):
            for line, cell in enumerate(row.cells):
                d = cell.difference
                if d is None:
                    continue
                y = line + (i - (len(rows) - 1) / 2) * step
                colour, fill = _style(i, row)
                if d.interval is not None:
                    low, high = (scale * end for end in d.interval)
                    axes.plot([low, high], [y, y], color=colour, linewidth=1.4)
                axes.plot(
                    [scale * d.mean], [y], "|", color=colour, markersize=9, markeredgewidth=1.8
                )
                axes.plot(
                    [scale * value for value in d.values],
                    [y] * d.n,
                    "o",
                    color=colour,
                    markerfacecolor=fill,
                    markersize=4.5,
                )
        titles = [
            f"{c.title}\n(in-domain)" if c.kind == "in-domain" else c.title for c in table.columns
        ]
        axes.set_yticks(range(len(titles)), titles)
        axes.set_ylim(len(titles) - 0.4, -0.6)
        axes.set_xlabel(f"{table.metric.title}, {what} {table.rows[0].label}")
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for text in (axes.xaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set_color(INK)
        handles = []
        for i, row in enumerate(rows):
            colour, fill = _style(i, row)
            handles.append(
                Line2D([], [], marker="o", color=colour, markerfacecolor=fill, label=row.label)
            )
        figure.legend(
            handles=handles, loc="outside upper left", frameon=False, labelcolor=INK, ncols=1
        )
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return page_svg(buffer.getvalue(), "Differences by seed; the table above has the numbers.")


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
    return body.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _style(index: int, row: Row) -> tuple[str, str]:
    colour = SERIES[index % len(SERIES)]
    return colour, ("none" if row.merged else colour)
