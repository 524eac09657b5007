"""Analyses that the arms of a study allow: each a figure, a few sentences and their numbers.

Nobody asks for them. Arms that are equal but for one setting are an ablation of that setting, so
a plan with the arms of a published figure gives that figure (EMoE, NAACL 2024: best against worst
experts, numbers of experts, gates, layers, clustered against random, shares of the data).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moduli.study.compare import Study
from moduli.study.figures import bar_plot, line_plot
from moduli.study.plan import Plan
from moduli.study.statistics import holm, paired_difference
from moduli.study.table import Cell, Column, Row, Table, tabulate
from moduli.study.wording import PLACES, corrected_claim


@dataclass(frozen=True)
class Analysis:
    """A part of the report.

    Attributes:
        name: for machines.
        title: of its section.
        text: sentences that its intervals support, and what to mind in reading it.
        figure: SVG for a page.
        columns: places that were tested.
        numbers: what the figure is drawn from: label and one cell per column.
    """

    name: str
    title: str
    text: tuple[str, ...]
    figure: str
    columns: tuple[Column, ...]
    numbers: tuple[tuple[str, tuple[Cell, ...]], ...]

    @property
    def runs(self) -> tuple[str, ...]:
        """Keys of the runs that it is made from, those compared with among them."""
        cells = [cell for _, row in self.numbers for cell in row]
        return tuple(dict.fromkeys(key for cell in cells for key in cell.compared))


@dataclass(frozen=True)
class Ablation:
    """Settings of a method that arms may differ in.

    Attributes:
        name: for machines.
        title: of the section.
        keys: the settings; arms that differ in these only belong together.
        against: the value that the others are compared with in words; None: no such sentences,
            because there are many values and none is special.
        note: what to mind.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    against: str | None
    note: str


SEARCH = (
    "Whoever takes the best of these bars has chosen by the scores they show, and needs other "
    "data to know how good it is."
)
ABLATIONS = (
    Ablation(
        "negative-transfer",
        "Best experts, worst experts, all but the best",
        ("choose",),
        "top",
        "Experts that are chosen last are trained and tested here as the only ones. It speaks for "
        "negative transfer if the best ones do better than the model without experts, which uses "
        "all; that the others do worse than it is not enough, since the model was pretrained "
        "with all of them.",
    ),
    Ablation(
        "experts",
        "How many experts, and how many per token",
        ("num_experts", "top_k"),
        None,
        SEARCH,
    ),
    Ablation("layers", "Which layers have experts", ("layers",), None, SEARCH),
    Ablation(
        "split",
        "How neurons are grouped into experts",
        ("split",),
        "random",
        "Only if a clustered split is better than a random one is it the structure found in the "
        "weights that helps.",
    ),
    Ablation(
        "gates",
        "Which gate chooses",
        ("gate",),
        "avgk",
        "The gate avgk is derived from the weights of its experts; the others are learned.",
    ),
)


def analyses(study: Study, table: Table) -> list[Analysis]:
    """All analyses that the finished runs allow.

    Args:
        study: finished runs.
        table: of the metric and rule to use.
    """
    found = [
        _ablation(study, table, ablation, rows)
        for ablation in ABLATIONS
        for rows in groups(study.plan, table, ablation.keys)
    ]
    efficiency = _data_efficiency(study, table)
    return found if efficiency is None else [*found, efficiency]


def groups(plan: Plan, table: Table, keys: Sequence[str]) -> list[list[Row]]:
    """Rows as tuned whose arms are equal but for `keys`, where there are two or more.

    Args:
        plan: with the arms; those that were tuned with other learning rates are not equal.
        table: its rows.
        keys: settings of a method.
    """
    found: list[tuple[Any, list[Row]]] = []
    for row in table.rows:
        one = plan.arms[row.arm]
        if row.edit is not None or not all(key in one.method.config for key in keys):
            continue
        rest = {k: v for k, v in one.method.config.items() if k not in keys}
        same = (one.method.name, rest, dict(one.overrides), set(plan.rates(one)))
        for known, rows in found:
            if known == same:
                rows.append(row)
                break
        else:
            found.append((same, [row]))
    return [rows for _, rows in found if len(rows) > 1]


