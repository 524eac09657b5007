"""The table of a study: one row per method (as tuned, and merged), one column per place to test.

A pure function of the finished runs. Columns are the training domain, the mean over the other
domains, and each of those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moduli.study.compare import Study
from moduli.study.records import RunRecord
from moduli.study.spec import method_labels
from moduli.study.statistics import PairedDifference, Summary, paired_difference, summarise
from moduli.training.metrics import Metric


@dataclass(frozen=True)
class Column:
    """Where a model is tested: `domains` are averaged."""

    title: str
    kind: Literal["in-domain", "out-of-domain", "one domain"]
    domains: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """Scores of one row in one column, by seed, and their difference to the first row's."""

    values: Mapping[int, float]
    summary: Summary
    difference: PairedDifference | None


@dataclass(frozen=True)
class Row:
    """A method as tuned or merged."""

    label: str
    merged: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """`rows[0]` is what the others are compared with."""

    metric: Metric
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def tabulate(study: Study, metric: str | None = None) -> Table:
    """The table of one metric; methods without a finished run have no row.

    Args:
        study: finished runs.
        metric: name of a metric of the task's kind; None: the first one.

    Raises:
        UnknownNameError: the kind has no such metric.
    """
    chosen = study.kind.primary if metric is None else study.kind.metric(metric)
    tested = list(study.records[0].scores) if study.records else []
    columns = columns_of(tested, study.train_domain)
    labels = method_labels(study.plan.methods)
    rows: list[Row] = []
    baseline: dict[int, RunRecord] | None = None
    for method, label in zip(study.plan.methods, labels, strict=True):
        runs = study.of(method)
        if method == study.plan.methods[0]:
            baseline = runs
        if not runs:
            continue
        variants = [False, True] if any(r.merged is not None for r in runs.values()) else [False]
        for merged in variants:
            cells = []
            for column in columns:
                values = values_of(runs, column, chosen.name, merged=merged)
                difference = None
                if baseline and rows:
                    reference = values_of(baseline, column, chosen.name, merged=False)
                    difference = paired_difference(values, reference)
                cells.append(Cell(values, summarise(list(values.values())), difference))
            rows.append(Row(f"{label} (merged)" if merged else label, merged, tuple(cells)))
    return Table(chosen, tuple(columns), tuple(rows))


def columns_of(tested: list[str], train_domain: str) -> list[Column]:
    """In-domain first, then the mean of the others, then each of them."""
    columns = []
    if train_domain in tested:
        columns.append(Column(train_domain, "in-domain", (train_domain,)))
    others = tuple(name for name in tested if name != train_domain)
    if others:
        columns.append(Column("out-of-domain mean", "out-of-domain", others))
        if len(others) > 1:
            columns += [Column(name, "one domain", (name,)) for name in others]
    return columns


def values_of(
    runs: Mapping[int, RunRecord], column: Column, metric: str, *, merged: bool
) -> dict[int, float]:
    """Score by seed: the mean over the column's domains."""
    found = {}
    for seed, record in runs.items():
        scores = record.merged if merged else record.scores
        if scores is not None:
            values = [scores[domain][metric] for domain in column.domains]
            found[seed] = math.fsum(values) / len(values)
    return found
