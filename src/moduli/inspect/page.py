"""The page of an inspection: one HTML file that needs nothing but itself, a function of the record.

It works without scripts, in light and dark, on a phone and on paper.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moduli.inspect import figures
from moduli.inspect.charts import Chart, HeatMap
from moduli.inspect.files import write_text
from moduli.inspect.html import render
from moduli.inspect.record import Inspection, TokenTrace
from moduli.inspect.svg import chart_svg
from moduli.inspect.text import layer_names
from moduli.inspect.wording import headline

HUES = 12
"""Colours of tokens that can be told apart; other experts have their number only."""
PANELS = 8
"""Layers for which large maps are drawn."""
LISTED = 8
"""Experts of a token that are listed with their weights."""


@dataclass(frozen=True)
class Token:
    """A token as the page shows it: its text, first expert, hue, and all experts in words."""

    piece: str
    expert: str
    hue: int | None
    experts: str


def write_page(inspection: Inspection, path: Path, *, command: Sequence[str]) -> None:
    """Write the page; the file is there completely or not at all.

    Args:
        inspection: what the page shows.
        path: the HTML file.
        command: what made the inspection, for the section on running it again.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_text(path, render_page(inspection, command=command))


def render_page(inspection: Inspection, *, command: Sequence[str]) -> str:
    """The HTML of the page; see `write_page`."""
    names = layer_names([layer.name for layer in inspection.layers])
    charts = figures.all_charts(inspection)
    few = {name: _few(found, 2 if name == "activations" else 1) for name, found in charts.items()}
    return render(
        "moduli.inspect",
        "inspection.html.j2",
        title=inspection.title,
        inspection=inspection,
        layers=list(zip(names, inspection.layers, strict=True)),
        headline=headline(inspection),
        figures={name: list(map(chart_svg, found)) for name, found in few.items()},
        left_out={name: len(found) - len(few[name]) for name, found in charts.items()},
        rows=figures.ROWS,
        hues=HUES,
        traces=_traces(inspection),
        command=shlex.join(command),
    )


def _few(charts: Sequence[Chart], group: int) -> list[Chart]:
    """All bars, which are small, but only some of many maps, evenly, in whole groups."""
    if not any(isinstance(chart, HeatMap) for chart in charts):
        return list(charts)
    groups = figures.spread(len(charts) // group, PANELS // group)
    return [chart for i in groups for chart in charts[group * i : group * (i + 1)]]


def _traces(inspection: Inspection) -> list[list[tuple[str, list[Token]]]]:
    """For every text and layer, its tokens; an expert has the same hue in all texts."""
    layers = list(dict.fromkeys(name for trace in inspection.tokens for name in trace.experts))
    names = dict(zip(layers, layer_names(layers), strict=True))
    hues = {layer: _hues(inspection.tokens, layer) for layer in layers}
    return [
        [(names[layer], _tokens(trace, layer, hues[layer])) for layer in trace.experts]
        for trace in inspection.tokens
    ]


def _hues(traces: Sequence[TokenTrace], layer: str) -> dict[int, int]:
    """A hue for each of the experts that come first most often."""
    first = Counter(row[0] for trace in traces for row in trace.experts.get(layer, ()) if row)
    frequent = sorted(sorted(first), key=lambda expert: -first[expert])[:HUES]
    return {expert: hue for hue, expert in enumerate(sorted(frequent))}


def _tokens(trace: TokenTrace, layer: str, hues: dict[int, int]) -> list[Token]:
    tokens = []
    for piece, experts, weights in zip(
        trace.pieces, trace.experts[layer], trace.weights[layer], strict=True
    ):
        if not experts:
            tokens.append(Token(piece, "–", None, "no expert"))
            continue
        listed = [f"{e} ({w:.2g})" for e, w in zip(experts, weights, strict=True)]
        more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
        tokens.append(
            Token(
                piece,
                str(experts[0]),
                hues.get(experts[0]),
                f"experts {', '.join(listed[:LISTED])}{more}",
            )
        )
    return tokens
