"""What `moduli extend` and `moduli prune` share: a model, rows to edit it by, and tests of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from moduli.data import resolve_model
from moduli.data.task import Task
from moduli.errors import CheckpointError
from moduli.models.editing import where_of
from moduli.study.plan import source_groups
from moduli.study.pretraining import RECORD as PRETRAINING
from moduli.study.tuned import evaluate_task, load_tuned, model_kind
from moduli.surgery.files import check_target
from moduli.training.evaluate import batches_of
from moduli.training.kinds.base import TaskKind, get_kind
from moduli.training.settings import FinetuneSettings

EXTENSION = "extension.json"
PRUNING = "pruning.json"
"""Records beside models that were extended or pruned."""

Tell = Callable[[str], None]


def require_new(out: Path) -> None:
    """Raise unless a model may be written to a directory.

    Raises:
        CheckpointError: something is there already.
    """
    for record in (PRETRAINING, EXTENSION, PRUNING):
        if (out / record).is_file():
            raise CheckpointError(
                f"{out} holds a model already ({record} says which); choose another directory, or "
                "delete it"
            )
    check_target(out)


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


def load_editable(name: str, task: Task | None, verb: str) -> tuple[Any, Any, TaskKind]:
    """A model with its tokenizer, as of the kind of the task, or as what it is.

    Raises:
        CheckpointError: there is no such model, or it has another head, or none.
        ModelError: it is of a kind that cannot be edited.
    """
    require_editable(name, verb)
    kind = get_kind(task.kind) if task is not None else model_kind(name)
    if kind is None:
        raise CheckpointError(f"{name} has no head; load it and call moduli.{verb}(model, ...)")
    model, processor = load_tuned(name, kind, dense=True)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, processor, kind


def training_domains(task: Task, names: tuple[str, ...]) -> tuple[str, ...]:
    """These domains, or the first one with training rows, if they can be trained on."""
    return source_groups(task, (names,) if names else ())[0]


def training_rows(task: Task, domains: Sequence[str]) -> Any:
    """Training rows of several domains, mixed."""
    from datasets import concatenate_datasets

    parts = [task.domains[name].train for name in domains]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts).shuffle(seed=0)


def row_batches(
    kind: TaskKind, model: Any, processor: Any, rows: Any, settings: FinetuneSettings
) -> list[dict[str, Any]]:
    """Rows as keyword arguments of the forward, in a mixed but fixed order."""
    _, found = batches_of(kind, model, processor, rows, settings.max_length, settings.batch_size)
    batches = [batch for _, batch in found]  # from short to long
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    return [batches[i] for i in order]


def scores_by_domain(
    model: Any,
    processor: Any,
    task: Task,
    max_length: int,
    tell: Tell,
    when: str,
    state: Any = None,
) -> dict[str, Any]:
    """Scores by domain, on test rows, in a state of the model if one is given.

    Args:
        when: "before" or "after", for what is told.
        state: a context to be tested in.
    """
    with state or nullcontext():
        found = evaluate_task(
            model,
            processor,
            task,
            max_length=max_length,
            on_domain=lambda name: tell(f"testing on {name}, {when}"),
        )
    return {name: scores.to_dict() for name, scores in found.items()}
