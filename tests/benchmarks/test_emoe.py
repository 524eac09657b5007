"""The studies of EMoE: plans that can run, records that are their own, tables that are theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.emoe import plans, tables
from moduli.study.records import read_records

STUDIES = sorted(path for path in tables.RESULTS.glob("*") if path.is_dir())


@pytest.mark.parametrize("name", plans.PLANS)
def test_every_plan_names_methods_and_settings_that_exist(name: str) -> None:
    plan = plans.PLANS[name]()
    assert len(set(plan.labels)) == len(plan.arms) > 1
    for one in plan.arms:
        assert one.method.build().name == one.method.name
        assert plan.rates(one)
    assert not plan.arms[0].method.build().modular  # what the others are compared with


@pytest.mark.parametrize("root", STUDIES, ids=lambda root: root.name)
def test_records_are_those_of_the_plan(root: Path) -> None:
    records = read_records(root)
    plan = plans.PLANS[root.name]()
    methods = [one.method for one in plan.arms]
    assert records
    for record in records:
        assert (root / record.spec.key / "record.json").is_file()
        assert record.spec.model == plan.model
        assert record.spec.seed in plan.seeds
        assert record.spec.method in methods


def test_tables_in_the_documentation_are_made_from_the_results() -> None:
    for page in tables.PAGES:
        text = (tables.ROOT / page).read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{page}: run python benchmarks/emoe/tables.py"
