"""What is compared of THOR, on real translations, and how long everything is trained.

headline    dense and THOR, three seeds, Debian's descriptions in four languages
arms        the same with R-Drop, THOR without its consistency loss, and Switch, one seed
wesnoth     dense and THOR on dialogues, tested on a campaign that is held out, one seed

Arms are compared at equal numbers of target tokens through the model, and at equal processor time
of training. THOR and R-Drop pass over each batch twice, so that at equal tokens they make half as
many updates, on half as many batches. `calibrate.py` has measured what a step costs; where both
budgets come to the same number of steps, in twentieths of those of the dense model, one run serves
both. The dense model is also trained for as many updates as THOR makes, which is half as much of
everything.

All arms of a seed start from one translator with random weights, of whose feed-forward layers
experts are copies, and see the same batches in one order.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import moduli
from moduli.methods.dense import Dense
from moduli.study.plan import Arm, Plan, TaskSpec
from moduli.study.plan import arm as arm_of
from moduli.training.translator import SETTINGS

CALIBRATION = Path(__file__).parents[1] / "results" / "thor" / "calibration.json"
STEPS = 2800
"""Of the dense model on Debian's descriptions."""
WESNOTH_STEPS = 1400
"""Likewise on Wesnoth, whose texts are longer."""
GRID = 20
MODEL = "translator:tiny"
TRAINING = dataclasses.replace(SETTINGS, bf16=False)
"""In float32, which is faster here than bfloat16 for a model of this width, and the same on every
machine."""
DENSE, THOR = "dense", "THOR, α 5"
METHODS: dict[str, Any] = {
    DENSE: Dense(),
    "R-Drop, α 5": moduli.THOR(num_experts=1, alpha=5.0),
    "THOR, α 0": moduli.THOR(num_experts=2, alpha=0.0),
    THOR: moduli.THOR(num_experts=2, alpha=5.0),
    "Switch": moduli.Switch(num_experts=2, layers="even"),
}
"""By label. Experts are in the same layers; Switch is that of its paper otherwise."""

Costs = Mapping[str, float]
"""Processor time of a training step over that of the dense model, by label."""


def costs() -> Costs:
    """What `calibrate.py` has measured.

    Raises:
        SystemExit: it has not.
    """
    return {label: float(cost) for label, cost in _calibration()["cost"].items()}


def seconds_per_step(label: str) -> float:
    """Processor time of a training step of an arm, likewise."""
    return statistics.median(_calibration()["cpu_seconds_per_step"][label.partition(";")[0]])


def _calibration() -> dict[str, Any]:
    if not CALIBRATION.is_file():
        raise SystemExit("no step has been timed yet; run python -m benchmarks.thor.calibrate")
    found: dict[str, Any] = json.loads(CALIBRATION.read_text(encoding="utf-8"))
    return found


def passes(label: str) -> int:
    """How often a step of this method passes over its batch."""
    return int(getattr(METHODS[label], "passes", 1))


def arms(labels: tuple[str, ...], steps: int, costs: Costs) -> tuple[Arm, ...]:
    """An arm for every method and budget; one for both budgets where they are as many steps.

    Args:
        labels: of `METHODS`; dense has one budget, that of the others.
        steps: of dense; a multiple of `GRID`.
        costs: of a step.
    """
    found = []
    for label in labels:
        tokens = steps // passes(label)
        time = round(GRID / costs[label]) * (steps // GRID)
        if label == DENSE:
            found.append(arm(label, label, steps))
        elif tokens == time:
            found.append(arm(label, f"{label}; equal tokens and time", tokens))
        else:
            found.append(arm(label, f"{label}; equal tokens", tokens))
            found.append(arm(label, f"{label}; equal time", time))
    return tuple(found)


def arm(method: str, label: str, steps: int) -> Arm:
    """One method, trained for so many steps, and tested as it is."""
    made = arm_of(METHODS[method], label=label, max_steps=steps)
    return dataclasses.replace(made, edits=())


def plan(task: str, arms: tuple[Arm, ...], seeds: tuple[int, ...], **settings: Any) -> Plan:
    """A study of these arms on all languages of a task together."""
    return Plan(
        model=MODEL,
        tasks=(TaskSpec(task),),
        sources=(),
        arms=arms,
        seeds=seeds,
        settings=dataclasses.replace(TRAINING, **settings),
    )


def headline() -> Plan:
    """Dense and THOR on three seeds."""
    first, *others = arms((DENSE, THOR), STEPS, costs())
    half = arm(DENSE, "dense; as many updates as THOR", STEPS // passes(THOR))
    return plan("debian-descriptions", (first, half, *others), (0, 1, 2))


def all_arms() -> Plan:
    """Five methods on the first of these seeds."""
    return plan("debian-descriptions", arms(tuple(METHODS), STEPS, costs()), (0,))


def wesnoth() -> Plan:
    """Dense and THOR on other text."""
    return plan("wesnoth", arms((DENSE, THOR), WESNOTH_STEPS, costs()), (0,))


PLANS: dict[str, Callable[[], Plan]] = {
    "headline": headline,
    "arms": all_arms,
    "wesnoth": wesnoth,
}
