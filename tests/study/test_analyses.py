"""Analyses follow from the arms alone, and their numbers from the runs."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

import moduli
from moduli.study.analyses import Analysis, analyses, train_and_test
from moduli.study.plan import Arm, Planned, also_tested, arm
from moduli.study.table import tabulate
from tests.study.fakes import emoe, made_study, two_arms


def found(*arms: Arm, **options: Any) -> dict[str, Analysis]:
    """The analyses of a study of dense and these arms, by name."""
    study = made_study((arm(moduli.Dense()), *arms), **options)
    return {one.name: one for one in analyses(study, tabulate(study))}


def test_a_plain_comparison_has_none() -> None:
    assert found(arm(emoe())) == {}
    assert found(arm(emoe()), arm(moduli.GMoE(num_experts=4, top_k=1))) == {}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("negative-transfer", [{"choose": "bottom"}, {"choose": "not_top"}]),
        ("experts", [{"top_k": 8}, {"num_experts": 32}]),
        ("layers", [{"layers": "last:1"}]),
        ("split", [{"split": "random"}]),
        ("gates", [{"gate": "cosine"}]),
    ],
)
def test_arms_equal_but_for_one_setting_are_an_ablation_of_it(
    name: str, changes: list[dict[str, Any]]
) -> None:
    made = found(arm(emoe()), *(arm(emoe(**change)) for change in changes))
    assert list(made) == [name]
    analysis = made[name]
    assert len(analysis.numbers) == 1 + len(changes)
    assert analysis.figure.startswith("<svg")
    assert len(analysis.runs) == 3 * (2 + len(changes))  # and those of dense


def test_arms_that_differ_in_more_do_not_belong_together() -> None:
    assert found(arm(emoe()), arm(emoe(choose="bottom", split="random"))) == {}
    assert found(arm(emoe()), arm(emoe(choose="bottom"), trains="last:2")) == {}
    assert found(arm(emoe()), arm(emoe(choose="bottom"), learning_rate=3e-5)) == {}


def test_sentences_compare_with_the_best_experts_pair_by_pair() -> None:
    def score(run: Planned, domain: str) -> float:
        loss = 0.1 if run.spec.method.config.get("choose") == "bottom" else 0
        return 0.8 - loss + 0.01 * run.spec.seed + (0.001 if run.arm == 2 else 0) * run.spec.seed

    made = found(arm(emoe()), arm(emoe(choose="bottom")), score=score)["negative-transfer"]
    first, *_ = made.text
    assert first.startswith("emoe (choose=bottom) scored lower than emoe (choose=top)")
    assert "9.9 points" in first


def test_a_setting_that_was_searched_says_so_and_claims_nothing() -> None:
    made = found(arm(emoe()), arm(emoe(top_k=8)))["experts"]
    (note,) = made.text
    assert "needs other data" in note


def test_fractions_give_lines_and_every_point_is_the_mean_of_its_runs() -> None:
    study = made_study(fractions=(1.0, 0.5, 0.1))
    table = tabulate(study)
    (efficiency,) = analyses(study, table)
    assert efficiency.name == "data-efficiency"
    numbers = dict(efficiency.numbers)
    assert len(numbers) == 6
    for label, cells in numbers.items():
        records = [study.records[key] for key in cells[0].runs]
        assert {100 * r.spec.fraction for r in records} == {
            float(label.split(", ")[1].split(" ")[0])
        }
        expected = statistics.mean(r.scores["shop"]["accuracy"] for r in records)
        assert cells[0].summary.mean == pytest.approx(expected)
    # whole data only elsewhere
    assert {study.records[k].spec.fraction for c in table.rows[0].cells for k in c.runs} == {1.0}


def test_what_is_due_to_training_stands_beside_what_is_due_to_testing() -> None:
    study = made_study(also_tested(two_arms(), pruned=True, cross=True))
    analysis = train_and_test(tabulate(study))
    assert analysis is not None
    assert [label for label, _ in analysis.numbers] == [
        "dense",
        "dense (split by emoe)",
        "emoe",
        "emoe (merged)",
        "emoe (pruned)",
    ]
    plain = made_study((arm(moduli.Dense()), arm(moduli.Dense(), trains="head")))
    assert train_and_test(tabulate(plain)) is None


def test_without_the_baseline_an_ablation_has_numbers_but_no_bars() -> None:
    study = made_study((arm(moduli.Dense()), arm(emoe()), arm(emoe(choose="bottom"))))
    records = {k: r for k, r in study.records.items() if r.spec.method.name == "emoe"}
    table = tabulate(study.__class__(study.plan, study.runs, records, ()))
    (analysis,) = analyses(study, table)
    assert analysis.figure == ""
    assert len(analysis.numbers) == 2
