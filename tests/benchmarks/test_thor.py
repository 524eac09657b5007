"""The studies of THOR: equal budgets, records that are their own, tables that are theirs."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from benchmarks.shared import studies
from benchmarks.shared.tables import ROOT
from benchmarks.thor import plans, study, tables
from moduli.data.translation import language_of
from moduli.study.plan import Plan, TaskSpec
from moduli.study.records import read_records
from tests.training.test_translation import rows

DEAR = {label: 2.04 if plans.passes(label) > 1 else 1.31 for label in plans.METHODS}
COSTS = DEAR | {plans.DENSE: 1.0}


def steps(arms: tuple[plans.Arm, ...]) -> dict[str, int]:
    return {str(arm.label): int(arm.overrides["max_steps"]) for arm in arms}


def test_equal_tokens_count_every_pass_and_equal_time_every_second() -> None:
    found = steps(plans.arms(tuple(plans.METHODS), 2000, COSTS))
    assert found == {
        "dense": 2000,
        "R-Drop, α 5; equal tokens and time": 1000,
        "THOR, α 0; equal tokens and time": 1000,
        "THOR, α 5; equal tokens and time": 1000,
        "Switch; equal tokens": 2000,
        "Switch; equal time": 1500,
    }


def test_budgets_that_differ_are_arms_of_their_own() -> None:
    found = steps(plans.arms((plans.DENSE, plans.THOR), 2000, COSTS | {plans.THOR: 1.7}))
    assert found == {"dense": 2000, f"{plans.THOR}; equal tokens": 1000,
                     f"{plans.THOR}; equal time": 1200}  # fmt: skip


@pytest.mark.parametrize("name", plans.PLANS)
def test_every_plan_has_arms_that_are_comparable(name: str) -> None:
    plan = plans.PLANS[name]()
    assert plan.labels[0] == plans.DENSE
    assert len(set(plan.labels)) == len(plan.arms) > 1
    dense, *others = plan.arms
    for arm in others:
        label = str(arm.label).partition(";")[0]
        own, whole = int(arm.overrides["max_steps"]), int(dense.overrides["max_steps"])
        if "tokens" in str(arm.label):
            assert own * plans.passes(label) == whole
        if "time" in str(arm.label):
            assert own * plans.costs()[label] == pytest.approx(whole, rel=0.06)


def test_the_headline_has_intervals_and_shares_its_runs() -> None:
    headline, arms = plans.headline(), plans.all_arms()
    assert len(headline.seeds) >= 3
    assert set(arms.seeds) <= set(headline.seeds)
    assert steps(headline.arms).items() >= {(k, v) for k, v in steps(arms.arms).items()
                                            if k.startswith((plans.DENSE, plans.THOR))}  # fmt: skip
    assert tables.planned([headline, arms]) < tables.planned([headline]) + tables.planned([arms])


def small(path: Path) -> Plan:
    """Two arms and one seed on thirty rows."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["source", "target", "language"])
        writer.writeheader()
        writer.writerows({**row, "language": language_of(row["source"])} for row in rows())
    arms = plans.arms((plans.DENSE, plans.THOR), plans.GRID, COSTS | {plans.THOR: 4.0})
    arms = tuple(
        dataclasses.replace(arm, overrides={"max_steps": n + 1}) for n, arm in enumerate(arms[:2])
    )
    plan = plans.plan(f"csv:{path}", arms, (0,), max_length=16, batch_size=8)
    data = {"kind": "translation", "domain_column": "language"}
    task = TaskSpec(plan.tasks[0].name, data)
    return dataclasses.replace(plan, tasks=(task,), sources=(("es", "cs"),))


def test_a_small_study_from_the_runs_to_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small(tmp_path / "rows.csv")
    made = {"headline": lambda: plan, "arms": lambda: plan}
    monkeypatch.setattr(tables, "PLANS", made)
    monkeypatch.setattr(tables, "costs", lambda: COSTS)
    runs = tmp_path / "runs"
    assert "Not run yet: 0 of 2 runs" in tables.markdown("headline", tmp_path)

    def run() -> dict[Path, int]:
        found = studies.run_study(
            plan, runs, tmp_path / "headline", command=["none"], keep_models=("thor",)
        )
        assert not found.failures
        study.measure_modes(found, runs)
        return {path: path.stat().st_mtime_ns for path in runs.rglob("*")}

    before = run()
    assert len(read_records(runs)) == 2
    assert len(list(runs.glob("*/modes.json"))) == 1
    assert run() == before  # nothing is done twice
    report = (tmp_path / "headline.html").read_text(encoding="utf-8")
    assert "trained from random weights on es + cs" in report
    assert "The seeds vary all first weights" in report

    tabled = tables.comparison({"headline": tables.finished(plan, runs)}, runs)[0]
    assert [row[0] for row in tabled[1:]] == plan.labels
    assert [row[1] for row in tabled[1:]] == ["1", "2"]
    other = dataclasses.replace(plan.settings, learning_rate=9e-3)
    assert not tables.finished(dataclasses.replace(plan, settings=other), runs)
    for name in ("headline", "languages", "modes"):
        text = tables.markdown(name, tmp_path)
        assert "2 of 2 runs" in text
        assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_records_are_those_of_the_plans() -> None:
    made = [plan() for plan in plans.PLANS.values()]
    known = [tables.finished(plan, tables.RESULTS / "runs") for plan in made]
    keys = {r.spec.key for found in known for seeds in found.values() for r in seeds.values()}
    assert keys == {record.spec.key for record in read_records(tables.RESULTS / "runs")}


def test_tables_in_the_documentation_are_made_from_the_records() -> None:
    for page in tables.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{page}: run python -m benchmarks.thor.tables"
