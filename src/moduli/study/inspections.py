"""What the experts of a study's models do: one inspected run of every arm that has experts.

A run leaves its inspection beside its record. Which run is shown does not depend on scores: it is
the first of the arm in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moduli.errors import CheckpointError
from moduli.inspect import figures
from moduli.inspect.charts import Chart, HeatMap
from moduli.inspect.record import Inspection
from moduli.inspect.svg import chart_svg
from moduli.inspect.text import layer_names, shortened
from moduli.study.compare import Study
from moduli.study.records import INSPECTION

PANELS = 4
"""Maps of one arm that are drawn: those of its last layers."""
LABEL = 28
"""Characters of an arm's label above a map."""


@dataclass(frozen=True)
class Panels:
    """Figures of one kind: SVG, and the keys of the runs that were inspected."""

    name: str
    title: str
    note: str
    figures: tuple[str, ...]
    runs: tuple[str, ...]


def read_inspections(study: Study, root: Path) -> tuple[dict[str, Inspection], list[str]]:
    """The inspection of the first run of every arm that has one, and what could not be read.

    Args:
        study: finished runs.
        root: where their directories are; none need to be there.

    Returns:
        Inspections by key of the run, and sentences for the report.
    """
    found, notes = {}, []
    for arm in range(len(study.plan.arms)):
        for _, record in study.finished(arm):
            key = record.spec.key
            path = root / key / INSPECTION
            if not path.is_file():
                continue
            try:
                found[key] = Inspection.read(path)
                break
            except CheckpointError as error:
                reason = str(error).replace(str(path), INSPECTION)
                notes.append(f"The inspection of run {key} was left out: {reason}.")
    return found, notes


def panels(study: Study, inspections: Mapping[str, Inspection]) -> list[Panels]:
    """Figures of the inspected runs, one section each; sections without figures are left out.

    Args:
        study: finished runs.
        inspections: by key of the run.
    """
    shown: dict[str, tuple[str, Inspection]] = {}
    for arm, label in enumerate(study.plan.labels):
        for _, record in study.finished(arm):
            if record.spec.key in inspections:
                shown[label] = (record.spec.key, inspections[record.spec.key])
                break
    made = (
        (
            "selection",
            "Which experts are chosen in the course of training",
            "A row is a window of training that ends with the step written beside it.",
            _selection(shown),
        ),
        (
            "experts-by-domain",
            "Which experts the domains use",
            "A row is one domain: how its selections spread over the experts of the tuned model.",
            _labelled(shown, figures.by_domain),
        ),
        (
            "activations",
            "Neurons before and after the split",
            "How many neurons of a block are positive for a token. Where neurons that fire "
            "together are in one expert, few blocks of a row are strong on the side by expert.",
            _labelled(shown, figures.activations),
        ),
    )
    return [
        Panels(
            name,
            title,
            note,
            tuple(chart_svg(chart) for charts in drawn.values() for chart in charts),
            tuple(shown[label][0] for label in drawn),
        )
        for name, title, note, drawn in made
        if drawn
    ]


def uninspected(study: Study, inspections: Mapping[str, Inspection]) -> list[str]:
    """Labels of the arms with experts of which there is no inspection."""
    return [
        label
        for arm, label in enumerate(study.plan.labels)
        if (runs := study.finished(arm))
        and (method := study.plan.arms[arm].method.build()).modular
        and method.routes
        and not any(record.spec.key in inspections for _, record in runs)
    ]


def _labelled(
    shown: Mapping[str, tuple[str, Inspection]], make: Callable[[Inspection], Sequence[HeatMap]]
) -> dict[str, list[Chart]]:
    """The maps of every arm that has some, with the arm in their titles."""
    made = {label: make(inspection)[-PANELS:] for label, (_, inspection) in shown.items()}
    return {
        label: [replace(chart, title=f"{shortened(label, LABEL)}, {chart.title}") for chart in maps]
        for label, maps in made.items()
        if maps
    }


def _selection(shown: Mapping[str, tuple[str, Inspection]]) -> dict[str, list[Chart]]:
    """Side by side on one scale for the last layer that all arms have, else each arm's last."""
    held = {label: i.selection for label, (_, i) in shown.items() if i.selection is not None}
    held = {label: selection for label, selection in held.items() if selection.steps}
    if not held:
        return {}
    common = set.intersection(*(set(selection.shares) for selection in held.values()))
    last = {label: list(selection.shares)[-1] for label, selection in held.items()}
    if common:
        layer = [name for name in next(iter(held.values())).shares if name in common][-1]
        (title,) = layer_names([layer])
        named = {f"{shortened(label, LABEL)}, {title}": one for label, one in held.items()}
        if len(named) < len(held):  # labels that are equal where they are cut
            named = {f"{title}, {label}": one for label, one in held.items()}
        charts = figures.selection(named, layer)
        return {label: [chart] for label, chart in zip(held, charts, strict=True)}
    return {
        label: list(figures.selection({f"{label}, {last[label]}": selection}, last[label]))
        for label, selection in held.items()
    }
