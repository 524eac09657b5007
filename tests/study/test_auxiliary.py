"""A run trains with the auxiliary loss of its method."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import moduli
from moduli.data.task import Task
from moduli.study.compare import compare
from moduli.study.plan import arm
from tests.study.conftest import SETTINGS, make_plan


def test_the_auxiliary_loss_is_part_of_what_a_run_minimises(
    minilm_path: Path, task: Task, tmp_path: Path
) -> None:
    weight, layers = 100.0, 2
    method = moduli.EMoE(num_experts=16, top_k=8, split="contiguous", gate="linear")
    plan = make_plan(
        minilm_path,
        arms=tuple(
            arm(dataclasses.replace(method, aux=aux, aux_weight=weight))
            for aux in ("none", "switch")
        ),
        seeds=(0,),
        settings=dataclasses.replace(SETTINGS, max_steps=2, learning_rate=1e-8),
    )
    study = compare(plan, [task], tmp_path)
    assert not study.failures
    plain, balanced = (record.final_loss for record in study.records.values())
    # A layer's switch loss is about 1 where experts are used evenly, and never 0.
    assert balanced - plain > 0.5 * weight * layers
