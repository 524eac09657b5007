"""Several processes on one study share its work; killed ones hold up nobody and lose nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from moduli.data.task import Task
from moduli.study import compare as compare_module
from moduli.study import run as run_module
from moduli.study.compare import compare
from moduli.study.plan import Plan
from moduli.study.run import RunEvent, execute
from moduli.study.spec import RunSpec
from tests.reliability.killing import differences, draw_moments, kill_often, resumed
from tests.reliability.pretended import Pretended, pretended_plan
from tests.reliability.small_study import (
    finish,
    make_plan,
    make_task,
    read_log,
    shorter,
    start,
    write_model,
)

LOCK = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return Pretended(monkeypatch)


@pytest.fixture
def small_plan(tmp_path: Path) -> Plan:
    return pretended_plan(tmp_path / "model")


@pytest.fixture(scope="module")
def small_task() -> Task:
    return make_task()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "study"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "POLL_SECONDS", 0.0)


def names(root: Path) -> set[str]:
    return set(os.listdir(root))


@pytest.mark.usefixtures("no_waiting")
def test_a_run_in_the_hands_of_another_process_is_waited_for(
    small_plan: Plan, small_task: Task, pretended: Pretended, root: Path
) -> None:
    runs = small_plan.runs([small_task])
    theirs = runs[1].spec.key
    root.mkdir()
    lock = FileLock(root / f".{theirs}.lock")
    lock.acquire()
    stages: dict[str, list[str]] = {run.spec.key: [] for run in runs}

    def note(event: RunEvent) -> None:
        stages[event.spec.key].append(event.stage)
        if event.stage == "elsewhere":  # the other process gets it done just now
            assert len(names(root) & stages.keys()) == len(runs) - 1
            lock.release()
            execute(event.spec, small_task, root / theirs)

    study = compare(small_plan, [small_task], root, on_event=note)
    assert stages.pop(theirs) == ["elsewhere", "known"]
    assert set(map(tuple, stages.values())) == {("started", "finished")}
    assert study.records.keys() == names(root) == {run.spec.key for run in runs}
    assert pretended.done == Counter(study.records.keys())


@pytest.mark.usefixtures("no_waiting", "pretended")
def test_the_lock_of_a_killed_process_holds_up_nobody(
    small_plan: Plan, small_task: Task, root: Path
) -> None:
    first = small_plan.runs([small_task])[0].spec
    root.mkdir()
    lock = root / f".{first.key}.lock"
    with subprocess.Popen([sys.executable, "-c", LOCK, lock], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        stages = []

        def note(event: RunEvent) -> None:
            if event.spec == first:
                stages.append(event.stage)
            if event.stage == "elsewhere":
                other.send_signal(signal.SIGKILL)
                other.wait()

        study = compare(small_plan, [small_task], root, on_event=note)
    assert stages[0] == "elsewhere"
    assert stages[-2:] == ["started", "finished"]
    assert first.key in study.records
    assert names(root) == study.records.keys()


def test_what_a_process_left_that_was_killed_when_a_run_was_there_is_swept_away(
    small_plan: Plan, small_task: Task, pretended: Pretended, root: Path
) -> None:
    compare(small_plan, [small_task], root)
    key = small_plan.runs([small_task])[0].spec.key
    checkpoint = root / f".{key}.partial" / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    lock = root / f".{key}.lock"
    with FileLock(lock):  # it is still at it
        compare(small_plan, [small_task], root)
        assert checkpoint.is_dir()
    lock.touch()
    study = compare(small_plan, [small_task], root)
    assert names(root) == study.records.keys()
    assert set(pretended.done.values()) == {1}


def test_what_another_process_has_tried_again_is_not_tried_once_more(
    small_plan: Plan, small_task: Task, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: Counter[str] = Counter()

    def wrong(spec: RunSpec, *_: object) -> None:
        tried[spec.key] += 1
        raise ValueError(f"try {tried[spec.key]}")

    monkeypatch.setattr(run_module, "_work", wrong)
    first, *_, last = (run.spec for run in small_plan.runs([small_task]))

    def other_process(event: RunEvent) -> None:
        if (event.spec, event.stage) == (first, "started"):
            with pytest.raises(ValueError, match="try"):
                execute(last, small_task, root / last.key)

    compare(small_plan, [small_task], root)
    assert set(tried.values()) == {1}
    study = compare(small_plan, [small_task], root, retry_failed=True, on_event=other_process)
    assert set(tried.values()) == {2}
    assert {failure.message for failure in study.failures} == {"try 2"}
    assert len(study.failures) == 10
    compare(small_plan, [small_task], root, retry_failed=True)
    assert set(tried.values()) == {3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plan of a small study, where it was done for real, and the log of that."""
    root = tmp_path_factory.mktemp("undisturbed")
    write_model(root / "model")
    plan = shorter(make_plan(root / "model", 1))
    finish(start(plan, root / "study", root / "log"))
    return plan, root / "study", read_log(root / "log")


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_as_one_left_in_peace(
    undisturbed: Any, tmp_path: Path
) -> None:
    plan, root, log = undisturbed
    hit = kill_often(plan, tmp_path / "study", tmp_path / "log", draw_moments(log, 3, seed=0))
    assert hit.total() == 3
    assert differences(plan, root, tmp_path / "study") == []
    assert resumed(log) == 0


@pytest.mark.slow
def test_two_processes_started_at_once_do_every_run_once(undisturbed: Any, tmp_path: Path) -> None:
    plan, root, _ = undisturbed
    both = [start(plan, tmp_path / "study", tmp_path / "log") for _ in range(2)]
    for process in both:
        finish(process)
    log = read_log(tmp_path / "log")
    started = Counter(line.key for line in log if line.stage == "started")
    assert len(started) == 10
    assert set(started.values()) == {1}
    for process in both:  # each knows all of it in the end, and has done a part
        mine = [line for line in log if line.process == process.pid]
        assert {line.key for line in mine if line.is_done} == started.keys()
        assert any(line.stage == "finished" for line in mine)
    assert differences(plan, root, tmp_path / "study") == []


@pytest.mark.slow
def test_differences_are_found(undisturbed: Any, tmp_path: Path) -> None:
    """What the tests above rest on."""
    plan, root, _ = undisturbed
    other = tmp_path / "study"
    shutil.copytree(root, other)
    assert differences(plan, root, other) == []
    keys = sorted(names(other))
    path = other / keys[0] / "record.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"final_loss": data["final_loss"] + 1e-9}))
    shutil.rmtree(other / keys[1])
    (other / f".{keys[2]}.lock").touch()
    inspected = next(key for key in keys[3:] if (other / key / "inspection.json").exists())
    with (other / inspected / "inspection.json").open("a") as stream:
        stream.write("\n")
    assert sorted(differences(plan, root, other)) == sorted(
        [
            f"{keys[0]}: final_loss differs",
            f"{keys[1]}: not finished",
            f"{inspected}: inspection.json differs",
            f"left over: study/.{keys[2]}.lock",
        ]
    )
