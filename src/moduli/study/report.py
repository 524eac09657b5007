"""The report of a study: an HTML file for people, a dictionary for machines.

Both are pure functions of the table of runs. Every number says which runs it is made from: cells
and figures carry their keys in `data-runs`, and the appendix has a line for each run.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moduli.errors import ConfigError
from moduli.inspect.files import write_text
from moduli.inspect.html import render
from moduli.inspect.record import Inspection
from moduli.study import evidence, sections, wording
from moduli.study.analyses import Analysis, analyses, train_and_test
from moduli.study.compare import Study
from moduli.study.figures import difference_plot
from moduli.study.inspections import panels, read_inspections, uninspected
from moduli.study.plan import Unit
from moduli.study.selection import TRAINING_DOMAIN
from moduli.study.statistics import PairedDifference
from moduli.study.table import Cell, Column, Split, Table, tabulate
from moduli.training.translator import size_of


def write_report(
    study: Study,
    path: Path,
    *,
    root: Path,
    rule: str = TRAINING_DOMAIN,
    split: Split = "test",
    command: Sequence[str],
) -> None:
    """Write the report; the file is there completely or not at all.

    Args:
        study: at least one finished run.
        path: the HTML file.
        root: where the directories of the runs are; what inspections they hold are shown.
        rule: by which learning rates are chosen (`moduli.study.selection`).
        split: whose scores are shown; a search for settings looks at "validation" only.
        command: what produced the study, for the section on running it again.

    Raises:
        ConfigError: no run has finished, or the rule does not work for these data.
        UnknownNameError: there is no such rule.
        CheckpointError: the file cannot be written.
    """
    found, notes = read_inspections(study, root)
    text = render_report(
        study, inspections=found, notes=notes, rule=rule, split=split, command=command
    )
    write_text(path, text)


def render_report(
    study: Study,
    *,
    inspections: Mapping[str, Inspection],
    notes: Sequence[str] = (),
    rule: str = TRAINING_DOMAIN,
    split: Split = "test",
    command: Sequence[str],
) -> str:
    """The HTML of the report; see `write_report`.

    Args:
        study: at least one finished run.
        inspections: of runs, by key.
        notes: sentences on inspections that could not be read.
        rule: by which learning rates are chosen.
        split: whose scores are shown.
        command: what produced the study.

    Raises:
        ConfigError: no run counts yet, or the rule does not work for these data.
        UnknownNameError: there is no such rule.
    """
    main = tabulate(study, rule=rule, split=split)
    if not main.rows:
        raise ConfigError(
            "No method has finished a seed with all of its learning rates, so none can be chosen "
            "and there is nothing to show yet."
        )
    shown = evidence.shown(main)
    compared = any(cell.difference for row in main.rows for cell in row.cells)
    return render(
        "moduli.study",
        "report.html.j2",
        say=wording,
        label_of=evidence.run_label,
        study=study,
        title=title(study),
        from_scratch=size_of(study.plan.model) is not None,
        claims=wording.claims(main),
        main=shown,
        others=[
            evidence.shown(tabulate(study, metric.name, rule=rule, split=split))
            for metric in study.kind.metrics
            if metric.note
        ],
        compared=compared,
        difference_figure=difference_plot(shown) if compared else None,
        tests=evidence.paired_tests(shown),
        chosen=evidence.chosen(study, main),
        rates=evidence.rates_used(study, main),
        per_unit=evidence.per_unit(study, main),
        ranks=evidence.ranks(main),
        costs=sections.costs(study, main),
        train_and_test=train_and_test(main),
        edited=sections.edited(study, main),
        analyses=analyses(study, main),
        panels=panels(study, inspections),
        uninspected=uninspected(study, inspections),
        notes=notes,
        conversions=sections.conversions(study),
        settings=sections.settings_of(study),
        environment=sections.environment_of(study),
        counted=list(dict.fromkeys(k for row in shown.rows for c in row.cells for k in c.runs)),
        runs_table=sections.all_runs(study, main),
        command=shlex.join(command),
    )


def title(study: Study) -> str:
    """The arms and the tasks: "emoe against dense on sentiment"."""
    baseline, *others = study.plan.labels
    if len(others) > 4:
        others = [f"{len(others)} methods"]
    compared = f"{', '.join(others)} against {baseline}" if others else baseline
    return f"{compared} on {', '.join(task.name for task in study.plan.tasks)}"


def summary_dict(
    study: Study, *, rule: str = TRAINING_DOMAIN, split: Split = "test"
) -> dict[str, Any]:
    """The study's result for machines: what the report says, with the runs behind every number.

    Args:
        study: at least one finished run.
        rule: by which learning rates are chosen.
        split: whose scores.

    Raises:
        ConfigError: no run has finished, or the rule does not work for these data.
    """
    main = tabulate(study, rule=rule, split=split)
    claims = wording.claims(main)
    ranks = evidence.ranks(main)
    made = [*analyses(study, main), train_and_test(main)]
    return {
        "headline": [claim.text for claim in claims],
        "power": [claim.power for claim in claims if claim.power is not None],
        "split": split,
        "planned": len(study.runs),
        "finished": len(study.records),
        "selection": _selection(study, main),
        "tried": [asdict(setting) for setting in sections.tried(study, main)],
        "tables": [
            _table(
                study,
                main
                if metric == study.kind.primary
                else tabulate(study, metric.name, rule=rule, split=split),
            )
            for metric in study.kind.metrics
            if metric == study.kind.primary or metric.note
        ],
        "friedman": None if ranks is None else _ranks(study, ranks),
        "costs": [asdict(cost) for cost in sections.costs(study, main)],
        "edits": [asdict(edit) for edit in sections.edited(study, main)],
        "analyses": [_analysis(study, analysis) for analysis in made if analysis is not None],
        "runs": {key: record.to_dict() for key, record in study.records.items()},
        "failures": [
            {"run": f.spec.key, "label": evidence.run_label(study, f.spec)}
            | {"error": f.error, "message": f.message}
            for f in study.failures
        ],
    }


def _selection(study: Study, table: Table) -> dict[str, Any]:
    """`Choice.to_dict` with arms and units called as in the tables."""
    data = table.choice.to_dict()
    for group in data["groups"]:
        group["arm"] = study.plan.labels[group["arm"]]
        group["stratum"] = evidence.unit_label(study, Unit(**group["stratum"]))
    return data


def _table(study: Study, table: Table) -> dict[str, Any]:
    return {
        "metric": table.metric.name,
        "title": table.metric.title,
        "share": table.metric.share,
        "rows": [
            {"label": row.label, "edit": row.edit, "cells": _cells(study, table.columns, row.cells)}
            for row in table.rows
        ],
    }


def _cells(study: Study, columns: Sequence[Column], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    return [
        {
            "column": column.title,
            "kind": column.kind,
            "mean": cell.summary.mean,
            "sd": cell.summary.sd,
            "n": cell.summary.n,
            "values": _values(study, cell.values.items()),
            "difference": None if cell.difference is None else _difference(study, cell.difference),
            "runs": list(cell.runs),
            "compared_with": list(cell.against),
        }
        for column, cell in zip(columns, cells, strict=True)
    ]


def _difference(study: Study, d: PairedDifference) -> dict[str, Any]:
    return {
        "mean": d.mean,
        "sd": d.sd,
        "n": d.n,
        "interval_95_paired_t": d.interval,
        "interval_95_bootstrap": d.bootstrap,
        "p_t": d.p_t,
        "p_wilcoxon": d.p_wilcoxon,
        "resolves": d.resolves,
        "values": _values(study, zip(d.pairs, d.values, strict=True)),
    }


def _values(study: Study, pairs: Iterable[tuple[Any, float]]) -> list[dict[str, Any]]:
    return [
        {"unit": evidence.unit_label(study, unit), "seed": seed, "value": value}
        for (unit, seed), value in pairs
    ]


def _ranks(study: Study, ranks: evidence.Ranks) -> dict[str, Any]:
    test = ranks.test
    return {
        "ranks": dict(test.ranks),
        "test_sets": [
            {"unit": evidence.unit_label(study, unit), "domain": domain}
            for unit, domain in ranks.test_sets
        ],
        "chi2": test.chi2,
        "p": test.p,
        "critical_difference": test.critical_difference,
        "runs": list(ranks.runs),
    }


def _analysis(study: Study, analysis: Analysis) -> dict[str, Any]:
    return {
        "name": analysis.name,
        "text": list(analysis.text),
        "rows": [
            {"label": label, "cells": _cells(study, analysis.columns, cells)}
            for label, cells in analysis.numbers
        ],
    }
