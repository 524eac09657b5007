"""Figures of the report: SVG text that takes its colours and its font from the page around it.

An arm has one colour and one marker in all of them; what was edited is hollow, or a cross where
experts were pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from moduli.inspect.svg import INK, RULE, SERIES, figure_svg, style
from moduli.inspect.text import shortened
from moduli.study.table import Cell, Column, Row, Table
from moduli.training.metrics import Metric

MARKERS = "osD^vPX*"
"""One more turn of the colours begins with the next marker."""
CROWDED = 40
"""Intervals beyond which single domains are left out of the figure of differences."""
LABEL = 40
"""Characters of a label in a figure."""


def difference_plot(table: Table) -> str:
    """Pair-by-pair differences to the first row: a dot per pair, the mean and its interval.

    Args:
        table: its rows after the first are drawn, edited ones with hollow dots; single domains
            only where there is room for them.
    """
    rows = table.rows[1:]
    places = list(range(len(table.columns)))
    if len(rows) * len(places) > CROWDED:
        places = [i for i in places if table.columns[i].kind != "one domain"]
    step = 0.8 / max(1, len(rows))
    height = 0.75 + len(places) * max(0.42, 0.23 * len(rows)) + 0.17 * len(rows)
    scale = _scale(table.metric)
    with _page((4.7, height)) as (figure, panels):
        axes = panels[0]
        axes.axvline(0, color=INK, linewidth=0.8)
        for i, row in enumerate(rows):
            look = _look(row)
            for line, place in enumerate(places):
                d = row.cells[place].difference
                if d is None:
                    continue
                y = line + (i - (len(rows) - 1) / 2) * step
                _interval(axes, d.interval, scale, y, look["color"])
                axes.plot(
                    [scale * d.mean],
                    [y],
                    "|",
                    color=look["color"],
                    markersize=9,
                    markeredgewidth=1.8,
                )
                dots = [scale * value for value in d.values]
                axes.plot(dots, [y] * d.n, linestyle="", markersize=4.5, **look)
        _lines(axes, [_title(table.columns[place]) for place in places])
        axes.set_xlabel(_against(table))
        _legend(figure, [(row.label, _look(row)) for row in rows])
        return figure_svg(figure, "Differences by seed; the table above has the numbers.")


def bar_plot(table: Table, rows: Sequence[Row], label: str) -> str:
    """Mean differences to the first row as bars with intervals, in-domain beside out-of-domain.

    Args:
        table: what `rows` are from.
        rows: a bar in every panel.
        label: what the figure shows, for those who cannot see it.
    """
    places = [i for i, column in enumerate(table.columns) if column.kind != "one domain"]
    scale = _scale(table.metric)
    size = (5.6, 0.75 + 0.3 * len(rows))
    with _page(size, columns=len(places)) as (figure, panels):
        for axes, place in zip(panels, places, strict=True):
            axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
            for y, row in enumerate(rows):
                d = row.cells[place].difference
                if d is None:
                    continue
                look = _look(row)
                axes.barh(
                    y,
                    scale * d.mean,
                    height=0.62,
                    color=look["markerfacecolor"],
                    edgecolor=look["color"],
                    linewidth=1.2,
                )
                _interval(axes, d.interval, scale, y, INK)
            kind = table.columns[place].kind
            axes.set_title(kind, fontsize=9, color=INK)
        _lines(panels[0], [row.label for row in rows])
        figure.supxlabel(_against(table), fontsize=9, color=INK)
        return figure_svg(figure, label)


def line_plot(
    metric: Metric,
    series: Sequence[tuple[Row, Sequence[tuple[float, Cell]]]],
    column: Column,
    label: str,
) -> str:
    """Means with intervals over shares of the training rows; the first row's last is dashed.

    Args:
        metric: of the cells.
        series: row by row, (share, cell) with ascending shares.
        column: the place that was tested.
        label: what the figure shows, for those who cannot see it.
    """
    scale = _scale(metric)
    with _page((4.7, 2.9)) as (figure, panels):
        axes = panels[0]
        for row, points in series:
            look = _look(row)
            shares = [100 * share for share, _ in points]
            means = [scale * cell.summary.mean for _, cell in points]
            axes.plot(shares, means, linewidth=1.4, markersize=4.5, **look)
            for share, (_, cell) in zip(shares, points, strict=True):
                if cell.summary.interval is not None:
                    ends = [scale * end for end in cell.summary.interval]
                    axes.plot([share, share], ends, color=look["color"], linewidth=1.0)
        whole = scale * series[0][1][-1][1].summary.mean
        axes.axhline(whole, color=INK, linewidth=0.8, linestyle="--")
        axes.set_xlabel("share of the training rows in %")
        unit = " in %" if metric.share else ""
        axes.set_ylabel(f"{metric.title}{unit}, {column.kind}")
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        _legend(figure, [(row.label, _look(row)) for row, _ in series])
        return figure_svg(figure, label)


@contextmanager
def _page(size: tuple[float, float], columns: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """A figure whose axes look like the page, settled when the block ends."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=size, layout="constrained")
        panels = list(figure.subplots(1, columns, squeeze=False, sharey=True)[0])
        for axes in panels:
            axes.grid(axis="x", color=RULE, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(colors=INK, length=0)
            for text in (axes.xaxis.label, axes.yaxis.label):
                text.set_color(INK)
            for spine in axes.spines.values():
                spine.set_visible(False)
        yield figure, panels


def _lines(axes: Any, titles: Sequence[str]) -> None:
    """Names of the lines of a figure, from above."""
    axes.set_yticks(range(len(titles)))
    # A dollar sign in a name of the data is no formula.
    axes.set_yticklabels([_short(title) for title in titles], parse_math=False)
    axes.set_ylim(len(titles) - 0.4, -0.6)


def _legend(figure: Any, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=_short(label), **look) for label, look in entries]
    legend = figure.legend(
        handles=handles, loc="outside upper left", frameon=False, labelcolor=INK, ncols=1
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _interval(
    axes: Any, interval: tuple[float, float] | None, scale: float, y: int | float, colour: str
) -> None:
    if interval is not None:
        axes.plot([scale * end for end in interval], [y, y], color=colour, linewidth=1.4)


def _look(row: Row) -> dict[str, Any]:
    """Colour and marker of a row; those of the first arm, which the others are compared with, are
    the colour of the text."""
    turn, place = divmod(row.arm - 1, len(SERIES))
    colour = SERIES[place] if row.arm else INK
    return {
        "color": colour,
        "marker": "x" if row.edit == "pruned" else MARKERS[(place + turn) % len(MARKERS)],
        "markerfacecolor": colour if row.edit is None else "none",
    }


def _title(column: Column) -> str:
    if column.kind == "in-domain" and column.title != "in-domain":
        return f"{_short(column.title)}\n(in-domain)"
    return column.title


def _short(text: str) -> str:
    return "\n".join(shortened(line, LABEL) for line in text.split("\n"))


def _scale(metric: Metric) -> float:
    return 100.0 if metric.share else 1.0


def _against(table: Table) -> str:
    what = "points above" if table.metric.share else "difference to"
    return f"{table.metric.title}, {what} {_short(table.rows[0].label)}"
