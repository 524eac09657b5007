"""The figures of an inspection: functions from its records to charts.

Shares of experts are drawn as multiples of an equal share, so that layers with different numbers
of experts can be read alike.

Letters: E experts, L layers, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from moduli.errors import ConfigError, nearest
from moduli.inspect.charts import Bars, Cell, Chart, HeatMap, draw
from moduli.inspect.record import Inspection, LayerInspection, Selection
from moduli.inspect.text import layer_names

EQUAL = "× equal share"
ROWS = 40
"""Rows of a map of classes, tokens or windows at most."""
EXPERTS = 64
"""Experts of a map of pairs at most."""


def figures(inspection: Inspection) -> dict[str, Any]:
    """All figures of an inspection for Python, as matplotlib figures by name.

    Args:
        inspection: names of figures for which it holds nothing are left out.
    """
    return {name: draw(charts) for name, charts in all_charts(inspection).items()}


def all_charts(inspection: Inspection) -> dict[str, list[Chart]]:
    """The charts of an inspection by name; what it holds nothing for is left out."""
    found: dict[str, Sequence[Chart]] = {
        "load": load(inspection),
        "domains": by_domain(inspection),
        "classes": by_class(inspection),
        "coselection": coselection(inspection),
        "overlap": overlap(inspection),
        "activations": activations(inspection),
    }
    if (held := inspection.selection) is not None:
        names = layer_names(list(held.shares))
        panels = [
            selection({name: held}, layer) for name, layer in zip(names, held.shares, strict=True)
        ]
        found["selection"] = [panel for layer in panels for panel in layer]
    return {name: list(charts) for name, charts in found.items() if charts}


def load(inspection: Inspection) -> list[Bars]:
    """How much every expert is used, by layer."""
    return [
        Bars(
            title=name,
            values=_relative(layer.load),
            x="expert",
            unit=EQUAL,
            line=1.0,
            line_label="equal share",
        )
        for name, layer in _named(inspection)
    ]


def by_domain(inspection: Inspection) -> list[HeatMap]:
    """Which experts the domains use, by layer; none where there are fewer than two domains."""
    return [
        _shares(name, "domain", layer.by_domain, layer)
        for name, layer in _named(inspection)
        if len(layer.by_domain) > 1
    ]


def by_class(inspection: Inspection) -> list[HeatMap]:
    """Which experts the classes use, by layer; none where there are fewer than two classes."""
    return [
        _shares(name, "class", layer.by_class, layer)
        for name, layer in _named(inspection)
        if len(layer.by_class) > 1
    ]


def coselection(inspection: Inspection) -> list[HeatMap]:
    """Which experts are chosen together, by layer; none for layers that choose only one.

    Of many experts those most used are shown.
    """
    maps = []
    for name, layer in _named(inspection):
        if layer.coselection is None or layer.top_k < 2 or layer.num_experts < 2:
            continue
        used = sorted(range(layer.num_experts), key=lambda e: -layer.load[e])
        shown = sorted(used[:EXPERTS])
        all_shown = len(shown) == layer.num_experts
        # How often an expert is chosen at all would drown what it is chosen with.
        cells: list[list[Cell]] = [
            [None if i == j else 100 * layer.coselection[i][j] for j in shown] for i in shown
        ]
        maps.append(
            HeatMap(
                title=name if all_shown else f"{name}, the {EXPERTS} experts most used",
                values=cells,
                x="expert",
                y="expert",
                unit="% of tokens chose both",
                rows=() if all_shown else tuple(map(str, shown)),
                columns=() if all_shown else tuple(map(str, shown)),
            )
        )
    return maps


def selection(selections: Mapping[str, Selection], layer: str) -> list[HeatMap]:
    """Which experts were chosen in the course of training: one panel per method, on one scale.

    Of many windows neighbours are averaged.

    Args:
        selections: by the name that the panel gets.
        layer: name of a layer that all of them hold.

    Raises:
        ConfigError: one of them has no such layer.
    """
    for held in selections.values():
        if layer not in held.shares:
            raise ConfigError(
                f"selection over training was not recorded for {layer}. "
                f"{nearest(layer, held.shares)}"
            )
    rows = {name: _windows(held, layer) for name, held in selections.items() if held.steps}
    top = max(
        (value for found in rows.values() for row in found.values() for value in row), default=0.0
    )
    return [
        HeatMap(
            title=name,
            values=list(found.values()),
            x="expert",
            y="step",
            unit=EQUAL,
            rows=tuple(map(str, found)),
            top=top,
        )
        for name, found in rows.items()
    ]


def _windows(held: Selection, layer: str) -> dict[int, list[float]]:
    """Shares by the last step of a window, in at most ROWS rows."""
    starts = [*spread(len(held.steps), ROWS), len(held.steps)]
    rows = held.shares[layer]
    return {
        held.steps[end - 1]: _relative(
            [sum(e) / (end - start) for e in zip(*rows[start:end], strict=True)]
        )
        for start, end in pairwise(starts)
    }


def overlap(inspection: Inspection) -> list[HeatMap]:
    """How much the choices of two layers tell about each other, and would by chance, on one scale.

    None for a single layer.
    """
    if len(inspection.overlap) < 2:
        return []
    names = tuple(name for name, _ in _named(inspection))
    panels: dict[str, list[list[Cell]]] = {
        title: [[None if i == j else v for j, v in enumerate(row)] for i, row in enumerate(rows)]
        for title, rows in (
            ("first choices, layer by layer", inspection.overlap),
            ("the same by chance alone", inspection.overlap_by_chance),
        )
        if rows
    }
    shown = [value or 0.0 for cells in panels.values() for row in cells for value in row]
    return [
        HeatMap(
            title=title,
            values=cells,
            x="layer",
            y="layer",
            unit="mutual information",
            rows=names,
            columns=names,
            top=max(shown),
        )
        for title, cells in panels.items()
    ]


def activations(inspection: Inspection) -> list[HeatMap]:
    """Positive neurons by token: in blocks of the original order, then by expert, on one scale."""
    maps = []
    for pattern in inspection.activations:
        (name,) = layer_names([pattern.layer])
        shown = spread(len(pattern.original), ROWS)
        both = [
            [
                [100 * n / size for n, size in zip(rows[t], pattern.sizes, strict=True)]
                for t in shown
            ]
            for rows in (pattern.original, pattern.by_expert)
        ]
        top = max((value for rows in both for row in rows for value in row), default=0.0)
        if not shown:
            continue
        for rows, order in zip(both, ("original order", "by expert"), strict=True):
            maps.append(
                HeatMap(
                    title=f"{name}, {order}",
                    values=rows,
                    x="expert" if order == "by expert" else "block of neurons",
                    y="token",
                    unit="% of the neurons positive",
                    rows=tuple(map(str, shown)),
                    top=top,
                )
            )
    return maps


def distance(shares: Sequence[float], others: Sequence[float]) -> float:
    """Share of selections that would have to move to make two distributions equal, 0 to 1."""
    return sum(abs(a - b) for a, b in zip(shares, others, strict=True)) / 2


def _named(inspection: Inspection) -> list[tuple[str, LayerInspection]]:
    names = layer_names([layer.name for layer in inspection.layers])
    return list(zip(names, inspection.layers, strict=True))


def _shares(
    name: str, what: str, groups: Mapping[str, Sequence[float]], layer: LayerInspection
) -> HeatMap:
    """Shares of groups of tokens; of many groups those least like all tokens together."""
    far = sorted(groups, key=lambda group: -distance(groups[group], layer.load))[:ROWS]
    rows = tuple(group for group in groups if group in far)
    values = [_relative(groups[group]) for group in rows]
    return HeatMap(title=name, values=values, x="expert", y=what, unit=EQUAL, rows=rows)


def _relative(shares: Sequence[float]) -> list[float]:
    return [len(shares) * share for share in shares]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the first `count` numbers, evenly."""
    if count <= most:
        return list(range(count))
    return [i * count // most for i in range(most)]