def _ablation(study: Study, table: Table, ablation: Ablation, rows: list[Row]) -> Analysis:
    text = []
    arms = study.plan.arms
    (key, *_) = ablation.keys
    reference = next((r for r in rows if arms[r.arm].method.config[key] == ablation.against), None)
    places = [i for i, column in enumerate(table.columns) if column.kind != "one domain"]
    if reference is not None:
        others = [row for row in rows if row is not reference]
        text = _against(table, reference, others, places)
    drawn = [row for row in rows if any(c.difference for c in row.cells)]
    return Analysis(
        name=ablation.name,
        title=ablation.title,
        text=(*text, ablation.note),
        figure=bar_plot(table, drawn, f"{ablation.title}: differences to {table.rows[0].label}")
        if drawn
        else "",
        columns=tuple(table.columns[i] for i in places),
        numbers=tuple((row.label, tuple(row.cells[i] for i in places)) for row in rows),
    )


def _against(table: Table, reference: Row, rows: Sequence[Row], places: Sequence[int]) -> list[str]:
    """A sentence per row and place; p-values are corrected for the rows, place by place."""
    said: dict[tuple[int, int], str] = {}
    for i in places:
        values = reference.cells[i].values
        found = [paired_difference(row.cells[i].values, values) for row in rows]
        corrected = holm([None if d is None else d.p_t for d in found])
        family = sum(p is not None for p in corrected)
        where = PLACES[table.columns[i].kind]
        for n, (row, d, p) in enumerate(zip(rows, found, corrected, strict=True)):
            if d is not None:
                said[n, i] = corrected_claim(
                    row.label, reference.label, where, d, table.metric, p, family
                )
    return [said[key] for key in sorted(said)]


def train_and_test(table: Table) -> Analysis | None:
    """What is due to training with experts, and what to testing with them.

    Bars of the models as tuned beside those that were merged, pruned or split for testing only
    (EMoE, figure 3). None where nothing was edited.
    """
    edited = {row.arm for row in table.rows if row.edit is not None}
    rows = [
        row
        for row in table.rows[1:]
        if row.arm in edited and any(cell.difference for cell in row.cells)
    ]
    if not rows or not any(row.edit for row in rows):
        return None
    places = [i for i, column in enumerate(table.columns) if column.kind != "one domain"]
    baseline = table.rows[0]
    return Analysis(
        name="train-and-test",
        title="Tuned with experts, tested with experts",
        text=(),
        figure=bar_plot(
            table,
            rows,
            f"Models as tuned and as edited for testing: differences to {baseline.label}",
        ),
        columns=tuple(table.columns[i] for i in places),
        numbers=tuple(
            (row.label, tuple(row.cells[i] for i in places)) for row in (baseline, *rows)
        ),
    )


def _data_efficiency(study: Study, table: Table) -> Analysis | None:
    """Scores by share of the training rows, where the plan has several."""
    finished = {run.unit.fraction for run in study.runs if run.spec.key in study.records}
    if len(finished) < 2:
        return None
    tables: Mapping[float, Table] = {
        fraction: tabulate(
            study,
            table.metric.name,
            rule=table.choice.rule.name,
            split=table.split,
            units=[unit for unit in study.units if unit.fraction == fraction],
        )
        for fraction in sorted(finished)
    }
    columns = tuple(column for column in table.columns if column.kind != "one domain")
    cells = {
        (fraction, row.arm): row.cells[: len(columns)]
        for fraction, one in tables.items()
        for row in one.rows
        if row.edit is None
    }
    rows = [row for row in table.rows if row.edit is None]
    series = [
        (row, [(f, cells[f, row.arm][-1]) for f in tables if (f, row.arm) in cells]) for row in rows
    ]
    return Analysis(
        name="data-efficiency",
        title="With fewer training rows",
        text=(
            f"The dashed line is {rows[0].label} with the most rows. Intervals are those of the "
            "means.",
        ),
        figure=line_plot(table.metric, series, columns[-1], "Scores by share of training rows"),
        columns=columns,
        numbers=tuple(
            (f"{row.label}, {100 * fraction:g} % of the rows", cells[fraction, row.arm])
            for row in rows
            for fraction in tables
            if (fraction, row.arm) in cells
        ),
    )
