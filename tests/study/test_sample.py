"""What a conversion is given: the same first batch for every method, all of it where it is used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moduli
from moduli.data import load_task
from moduli.data.kinds import KINDS
from moduli.data.task import Task
from moduli.errors import CheckpointError, DataError, UnknownNameError
from moduli.methods.base import Method
from moduli.methods.dense import Dense
from moduli.study import sample
from moduli.study.plan import Plan, TaskSpec, arm
from moduli.study.run import execute
from moduli.study.sample import rows_to_show, sample_batches, task_batches
from moduli.study.tuned import load_any
from moduli.training.kinds.base import get_kind
from moduli.training.settings import FinetuneSettings
from tests.training import tinykinds

IMPORTANCE = moduli.LlamaMoE(num_experts=4, top_k=2, split="importance", layers="all")
LOOKING = (IMPORTANCE, moduli.MoEfication(num_experts=4, top_k=2, select="mlp", layers="all"))
NOT_LOOKING = (Dense(), moduli.GMoE(num_experts=4))


def task_of(kind: str, root: Path) -> Task:
    options = {"kind": kind} if kind == "language-modeling" else {}
    return load_task(tinykinds.write_rows(kind, root), domain_column="domain", **options)


def with_head(kind: str, task: Task, path: Path) -> tuple[Any, Any]:
    own = get_kind(kind)
    loader: Any = getattr(transformers, own.auto_class)
    model = loader.from_pretrained(
        tinykinds.write_model(kind, path), **own.head(task.label_names)
    ).eval()
    return model, own.load_processor(str(path))


def given(method: Method, model: Any, processor: Any, kind: str, rows: Any) -> list[dict[str, Any]]:
    return sample_batches(
        method,
        model,
        processor,
        get_kind(kind),
        rows,
        count=rows_to_show(method),
        max_length=16,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_look_at_data_are_shown_labels_and_the_others_are_not(
    kind: str, tmp_path: Path
) -> None:
    task = task_of(kind, tmp_path / "data")
    model, processor = with_head(kind, task, tmp_path / "model")
    rows = next(iter(task.domains.values())).train
    (plain,) = given(NOT_LOOKING[1], model, processor, kind, rows)
    assert "labels" not in plain
    for method in LOOKING:
        batches = given(method, model, processor, kind, rows)
        assert batches[0].keys() - plain.keys() == {"labels"}
        assert all(torch.equal(batches[0][name], plain[name]) for name in plain)
        assert all(torch.isfinite(model(**batch).loss) for batch in batches)


def test_there_are_rows_for_every_expert_and_they_come_in_order(tmp_path: Path) -> None:
    task = task_of("classification", tmp_path / "data")
    model, processor = with_head("classification", task, tmp_path / "model")
    rows = [
        {"text": f"the camera {'truly ' * (i % 3)}was great", "label": i % 2} for i in range(200)
    ]
    for experts in (2, 3, 16, 40):
        method = dataclasses.replace(IMPORTANCE, num_experts=experts)
        batches = given(method, model, processor, "classification", rows)
        count = min(200, max(sample.BATCH_ROWS, sample.ROWS_PER_EXPERT * experts))
        labels = torch.cat([batch["labels"] for batch in batches])
        assert labels.tolist() == [i % 2 for i in range(count)]
        assert all(len(batch["labels"]) <= sample.BATCH_ROWS for batch in batches)


@pytest.mark.parametrize("count", [65, 128, 190])
def test_batches_of_texts_are_never_taken_for_groups(count: int, tmp_path: Path) -> None:
    task = task_of("classification", tmp_path / "data")
    model, processor = with_head("classification", task, tmp_path / "model")
    rows = [{"text": "the camera was great", "label": 1}] * count
    for experts in (2, 3):
        batches = sample_batches(
            dataclasses.replace(IMPORTANCE, num_experts=experts),
            model,
            processor,
            get_kind("classification"),
            rows,
            count=count,
            max_length=16,
        )
        sizes = [len(batch["labels"]) for batch in batches]
        assert sum(sizes) == count
        assert len(sizes) != experts
        assert sizes[0] == sample.BATCH_ROWS or set(sizes[2:]) == {1}


@pytest.mark.parametrize("method", LOOKING, ids=lambda method: method.name)
@pytest.mark.parametrize("kind", ["classification", "language-modeling", "seq2seq"])
def test_a_run_trains_what_data_made(kind: str, method: Method, tmp_path: Path) -> None:
    task = task_of(kind, tmp_path / "data")
    plan = Plan(
        model=str(tinykinds.write_model(kind, tmp_path / "base")),
        tasks=(TaskSpec(kind),),
        sources=(),
        arms=(arm(method),),
        seeds=(0,),
        settings=FinetuneSettings(max_steps=2, batch_size=8, max_length=16, bf16=False),
    )
    (run,) = plan.runs([task])
    record = execute(run.spec, task, tmp_path / "run")
    assert record.conversion is not None
    assert record.conversion["probe"] == "the given inputs"
    assert record.steps == 2


def shown(model: str, task: Task, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    notes: list[str] = []
    loaded = load_any(model)[0]
    options = {"domain": None, "count": 8, **options}
    return task_batches(IMPORTANCE, loaded, model, task, on_event=notes.append, **options), notes


def test_labels_are_numbered_as_the_model_does_or_left_out(tmp_path: Path) -> None:
    task = task_of("classification", tmp_path / "data")
    model, _ = with_head("classification", task, tmp_path / "tuned")
    path = str(tmp_path / "tuned")
    model.save_pretrained(path)
    ((straight,), notes) = shown(path, task)
    assert notes == []
    flipped = dataclasses.replace(task, label_names=task.label_names[::-1])
    ((turned,), notes) = shown(path, flipped)
    assert notes == []
    assert torch.equal(turned["labels"], 1 - straight["labels"])
    strange = dataclasses.replace(task, label_names=("bad", "fine"))
    ((unlabelled,), notes) = shown(path, strange)
    assert "labels" not in unlabelled
    assert "'fine'" in notes[0]
    assert torch.equal(unlabelled["input_ids"], straight["input_ids"])


@pytest.mark.parametrize("kind", ["classification", "token-classification", "language-modeling"])
def test_a_model_without_a_head_gets_inputs_alone(kind: str, tmp_path: Path) -> None:
    path = str(tinykinds.write_model("classification", tmp_path / "base"))
    batches, notes = shown(path, task_of(kind, tmp_path / "data"))
    assert {*batches[0]} == {"input_ids", "attention_mask"}
    assert f"no head for {kind}" in notes[0]


def test_a_language_model_learns_from_the_texts_of_any_task(tmp_path: Path) -> None:
    path = str(tinykinds.write_model("language-modeling", tmp_path / "base"))
    batches, notes = shown(path, task_of("classification", tmp_path / "data"))
    assert batches[0]["labels"].shape == batches[0]["input_ids"].shape
    assert notes == []


def test_what_cannot_be_given_is_said(tmp_path: Path) -> None:
    task = task_of("classification", tmp_path / "data")
    with pytest.raises(DataError, match="looks at 'source'; the data has 'text'"):
        shown(str(tinykinds.write_model("seq2seq", tmp_path / "bart")), task)
    path = tinykinds.write_model("classification", tmp_path / "bert")
    with pytest.raises(UnknownNameError, match="'shop'"):
        shown(str(path), task, domain="shops")
    path = tinykinds.write_model("image-classification", tmp_path / "vit")
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer or processor"):
        shown(str(path), task_of("image-classification", tmp_path / "images"))
