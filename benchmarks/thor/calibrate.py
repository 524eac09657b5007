"""Measure what a training step of each method costs, for the budgets of equal time in `plans.py`.

    python -m benchmarks.thor.calibrate

Every method is trained for a few steps by the loop that trains it in the study, on the same batches
of Debian's descriptions, in turns; the first steps of a turn, which pay for things that happen
once, are left out. A cost is the median over turns of processor time relative to that of the dense
model in the same turn. Results go to benchmarks/results/thor/calibration.json; after runs exist, a
new one would make another study of theirs.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

from benchmarks.shared.studies import one_thread

ROUNDS, SKIPPED, STEPS = 3, 4, 16


def main() -> None:
    """Run the command."""
    one_thread()
    from benchmarks.thor.plans import CALIBRATION, DENSE
    from moduli.data import load_task
    from moduli.study.environment import hardware, versions
    from moduli.study.records import write_json

    task = load_task("debian-descriptions")
    found = seconds(task)
    cost = {
        label: statistics.median(a / b for a, b in zip(each, found[DENSE], strict=True))
        for label, each in found.items()
    }
    CALIBRATION.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        CALIBRATION,
        {
            "command": "python -m benchmarks.thor.calibrate",
            "cost": {label: round(value, 3) for label, value in cost.items()},
            "cpu_seconds_per_step": {k: [round(s, 4) for s in v] for k, v in found.items()},
            "environment": {"versions": versions(), "hardware": hardware()},
        },
    )
    for label, value in cost.items():
        print(f"{label:12} {value:.2f}")


def seconds(task: Any, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Processor time of a step in every round, by label."""
    import copy

    import torch
    from datasets import concatenate_datasets

    import moduli
    from benchmarks.thor.plans import METHODS, MODEL, TRAINING
    from moduli.training.finetune import finetune
    from moduli.training.translator import fresh_translator, size_of

    sources = task.sources or tuple(task.domains)
    rows = concatenate_datasets([task.domains[name].train for name in sources]).shuffle(seed=0)
    torch.manual_seed(0)
    size = size_of(MODEL)
    assert size is not None
    plain, tokenizer = fresh_translator(size, task.kind, rows)
    settings = dataclasses.replace(TRAINING, max_steps=SKIPPED + STEPS)
    found: dict[str, list[float]] = {label: [] for label in METHODS}
    for seed in range(rounds):
        for label, method in METHODS.items():
            model = copy.deepcopy(plain)
            if method.modular:
                moduli.convert(model, method)
            marks: list[float] = []
            finetune(
                model,
                tokenizer,
                task.kind,
                rows,
                settings=settings,
                seed=seed,
                on_progress=lambda _, marks=marks: marks.append(time.process_time()),
            )
            found[label].append((marks[-1] - marks[SKIPPED - 1]) / STEPS)
    return found


if __name__ == "__main__":
    main()
