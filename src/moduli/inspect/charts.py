"""What a figure shows, before anything is drawn: heat maps and bars as plain numbers with names.

A page draws them as SVG (`moduli.inspect.svg`), Python as matplotlib figures (`draw`). Both read
the same numbers, labels and scale.

Letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moduli.errors import ConfigError
from moduli.inspect.text import shortened, visible

Cell = float | None
TICKS = 20
"""Names along one side of a matplotlib map at most."""


@dataclass(frozen=True)
class HeatMap:
    """A table of numbers from 0 up, shown by the strength of one colour.

    Attributes:
        title: what it shows.
        values: [R][C]; None leaves a cell empty.
        x: what columns are.
        y: what rows are.
        unit: what the numbers are, for the scale.
        rows: names of the rows; empty: they are numbered from 0.
        columns: names of the columns; empty: they are numbered from 0.
        top: the end of the scale; None: the largest value.
    """

    title: str
    values: Sequence[Sequence[Cell]]
    x: str
    y: str
    unit: str
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    top: float | None = None

    def __post_init__(self) -> None:
        """Check that rows are of equal length and names are as many.

        Raises:
            ConfigError: there is nothing to draw, or the sizes do not agree.
        """
        widths = {len(row) for row in self.values}
        if len(widths) != 1 or widths == {0}:
            raise ConfigError(
                f"a heat map needs rows of one length of at least 1, not {sorted(widths)}"
            )
        for names, size in ((self.rows, len(self.values)), (self.columns, widths.pop())):
            if names and len(names) != size:
                raise ConfigError(f"{len(names)} names for {size} rows or columns of a heat map")

    @property
    def end(self) -> float:
        """Where the scale ends; it starts at 0."""
        if self.top is not None:
            return self.top
        return max((v for row in self.values for v in row if v is not None), default=0.0)


@dataclass(frozen=True)
class Bars:
    """One bar per column, and a line to compare them with.

    Attributes:
        title: what it shows.
        values: [C] heights, from 0 up.
        x: what columns are.
        unit: what heights are.
        line: where the line is drawn.
        line_label: what the line is.
    """

    title: str
    values: Sequence[float]
    x: str
    unit: str
    line: float
    line_label: str

    @property
    def end(self) -> float:
        """The height of the tallest bar, or of the line."""
        return max(self.line, *self.values)


Chart = HeatMap | Bars


def draw(charts: Sequence[Chart], *, columns: int = 2) -> Any:
    """A matplotlib figure with one panel per chart.

    Args:
        charts: at least one.
        columns: panels side by side.

    Returns:
        A `matplotlib.figure.Figure`; a notebook shows it, `savefig` writes it.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(5.0 * columns, 3.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for chart, axes in zip(charts, panels, strict=False):
        # A dollar sign in a name is no formula.
        axes.set_title(visible(chart.title), fontsize="medium", parse_math=False)
        axes.set_xlabel(chart.x)
        if isinstance(chart, Bars):
            axes.bar(range(len(chart.values)), chart.values)
            axes.axhline(chart.line, color="black", linewidth=0.8, label=chart.line_label)
            axes.set_ylabel(chart.unit)
            axes.legend(fontsize="small", frameon=False)
        else:
            _draw_map(chart, axes, figure)
    for axes in panels[len(charts) :]:
        axes.remove()
    return figure


def _draw_map(chart: HeatMap, axes: Any, figure: Any) -> None:
    cells = [[float("nan") if v is None else v for v in row] for row in chart.values]
    image = axes.imshow(
        cells, cmap="Blues", vmin=0, vmax=chart.end or 1, aspect="auto", interpolation="nearest"
    )
    axes.set_ylabel(chart.y)
    # A dollar sign in a name is no formula.
    if chart.rows:
        axes.set_yticks(*_ticks(chart.rows), parse_math=False)
    if chart.columns:
        axes.set_xticks(*_ticks(chart.columns), rotation=90, parse_math=False)
    figure.colorbar(image, ax=axes, label=chart.unit)


def _ticks(names: Sequence[str]) -> tuple[range, list[str]]:
    """Places and names of at most TICKS cells, evenly."""
    places = range(0, len(names), -(-len(names) // TICKS))
    return places, [shortened(names[place], 24) for place in places]
