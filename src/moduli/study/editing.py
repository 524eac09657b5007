"""Change the experts of a model directory, and test it before and after: `moduli extend`, `prune`.

Nothing is written before everything is done; then the new directory appears by one rename, with a
record of what was changed and what came of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from moduli.data import resolve_model
from moduli.data.task import Task
from moduli.errors import CheckpointError, ConfigError
from moduli.models.editing import expert_use, extend, prune, where_of
from moduli.models.moduleformer.grown import closed, settle
from moduli.models.moduleformer.pruning import check_keep
from moduli.models.moduleformer.replay import KeepOld
from moduli.models.moduleformer.unchanged import changed_tensors, fingerprints
from moduli.study.plan import source_groups
from moduli.study.records import write_json
from moduli.study.spec import plain
from moduli.study.tuned import evaluate_task, load_tuned, model_kind
from moduli.surgery.files import check_target, new_directory
from moduli.training.finetune import batches_of, finetune
from moduli.training.kinds.base import TaskKind, get_kind
from moduli.training.settings import FinetuneSettings

EXTENSION = "extension.json"
PRUNING = "pruning.json"
MEASURED_ROWS = 64
"""Rows of the old domain on which leakage is measured."""

Tell = Callable[[str], None]


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
    tell: Tell = lambda line: None,
    on_progress: Callable[[Any], None] | None = None,
) -> tuple[dict[str, Any], Any]:
    """Extend a model, train the new experts if there is a task, and write it.

    Args:
        name: of the model.
        out: directory to write.
        spec: what to do.
        task: to train and test on; None: nothing is trained.
        tell: called with a line about what is going on.
        on_progress: called with a `moduli.training.callbacks.Progress` after each step.

    Returns:
        The record (scores before and after by domain, and how many old tensors were found
        unchanged in the written files among it), and the report of `extend`.

    Raises:
        ModelError, ConfigError, DataError, CheckpointError: what is given cannot work; nothing is
            written.
        TrainingError: the loss became infinite or NaN.
        Interrupted: Ctrl-C; nothing is written.
    """
    check_target(out)
    if task is None and (spec.train_domains or spec.replay_domain or spec.leakage or spec.rows):
        raise ConfigError("domains and penalties are of training; name the task with --data")
    model, tokenizer, kind = _load(name, task, "extend")
    dtype, marks = model.dtype, fingerprints(model)
    length = spec.settings.max_length
    train: tuple[str, ...] = ()
    old: list[dict[str, Any]] = []
    if task is not None:
        train = _domains(task, spec.train_domains)
        if spec.replay_domain:
            replayed = _domains(task, (spec.replay_domain,))
            old = _batches(kind, model, tokenizer, _rows(task, replayed), spec.settings)
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
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    losses: tuple[float, ...] = ()
    if task is not None:
        before = _scores(model, tokenizer, task, length, tell, "before", closed(model))
        model.float()  # small steps are lost in shorter types
        keep = KeepOld(
            old if spec.leakage else (), leakage_weight=spec.leakage, row_weight=spec.rows
        )
        result = finetune(
            model,
            tokenizer,
            task.kind,
            _rows(task, train),
            settings=spec.settings,
            seed=spec.seed,
            on_progress=on_progress,
            callbacks=[keep],
        )
        losses = result.losses
    settle(model)
    model.to(dtype)
    if task is not None:
        after = _scores(model, tokenizer, task, length, tell, "after")
    record = {
        "model": name,
        "extension": plain(dataclasses.asdict(spec)),
        "data": None if task is None else task.name,
        "train_domains": list(train),
        "report": report.to_dict(),
        "before": before,
        "after": after,
        "steps": len(losses),
        "unchanged_tensors": len(marks),
    }
    with new_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if changed := changed_tensors(marks, folder):
            raise CheckpointError(f"old tensors would have changed: {', '.join(changed)}")
        write_json(folder / EXTENSION, record)
    return record, report


def prune_directory(
    name: str,
    out: Path,
    task: Task,
    *,
    keep: float | None = None,
    by: Literal["frequency", "mass"] = "frequency",
    per_layer: bool = False,
    threshold: float | None = None,
    max_length: int = 256,
    batch_size: int = 8,
    tell: Tell = lambda line: None,
) -> tuple[dict[str, Any], Any]:
    """Measure the use of experts on the training rows of all domains, prune, test, and write.

    Args:
        name: of the model.
        out: directory to write.
        task: to measure and test on.
        keep, by, per_layer, threshold: of `moduli.models.moduleformer.pruning.prune`.
        max_length: longest text in tokens; longer ones are cut into pieces.
        batch_size: pieces per forward pass.
        tell: called with a line about what is going on.

    Returns:
        The record (scores before and after by domain among it), and the report of `prune`.

    Raises:
        ModelError, ConfigError, DataError, CheckpointError: what is given cannot work; nothing is
            written.
    """
    check_target(out)
    model, tokenizer, kind = _load(name, task, "prune")
    check_keep(model, keep, threshold)  # before what takes long
    settings = FinetuneSettings(max_length=max_length, batch_size=batch_size)
    domains = tuple(domain for domain, splits in task.domains.items() if splits.train is not None)

    def batches() -> Iterator[dict[str, Any]]:
        for domain in domains:
            tell(f"measuring the use of experts on {domain}")
            yield from _batches(kind, model, tokenizer, _rows(task, (domain,)), settings)

    use = expert_use(model, batches())
    before = _scores(model, tokenizer, task, max_length, tell, "before")
    report = prune(model, use, keep=keep, by=by, per_layer=per_layer, threshold=threshold)
    record = {
        "model": name,
        "data": task.name,
        "measured_on": list(domains),
        "report": report.to_dict(),
        "use": use.to_dict(),
        "before": before,
        "after": _scores(model, tokenizer, task, max_length, tell, "after"),
    }
    with new_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / PRUNING, record)
    return record, report


def require_editable(name: str, verb: str) -> None:
    """Raise unless a model is of a kind that can be extended or pruned; nothing large is loaded.

    Raises:
        CheckpointError: there is no such model.
        ModelError: it is of another kind.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no model {name!r}: {str(error).splitlines()[0]}") from error
    where_of(config, verb, name)


