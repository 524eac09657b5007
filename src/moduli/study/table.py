"""The table of a study: one row per arm and edit, one column per place to test.

A pure function of the finished runs. Columns are in-domain, the mean over the domains out of it,
and each of those. Values are by unit and seed: a study that trains on several groups of domains
in turn has a value of every column for every group.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moduli.data.task import Task
from moduli.errors import ConfigError
from moduli.study.compare import Study
from moduli.study.plan import Planned, Unit
from moduli.study.records import RunRecord
from moduli.study.selection import TRAINING_DOMAIN, Candidate, Choice, choose
from moduli.study.statistics import PairedDifference, Summary, paired_difference, summarise
from moduli.training.kinds.base import get_kind
from moduli.training.metrics import Metric

Values = Mapping[tuple[Unit, int], float]
Split = Literal["test", "validation"]


@dataclass(frozen=True)
class Column:
    """Where models are tested: for every unit some domains, which are averaged."""

    title: str
    kind: Literal["in-domain", "out-of-domain", "one domain"]
    domains: Mapping[Unit, tuple[str, ...]]


@dataclass(frozen=True)
class Cell:
    """Scores of one row in one column, by unit and seed, and their difference to the first row."""

    values: Values
    summary: Summary
    difference: PairedDifference | None
    runs: tuple[str, ...]
    """Keys of the runs that the values come from."""
    against: tuple[str, ...]
    """Keys of the first row's runs, where there is a difference to them."""

    @property
    def compared(self) -> tuple[str, ...]:
        """Keys of all runs behind the difference."""
        return tuple(dict.fromkeys((*self.runs, *self.against)))


@dataclass(frozen=True)
class Row:
    """An arm as tuned (`edit` is None), or after an edit."""

    label: str
    arm: int
    edit: str | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """`rows[0]` is what the others are compared with."""

    metric: Metric
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    choice: Choice
    units: tuple[Unit, ...]
    split: Split = "test"
    """Whose scores it has."""


def tabulate(
    study: Study,
    metric: str | None = None,
    *,
    rule: str = TRAINING_DOMAIN,
    units: Sequence[Unit] | None = None,
    split: Split = "test",
) -> Table:
    """The table of one metric; what has no score in one of the columns yet has no row.

    Args:
        study: finished runs.
        metric: name of a metric of the task's kind; None: the first one.
        rule: by which the learning rate of every arm is chosen (`moduli.study.selection`).
        units: to average over; None: those with the largest share of the training rows.
        split: whose scores; a search for settings looks at "validation" only, and at no edits.

    Raises:
        ConfigError: no run has finished, or the rule does not work for these data.
        UnknownNameError: the kind has no such metric, or there is no such rule.
    """
    if not study.records:
        raise ConfigError("No run of this study has finished, so there is nothing to show yet.")
    chosen = study.kind.primary if metric is None else study.kind.metric(metric)
    if units is None:
        whole = max(unit.fraction for unit in study.units)
        units = [unit for unit in study.units if unit.fraction == whole]
    choice = choose(_candidates(study, units), rule, study.kind.primary)
    columns = columns_of(study, units, split)
    rows: list[Row] = []
    for number, label in enumerate(study.plan.labels):
        runs = [
            (planned, record) for planned, record in study.finished(number) if planned.unit in units
        ]
        if not runs:
            continue
        edits = study.plan.arms[number].edits if split == "test" else ()
        for edit in (None, *(edit.label for edit in edits)):
            found = [
                values_of(runs, column, chosen.name, choice, edit or split) for column in columns
            ]
            if not all(values for values, _ in found):
                continue  # a rate cannot be chosen yet, or a source has no finished run
            cells = []
            for place, (values, keys) in enumerate(found):
                first = rows[0].cells[place] if rows and rows[0].arm == 0 else None
                difference = None if first is None else paired_difference(values, first.values)
                against = () if first is None or difference is None else first.runs
                cells.append(Cell(values, summarise(values), difference, keys, against))
            title = f"{label} ({edit})" if edit else label
            rows.append(Row(title, number, edit, tuple(cells)))
    return Table(chosen, tuple(columns), tuple(rows), choice, tuple(units), split)


def check_rule(study: Study, tasks: Sequence[Task], rule: str) -> None:
    """See to it, before anything runs, that a rule will be able to choose learning rates.

    Args:
        study: its plan counts, not what is finished.
        tasks: those of its plan, loaded.
        rule: as for `tabulate`.

    Raises:
        ConfigError: the rule does not work for these data.
        UnknownNameError: there is no such rule.
    """
    metric = get_kind(tasks[0].kind).primary
    domains = {run.unit: tasks[run.unit.task].domains for run in study.runs}
    candidates = [
        _candidate(
            run,
            {
                name: {metric.name: 0.0}
                for name, splits in domains[run.unit].items()
                if splits.validation is not None
            },
        )
        for run in study.runs
    ]
    choice = choose(candidates, rule, metric)
    for arm, unit in {(run.arm, run.unit): None for run in study.runs}:
        for name, splits in domains[unit].items():
            if splits.test is not None:
                choice.learning_rate(arm, unit, name)


