"""A run's name is the hash of everything that can change its result, and of nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

import moduli
from moduli.data.task import Splits, Task
from moduli.errors import ConfigError, DataError, UnknownNameError
from moduli.methods.dense import Dense
from moduli.study.compare import best_by_validation
from moduli.study.plan import Arm, Plan, TaskSpec, Unit, also_tested, arm, arm_labels
from moduli.study.spec import Edit, MethodSpec, RunSpec, hash_model, hash_task
from moduli.training.settings import FinetuneSettings
from tests.study.conftest import make_plan, make_task


def test_a_spec_survives_json_and_keeps_its_name(plan: Plan, task: Task) -> None:
    for run in plan.runs([task]):
        spec = run.spec
        again = RunSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec
        assert again.key == spec.key


def test_every_field_is_part_of_the_name(plan: Plan, task: Task) -> None:
    spec = plan.runs([task])[0].spec
    changed = {
        "model": "other",
        "model_hash": "0",
        "task": "other",
        "data": {"seed": 1},
        "data_hash": "0",
        "train_domains": ("film",),
        "fraction": 0.5,
        "method": MethodSpec("dense", {"x": 1}),
        "settings": dataclasses.replace(spec.settings, learning_rate=2e-4),
        "seed": 9,
        "edits": (Edit("pruned"),),
        "code": "0",
    }
    assert changed.keys() == {f.name for f in dataclasses.fields(RunSpec)}
    keys = {dataclasses.replace(spec, **{k: v}).key for k, v in changed.items()}
    assert len(keys | {spec.key}) == len(changed) + 1


def test_a_setting_that_came_later_renames_no_run_that_does_without(plan: Plan, task: Task) -> None:
    spec = plan.runs([task])[0].spec
    old, usual = spec.to_dict(), FinetuneSettings()
    later = [f.name for f in dataclasses.fields(usual) if f.metadata.get("later")]
    assert later
    assert not set(later) & set(old["settings"])
    other = dataclasses.replace(usual, label_smoothing=0.1)
    changed = dataclasses.replace(spec, settings=other)
    assert changed.key != dataclasses.replace(spec, settings=usual).key
    assert RunSpec.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


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
    order = [(run.spec.seed, run.spec.method.name) for run in plan.runs([task])]
    assert order == [(0, "dense"), (0, "emoe"), (1, "dense"), (1, "emoe")]


def test_rates_sources_and_fractions_are_crossed(minilm_path: Path, task: Task) -> None:
    """Every arm with its own rates, on every unit, in the order: seeds, units, arms, rates."""
    arms = (arm(Dense()), arm(Dense(), trains="lora", learning_rate=(1e-3, 2e-3)))
    plan = make_plan(minilm_path, arms=arms, sources="each", seeds=(3, 1), fractions=(1.0, 0.5))
    runs = plan.runs([task])
    assert len({run.spec.key for run in runs}) == len(runs) == 2 * 3 * 2 * (1 + 2)
    assert [run.spec.seed for run in runs] == [3] * 18 + [1] * 18
    assert plan.units([task])[:4] == [
        *(Unit(0, (name,), 1.0) for name in ("shop", "film", "food")),
        Unit(0, ("shop",), 0.5),
    ]
    rates = [run.spec.settings.learning_rate for run in runs[:3]]
    assert rates == [plan.settings.learning_rate, 1e-3, 2e-3]
    assert [run.spec.settings.trains for run in runs[:3]] == ["all", "lora", "lora"]
    both = make_plan(minilm_path, sources="leave-one-out")
    assert [u.sources for u in both.units([task])] == [
        ("shop", "film"),
        ("shop", "food"),
        ("film", "food"),
    ]


def test_arms_are_told_apart_by_what_differs() -> None:
    arms = [Arm(MethodSpec("emoe", {"k": k, "layers": "all"})) for k in (1, 2)]
    head, lora, last = (arm(Dense(), trains=how) for how in ("head", "lora", "last:2"))
    named = Arm(MethodSpec("emoe", {"k": 3}), label="mine")
    both = Arm(MethodSpec("gmoe", {}), overrides={"trains": "lora"})
    assert arm_labels([arm(Dense()), *arms, head, lora, last, named, both]) == [
        "dense",
        "emoe (k=1)",
        "emoe (k=2)",
        "frozen probe",
        "LoRA",
        "last 2 blocks",
        "mine",
        "LoRA + gmoe",
    ]


def test_what_the_settings_say_is_part_of_the_name() -> None:
    """With `--trains lora` for all, nobody is called dense who trains factors."""
    arms = (arm(Dense()), arm(moduli.EMoE(num_experts=16)), arm(Dense(), trains="all"))
    assert arm_labels(arms, "lora") == ["LoRA", "LoRA + emoe", "dense"]
    cross = also_tested(arms, pruned=False, cross=True, usual="lora")
    assert [[edit.name for edit in one.edits] for one in cross] == [["split"], ["merged"], []]


def test_edits_go_to_the_arms_that_they_fit() -> None:
    emoe, gmoe = moduli.EMoE(num_experts=16), moduli.GMoE(num_experts=2)
    arms = (arm(Dense()), arm(emoe), arm(gmoe), arm(Dense(), trains="lora"))
    edits = [one.edits for one in also_tested(arms, pruned=True, cross=True)]
    assert edits == [
        (Edit("split", MethodSpec.of(emoe)),),
        (Edit("merged"), Edit("pruned")),
        (Edit("merged"),),
        (),
    ]
    assert [edit.label for edit in (*edits[0], *edits[1])] == ["split by emoe", "merged", "pruned"]


DENSE = MethodSpec("dense", {})
EMOE = MethodSpec.of(moduli.EMoE(num_experts=16))
WIDE = MethodSpec.of(moduli.EMoE(num_experts=8))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"sources": (("shopp",),)}, UnknownNameError, "'shop'"),
        ({"sources": (("shop",), ("shop",))}, ConfigError, "shop are given twice"),
        ({"sources": ((),)}, ConfigError, "name each once"),
        ({"sources": "all"}, ConfigError, "leave-one-out"),
        ({"seeds": ()}, ConfigError, "at least one"),
        ({"seeds": (1, 1)}, ConfigError, "seed 1 is given twice"),
        ({"seeds": (0, 0)}, ConfigError, "seed 0 is given twice"),
        ({"fractions": (0.0,)}, ConfigError, "fraction is 0"),
        ({"arms": (Arm(DENSE),) * 2}, ConfigError, "dense is given twice"),
        ({"arms": (Arm(DENSE, label="a"), Arm(EMOE, label="a"))}, ConfigError, "called 'a'"),
        ({"arms": (Arm(MethodSpec("emo", {})),)}, UnknownNameError, "'emoe'"),
        ({"arms": (Arm(MethodSpec("emoe", {"topk": 1})),)}, ConfigError, "'top_k'"),
        ({"arms": (arm(Dense(), epoch=3),)}, UnknownNameError, "'epochs'"),
        ({"arms": (Arm(DENSE, overrides={"learning_rate": 1e-3}),)}, ConfigError, "learning_rates"),
        ({"fractions": (1.5,)}, ConfigError, "at most 1"),
        (
            {"arms": (Arm(DENSE, edits=(Edit("split", EMOE), Edit("split", WIDE))),)},
            ConfigError,
            "split by emoe in two ways",
        ),
        ({"arms": (Arm(DENSE, edits=(Edit("merged"),)),)}, ConfigError, "with experts"),
        ({"arms": (Arm(EMOE, edits=(Edit("split", EMOE),)),)}, ConfigError, "without experts"),
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
        make_plan(minilm_path, **changes).runs([task])


def test_edits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a method"):
        Edit("split")


def test_tasks_of_two_kinds_are_not_averaged(minilm_path: Path, task: Task) -> None:
    other = dataclasses.replace(task, kind="regression")
    plan = make_plan(minilm_path, tasks=(TaskSpec("made"), TaskSpec("other")))
    with pytest.raises(ConfigError, match="different kinds"):
        plan.runs([task, other])


def test_a_domain_without_training_data_cannot_be_trained_on(minilm_path: Path, task: Task) -> None:
    shop = task.domains["shop"]
    only_test = dataclasses.replace(
        task, domains=task.domains | {"shop": Splits(None, None, shop.test)}
    )
    with pytest.raises(DataError, match="test data only"):
        make_plan(minilm_path).runs([only_test])
    first = make_plan(minilm_path, sources=()).runs([only_test])[0].spec
    assert first.train_domains == ("film",)
    assert first.trained_on == "film"


def test_nothing_is_chosen_from_no_runs() -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        best_by_validation([])
