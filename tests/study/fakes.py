"""Studies of made numbers: real plans and records, but scores that were never run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import moduli
from moduli.study.compare import Study
from moduli.study.plan import Arm, Plan, Planned, TaskSpec, Unit, arm
from moduli.study.records import RunRecord, Variant
from moduli.study.spec import RunSpec
from moduli.training.settings import FinetuneSettings

DOMAINS = ("shop", "film", "food")
SETTINGS = FinetuneSettings(max_steps=6, batch_size=16, max_length=16, bf16=False)
Score = Callable[[Planned, str], float]
"""From a run and a domain to its accuracy."""


def emoe(**changes: Any) -> Any:
    """EMoE with 16 experts, changed."""
    return moduli.EMoE(**({"num_experts": 16, "top_k": 4, "split": "contiguous"} | changes))


def two_arms() -> tuple[Arm, ...]:
    """Dense against EMoE."""
    return arm(moduli.Dense()), arm(emoe())


def made_study(
    arms: Sequence[Arm] | None = None,
    *,
    sources: Sequence[tuple[str, ...]] = (("shop",),),
    seeds: Sequence[int] = (0, 1, 2),
    rates: Sequence[float] = (),
    fractions: Sequence[float] = (1.0,),
    domains: Sequence[str] = DOMAINS,
    score: Score | None = None,
    validated: bool = True,
    cost: bool = True,
    data: Mapping[str, Any] | None = None,
    tasks: Sequence[str] = ("made",),
) -> Study:
    """A finished study.

    Args:
        arms: what is compared; None: dense and EMoE.
        sources: groups of domains to train on.
        seeds: of the runs.
        rates: learning rates that are tried for every arm.
        fractions: of the training rows.
        domains: that are tested.
        score: accuracy of a run on a domain; None: arms a little apart, with noise.
        validated: whether domains have a validation split.
        cost: whether runs were measured.
        data: options of the tasks.
        tasks: their names; all have the same domains.
    """
    plan = Plan(
        model="made-model",
        tasks=tuple(TaskSpec(name, dict(data or {})) for name in tasks),
        sources=tuple(sources),
        arms=tuple(arms if arms is not None else two_arms()),
        seeds=tuple(seeds),
        settings=SETTINGS,
        learning_rates=tuple(rates),
        fractions=tuple(fractions),
    )
    runs = [
        Planned(_spec(plan, number, unit, rate, seed), number, unit)
        for seed in plan.seeds
        for unit in (
            Unit(task, group, fraction)
            for fraction in plan.fractions
            for task in range(len(plan.tasks))
            for group in sources
        )
        for number, one in enumerate(plan.arms)
        for rate in plan.rates(one)
    ]
    scores = score or _plausible
    records = {run.spec.key: _record(plan, run, domains, scores, validated, cost) for run in runs}
    return Study(plan, tuple(runs), records, ())


def _spec(plan: Plan, number: int, unit: Unit, rate: float, seed: int) -> RunSpec:
    one = plan.arms[number]
    return RunSpec(
        model=plan.model,
        model_hash="0" * 64,
        task=plan.tasks[unit.task].name,
        data=dict(plan.tasks[unit.task].data),
        data_hash="1" * 64,
        train_domains=unit.sources,
        fraction=unit.fraction,
        method=one.method,
        settings=plan.settings_of(one, rate),
        seed=seed,
        edits=one.edits,
    )


def _plausible(run: Planned, domain: str) -> float:
    """0.8 and a point more per arm, less out of domain, with noise of a point per run."""
    noise = random.Random(f"{run.spec.key} {domain}").gauss(0, 0.01)
    shared = random.Random(f"{run.spec.seed} {run.unit} {domain}").gauss(0, 0.02)
    away = 0 if domain in run.unit.sources else 0.1
    return 0.8 + 0.01 * run.arm - away + shared + noise - 0.05 * (1 - run.unit.fraction)


def _record(
    plan: Plan,
    run: Planned,
    domains: Sequence[str],
    score: Score,
    validated: bool,
    cost: bool,
) -> RunRecord:
    scores = {domain: _numbers(score(run, domain)) for domain in domains}
    one = plan.arms[run.arm]
    variants = {
        edit.label: Variant(
            {d: _numbers(s["accuracy"] - 0.001) for d, s in scores.items()},
            dict.fromkeys(scores, 2),
            {"merged": {"exact": True}, "pruned": {"dropped": 0.25}}.get(edit.name, {}),
        )
        for edit in run.spec.edits
    }
    modular = one.method.build().modular
    layer = {
        "name": "layers.5",
        "neurons": 64,
        "sizes": [4, 4],
        "quality": {"share": 0.2} if run.arm % 2 else None,
        "error": 0.1,
        "cost": 0.5,
        "path": "masked",
    }
    conversion = {
        "layers": [layer],
        "total_ffns": 6,
        "num_experts": 16,
        "top_k": 4,
        "added_parameters": 0,
        "seconds": 0.1,
    }
    return RunRecord(
        spec=run.spec,
        kind="classification",
        scores=scores,
        validation={d: _numbers(s["accuracy"]) for d, s in scores.items()} if validated else {},
        variants=variants,
        conversion=conversion if modular else None,
        cost={
            "parameters": 22_000_000,
            "trainable_parameters": 22_000_000,
            "active_parameters": 21_000_000 if modular else 22_000_000,
            "flops_per_token": 40.0e6 if modular else 42.0e6,
            "peak_memory_bytes": 512 * 2**20,
        }
        if cost
        else {},
        steps=6,
        final_loss=0.5,
        seconds={"train": 2.0, "evaluate": 1.0},
        cpu_seconds={"train": 2.0 + 0.5 * run.arm + 0.1 * run.spec.seed} if cost else {},
        environment={
            "versions": {"moduli": "0"},
            "hardware": {"device": "cpu", "threads": 1},
        },
    )


def _numbers(accuracy: float) -> dict[str, int | float]:
    return {
        "n": 100,
        "accuracy": accuracy,
        "balanced_accuracy": accuracy - 0.01,
        "macro_f1": accuracy - 0.02,
        "loss": 1 - accuracy,
    }