def columns_of(study: Study, units: Sequence[Unit], split: Split = "test") -> list[Column]:
    """In-domain first, then the mean of the others, then each of them.

    Domains of several tasks that have one name are different places all the same: each has a
    column, called by its task as well.
    """
    tested: dict[Unit, list[str]] = {}
    for run in study.runs:
        record = study.records.get(run.spec.key)
        if run.unit in units and record is not None and run.unit not in tested:
            tested[run.unit] = list(scores_of(record, split))
    own = {u: tuple(d for d in names if d in u.sources) for u, names in tested.items()}
    others = {u: tuple(d for d in names if d not in u.sources) for u, names in tested.items()}
    columns = []
    if all(own.values()):
        groups = {(unit.task, names) for unit, names in own.items()}
        title = " + ".join(groups.pop()[1]) if len(groups) == 1 else "in-domain"
        columns.append(Column(title, "in-domain", own))
    others = {unit: names for unit, names in others.items() if names}
    if others:
        columns.append(Column("out-of-domain mean", "out-of-domain", others))
        single = dict.fromkeys((unit.task, n) for unit, names in others.items() for n in names)
        tasks = Counter(name for _, name in single)
        if len(single) > 1:
            columns += [
                Column(
                    f"{study.plan.tasks[task].name}: {name}" if tasks[name] > 1 else name,
                    "one domain",
                    {u: (name,) for u, n in others.items() if u.task == task and name in n},
                )
                for task, name in single
            ]
    return columns


def values_of(
    runs: Sequence[tuple[Planned, RunRecord]],
    column: Column,
    metric: str,
    choice: Choice,
    what: str,
) -> tuple[dict[tuple[Unit, int], float], tuple[str, ...]]:
    """Score by unit and seed (the mean over the column's domains), and the runs they are from.

    The run of every domain is the one with the learning rate that was chosen for it.

    Args:
        runs: of one arm.
        column: which domains.
        metric: of the task's kind.
        choice: of learning rates.
        what: see `scores_of`.
    """
    by_place: dict[tuple[Unit, int, float | None], RunRecord] = {
        (run.unit, run.spec.seed, run.spec.settings.learning_rate): record for run, record in runs
    }
    arm = runs[0][0].arm
    found: dict[tuple[Unit, int], float] = {}
    keys: dict[str, None] = {}
    for unit, seed in dict.fromkeys((run.unit, run.spec.seed) for run, _ in runs):
        records = {}
        for domain in column.domains.get(unit, ()):
            rate = choice.learning_rate(arm, unit, domain)
            if (record := by_place.get((unit, seed, rate))) is not None:
                records[domain] = record
        if not records or len(records) < len(column.domains[unit]):
            continue
        scores = [scores_of(r, what)[d][metric] for d, r in records.items()]
        found[unit, seed] = math.fsum(scores) / len(scores)
        keys |= dict.fromkeys(record.spec.key for record in records.values())
    return found, tuple(keys)


def scores_of(record: RunRecord, what: str) -> Mapping[str, Mapping[str, int | float]]:
    """Scores by domain: of the "test" or "validation" split, or the test scores after an edit."""
    own = {"test": record.scores, "validation": record.validation}
    return own[what] if what in own else record.variants[what].scores


def _candidates(study: Study, units: Sequence[Unit]) -> list[Candidate]:
    """What is chosen among; an arm takes part in a unit once all its rates have finished there.

    A rate with which every run failed is not waited for: it cannot be chosen.
    """
    failed = {failure.spec.key for failure in study.failures}
    planned: dict[tuple[int, Unit], set[float]] = defaultdict(set)
    there: dict[tuple[int, Unit], set[float]] = defaultdict(set)
    for run in study.runs:
        rate = run.spec.settings.learning_rate
        if run.spec.key not in failed:
            planned[run.arm, run.unit].add(rate)
        if run.spec.key in study.records:
            there[run.arm, run.unit].add(rate)
    return [
        _candidate(run, study.records[run.spec.key].validation)
        for run in study.runs
        if run.unit in units
        and run.spec.key in study.records
        and there[run.arm, run.unit] == planned[run.arm, run.unit]
    ]


def _candidate(run: Planned, validation: Mapping[str, Mapping[str, int | float]]) -> Candidate:
    return Candidate(
        arm=run.arm,
        stratum=run.unit,
        seed=run.spec.seed,
        learning_rate=run.spec.settings.learning_rate,
        sources=run.unit.sources,
        validation=validation,
    )
