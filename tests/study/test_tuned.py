"""A model directory is scored by the names of its classes, on the rows that were asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moduli.data.task import DataOptions, Splits, Task
from moduli.errors import CheckpointError, ConfigError, DataError
from moduli.study.compare import Study
from moduli.study.tuned import (
    evaluate_task,
    given_inputs,
    load_tuned,
    model_kind,
    read_inputs,
    trained_length,
)
from moduli.training.kinds.base import get_kind

CLASSES = get_kind("classification")


def test_classes_are_matched_by_name_and_not_by_number(
    study: Study, task: Task, root: Path
) -> None:
    record = study.finished(1)[0][1]
    model, tokenizer = load_tuned(str(root / record.spec.key), CLASSES)
    length = trained_length(str(root / record.spec.key))
    assert length == 16
    given = evaluate_task(model, tokenizer, task, max_length=length)
    assert {name: s.to_dict() for name, s in given.items()} == record.scores

    def renumber(splits: Splits) -> Splits:
        flip = [
            part.map(lambda row: {"label": 1 - row["label"]})  # type: ignore[union-attr]
            for part in (splits.train, splits.validation, splits.test)
        ]
        return Splits(*flip)

    other = dataclasses.replace(
        task,
        label_names=("good", "bad"),
        domains={name: renumber(splits) for name, splits in task.domains.items()},
    )
    assert evaluate_task(model, tokenizer, other, max_length=length) == given
    with pytest.raises(DataError, match="'fine'"):
        evaluate_task(
            model, tokenizer, dataclasses.replace(task, label_names=("bad", "fine")), max_length=16
        )


def test_splits_are_those_that_were_asked_for(study: Study, task: Task, root: Path) -> None:
    model, tokenizer = load_tuned(str(root / study.finished(1)[0][1].spec.key), CLASSES, dense=True)
    every = evaluate_task(model, tokenizer, task, split="all", max_length=16)
    assert {score.n for score in every.values()} == {48}
    with pytest.raises(ConfigError, match="'tests'"):
        evaluate_task(model, tokenizer, task, split="tests", max_length=16)


def test_texts_without_labels_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text('body,other\n"one, two",x\nthree,y\n')
    body = DataOptions(text_column="body")
    rows = read_inputs(f"csv:{file}", CLASSES, body)
    assert rows == [{"text": "one, two"}, {"text": "three"}]
    with pytest.raises(DataError, match="'body'"):
        read_inputs(f"csv:{file}", CLASSES, DataOptions(text_column="bodi"))
    file.write_text("body,other\none,x\n,y\n")
    with pytest.raises(DataError, match=r"1 of 2 rows with no text \(column 'body'\): row 2"):
        read_inputs(f"csv:{file}", CLASSES, body)
    with pytest.raises(DataError, match="csv:PATH"):
        read_inputs(str(file), CLASSES, body)


def test_a_model_says_what_it_is_for(study: Study, root: Path, minilm_path: Path) -> None:
    tuned = root / study.finished(1)[0][1].spec.key
    assert model_kind(str(tuned)) == CLASSES
    assert model_kind(str(minilm_path)) is None
    with pytest.raises(CheckpointError, match="for classification, not a regression model"):
        load_tuned(str(tuned), get_kind("regression"))
    with pytest.raises(ConfigError, match="texts, with --text"):
        given_inputs(("cat.png",), CLASSES, files=True)
