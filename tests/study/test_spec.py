"""A run's name is the hash of everything that can change its result, and of nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

from moduli.data.task import Splits, Task
from moduli.errors import ConfigError, DataError, UnknownNameError
from moduli.study.compare import best_by_validation, check
from moduli.study.spec import MethodSpec, Plan, RunSpec, hash_model, hash_task, method_labels
from tests.study.conftest import make_plan, make_task


def test_a_spec_survives_json_and_keeps_its_name(plan: Plan, task: Task) -> None:
    for spec in plan.specs(task):
        again = RunSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec
        assert again.key == spec.key


def test_every_field_is_part_of_the_name(plan: Plan, task: Task) -> None:
    spec = plan.specs(task)[0]
    changed = {
        "model": "other",
        "model_hash": "0",
        "task": "other",
        "data": {"seed": 1},
        "data_hash": "0",
        "train_domain": "film",
        "method": MethodSpec("dense", {"x": 1}),
        "settings": dataclasses.replace(spec.settings, learning_rate=2e-4),
        "seed": 9,
        "code": "0",
    }
    assert changed.keys() == {f.name for f in dataclasses.fields(RunSpec)}
    keys = {dataclasses.replace(spec, **{k: v}).key for k, v in changed.items()}
    assert len(keys | {spec.key}) == len(changed) + 1


def test_other_weights_under_an_old_name_are_another_model(
    minilm_path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(minilm_path, copy)
    assert hash_model(str(copy)) == hash_model(str(minilm_path))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert hash_model(str(copy)) != hash_model(str(minilm_path))


def test_one_changed_label_is_other_data(task: Task) -> None:
    assert hash_task(make_task()) == hash_task(task)
    rows = task.domains["food"].test.to_list()  # type: ignore[union-attr]
    rows[0]["label"] = 1 - rows[0]["label"]
    food = task.domains["food"]
    domains = task.domains | {"food": Splits(food.train, food.validation, Dataset.from_list(rows))}
    assert hash_task(dataclasses.replace(task, domains=domains)) != hash_task(task)


def test_runs_of_one_seed_come_together(plan: Plan, task: Task) -> None:
    order = [(spec.seed, spec.method.name) for spec in plan.specs(task)]
    assert order == [(0, "dense"), (0, "emoe"), (1, "dense"), (1, "emoe")]


def test_two_settings_of_one_method_are_told_apart_by_what_differs() -> None:
    methods = [MethodSpec("emoe", {"k": k, "layers": "all"}) for k in (1, 2)]
    assert method_labels([MethodSpec("dense", {}), *methods]) == [
        "dense",
        "emoe (k=1)",
        "emoe (k=2)",
    ]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"train_domain": "shopp"}, UnknownNameError, "'shop'"),
        ({"seeds": ()}, ConfigError, "at least one"),
        ({"seeds": (1, 1)}, ConfigError, "seed 1 is given twice"),
        ({"methods": (MethodSpec("dense", {}),) * 2}, ConfigError, "dense is given twice"),
        ({"methods": (MethodSpec("emo", {}),)}, UnknownNameError, "'emoe'"),
        ({"methods": (MethodSpec("emoe", {"topk": 1}),)}, ConfigError, "'top_k'"),
    ],
)
def test_plans_that_cannot_work_are_refused_before_anything_runs(
    changes: dict[str, object],
    error: type[Exception],
    match: str,
    minilm_path: Path,
    task: Task,
) -> None:
    with pytest.raises(error, match=match):
        check(make_plan(minilm_path, **changes), task)


def test_a_domain_without_training_data_cannot_be_trained_on(minilm_path: Path, task: Task) -> None:
    shop = task.domains["shop"]
    only_test = dataclasses.replace(
        task, domains=task.domains | {"shop": Splits(None, None, shop.test)}
    )
    with pytest.raises(DataError, match="test data only"):
        check(make_plan(minilm_path), only_test)
    assert check(make_plan(minilm_path, train_domain=None), only_test)[0].train_domain == "film"


def test_nothing_is_chosen_from_no_runs() -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        best_by_validation({})
