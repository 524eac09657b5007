"""A figure of the bench: time over floor of every case, as an SVG file of its own."""

from __future__ import annotations

import io
from collections.abc import Sequence

from moduli.bench.rows import Entry, LayerRow
from moduli.bench.wording import short

INK, RULE = "#333333", "#d0d0d0"
# Ours filled, the others hollow, so that the figure also works without colours.
SERIES = (
    ("moduli, auto", "#3f51b5", "o", True),
    ("transformers, best backend", "#c62828", "s", False),
    ("dense, fastest form", "#6d6d6d", "D", False),
)


def floor_plot(rows: Sequence[LayerRow]) -> str:
    """Time over floor on a logarithmic axis: one line per case, a mark per contender.

    Args:
        rows: of one of the settings.

    Returns:
        The SVG file; the same rows make the same file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moduli", "font.size": 9.0}):
        figure = Figure(figsize=(7.0, 1.2 + 0.26 * len(rows)), layout="constrained")
        figure.set_facecolor("white")
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.axvline(1, color=INK, linewidth=1.0)
        for i, (label, colour, marker, filled) in enumerate(SERIES):
            points = [(row.to_floor(_contender(row, i)), y) for y, row in enumerate(rows)]
            there = [(x, y) for x, y in points if x is not None]
            axes.plot(
                [x for x, _ in there],
                [y for _, y in there],
                marker,
                color=colour,
                markerfacecolor=colour if filled else "white",
                markersize=5.5,
                label=label,
            )
        axes.set_yticks(range(len(rows)), [short(row.case) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("time over floor (1 is the cost of the chosen experts' arithmetic)")
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        figure.legend(loc="outside upper left", frameon=False, ncols=3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _contender(row: LayerRow, series: int) -> Entry | None:
    if series == 0:
        return row.entry("auto")
    if series == 2:
        return row.best_dense
    timed = [e for e in row.entries if e.role == "peer" and e.ms is not None]
    return min(timed, key=lambda e: e.ms or 0.0, default=None)
