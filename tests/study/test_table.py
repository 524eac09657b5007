"""A table is a function of the finished runs: what is chosen, averaged and compared in it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from moduli.errors import ConfigError
from moduli.study.compare import Study
from moduli.study.plan import Planned, Unit
from moduli.study.records import Failure
from moduli.study.table import check_rule, tabulate
from tests.study.conftest import make_task
from tests.study.fakes import made_study


def without(study: Study, gone: set[str]) -> Study:
    """The study before some of its runs were finished."""
    records = {key: record for key, record in study.records.items() if key not in gone}
    return dataclasses.replace(study, records=records)


def test_a_cell_is_the_mean_over_sources_of_means_over_domains() -> None:
    study = made_study(sources=(("shop",), ("film", "food")))
    table = tabulate(study)
    assert [column.kind for column in table.columns][:2] == ["in-domain", "out-of-domain"]
    for row in (row for row in table.rows if row.edit is None):
        for column, cell in zip(table.columns, row.cells, strict=True):
            found = []
            for unit, domains in column.domains.items():
                runs = study.finished(row.arm, unit)
                scores = [r.scores[d]["accuracy"] for _, r in runs for d in domains]
                found.append(math.fsum(scores) / len(scores))
            assert cell.summary.mean == pytest.approx(math.fsum(found) / len(found))
            assert set(cell.runs) <= set(study.records)
    first, second = (row.cells[1] for row in (table.rows[0], table.rows[1]))
    assert first.difference is None
    assert second.difference is not None
    assert second.difference.mean == pytest.approx(second.summary.mean - first.summary.mean)


def test_domains_of_one_name_in_two_tasks_are_two_places() -> None:
    def score(run: Planned, domain: str) -> float:
        return 0.9 if run.spec.task == "new" else 0.5

    table = tabulate(made_study(tasks=("old", "new"), score=score))
    titles = [column.title for column in table.columns]
    assert titles[:2] == ["in-domain", "out-of-domain mean"]
    assert titles[2:] == ["old: film", "old: food", "new: film", "new: food"]
    for row in (row for row in table.rows if row.edit is None):
        means = [cell.summary.mean for cell in row.cells]
        assert means == pytest.approx([0.7, 0.7, 0.5, 0.5, 0.9, 0.9])


def test_domains_are_called_by_their_names_where_these_are_enough() -> None:
    """Also a domain of one task that several sources are tested on."""
    study = made_study(sources=(("shop",), ("film",)))
    titles = [column.title for column in tabulate(study).columns]
    assert titles == ["in-domain", "out-of-domain mean", "film", "food", "shop"]
    (unit, *_) = study.units
    alone = tabulate(made_study(tasks=("old", "new")), units=[unit])
    assert [column.title for column in alone.columns][2:] == ["film", "food"]


def test_of_several_rates_only_the_chosen_one_counts() -> None:
    def score(run: Planned, domain: str) -> float:
        return 0.9 if run.spec.settings.learning_rate == 2e-4 else 0.7

    study = made_study(rates=(1e-4, 2e-4), score=score)
    for row in (row for row in tabulate(study).rows if row.edit is None):
        assert all(cell.summary.mean == pytest.approx(0.9) for cell in row.cells)
        rates = {study.records[k].spec.settings.learning_rate for c in row.cells for k in c.runs}
        assert rates == {2e-4}


def test_nothing_is_chosen_before_every_rate_has_a_run() -> None:
    """Else the rate that happens to be first would stand for the arm."""
    study = made_study(rates=(1e-4, 2e-4))
    second = {
        run.spec.key
        for run in study.runs
        if run.arm == 1 and run.spec.settings.learning_rate == 2e-4
    }
    assert [row.arm for row in tabulate(study).rows] == [0, 1, 1]
    assert [row.arm for row in tabulate(without(study, second)).rows] == [0]


def test_a_rate_with_which_everything_failed_is_not_waited_for() -> None:
    study = made_study(rates=(1e-4, 2e-4))
    gone = {run.spec.key: run.spec for run in study.runs if run.spec.settings.learning_rate == 2e-4}
    failures = tuple(Failure(spec, "TrainingError", "the loss is nan") for spec in gone.values())
    table = tabulate(dataclasses.replace(without(study, set(gone)), failures=failures))
    assert [row.arm for row in table.rows] == [0, 1, 1]
    assert table.choice.learning_rate(1, table.units[0]) == 1e-4


@pytest.mark.parametrize("rule", ["training-domain", "leave-one-domain-out", "oracle"])
def test_a_rule_that_cannot_choose_is_refused_before_anything_runs(rule: str) -> None:
    task = make_task()
    bare = dataclasses.replace(
        task,
        domains={
            name: dataclasses.replace(splits, validation=None)
            for name, splits in task.domains.items()
        },
    )
    several, one = made_study(rates=(1e-4, 2e-4)), made_study()
    planned = without(several, set(several.records))
    check_rule(planned, [task], rule)
    check_rule(one, [bare], rule)  # nothing to choose
    with pytest.raises(ConfigError, match="validation"):
        check_rule(planned, [bare], rule)


def test_a_search_looks_at_validation_and_at_no_edit() -> None:
    study = made_study()
    assert {row.edit for row in tabulate(study).rows} == {None, "merged"}
    assert {row.edit for row in tabulate(study, split="validation").rows} == {None}


def test_only_the_largest_fraction_is_averaged_unless_told_otherwise() -> None:
    study = made_study(fractions=(1.0, 0.5))
    assert tabulate(study).units == (Unit(0, ("shop",), 1.0),)
    half = Unit(0, ("shop",), 0.5)
    table = tabulate(study, units=[half])
    assert {unit for column in table.columns for unit in column.domains} == {half}


def test_a_study_without_runs_has_no_table() -> None:
    study = made_study()
    with pytest.raises(ConfigError, match="No run of this study has finished"):
        tabulate(without(study, set(study.records)))


def test_without_other_domains_there_is_no_column_out_of_domain() -> None:
    table = tabulate(made_study(domains=("shop",)))
    assert [column.kind for column in table.columns] == ["in-domain"]
