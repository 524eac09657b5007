"""What a study says beside its scores follows from runs that can be compared."""

from __future__ import annotations

import dataclasses

import pytest

from moduli.study.sections import all_runs, costs
from moduli.study.table import tabulate
from tests.study.fakes import made_study


def test_time_is_that_of_whole_runs_on_equal_hardware() -> None:
    study = made_study(seeds=(0, 1, 2))
    records = dict(study.records)
    emoe_runs = [r for _, r in study.finished(1)]
    for record, change in zip(
        emoe_runs,
        ({"resumed_from": 3}, {"hardware": {"device": "cpu", "threads": 2}}, {}),
        strict=True,
    ):
        slow = record.cpu_seconds if not change else {"train": 1000.0}
        records[record.spec.key] = dataclasses.replace(
            record, environment={**record.environment, **change}, cpu_seconds=slow
        )
    study = dataclasses.replace(study, records=records)
    dense, modular = costs(study, tabulate(study))
    assert dense.time == 1
    assert modular.time == pytest.approx(2.7 / 2.2)  # of seed 2


def test_operations_are_compared_on_the_same_inputs() -> None:
    """How many a token costs depends on how long the texts of its batch are."""
    study = made_study()
    records = {
        key: dataclasses.replace(
            r, cost={**r.cost, "flops_per_token": (2 if r.spec.seed else 1) * (1 + r.spec.seed)}
        )
        for key, r in study.records.items()
    }
    del records[study.finished(0)[0][1].spec.key]
    study = dataclasses.replace(study, records=records)
    assert [cost.flops for cost in costs(study, tabulate(study))] == [1, 1]


def test_every_run_says_why_it_counts_or_not() -> None:
    study = made_study(rates=(1e-4, 2e-4), fractions=(1.0, 0.5), seeds=(0,))
    (gone,) = [
        run.spec.key
        for run in study.runs
        if run.arm == 1 and run.unit.fraction == 1 and run.spec.settings.learning_rate == 2e-4
    ]
    records = {key: record for key, record in study.records.items() if key != gone}
    study = dataclasses.replace(study, records=records)
    states = {line.key: line.state for line in all_runs(study, tabulate(study))}
    for run in study.runs:
        state = states[run.spec.key]
        if run.spec.key == gone:
            assert state == "not finished"
        elif run.unit.fraction < 1:
            assert state == "other share of the rows"
        elif run.arm == 1:
            assert state == "waits for other runs"
        else:
            assert state in ("counts", "other learning rate")
    assert list(states.values()).count("counts") == 1
