"""The time of a study, from finished runs where there are any and from a trial where not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import moduli
from moduli.data.task import Task
from moduli.methods.dense import Dense
from moduli.study import estimate as module
from moduli.study.compare import Study, collect
from moduli.study.estimate import Pace, Work, estimate, try_out, work_of
from moduli.study.plan import Plan, arm
from moduli.study.records import Failure, RunRecord
from moduli.study.spec import Edit, RunSpec
from moduli.training.settings import FinetuneSettings
from tests.study.conftest import SETTINGS

ROWS = 16  # in every split of the made task, which has three domains


def study_of(plan: Plan, task: Task, root: Path) -> Study:
    found: Study = collect(plan, [task], root)
    return found


def record_of(spec: RunSpec, pace: Pace, task: Task) -> RunRecord:
    """A finished run that went at a given pace."""
    work = work_of(spec, task)
    seconds = {
        "convert": pace.once,
        "train": pace.train * work.trained,
        "evaluate": pace.score * work.scored * 0.75,
        "inspect": pace.score * work.scored * 0.25,
    }
    return RunRecord(
        spec, "classification", {}, {}, {}, None, {}, 6, 0.1, seconds, dict(seconds), {}
    )


def finished(study: Study, task: Task, paces: dict[int, Pace]) -> Study:
    """The study with some of its runs finished, by their place."""
    records = {
        study.runs[i].spec.key: record_of(study.runs[i].spec, pace, task)
        for i, pace in paces.items()
    }
    return dataclasses.replace(study, records=records)


@pytest.fixture
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("an arm with finished runs was tried")

    monkeypatch.setattr(module, "try_out", never)


def test_the_work_of_a_run_by_hand(
    plan: Plan, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, emoe = (run.spec for run in study_of(plan, task, tmp_path).runs[:2])
    assert work_of(dense, task) == Work(6 * 16, 3 * ROWS + 3 * ROWS)
    # Merged as well, and inspected: here all of its few test rows.
    assert work_of(emoe, task) == Work(6 * 16, 3 * ROWS + 3 * 3 * ROWS)
    monkeypatch.setattr(module, "INSPECTED_ROWS", 5)
    assert work_of(emoe, task).scored == 3 * ROWS + 2 * 3 * ROWS + 3 * 5
    # One more test of every row, and a look at the training rows that say what to prune.
    pruned = dataclasses.replace(emoe, edits=(*emoe.edits, Edit("pruned")))
    assert work_of(pruned, task).scored == work_of(emoe, task).scored + 3 * ROWS + ROWS
    epochs = dataclasses.replace(
        dense,
        settings=FinetuneSettings(epochs=5),
        train_domains=("shop", "film"),
        fraction=0.3,
    )
    assert work_of(epochs, task).trained == 5 * 2 * 5  # 30 % of 16 rows, rounded up


@pytest.mark.usefixtures("no_trials")
def test_finished_runs_say_it(plan: Plan, task: Task, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, seeds=(0, 1, 2, 3))
    fast, slow = Pace(0.01, 0.001, 2.0), Pace(0.1, 0.002, 5.0)
    odd = Pace(9.0, 9.0, 900.0)  # a machine that was busy; the median does not see it
    study = study_of(plan, task, tmp_path)
    study = finished(study, task, {0: fast, 2: fast, 4: odd, 1: slow, 3: slow, 5: slow, 7: slow})
    found = estimate(study, [task])
    dense, emoe = found.arms
    assert (dense.finished, dense.left, emoe.finished, emoe.left) == (3, 1, 4, 0)
    assert dense.seconds == pytest.approx(fast.of(work_of(study.runs[6].spec, task)))
    assert emoe.seconds == 0
    assert found.seconds == dense.seconds
    assert not dense.tried
    assert found.sentence == "about 3 s (7 of 8 runs are finished)"


@pytest.mark.usefixtures("no_trials")
def test_the_clocks_of_a_resumed_run_are_not_believed(
    plan: Plan, task: Task, tmp_path: Path
) -> None:
    plan = dataclasses.replace(plan, arms=(arm(Dense()),), seeds=(0, 1, 2))
    whole = Pace(0.1, 0.01, 2.0)
    study = finished(study_of(plan, task, tmp_path), task, {0: Pace(0.0, 0.0, 0.0), 1: whole})
    first, _, last = (run.spec for run in study.runs)
    resumed = dataclasses.replace(study.records[first.key], environment={"resumed_from": 5})
    study = dataclasses.replace(study, records={**study.records, first.key: resumed})
    found = estimate(study, [task])
    assert (found.finished, found.left) == (2, 1)
    assert found.seconds == pytest.approx(whole.of(work_of(last, task)))


def test_more_rows_take_longer(plan: Plan, task: Task, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_steps=None, epochs=2)
    plan = dataclasses.replace(
        plan,
        arms=(arm(Dense()),),
        seeds=(0,),
        settings=settings,
        sources=(("shop",), ("shop", "film", "food")),
    )
    study = finished(study_of(plan, task, tmp_path), task, {0: Pace(1.0, 0.5, 3.0)})
    assert estimate(study, [task]).seconds == pytest.approx(2 * 48 + 0.5 * 96 + 3)


@pytest.mark.usefixtures("no_trials")
def test_a_unit_is_judged_by_its_own_runs(plan: Plan, task: Task, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, arms=(arm(Dense()),), sources=(("shop",), ("film",)))
    study = study_of(plan, task, tmp_path)
    assert [run.unit.sources for run in study.runs] == [("shop",), ("film",)] * 2
    study = finished(study, task, {0: Pace(0.0, 0.0, 1.0), 1: Pace(0.0, 0.0, 100.0)})
    assert estimate(study, [task]).seconds == pytest.approx(101)


def test_runs_that_failed_are_not_waited_for(
    plan: Plan, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "try_out", lambda spec, task: Pace(0.0, 0.0, 10.0))
    study = study_of(plan, task, tmp_path)
    study = dataclasses.replace(
        study, failures=(Failure(study.runs[0].spec, "TrainingError", "NaN"),)
    )
    assert estimate(study, [task]).left == 3
    again = estimate(study, [task], retry_failed=True)
    assert again.left == 4
    assert again.seconds == pytest.approx(40)
    assert all(one.tried for one in again.arms)


def test_an_arm_that_cannot_be_tried_is_named(
    plan: Plan, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(spec: RunSpec, task: Task) -> Pace:
        if spec.method.name == "emoe":
            raise moduli.errors.ConfigError("cannot work")
        return Pace(0.0, 0.0, 30.0)

    monkeypatch.setattr(module, "try_out", fails)
    found = estimate(study_of(plan, task, tmp_path), [task])
    assert [one.seconds for one in found.arms] == [pytest.approx(60), None]
    assert found.sentence.startswith("about 60 s (0 of 4 runs are finished), not counting emoe")


@pytest.mark.usefixtures("no_trials")
def test_a_finished_study_takes_no_time(plan: Plan, task: Task, tmp_path: Path) -> None:
    study = study_of(plan, task, tmp_path)
    study = finished(study, task, dict.fromkeys(range(4), Pace(1.0, 1.0, 1.0)))
    found = estimate(study, [task])
    assert found.seconds == 0
    assert found.sentence == "nothing is left to do (all 4 runs are finished)"


def test_a_trial_of_the_real_model(
    plan: Plan, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every arm is tried once, with what it trains; nothing is written."""
    paces: list[Pace] = []

    def spy(spec: RunSpec, task: Task) -> Pace:
        paces.append(try_out(spec, task))
        return paces[-1]

    monkeypatch.setattr(module, "try_out", spy)
    plan = dataclasses.replace(
        plan, arms=(*plan.arms, arm(Dense(), trains="lora", lora_rank=2)), seeds=(0, 1)
    )
    study = study_of(plan, task, tmp_path)
    found = estimate(study, [task])
    assert len(paces) == 3
    assert all(min(pace.train, pace.score, pace.once) > 0 for pace in paces)
    assert [one.tried for one in found.arms] == [True] * 3
    expected = sum(
        pace.of(work_of(run.spec, task))
        for pace, label in zip(paces, plan.labels, strict=True)
        for run in study.runs
        if plan.labels[run.arm] == label
    )
    assert found.seconds == pytest.approx(expected)
    assert not list(tmp_path.iterdir())
