"""What a report says beside its scores: costs, edits, conversions, settings, and all runs.

Pure functions of the study and its table.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moduli.study.compare import Study
from moduli.study.evidence import unit_label
from moduli.study.plan import Planned, Unit
from moduli.study.records import RunRecord
from moduli.study.table import Row, Table, scores_of
from moduli.study.wording import percent
from moduli.training.settings import FinetuneSettings


@dataclass(frozen=True)
class Cost:
    """What an arm costs; None where no run of it was measured.

    Attributes:
        label: of the arm.
        parameters: of the tuned model.
        trainable: those that were trained.
        active: those that one token uses.
        flops: of a forward pass per token, relative to the first arm; median over paired runs,
            which were measured on the same inputs.
        time: of training, relative to the first arm; median over paired runs that are whole and
            were done on equal hardware. Processor time, or wall time on an accelerator.
        memory: peak in training, in bytes, median.
        runs: that it is made from.
    """

    label: str
    parameters: int | None
    trainable: int | None
    active: int | None
    flops: float | None
    time: float | None
    memory: float | None
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Edited:
    """What an edit changed in the tuned models of an arm, over all their test data."""

    label: str
    changed: int
    tested: int
    before: float
    after: float
    note: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class RunLine:
    """A run in the appendix; scores are None for a run that has not finished."""

    key: str
    label: str
    unit: str
    rate: float
    seed: int
    inside: float | None
    outside: float | None
    steps: int | None
    state: str


@dataclass(frozen=True)
class Tried:
    """A setting and what it reached, whether it was chosen or not: means over its runs of the mean
    over the domains trained on, and of that over the others."""

    label: str
    rate: float
    inside: float | None
    outside: float | None
    runs: tuple[str, ...]


def counted(study: Study, row: Row) -> list[tuple[Planned, RunRecord]]:
    """The finished runs behind the numbers of a row."""
    keys = {key for cell in row.cells for key in cell.runs}
    return [(run, r) for run, r in study.finished(row.arm) if r.spec.key in keys]


def costs(study: Study, table: Table) -> list[Cost]:
    """One line per arm; empty if nothing was measured."""
    rows = [row for row in table.rows if row.edit is None]
    baseline = counted(study, rows[0]) if rows and rows[0].arm == 0 else []
    found = []
    for row in rows:
        runs = counted(study, row)
        memory = [
            float(r.cost["peak_memory_bytes"]) for _, r in runs if _has(r, "peak_memory_bytes")
        ]
        found.append(
            Cost(
                label=row.label,
                parameters=_first(runs, "parameters"),
                trainable=_first(runs, "trainable_parameters"),
                active=_first(runs, "active_parameters"),
                flops=_ratio(runs, baseline, lambda record: record.cost.get("flops_per_token")),
                time=_ratio(runs, baseline, _training_time, same_hardware=True),
                memory=statistics.median(memory) if memory else None,
                runs=tuple(r.spec.key for _, r in runs),
            )
        )
    return found if any(_measured(cost) for cost in found) else []


def edited(study: Study, table: Table) -> list[Edited]:
    """One line per arm and edit."""
    found = []
    name = table.metric.name
    for row in table.rows:
        if row.edit is None:
            continue
        records = [r for _, r in counted(study, row) if row.edit in r.variants]
        variants = [r.variants[row.edit] for r in records]
        if not records:
            continue
        found.append(
            Edited(
                label=row.label,
                changed=sum(sum(v.changed.values()) for v in variants),
                tested=sum(int(s["n"]) for r in records for s in r.scores.values()),
                before=pooled([r.scores for r in records], name),
                after=pooled([v.scores for v in variants], name),
                note=_note([v.report for v in variants if v.report]),
                runs=tuple(r.spec.key for r in records),
            )
        )
    return found


def pooled(scores: list[Mapping[str, Mapping[str, int | float]]], metric: str) -> float:
    """Mean of a metric over runs and domains, weighted by what was tested there."""
    parts = [score for run in scores for score in run.values()]
    total = math.fsum(score[metric] * score["n"] for score in parts)
    return total / math.fsum(score["n"] for score in parts)


def conversions(study: Study) -> list[tuple[str, dict[str, Any], str]]:
    """Label, conversion report and key of the first finished run of every arm that has one."""
    found = []
    for arm, label in enumerate(study.plan.labels):
        for _, record in study.finished(arm):
            if record.conversion is not None:
                found.append((label, dict(record.conversion), record.spec.key))
                break
    return found


def settings_of(study: Study) -> list[tuple[str, str]]:
    """Everything that shaped the runs, as name and value."""
    plan = study.plan
    rows = [("model", plan.model)]
    for task in plan.tasks:
        options = ", ".join(f"{key}={value}" for key, value in task.data.items())
        rows.append(("task", f"{task.name} ({options})" if options else task.name))
    units = dict.fromkeys(unit_label(study, unit) for unit in study.units)
    rows.append(("trained on", "; ".join(units)))
    rows.append(("seeds", ", ".join(map(str, plan.seeds))))
    for field in dataclasses.fields(FinetuneSettings):
        given = {str(getattr(run.spec.settings, field.name)) for run in study.runs}
        if len(given) == 1:
            rows.append((field.name, given.pop()))
    for one, label in zip(plan.arms, plan.labels, strict=True):
        own = [f"{k}={v}" for k, v in one.overrides.items()]
        own.append(f"learning_rate={' or '.join(f'{rate:g}' for rate in plan.rates(one))}")
        own += [f"{k}={v}" for k, v in one.method.config.items() if v is not None]
        rows.append((label, f"{one.method.name}: {', '.join(own)}"))
    return rows


def environment_of(study: Study) -> list[tuple[str, str]]:
    """What the runs ran on and were made from; every different answer once."""
    rows: list[tuple[str, str]] = []
    records = list(study.records.values())
    for title, values in (
        ("weights", [r.spec.model_hash or "by name" for r in records]),
        ("data", [r.spec.data_hash for r in records]),
        ("machine", [_listed(_hardware(r)) for r in records]),
        ("versions", [_listed(r.environment.get("versions", {})) for r in records]),
    ):
        rows += [(title, value) for value in dict.fromkeys(values) if value]
    seconds = math.fsum(math.fsum(r.seconds.values()) for r in records)
    rows.append(("time", f"{seconds:.0f} s for all runs together"))
    return rows


def all_runs(study: Study, table: Table) -> list[RunLine]:
    """Every run of the plan, finished or not."""
    labels = study.plan.labels
    used = {key for row in table.rows for cell in row.cells for key in cell.runs}
    failed = {failure.spec.key for failure in study.failures}
    lines = []
    for run in study.runs:
        key = run.spec.key
        record = study.records.get(key)
        state = "failed" if key in failed else "not finished"
        if record is not None:
            state = "counts" if key in used else _unused(run, table)
        lines.append(
            RunLine(
                key=key,
                label=labels[run.arm],
                unit=unit_label(study, run.unit),
                rate=run.spec.settings.learning_rate,
                seed=run.spec.seed,
                inside=_mean(record, run.unit, table, inside=True),
                outside=_mean(record, run.unit, table, inside=False),
                steps=None if record is None else record.steps,
                state=state,
            )
        )
    return lines


def tried(study: Study, table: Table) -> list[Tried]:
    """Every arm with every learning rate that has finished runs, in the order of the plan."""
    groups: dict[tuple[str, float], list[RunLine]] = {}
    for line in all_runs(study, table):
        if line.steps is not None:
            groups.setdefault((line.label, line.rate), []).append(line)
    return [
        Tried(
            label=label,
            rate=rate,
            inside=_mean_of(line.inside for line in lines),
            outside=_mean_of(line.outside for line in lines),
            runs=tuple(line.key for line in lines),
        )
        for (label, rate), lines in groups.items()
    ]


def _unused(run: Planned, table: Table) -> str:
    """Why a finished run is in no number."""
    if run.unit not in table.units:
        return "other share of the rows"
    group = table.choice.groups.get((run.arm, run.unit))
    if group is None or not group.seeds or all(row.arm != run.arm for row in table.rows):
        return "waits for other runs"
    return "other learning rate"


def _mean(record: RunRecord | None, unit: Unit, table: Table, *, inside: bool) -> float | None:
    if record is None:
        return None
    scores = scores_of(record, table.split)
    return _mean_of(
        s[table.metric.name] for d, s in scores.items() if (d in unit.sources) == inside
    )


def _mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there; None of none."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def _ratio(
    runs: list[tuple[Planned, RunRecord]],
    baseline: list[tuple[Planned, RunRecord]],
    measured: Callable[[RunRecord], float | None],
    *,
    same_hardware: bool = False,
) -> float | None:
    """Median over units and seeds of a measurement relative to that of the first arm."""
    firsts = {(run.unit, run.spec.seed): record for run, record in baseline}
    ratios = []
    for run, record in runs:
        first = firsts.get((run.unit, run.spec.seed))
        if first is None or (same_hardware and _hardware(first) != _hardware(record)):
            continue
        mine, theirs = measured(record), measured(first)
        if mine and theirs:
            ratios.append(mine / theirs)
    return statistics.median(ratios) if ratios else None


def _hardware(record: RunRecord) -> Mapping[str, Any]:
    found: Mapping[str, Any] = record.environment.get("hardware", {})
    return found


def _training_time(record: RunRecord) -> float | None:
    """None for a run that was interrupted: its clocks ran in its last process only."""
    if record.environment.get("resumed_from") is not None:
        return None
    on_cpu = _hardware(record).get("device") == "cpu"
    return (record.cpu_seconds if on_cpu else record.seconds).get("train")


def _has(record: RunRecord, name: str) -> bool:
    return record.cost.get(name) is not None


def _first(runs: list[tuple[Planned, RunRecord]], name: str) -> Any:
    return next((r.cost[name] for _, r in runs if _has(r, name)), None)


def _measured(cost: Cost) -> bool:
    values = (cost.parameters, cost.trainable, cost.active, cost.flops, cost.time, cost.memory)
    return any(value is not None for value in values)


def _note(reports: list[Mapping[str, Any]]) -> str:
    """What the reports of an edit have in common that is worth a few words."""
    exact = [report["exact"] for report in reports if "exact" in report]
    if exact:
        return "weights only moved" if all(exact) else "some weights averaged"
    dropped = [float(report["dropped"]) for report in reports if "dropped" in report]
    if dropped:
        return f"{percent(math.fsum(dropped) / len(dropped))} % of the selections dropped"
    return ""


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
