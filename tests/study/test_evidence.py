"""What stands behind the table: ranks over test sets, and what runs are called."""

from __future__ import annotations

import dataclasses

from moduli.study.evidence import ranks, run_label
from moduli.study.plan import Planned, arm
from moduli.study.table import tabulate
from tests.study.fakes import emoe, made_study, two_arms


def test_ranks_are_over_the_seeds_that_all_methods_have() -> None:
    def score(run: Planned, domain: str) -> float:
        return 0.1 if run.spec.seed == 2 else 0.8 + 0.05 * run.arm

    study = made_study((*two_arms(), arm(emoe(top_k=8))), score=score)
    (last, _) = study.finished(0)[2]
    records = {k: r for k, r in study.records.items() if k != last.spec.key}
    found = ranks(tabulate(dataclasses.replace(study, records=records)))
    assert found is not None
    assert list(found.test.ranks.values()) == [3, 2, 1]
    one = made_study(sources=(("shop",), ("shop", "film")), domains=("shop", "film", "food"))
    found = ranks(tabulate(one))
    assert found is not None
    assert {domain for _, domain in found.test_sets} == {"film", "food"}
    single = made_study(sources=(("shop",), ("shop", "film")), domains=("shop", "food"))
    found = ranks(tabulate(single))
    assert found is not None
    assert {domain for _, domain in found.test_sets} == {"food"}


def test_runs_are_called_by_what_differs_within_the_study() -> None:
    plain = made_study(seeds=(3,))
    assert [run_label(plain, run.spec) for run in plain.runs] == ["dense, seed 3", "emoe, seed 3"]
    study = made_study(
        sources=(("shop",), ("film", "food")), fractions=(1.0, 0.5), rates=(1e-4, 2e-4), seeds=(3,)
    )
    names = [run_label(study, run.spec) for run in study.runs]
    assert len(set(names)) == len(names) == 16
    assert "emoe, on film + food, 50 % of the rows, rate 0.0002, seed 3" in names
