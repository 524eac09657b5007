"""The report of a study: one self-contained HTML file, a pure function of the table of runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moduli.study.compare import Study
from moduli.study.figures import difference_plot
from moduli.study.records import RunRecord, write_text
from moduli.study.spec import method_labels
from moduli.study.table import Cell, Table, tabulate
from moduli.study.wording import difference, headline, interval_text, percent, value


def write_report(study: Study, path: Path, *, command: Sequence[str]) -> None:
    """Write the report; the file is there completely or not at all.

    Args:
        study: at least one finished run.
        path: the HTML file.
        command: what produced the study, for the section on running it again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_report(study, command=command))


def render_report(study: Study, *, command: Sequence[str]) -> str:
    """The HTML of the report; see `write_report`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("moduli.study", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, value=value, difference=difference, interval=interval_text
    )
    main = tabulate(study)
    comparable = len(main.rows) > 1
    page = environment.get_template("report.html.j2").render(
        study=study,
        title=title(study),
        headline=headline(main),
        main=main,
        others=[tabulate(study, metric.name) for metric in study.kind.metrics if metric.note],
        figure=difference_plot(main) if comparable else None,
        seeds=sorted({record.spec.seed for record in study.records}),
        conversions=conversions(study),
        merging=merging(study),
        settings=settings_of(study),
        first=study.records[0],
        seconds=sum(sum(record.seconds.values()) for record in study.records),
        command=shlex.join(command),
    )
    return str(page)


def title(study: Study) -> str:
    """The methods and the task: "emoe against dense on sentiment"."""
    baseline, *others = method_labels(study.plan.methods)
    compared = f"{', '.join(others)} against {baseline}" if others else baseline
    return f"{compared} on {study.plan.task}"


def conversions(study: Study) -> list[tuple[str, dict[str, Any]]]:
    """The conversion report of the first finished run of every method that has one."""
    found = []
    labels = method_labels(study.plan.methods)
    for method, label in zip(study.plan.methods, labels, strict=True):
        for record in study.of(method).values():
            if record.conversion is not None:
                found.append((label, dict(record.conversion)))
                break
    return found


def merging(study: Study) -> list[dict[str, Any]]:
    """Per run: how many test predictions merging changed, and the score before and after."""
    found = []
    labels = dict(
        zip(map(_key, study.plan.methods), method_labels(study.plan.methods), strict=True)
    )
    for record in study.records:
        if record.merged is None or record.changed is None:
            continue
        tested = sum(int(score["n"]) for score in record.scores.values())
        found.append(
            {
                "label": labels[_key(record.spec.method)],
                "seed": record.spec.seed,
                "changed": sum(record.changed.values()),
                "tested": tested,
                "routed": pooled_score(record, study.kind.primary.name, merged=False),
                "merged": pooled_score(record, study.kind.primary.name, merged=True),
                "exact": bool((record.merge or {}).get("exact", False)),
            }
        )
    return found


def pooled_score(record: RunRecord, metric: str, *, merged: bool) -> float:
    """Mean of a metric over the domains, weighted by what was tested there."""
    scores = (record.merged if merged else record.scores) or {}
    total = sum(score[metric] * score["n"] for score in scores.values())
    return float(total / sum(score["n"] for score in scores.values()))


def settings_of(study: Study) -> list[tuple[str, str]]:
    """Everything that shaped the runs, as name and value."""
    spec = study.records[0].spec
    rows = [("model", spec.model), ("task", spec.task), ("trained on", spec.train_domain)]
    rows += [(key, str(value)) for key, value in spec.data.items()]
    rows += [(key, str(value)) for key, value in spec.to_dict()["settings"].items()]
    labels = method_labels(study.plan.methods)
    for method, label in zip(study.plan.methods, labels, strict=True):
        shown = ", ".join(f"{k}={v}" for k, v in method.config.items() if v is not None)
        rows.append((label, shown or "no settings"))
    return rows


def summary_dict(study: Study) -> dict[str, Any]:
    """The study's result for machines: headline, tables, failures."""
    return {
        "headline": headline(tabulate(study)),
        "tables": [
            _table_dict(tabulate(study, metric.name))
            for metric in study.kind.metrics
            if metric == study.kind.primary or metric.note
        ],
        "runs": {record.spec.key: record.to_dict() for record in study.records},
        "failures": [
            {"run": f.spec.key, "method": f.spec.method.name, "seed": f.spec.seed}
            | {"error": f.error, "message": f.message}
            for f in study.failures
        ],
    }


def _table_dict(table: Table) -> dict[str, Any]:
    return {
        "metric": table.metric.name,
        "rows": [
            {
                "label": row.label,
                "cells": [
                    {"column": column.title, **_cell_dict(cell)}
                    for column, cell in zip(table.columns, row.cells, strict=True)
                ],
            }
            for row in table.rows
        ],
    }


def _cell_dict(cell: Cell) -> dict[str, Any]:
    d = cell.difference
    return {
        "mean": cell.summary.mean,
        "sd": cell.summary.sd,
        "n": cell.summary.n,
        "by_seed": {str(seed): value for seed, value in cell.values.items()},
        "difference": None
        if d is None
        else {
            "mean": d.mean,
            "n": d.n,
            "interval_95_paired_t": d.interval,
            "interval_95_bootstrap": d.bootstrap,
            "by_seed": dict(zip(map(str, d.seeds), d.values, strict=True)),
        },
    }


def _key(method: Any) -> str:
    return f"{method.name} {sorted(method.config.items(), key=str)}"
