"""Figures of the report: SVG text that takes its colours and its font from the page around it."""

from __future__ import annotations

from moduli.inspect.svg import INK, RULE, SERIES, figure_svg, style
from moduli.study.table import Row, Table


def difference_plot(table: Table) -> str:
    """Per-seed differences to the first row: a dot per seed, the mean and its interval.

    Args:
        table: its rows after the first are drawn, merged ones with hollow dots.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = table.rows[1:]
    scale, what = (100, "points above") if table.metric.share else (1, "difference to")
    step = 0.8 / max(1, len(rows))
    height = 0.75 + len(table.columns) * max(0.42, 0.23 * len(rows)) + 0.17 * len(rows)
    with style():
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
    return figure_svg(figure, "Differences by seed; the table above has the numbers.")


def _style(index: int, row: Row) -> tuple[str, str]:
    colour = SERIES[index % len(SERIES)]
    return colour, ("none" if row.merged else colour)
