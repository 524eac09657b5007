"""Every kind of task, end to end: a file is learnt, scored, merged, handed back, used."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

import moduli
from moduli.data import load_task
from moduli.data.kinds import KINDS
from moduli.data.task import DataOptions, Task
from moduli.errors import CheckpointError
from moduli.inspect.record import Inspection
from moduli.methods.dense import Dense
from moduli.study.compare import best_by_validation, compare
from moduli.study.handback import hand_back
from moduli.study.plan import Plan, TaskSpec, arm
from moduli.study.records import INSPECTION, RunRecord, read_record
from moduli.study.report import render_report, summary_dict
from moduli.study.run import execute, training_rows
from moduli.study.tuned import (
    describe_rows,
    evaluate_task,
    load_tuned,
    model_kind,
    read_inputs,
)
from moduli.study.watching import WINDOWS
from moduli.training.kinds.base import get_kind
from moduli.training.settings import FinetuneSettings
from tests.training import tinykinds

SETTINGS = FinetuneSettings(
    max_steps=12, batch_size=8, max_length=16, learning_rate=5e-3, bf16=False
)
EMOE = moduli.EMoE(num_experts=8, top_k=2, split="contiguous")
OPTIONS = {"domain_column": "domain"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of one kind."""

    task: Task
    record: RunRecord
    directory: Path
    data: str


def options_of(kind: str) -> dict[str, Any]:
    """A text column alone does not say that texts are to be learnt; the other kinds are guessed."""
    return OPTIONS | ({"kind": kind} if kind == "language-modeling" else {})


def plan_of(kind: str, root: Path) -> tuple[Plan, Task, str]:
    data = tinykinds.write_rows(kind, root / "data")
    plan = Plan(
        model=str(tinykinds.write_model(kind, root / "base")),
        tasks=(TaskSpec(data, options_of(kind)),),
        sources=(),
        arms=(arm(Dense()), arm(EMOE)),
        seeds=(0, 1),
        settings=SETTINGS,
    )
    return plan, load_task(data, **options_of(kind)), data


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp(request.param)
    plan, task, data = plan_of(request.param, root)
    spec = plan.runs([task])[1].spec
    record = execute(spec, task, root / "run", keep_model=True)
    return Run(task, record, root / "run", data)


def test_selection_is_counted_in_few_windows_however_long_training_is(tmp_path: Path) -> None:
    """A language model's rows are cut into pieces: there are more steps than the rows say."""
    plan, task, _ = plan_of("language-modeling", tmp_path)
    settings = dataclasses.replace(SETTINGS, max_steps=None, epochs=1, batch_size=1, max_length=3)
    spec = dataclasses.replace(plan, settings=settings).runs([task])[1].spec
    record = execute(spec, task, tmp_path / "run")
    selection = Inspection.read(tmp_path / "run" / INSPECTION).selection
    assert selection is not None
    assert record.steps == selection.steps[-1] > len(training_rows(spec, task))
    assert WINDOWS / 2 < len(selection.steps) <= WINDOWS


def test_the_record_has_every_number_of_the_kind(run: Run) -> None:
    kind = get_kind(run.task.kind)
    assert read_record(run.directory).kind == run.record.kind == kind.name
    numbers = {metric.name for metric in kind.metrics} | {"n"}
    for scores in (run.record.scores, run.record.variants["merged"].scores):
        assert set(scores) == set(run.task.domains)
        for found in scores.values():
            assert set(found) == numbers
            assert found["n"] > 0
            assert math.isfinite(found[kind.primary.name])
    assert set(run.record.validation) == set(run.task.domains)
    assert all(set(found) == numbers for found in run.record.validation.values())
    assert run.record.conversion is not None
    assert len(run.record.conversion["layers"]) >= tinykinds.LAYERS
    assert run.record.final_loss < 20


