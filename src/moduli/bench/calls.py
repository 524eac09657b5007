"""From what somebody asks for to a record: the cases, their processes, their results."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from moduli.bench.cases import Dtype, LayerCase, Mode, Spread, named
from moduli.bench.jobs import Job, OnRow, plan, run
from moduli.bench.models import Task, default_case
from moduli.bench.protocol import ROUNDS
from moduli.bench.records import Record
from moduli.bench.settings import SETTINGS, Settings
from moduli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Layers of one shape for several numbers of tokens, modes and threads; see `LayerCase`."""

    tokens: tuple[int, ...]
    hidden: int
    experts: int
    top_k: int
    width: int
    dtype: Dtype
    mode: tuple[Mode, ...]
    gated: bool
    owned: bool
    spread: Spread
    threads: tuple[int, ...]

    def cases(self) -> list[LayerCase]:
        """All of them."""
        return [
            LayerCase(
                tokens=tokens,
                hidden=self.hidden,
                experts=self.experts,
                top_k=self.top_k,
                width=self.width,
                dtype=self.dtype,
                mode=mode,
                gated=self.gated,
                owned=self.owned,
                spread=self.spread,
                threads=threads,
            )
            for threads, tokens, mode in itertools.product(self.threads, self.tokens, self.mode)
        ]


def ask(
    shape: Shape,
    *,
    chosen: str | None = None,
    only: str = "",
    model: str | None = None,
    task: Task = "tune",
    settings: Sequence[Settings] = SETTINGS,
    device: str = "cpu",
    rounds: int = ROUNDS,
) -> list[Job]:
    """The processes for a named set of layers, for a model, or else for layers of a shape.

    Args:
        shape: layers, where neither a set nor a model is chosen.
        chosen: name of a set.
        only: text that the label of a layer has to hold.
        model: a model, with experts, top_k, dtype and threads of `shape`.
        task: what the model does.
        settings: see `moduli.bench.settings`.
        device: where.
        rounds: see `moduli.bench.protocol`.

    Raises:
        ConfigError: a set and a model at once, no layer that fits `only`, or no rounds.
        UnknownNameError: there is no set of that name.
    """
    if chosen is not None and model is not None:
        raise ConfigError("a set is of layers; measure either a set or a model")
    if rounds < 1 or not settings:
        raise ConfigError(f"{rounds} rounds under {len(settings)} settings; at least 1 is needed")
    if model is not None:
        models = [
            default_case(
                model, task, experts=shape.experts, top_k=shape.top_k, dtype=shape.dtype, threads=n
            )
            for n in shape.threads
        ]
        return plan(models=models, settings=settings, device=device, rounds=rounds)
    cases = shape.cases() if chosen is None else named(chosen)
    layers = [case for case in cases if only in case.label]
    if not layers:
        raise ConfigError(f"no layer has {only!r} in its name; the first is {cases[0].label!r}")
    return plan(layers, settings=settings, device=device, rounds=rounds)


def measure(jobs: Sequence[Job], *, name: str, command: str, on_row: OnRow | None = None) -> Record:
    """Run all jobs, one after the other.

    Args:
        jobs: from `ask` or `moduli.bench.jobs.plan`.
        name: of the record.
        command: what to type to measure it again.
        on_row: called with every row when it is there.
    """
    date = datetime.now(UTC).date().isoformat()
    return Record(name, command, date, tuple(run(job, on_row) for job in jobs))


def typed(argv: Sequence[str]) -> str:
    """The command that measures the same again, wherever its record goes."""
    kept = list(argv)
    for i, word in reversed(list(enumerate(kept))):
        if word == "--out":
            del kept[i : i + 2]
        elif word.startswith("--out=") or word in ("--json", "--details"):
            del kept[i]
    return shlex.join(["moduli", "bench", *kept])


def label(chosen: str | None, model: str | None, task: Task, device: str = "cpu") -> str:
    """The name of a record, which its file gets too."""
    name = chosen or "layers"
    if model is not None:
        name = f"{model.rstrip('/').rpartition('/')[2]}-{task}"
    return name if device == "cpu" else f"{name}-{device.partition(':')[0]}"
