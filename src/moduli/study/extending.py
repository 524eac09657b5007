"""Extend a model directory, train its new experts, test it before and after: `moduli extend`.

The new directory appears by one rename, with a record of what was added and what came of it. While
new experts are trained, checkpoints are in a hidden directory beside it, from which the same call
goes on after a kill.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from moduli.data.task import Task
from moduli.errors import CheckpointError, ConfigError
from moduli.models.editing import expert_use, extend
from moduli.models.moduleformer.grown import closed, settle
from moduli.models.moduleformer.replay import KeepOld
from moduli.models.moduleformer.unchanged import changed_tensors, fingerprints
from moduli.study.editing import (
    EXTENSION,
    Tell,
    load_editable,
    require_new,
    row_batches,
    scores_by_domain,
    training_domains,
    training_rows,
)
from moduli.study.inflight import disk_named, locked, partial_of
from moduli.study.records import write_json
from moduli.study.spec import hash_task, plain
from moduli.surgery.files import new_directory
from moduli.training.finetune import finetune
from moduli.training.settings import FinetuneSettings
from moduli.version import __version__

MEASURED_ROWS = 64
"""Rows of the old domain on which leakage is measured."""


@dataclass(frozen=True)
class Extension:
    """How a model is extended and its new experts are trained.

    Attributes:
        attention, feed_forward: new experts of every layer.
        start, noise: of `moduli.models.moduleformer.growing.extend`.
        train_domains: to train on; empty for the first one.
        replay_domain: the old domain: leakage is measured and held low on its training rows.
        leakage, rows: weights of the leakage and of the squares of the new rows.
        settings: of training.
        seed: of new experts and of the order of the data.
    """

    attention: int
    feed_forward: int
    start: Literal["fresh", "copy", "closed"] = "fresh"
    noise: float = 0.0
    train_domains: tuple[str, ...] = ()
    replay_domain: str | None = None
    leakage: float = 0.0
    rows: float = 0.0
    settings: FinetuneSettings = field(default_factory=FinetuneSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.settings.trains != "all":
            raise ConfigError(
                f"trains is {self.settings.trains!r}, but only new experts are trained; leave it "
                "out"
            )
        if self.leakage and self.replay_domain is None:
            raise ConfigError(
                f"leakage is {self.leakage}, which is measured on tokens of the old domain; name "
                "it with --replay-domain"
            )


def extend_directory(
    name: str,
    out: Path,
    spec: Extension,
    task: Task | None = None,
    *,
    checkpoint_every: int | None = None,
    tell: Tell = lambda line: None,
    on_progress: Callable[[Any], None] | None = None,
) -> tuple[dict[str, Any], Any]:
    """Extend a model, train the new experts if there is a task, and write it.

    Args:
        name: of the model.
        out: directory to write.
        spec: what to do.
        task: to train and test on; None: nothing is trained.
        checkpoint_every: steps between checkpoints; None: one per epoch.
        tell: called with a line about what is going on.
        on_progress: called with a `moduli.training.callbacks.Progress` after each step.

    Returns:
        The record (scores before and after by domain, and how many old tensors were found
        unchanged in the written files among it), and the report of `extend`.

    Raises:
        ModelError, ConfigError, DataError, CheckpointError: what is given cannot work; nothing is
            written.
        BusyError: another process is working on it.
        TrainingError: the loss became infinite or NaN.
        Interrupted: Ctrl-C; the next call goes on.
    """
    require_new(out)
    if task is None and (spec.train_domains or spec.replay_domain or spec.leakage or spec.rows):
        raise ConfigError("domains and penalties are of training; name the task with --data")
    model, tokenizer, kind = load_editable(name, task, "extend")
    dtype, marks = model.dtype, fingerprints(model)
    length = spec.settings.max_length
    train: tuple[str, ...] = ()
    old: list[dict[str, Any]] = []
    if task is not None:
        train = training_domains(task, spec.train_domains)
        if spec.replay_domain:
            replayed = training_rows(task, training_domains(task, (spec.replay_domain,)))
            old = row_batches(kind, model, tokenizer, replayed, spec.settings)
    few = old[: max(1, MEASURED_ROWS // spec.settings.batch_size)] or None
    use = None
    if spec.start == "copy" and few is not None:
        use = expert_use(model, few)
    generator = torch.Generator().manual_seed(spec.seed)
    report = extend(
        model,
        attention=spec.attention,
        feed_forward=spec.feed_forward,
        start=spec.start,
        noise=spec.noise,
        use=use,
        batches=few,
        generator=generator,
    )
    record: dict[str, Any] = {
        "model": name,
        "extension": plain(dataclasses.asdict(spec)),
        "data": None if task is None else task.name,
        "train_domains": list(train),
        "report": report.to_dict(),
        "before": {},
        "after": {},
        "steps": 0,
        "resumed_from": None,
        "unchanged_tensors": len(marks),
    }
    with nullcontext() if task is None else _in_flight(out, _identity(spec, task, marks)) as flight:
        if task is not None:
            record["before"] = scores_by_domain(
                model, tokenizer, task, length, tell, "before", closed(model)
            )
            model.float()  # small steps are lost in shorter types
            keep = KeepOld(
                old if spec.leakage else (), leakage_weight=spec.leakage, row_weight=spec.rows
            )
            result = finetune(
                model,
                tokenizer,
                task.kind,
                training_rows(task, train),
                settings=spec.settings,
                seed=spec.seed,
                out=flight,
                checkpoint_every=checkpoint_every,
                on_progress=on_progress,
                callbacks=[keep],
            )
            record |= {"steps": result.steps, "resumed_from": result.resumed_from}
        settle(model)
        model.to(dtype)
        if task is not None:
            record["after"] = scores_by_domain(model, tokenizer, task, length, tell, "after")
        with new_directory(out) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if changed := changed_tensors(marks, folder):
                raise CheckpointError(f"old tensors would have changed: {', '.join(changed)}")
            write_json(folder / EXTENSION, record)
    return record, report


def _identity(spec: Extension, task: Task, marks: Any) -> dict[str, Any]:
    """What has to be the same for checkpoints to be of this run."""
    weights = hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()
    settings = dataclasses.replace(spec, settings=spec.settings.resolved())
    return {
        "extension": plain(dataclasses.asdict(settings)),
        "weights": weights,
        "data": hash_task(task),
        "code": __version__,
    }


@contextmanager
def _in_flight(out: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """Where checkpoints of a run are that is to appear at `out`; gone when it is there."""
    target = out.absolute()
    partial = partial_of(target)
    said = partial / "spec.json"
    with disk_named(target), locked(target):
        if not said.is_file() or json.loads(said.read_text(encoding="utf-8")) != identity:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_json(said, identity)
        yield partial / "checkpoints"
        shutil.rmtree(partial)
