"""What stands behind the table of a study: choices, tests, ranks, and the same for every unit.

Pure functions of the study and its table. Everything names the runs it is made from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moduli.study.compare import Study
from moduli.study.plan import Unit
from moduli.study.ranks import Friedman, friedman
from moduli.study.spec import RunSpec
from moduli.study.statistics import PairedDifference
from moduli.study.table import Column, Row, Table, tabulate
from moduli.study.wording import adjusted, crowded


@dataclass(frozen=True)
class PairedTest:
    """A row in a column of the table against the first row; `adjusted` p-values are Holm's."""

    row: Row
    column: Column
    difference: PairedDifference
    adjusted_t: float | None
    adjusted_wilcoxon: float | None
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Tried:
    """A learning rate that an arm was tuned with, and what the rule saw of it."""

    learning_rate: float
    mean: float | None
    """On the validation splits of the rule; None if there is one rate only, or no such split."""
    chosen: bool
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """The learning rates of an arm in a unit; `target` is the tested domain if it matters."""

    label: str
    unit: str
    target: str | None
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class PerUnit:
    """The rows of the table in one unit, in the columns that are no single domains."""

    unit: str
    table: Table


@dataclass(frozen=True)
class Ranks:
    """Methods ranked over test sets out of domain, and the runs whose scores were ranked."""

    test: Friedman
    test_sets: tuple[tuple[Unit, str], ...]
    """Unit and domain of each."""
    runs: tuple[str, ...]


def paired_tests(table: Table) -> list[PairedTest]:
    """The paired tests in all columns that carry a statement."""
    found = []
    for place, column in enumerate(table.columns):
        if column.kind == "one domain":
            continue
        by_t = adjusted(table, place, "p_t")
        by_wilcoxon = adjusted(table, place, "p_wilcoxon")
        for number, row in enumerate(table.rows):
            cell = row.cells[place]
            if cell.difference is not None:
                adjusted_p = (by_t[number], by_wilcoxon[number])
                found.append(PairedTest(row, column, cell.difference, *adjusted_p, cell.compared))
    return found


def chosen(study: Study, table: Table) -> list[Chosen]:
    """What the rule saw and chose, by arm and unit; empty if every arm has one learning rate."""
    labels = study.plan.labels
    seen = table.choice.to_dict()["groups"]
    found = []
    for ((arm, unit), group), said in zip(table.choice.groups.items(), seen, strict=True):
        assert isinstance(arm, int)
        assert isinstance(unit, Unit)
        if len(group.rates) < 2:
            continue
        keys: dict[float, list[str]] = {}
        for run, _ in study.finished(arm, unit):
            if run.spec.seed in group.seeds:
                keys.setdefault(run.spec.settings.learning_rate, []).append(run.spec.key)
        for choice in said["choices"]:
            tried = tuple(
                Tried(
                    rate["learning_rate"],
                    rate["mean"],
                    rate["learning_rate"] == choice["learning_rate"],
                    tuple(keys.get(rate["learning_rate"], ())),
                )
                for rate in choice["rates"]
            )
            found.append(Chosen(labels[arm], unit_label(study, unit), choice["target"], tried))
    return sorted(found, key=lambda one: labels.index(one.label))


def rates_used(study: Study, table: Table) -> list[tuple[str, float]]:
    """The learning rate of every arm that was tuned with one only."""
    labels = study.plan.labels
    found: dict[str, float] = {}
    for (arm, _), group in table.choice.groups.items():
        if len(group.rates) == 1 and isinstance(arm, int):
            found[labels[arm]] = next(iter(group.rates))
    return sorted(found.items(), key=lambda pair: labels.index(pair[0]))


def per_unit(study: Study, table: Table) -> list[PerUnit]:
    """The table again for every unit, where it averages over several."""
    if len(table.units) < 2:
        return []
    finished = {run.unit for run in study.runs if run.spec.key in study.records}
    rule, metric = table.choice.rule.name, table.metric.name
    return [
        PerUnit(
            unit_label(study, unit),
            shown(tabulate(study, metric, rule=rule, units=[unit], split=table.split)),
        )
        for unit in table.units
        if unit in finished
    ]


def shown(table: Table) -> Table:
    """The table without edited models if it is crowded; they have a section of their own."""
    rows = tuple(row for row in table.rows if row.edit is None)
    return replace(table, rows=rows) if crowded(table) else table


def unit_label(study: Study, unit: Unit) -> str:
    """What a unit is called: its sources, and of the rest what differs within the study."""
    parts = [" + ".join(unit.sources)]
    if len(study.plan.tasks) > 1:
        parts.append(study.plan.tasks[unit.task].name)
    if unit.fraction < max(study.plan.fractions):
        parts.append(f"{100 * unit.fraction:g} % of the rows")
    return ", ".join(parts)


def run_label(study: Study, spec: RunSpec) -> str:
    """What a run is called: its arm, and of the rest what differs within the study."""
    run = next(run for run in study.runs if run.spec.key == spec.key)
    parts = [study.plan.labels[run.arm]]
    if len(study.units) > 1:
        parts.append(f"on {unit_label(study, run.unit)}")
    if len(study.plan.rates(study.plan.arms[run.arm])) > 1:
        parts.append(f"rate {spec.settings.learning_rate:g}")
    return ", ".join([*parts, f"seed {spec.seed}"])


def ranks(table: Table) -> Ranks | None:
    """Methods as tuned, ranked on every test set out of domain: unit by domain, mean over seeds.

    Only seeds that all of them have there count. None with fewer than two methods or test sets.
    """
    rows = [row for row in table.rows if row.edit is None]
    single = [i for i, column in enumerate(table.columns) if column.kind == "one domain"]
    places = single or [i for i, c in enumerate(table.columns) if c.kind == "out-of-domain"]
    scores = {row.label: _by_test_set(table, row, rows, places) for row in rows}
    test = friedman(scores, higher_is_better=table.metric.higher_is_better)
    if test is None or len(rows) < 2 or len(test.datasets) < 2:
        return None
    runs = dict.fromkeys(key for row in rows for i in places for key in row.cells[i].runs)
    sets = tuple(key for key in scores[rows[0].label] if key in set(test.datasets))
    return Ranks(test, sets, tuple(runs))


def _by_test_set(
    table: Table, row: Row, rows: Sequence[Row], places: Sequence[int]
) -> dict[tuple[Unit, str], float]:
    values: dict[tuple[Unit, str], list[float]] = {}
    for i in places:
        for (unit, seed), score in row.cells[i].values.items():
            if all((unit, seed) in other.cells[i].values for other in rows):
                (domain,) = table.columns[i].domains[unit]  # one, in these columns
                values.setdefault((unit, domain), []).append(score)
    return {dataset: math.fsum(found) / len(found) for dataset, found in values.items()}
