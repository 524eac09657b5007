"""Processes of the bench: one for every pair of settings and thread count, one after the other.

The allocator's setting and the pool of threads belong to a process, so that "tuned" and "defaults"
can only be measured apart. A job goes to the process as JSON, rows come back as lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moduli.bench.cases import LayerCase
from moduli.bench.layer import measure_layer
from moduli.bench.machine import inspect_machine
from moduli.bench.models import ModelCase, ModelRow, measure_model
from moduli.bench.protocol import ROUNDS
from moduli.bench.records import Part
from moduli.bench.rows import LayerRow
from moduli.bench.settings import SETTINGS, Settings, prepare
from moduli.errors import ModuliError

Row = LayerRow | ModelRow
OnRow = Callable[[Row], None]


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        settings: see `moduli.bench.settings`.
        threads: of the process.
        device: "cpu", "cuda", ...
        rounds: see `moduli.bench.protocol`.
        layers: cases of layers.
        models: cases of models.
        brief: measure the machine's rates on small arrays, for tests.
    """

    settings: Settings
    threads: int
    device: str = "cpu"
    rounds: int = ROUNDS
    layers: tuple[LayerCase, ...] = ()
    models: tuple[ModelCase, ...] = ()
    brief: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of `dataclasses.asdict`."""
        layers = tuple(LayerCase(**case) for case in data["layers"])
        models = tuple(ModelCase(**case) for case in data["models"])
        return cls(**{**data, "layers": layers, "models": models})


def plan(
    layers: Sequence[LayerCase] = (),
    models: Sequence[ModelCase] = (),
    *,
    settings: Sequence[Settings] = SETTINGS,
    device: str = "cpu",
    rounds: int = ROUNDS,
    brief: bool = False,
) -> list[Job]:
    """The processes that measure all cases under all settings."""
    threads = sorted({case.threads for case in layers} | {case.threads for case in models})
    return [
        Job(
            one,
            n,
            device,
            rounds,
            tuple(case for case in layers if case.threads == n),
            tuple(case for case in models if case.threads == n),
            brief,
        )
        for one in settings
        for n in threads
    ]


def run(job: Job, on_row: OnRow | None = None) -> Part:
    """Run a job in a process of its own.

    Args:
        job: the job.
        on_row: called with every row when it is there.

    Raises:
        ModuliError: the process failed; what it wrote on standard error says why.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", "moduli.bench.worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(job)))
            process.stdin.close()
            part = collect(process.stdout, on_row)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise ModuliError(
            f"the process that measured {job.settings!r} with {job.threads} threads ended with "
            f"status {process.returncode}; what it wrote above says why"
        )
    return part


def collect(lines: Iterable[str], on_row: OnRow | None = None) -> Part:
    """The part that a process writes, line by line."""
    machine: dict[str, Any] = {}
    layers: list[LayerRow] = []
    models: list[ModelRow] = []
    for line in lines:
        data = json.loads(line)
        row: Row
        if "machine" in data:
            machine = data["machine"]
            continue
        if "layer" in data:
            row = LayerRow.from_dict(data["layer"])
            layers.append(row)
        else:
            row = ModelRow.from_dict(data["model"])
            models.append(row)
        if on_row is not None:
            on_row(row)
    return Part(machine, tuple(layers), tuple(models))


def work(job: Job) -> Iterator[dict[str, Any]]:
    """Do a job in this process: the machine, then every row as plain JSON values."""
    prepare(job.settings)
    torch.set_num_threads(job.threads)
    machine = inspect_machine(job.settings, torch.device(job.device), quick=job.brief)
    yield {"machine": machine.to_dict()}
    for layer in job.layers:
        row = measure_layer(layer, machine, settings=job.settings, rounds=job.rounds)
        yield {"layer": row.to_dict()}
    for model in job.models:
        found = measure_model(model, machine, settings=job.settings, rounds=job.rounds)
        yield {"model": found.to_dict()}