def test_the_kept_model_repeats_its_scores_routed_and_merged(run: Run) -> None:
    kind = get_kind(run.task.kind)
    assert model_kind(str(run.directory)) == kind
    merged = run.record.variants["merged"].scores
    for dense, expected in ((False, run.record.scores), (True, merged)):
        model, processor = load_tuned(str(run.directory), kind, dense=dense)
        assert moduli.is_modular(model) is not dense
        found = evaluate_task(model, processor, run.task, max_length=SETTINGS.max_length)
        shown = {name: json.loads(json.dumps(s.to_dict())) for name, s in found.items()}
        assert json.dumps(shown) == json.dumps(expected)


def test_the_config_alone_says_the_kind(run: Run) -> None:
    """For checkpoints without a record, as `save_pretrained` writes them."""
    (run.directory / "record.json").rename(run.directory / "elsewhere.json")
    try:
        assert model_kind(str(run.directory)) == get_kind(run.task.kind)
    finally:
        (run.directory / "elsewhere.json").rename(run.directory / "record.json")


def test_a_model_of_another_kind_is_refused_by_name(run: Run) -> None:
    writes = run.task.kind in ("seq2seq", "translation")
    other = get_kind("classification" if writes else "seq2seq")
    with pytest.raises(CheckpointError, match=other.noun):
        load_tuned(str(run.directory), other)


def test_predictions_need_no_targets_and_come_one_per_row(run: Run, tmp_path: Path) -> None:
    kind = get_kind(run.task.kind)
    column = kind.columns[0]
    source = Path(run.data.removeprefix("jsonl:"))
    lines = [json.loads(line) for line in source.read_text().splitlines()][:5]
    file = source.with_name("inputs.jsonl")
    file.write_text("".join(json.dumps({column: line[column]}) + "\n" for line in lines))
    rows = read_inputs(f"jsonl:{file}", kind, DataOptions())
    model, processor = load_tuned(str(run.directory), kind)
    found = describe_rows(model, processor, kind, rows, max_length=SETTINGS.max_length)
    json.dumps(found)
    assert len(found) == 5
    for line, one in zip(lines, found, strict=True):
        if not kind.files:
            assert one[column] == line[column]
        if kind.name == "token-classification":
            assert len(one["tags"]) == len(line["tokens"])
            assert set(one["tags"]) <= {"JUDGE", "O"}
        elif "probabilities" in one:
            assert set(one["probabilities"]) == set(run.task.label_names)
        else:
            assert {"value", "loss", "target"} & set(one)


@pytest.mark.parametrize("run", ["token-classification"], indirect=True)
def test_plain_transformers_says_the_same_in_a_new_process(run: Run, tmp_path: Path) -> None:
    prove(run, tmp_path)


@pytest.mark.slow
def test_plain_transformers_says_the_same_for_every_kind(run: Run, tmp_path: Path) -> None:
    prove(run, tmp_path)


def prove(run: Run, target: Path) -> None:
    proof = hand_back(run.record, run.directory, run.task, target / "model")
    assert proof.identical
    primary = get_kind(run.task.kind).primary.name
    merged = run.record.variants["merged"].scores
    assert proof.merged == {d: s[primary] for d, s in merged.items()}
    assert proof.routed == {d: s[primary] for d, s in run.record.scores.items()}
    assert "moduli" not in json.loads((target / "model" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["regression", "language-modeling"])
def test_a_comparison_of_losses_says_that_lower_is_better(kind: str, tmp_path: Path) -> None:
    plan, task, _ = plan_of(kind, tmp_path)
    study = compare(plan, [task], tmp_path / "study")
    assert not study.failures
    primary = get_kind(kind).primary
    assert not primary.higher_is_better
    finished = study.finished(1)
    best = best_by_validation(finished)
    domain = best.spec.trained_on
    values = [record.validation[domain][primary.name] for _, record in finished]
    assert best.validation[domain][primary.name] == min(values)
    summary = summary_dict(study)
    assert summary["tables"][0]["metric"] == primary.name
    assert "points" not in " ".join(summary["headline"])
    html = render_report(study, inspections={}, command=["moduli", "compare"])
    assert "lower is better" in html
    assert f">{primary.title.capitalize()}</h2>" in html
