"""A study repeats nothing, keeps failures, survives a kill bit for bit, proves its hand-back."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import moduli
from moduli.data.task import Task
from moduli.errors import CheckpointError, ConfigError
from moduli.study import run as run_module
from moduli.study.compare import Study, best_by_validation, compare
from moduli.study.handback import hand_back
from moduli.study.plan import Plan
from moduli.study.records import Failure, RunRecord, read_record, read_records
from moduli.study.run import RunEvent, execute
from moduli.training.evaluate import predict
from moduli.training.settings import FinetuneSettings
from tests.study.conftest import make_plan

SCRIPT = """
import sys
from pathlib import Path
from tests.study.conftest import make_plan, make_task
from moduli.study.compare import compare
compare(make_plan(Path(sys.argv[1])), [make_task()], Path(sys.argv[2]), checkpoint_every=2)
"""
REPOSITORY = Path(__file__).parents[2]


def test_every_run_is_a_directory_with_its_record(study: Study, root: Path) -> None:
    assert not study.failures
    assert len(study.records) == 4
    assert {p.name for p in root.iterdir() if not p.name.startswith(".")} == {
        record.spec.key for record in records_of(study)
    }
    assert not list(root.glob(".*.partial"))
    by_key = {record.spec.key: record for record in read_records(root)}
    for record in records_of(study):
        assert by_key[record.spec.key] == record
        assert set(record.scores) == {"shop", "film", "food"}
        assert set(record.validation) == set(record.scores)
        assert record.steps == 6
        assert list(record.variants) == [edit.label for edit in record.spec.edits]


def test_seeds_are_paired_and_methods_differ(study: Study) -> None:
    """The same seed gives dense and EMoE the same head; another seed gives another one."""
    dense, emoe = ([record for _, record in study.finished(i)] for i in range(2))
    assert dense[0].scores != dense[1].scores
    assert dense[0].scores != emoe[0].scores
    assert emoe[0].conversion is not None
    assert emoe[0].conversion["num_experts"] == 16


def test_finished_runs_are_never_repeated(
    study: Study, plan: Plan, task: Task, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(run_module, "_work", never)
    events: list[RunEvent] = []
    again = compare(plan, [task], root, on_event=events.append)
    assert [event.stage for event in events] == ["known"] * 4
    assert again.records == study.records


@pytest.mark.slow
def test_a_study_killed_in_the_middle_of_a_run_ends_with_the_same_records(
    study: Study, minilm_path: Path, tmp_path: Path
) -> None:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(minilm_path), str(tmp_path)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stderr=subprocess.PIPE,
            text=True,
        )

    process = start()
    deadline = time.monotonic() + 120
    second = records_of(study)[1].spec.key  # the first run is finished, the second one in flight
    checkpoint = tmp_path / f".{second}.partial" / "checkpoints" / "checkpoint-4"
    while not (checkpoint / "trainer_state.json").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / second).exists()
    first = records_of(study)[0]
    assert read_record(tmp_path / first.spec.key).result() == first.result()

    process = start()
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    for record in records_of(study):
        assert read_record(tmp_path / record.spec.key).result() == record.result()


def records_of(study: Study) -> list[RunRecord]:
    """In the order of the plan."""
    return [study.records[run.spec.key] for run in study.runs if run.spec.key in study.records]


def test_a_failed_run_is_kept_with_its_reason_and_the_others_go_on(
    minilm_path: Path, task: Task, tmp_path: Path
) -> None:
    diverging = FinetuneSettings(
        max_steps=2, batch_size=16, learning_rate=1e30, max_length=16, warmup=0.0, bf16=False
    )
    plan = make_plan(minilm_path, settings=diverging, seeds=(0,))
    first = compare(plan, [task], tmp_path)
    assert [failure.error for failure in first.failures] == ["TrainingError"] * 2
    assert "step 2 of 2" in first.failures[0].message
    assert not first.records

    def count(**options: bool) -> int:
        events: list[RunEvent] = []
        outcome = compare(plan, [task], tmp_path, on_event=events.append, **options)
        assert all(isinstance(failure, Failure) for failure in outcome.failures)
        return sum(event.stage == "started" for event in events)

    assert count() == 0
    assert count(retry_failed=True) == 2


def test_a_directory_that_is_not_this_run_is_left_alone(
    study: Study, task: Task, root: Path, tmp_path: Path
) -> None:
    spec = records_of(study)[0].spec
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a run of moduli"):
        execute(spec, task, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(CheckpointError, match="seed differs"):
        execute(dataclasses.replace(spec, seed=5), task, root / spec.key)


def test_two_processes_do_not_work_on_one_run(study: Study, task: Task, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".run.lock"), pytest.raises(ConfigError, match="Another process"):
        execute(records_of(study)[0].spec, task, tmp_path / "run")


def test_the_model_kept_with_a_run_is_the_one_that_was_scored(
    study: Study, task: Task, root: Path
) -> None:
    from transformers import AutoTokenizer

    record = study.finished(1)[0][1]
    directory = root / record.spec.key
    model = moduli.load(directory)
    assert moduli.is_modular(model)
    assert model.config.id2label == {0: "bad", 1: "good"}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = task.domains["film"].test
    logits = predict(model, tokenizer, rows, max_length=16)
    labels = torch.tensor(rows["label"])  # type: ignore[index]
    accuracy = (logits.argmax(-1) == labels).double().mean()
    assert float(accuracy) == record.scores["film"]["accuracy"]


def test_the_model_handed_back_is_the_merged_one_bit_for_bit(
    study: Study, task: Task, root: Path, tmp_path: Path
) -> None:
    record = best_by_validation(study.finished(1))
    target = tmp_path / "model"
    result = hand_back(record, root / record.spec.key, task, target)
    assert result.identical
    assert result.texts == 48
    assert result.metric == "accuracy"
    assert result.merged == {d: s["accuracy"] for d, s in record.variants["merged"].scores.items()}
    assert json.loads((target / "config.json").read_text()).get("moduli") is None
    lines: list[str] = []
    assert hand_back(record, root / record.spec.key, task, target, on_event=lines.append) == result
    assert not lines


@pytest.mark.slow
def test_the_proof_fails_for_other_weights(
    study: Study,
    task: Task,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A save that loses one bit of one weight must not pass as identical."""
    real_save = moduli.save

    def lossy(model: torch.nn.Module, *args: object) -> object:
        weight = model.classifier.weight  # type: ignore[attr-defined]
        with torch.no_grad():
            kept = weight[0, 0].clone()
            weight[0, 0] = torch.nextafter(kept, torch.tensor(math.inf))
            report = real_save(model, *args)  # type: ignore[arg-type]
            weight[0, 0] = kept
        return report

    monkeypatch.setattr(moduli, "save", lossy, raising=False)
    record = study.finished(1)[0][1]
    assert not hand_back(record, root / record.spec.key, task, tmp_path / "model").identical