def _load(name: str, task: Task | None, verb: str) -> tuple[Any, Any, TaskKind]:
    require_editable(name, verb)
    kind = get_kind(task.kind) if task is not None else model_kind(name)
    if kind is None:
        raise CheckpointError(f"{name} has no head; load it and call moduli.{verb}(model, ...)")
    model, processor = load_tuned(name, kind, dense=True)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, processor, kind


def _domains(task: Task, names: tuple[str, ...]) -> tuple[str, ...]:
    """These domains, or the first one with training rows, if they can be trained on."""
    return source_groups(task, (names,) if names else ())[0]


def _rows(task: Task, domains: Sequence[str]) -> Any:
    """Training rows of several domains, mixed."""
    from datasets import concatenate_datasets

    parts = [task.domains[name].train for name in domains]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts).shuffle(seed=0)


def _batches(
    kind: TaskKind, model: Any, processor: Any, rows: Any, settings: FinetuneSettings
) -> list[dict[str, Any]]:
    """Rows as keyword arguments of the forward, in a mixed but fixed order."""
    _, found = batches_of(kind, model, processor, rows, settings.max_length, settings.batch_size)
    batches = [batch for _, batch in found]  # from short to long
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    return [batches[i] for i in order]


def _scores(
    model: Any,
    processor: Any,
    task: Task,
    max_length: int,
    tell: Tell,
    when: str,
    state: Any = None,
) -> dict[str, Any]:
    """Of every domain with test rows, in a state of the model if one is given."""
    with state or nullcontext():
        found = evaluate_task(
            model,
            processor,
            task,
            max_length=max_length,
            on_domain=lambda name: tell(f"testing on {name}, {when}"),
        )
    return {name: scores.to_dict() for name, scores in found.items()}
