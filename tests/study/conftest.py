"""A small study on the real encoder: two methods, two seeds, three domains of made sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

import moduli
from moduli.data.task import Splits, Task
from moduli.methods.dense import Dense
from moduli.study.compare import Study, compare
from moduli.study.plan import Plan, TaskSpec, arm
from moduli.training.settings import FinetuneSettings

GOOD = ("excellent", "great", "lovely", "superb", "reliable", "delightful")
BAD = ("terrible", "awful", "useless", "broken", "dreadful", "boring")
THINGS = {
    "shop": ("camera", "phone", "speaker", "battery"),
    "film": ("story", "plot", "actor", "scene"),
    "food": ("soup", "waiter", "dessert", "menu"),
}
SETTINGS = FinetuneSettings(max_steps=6, batch_size=16, max_length=16, bf16=False)


def make_task() -> Task:
    """48 sentences per domain, in three splits."""
    domains = {}
    for domain, things in THINGS.items():
        rows = [
            {"text": f"The {thing} was {word}" + ", truly" * (i % 3), "label": label}
            for i, thing in enumerate(things)
            for pair in zip(BAD, GOOD, strict=True)
            for label, word in enumerate(pair)
        ]
        domains[domain] = Splits(*(Dataset.from_list(rows[a::3]) for a in range(3)))
    return Task("made", "classification", ("bad", "good"), domains)


def make_plan(model: Path, **changes: object) -> Plan:
    """Dense against EMoE with two seeds."""
    emoe = moduli.EMoE(num_experts=16, top_k=8, split="contiguous")
    given = {
        "model": str(model),
        "tasks": (TaskSpec("made"),),
        "sources": (("shop",),),
        "arms": (arm(Dense()), arm(emoe)),
        "seeds": (0, 1),
        "settings": SETTINGS,
    }
    return Plan(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def task() -> Task:
    return make_task()


@pytest.fixture(scope="session")
def plan(minilm_path: Path) -> Plan:
    return make_plan(minilm_path)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="session")
def study(plan: Plan, task: Task, root: Path) -> Study:
    """Four finished runs under `root`."""
    return compare(plan, [task], root, keep_models=("emoe",))
