"""Train a small language model from scratch: tokenizer, random weights, training, test.

As with other runs (`moduli.study.run`), work in flight is in a hidden directory beside the final
one, which appears by one rename; a run that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moduli.data.task import Task
from moduli.errors import CheckpointError, ConfigError, DataError
from moduli.study.environment import hardware, versions
from moduli.study.inflight import disk_named, locked, partial_of, sweep
from moduli.study.language import KIND, domain_scores, expert_shares
from moduli.study.records import write_json
from moduli.study.spec import hash_task, plain
from moduli.training.architectures import (
    Architecture,
    Size,
    count_parameters,
    fresh_config,
    fresh_model,
)
from moduli.training.settings import FinetuneSettings
from moduli.training.tokenizer import require_room
from moduli.version import __version__

RECORD = "pretraining.json"


@dataclass(frozen=True)
class PretrainSpec:
    """Everything that decides the result of a run."""

    architecture: Architecture
    size: Size
    changes: Mapping[str, Any]
    """Fields of the configuration with other values."""
    vocab_size: int
    data: str
    """SHA-256 of the task."""
    train_domains: tuple[str, ...]
    settings: FinetuneSettings
    """With `bf16` resolved."""
    seed: int
    code: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        data: dict[str, Any] = plain(asdict(self))
        return data

    @cached_property
    def key(self) -> str:
        """The run's name: 12 hexadecimal digits of a hash over all of it."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Listener:
    """Who wants to know: `note` gets a line per part of the run, `step` a `Progress` per step."""

    note: Callable[[str], None] = lambda line: None
    step: Callable[[Any], None] = lambda progress: None


def plan(
    task: Task,
    *,
    architecture: Architecture,
    size: Size,
    changes: Mapping[str, Any],
    vocab_size: int,
    train_domains: tuple[str, ...],
    settings: FinetuneSettings,
    seed: int,
) -> PretrainSpec:
    """The spec of a run on a loaded task; `train_domains` may be empty for all of them.

    Raises:
        ConfigError: not a task of texts, an unknown domain, or too few tokens.
        DataError: a domain to train on has no rows for that.
    """
    if task.kind != KIND:
        raise ConfigError(
            f"{task.name!r} is a task of {task.kind}; pretraining needs one of {KIND}: "
            "brown, or a file of texts with --kind language-modeling."
        )
    require_room(vocab_size)
    domains = train_domains or tuple(task.domains)
    for name in domains:
        if name not in task.domains:
            raise ConfigError(
                f"There is no domain {name!r} to train on; there are {', '.join(task.domains)}."
            )
        if task.domains[name].train is None:
            raise DataError(f"The domain {name!r} has no rows to train on.")
    return PretrainSpec(
        architecture, size, dict(changes), vocab_size, hash_task(task), domains,
        settings.resolved(), seed,
    )  # fmt: skip


def pretrain(
    spec: PretrainSpec,
    task: Task,
    target: Path,
    *,
    checkpoint_every: int | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Do the run, or find it done; what `target` says of it (`RECORD`).

    Args:
        spec: of `plan`.
        task: that it was planned for.
        target: directory of model, tokenizer and record. It appears when the run is complete.
        checkpoint_every: steps between checkpoints; None: one per epoch.
        listener: who wants to know.

    Raises:
        CheckpointError: `target` holds something else, or the disk fails.
        BusyError: another process is working on it.
        TrainingError: the loss became infinite or NaN.
        Interrupted: Ctrl-C; the next call goes on.
    """
    listener = listener or Listener()
    target = target.absolute()
    if (record := finished(spec, target)) is not None:
        sweep(target)
        return record
    partial = partial_of(target)
    with disk_named(target), locked(target):
        if (record := finished(spec, target)) is not None:
            return record
        if not _same(partial / "spec.json", spec):
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        write_json(partial / "spec.json", spec.to_dict())
        record = _work(spec, task, partial, checkpoint_every, listener)
        os.rename(partial / "result", target)
        shutil.rmtree(partial)
    return record


def finished(spec: PretrainSpec, target: Path) -> dict[str, Any] | None:
    """The record in `target` if it is of this run; None if nothing is there.

    Raises:
        CheckpointError: something else is there.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    found = _read(target / RECORD)
    if "spec" not in found:
        raise CheckpointError(
            f"{target} exists and is not a model that was pretrained here (it has no whole "
            f"{RECORD}). "
            "Choose another directory, or move it away."
        )
    if found["spec"] != spec.to_dict():
        other = sorted(k for k, v in spec.to_dict().items() if found["spec"].get(k) != v)
        raise CheckpointError(
            f"{target} holds another run ({', '.join(other)} differs). "
            "Choose another directory, or delete it."
        )
    return found


def _work(
    spec: PretrainSpec, task: Task, partial: Path, checkpoint_every: int | None, listener: Listener
) -> dict[str, Any]:
    from datasets import concatenate_datasets
    from transformers import set_seed

    from moduli.training.finetune import finetune

    parts: list[Any] = [task.domains[name].train for name in spec.train_domains]
    rows = concatenate_datasets(parts)
    listener.note(f"learning a tokenizer from {len(rows)} texts")
    tokenizer = _tokenizer(spec, rows, partial / "tokenizer")
    if len(tokenizer) < spec.vocab_size:
        few = f"{len(tokenizer)} tokens instead of {spec.vocab_size} (vocab_size)"
        listener.note(f"the texts have few different words: {few}")
    config = fresh_config(
        spec.architecture,
        spec.size,
        spec.changes,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = fresh_model(config, spec.seed)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    set_seed(spec.seed)
    result = finetune(
        model,
        tokenizer,
        KIND,
        rows,
        settings=spec.settings,
        seed=spec.seed,
        out=partial / "checkpoints",
        checkpoint_every=checkpoint_every,
        on_progress=listener.step,
    )
    folder = partial / "result"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.model_max_length = spec.settings.max_length  # what other commands read at once
    tokenizer.save_pretrained(folder)
    scores = {}
    for name, splits in task.domains.items():
        if splits.test is not None:
            listener.note(f"testing on {name}")
            scores[name] = domain_scores(model, tokenizer, splits.test, spec.settings.max_length)
    tests = [splits.test for splits in task.domains.values() if splits.test is not None]
    tail = result.losses[-max(1, len(result.losses) // 10) :]
    record = {
        "spec": spec.to_dict(),
        "data": task.name,
        **count_parameters(model),
        "scores": scores,
        "load": expert_shares(model, tokenizer, tests, spec.settings.max_length),
        "steps": result.steps,
        "final_loss": math.fsum(tail) / len(tail),
        "seconds": result.seconds,
        "resumed_from": result.resumed_from,
        "environment": {"versions": versions(), "hardware": hardware()},
    }
    write_json(folder / RECORD, record)
    return record


def _tokenizer(spec: PretrainSpec, rows: Any, directory: Path) -> Any:
    """Learnt once, so that a run that goes on has the one that its checkpoints were trained by."""
    from transformers import AutoTokenizer

    from moduli.training.tokenizer import train_tokenizer

    if not directory.is_dir():
        made = train_tokenizer(rows["text"], spec.vocab_size)
        new = directory.with_name("tokenizer.new")
        shutil.rmtree(new, ignore_errors=True)
        made.save_pretrained(new)
        os.rename(new, directory)
    load: Any = AutoTokenizer.from_pretrained
    return load(directory)


def _same(path: Path, spec: PretrainSpec) -> bool:
    return _read(path) == spec.to_dict()


def _read(path: Path) -> dict[str, Any]:
    """What a file of JSON says; nothing if it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
