"""What is watched of a run besides its scores: time, selection over training, what experts do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moduli.data.task import Task
from moduli.study.spec import RunSpec

if TYPE_CHECKING:
    from moduli.inspect.training import SelectionOverTraining

WINDOWS = 20
"""Of training at most, in each of which selections are counted."""
INSPECTED_ROWS = 64
"""Test rows of every domain on which the experts of a tuned model are looked at."""
PATTERN_TOKENS = 40
"""Tokens whose neurons are counted by block: enough for a figure, in a record of every run."""


def write_inspection(
    spec: RunSpec,
    task: Task,
    model: Any,
    processor: Any,
    selection: SelectionOverTraining,
    path: Path,
) -> None:
    """What the experts of the tuned model do on some test rows of every domain, as a record."""
    from moduli.inspect.activations import evenly
    from moduli.inspect.inspecting import inspect_model

    found = inspect_model(
        model,
        processor,
        task,
        max_rows=INSPECTED_ROWS,
        max_length=spec.settings.max_length,
        title=f"{spec.method.name} tuned on {spec.trained_on}, seed {spec.seed}",
        coselection=False,
    )
    patterns = []
    for pattern in found.activations:
        kept = evenly(len(pattern.original), PATTERN_TOKENS)
        original, by_expert = (
            tuple(rows[t] for t in kept) for rows in (pattern.original, pattern.by_expert)
        )
        patterns.append(dataclasses.replace(pattern, original=original, by_expert=by_expert))
    found = dataclasses.replace(found, selection=selection.result(), activations=tuple(patterns))
    found.write(path)


class Clocks:
    """Wall and processor seconds of the parts of a run."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = time.perf_counter() - wall
        self.cpu[name] = time.process_time() - cpu
