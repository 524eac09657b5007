"""Rows of a task as what a conversion is given.

Output errors are measured on the first batch. A method that looks at data is shown all batches,
with labels where the model has a head for them, since the importance of a neuron needs a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moduli.data.kinds import KINDS, data_kind
from moduli.data.task import Task
from moduli.errors import DataError
from moduli.methods.base import DataMethod, Method
from moduli.study.plan import source_groups
from moduli.study.tuned import class_indices, load_processor, renumbered, trained_length
from moduli.training.kinds.base import TaskKind, get_kind, kind_of_config

BATCH_ROWS = 64
"""Rows of a batch, where they are not so long that it has to be smaller."""
ROWS_PER_EXPERT = 4
"""Rows that a run shows a method that looks at data, for every expert it is to make of them."""


def rows_to_show(method: Method) -> int:
    """How many training rows a run gives to conversion."""
    if not isinstance(method, DataMethod):
        return BATCH_ROWS
    return max(BATCH_ROWS, ROWS_PER_EXPERT * _experts(method))


def sample_batches(
    method: Method,
    model: Any,
    processor: Any,
    kind: TaskKind,
    rows: Any,
    *,
    count: int,
    max_length: int,
    labelled: bool = True,
) -> list[dict[str, Any]]:
    """The first rows as `batch` of `moduli.convert`; one batch where the method looks at no data.

    Args:
        method: that they are for.
        model: with a head of this kind, or without one if not `labelled`.
        processor: its tokenizer or another processor.
        kind: of the rows.
        rows: with the columns of the kind.
        count: at most so many.
        max_length: longer texts are cut.
        labelled: leave the labels in.
    """
    parts = _parts(processor, kind, [rows[i] for i in range(min(count, len(rows)))], max_length)
    looks = isinstance(method, DataMethod)
    parts = _not_as_many(parts, _experts(method)) if looks else parts[:1]
    collate = kind.collator(model, processor, max_length)
    batches = []
    for part in parts:
        batch = collate(part)
        if not (looks and labelled):
            batch.pop("labels", None)
        batches.append({name: tensor.to(model.device) for name, tensor in batch.items()})
    return batches


def _experts(method: Method) -> int:
    return int(getattr(method, "num_experts", 1))


def _parts(processor: Any, kind: TaskKind, rows: list[Any], max_length: int) -> list[list[Any]]:
    """Examples, batch by batch; of texts cut into many no more pieces than of short ones."""
    from moduli.training.evaluate import TOKENS

    found = []
    for start in range(0, len(rows), BATCH_ROWS):
        examples = kind.prepare(processor, rows[start : start + BATCH_ROWS], max_length)
        size = max(1, min(BATCH_ROWS, TOKENS // max([1, *examples.lengths])))
        items = [examples.items[i] for i in range(min(BATCH_ROWS, len(examples.items)))]
        found += [items[i : i + size] for i in range(0, len(items), size)]
    return found


def _not_as_many(parts: list[list[Any]], experts: int) -> list[list[Any]]:
    """The parts, but not one for every expert: that would say that each is a group of its own.

    The first part, on which output errors are measured, is cut only where no other can be.
    """
    if len(parts) != experts or experts == 1:
        return parts
    for i in reversed(range(len(parts))):
        if len(parts[i]) > 1:
            half = len(parts[i]) // 2
            return [*parts[:i], parts[i][:half], parts[i][half:], *parts[i + 1 :]]
    return parts


def task_batches(
    method: Method,
    model: Any,
    name: str,
    task: Task,
    *,
    domain: str | None,
    count: int,
    max_length: int | None = None,
    on_event: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Training rows of a task as `batch` of `moduli.convert`, for a model with any head or none.

    Args:
        method: that they are for.
        model: loaded from `name`.
        name: directory or hub name.
        task: whose inputs are what the model takes.
        domain: to take rows of; None: the first one that has training data.
        count: at most so many rows.
        max_length: longer texts are cut; None: the length the model was tuned with.
        on_event: told that labels are left out, and why.

    Raises:
        UnknownNameError: the task has no such domain.
        DataError: the model takes other inputs, or the domain has no training data.
        CheckpointError: the model has no tokenizer or processor.
    """
    ((first, *_), *_) = source_groups(task, () if domain is None else ((domain,),))
    rows = task.domains[first].train
    assert rows is not None  # `source_groups` saw to it
    kind, reason = _kind_for(model, name, task)
    if reason is None and data_kind(kind.name).target is not None and task.label_names:
        rows = renumbered(rows, kind, class_indices(model, task))
    if reason is not None and on_event is not None:
        on_event(f"labels are left out: {reason}")
    return sample_batches(
        method,
        model,
        load_processor(name, kind),
        kind,
        rows,
        count=count,
        max_length=max_length or trained_length(name),
        labelled=reason is None,
    )


def _kind_for(model: Any, name: str, task: Task) -> tuple[TaskKind, str | None]:
    """The kind by which rows become inputs, and why they can have no labels, if they cannot."""
    given = data_kind(task.kind)
    own = kind_of_config(model.config, type(model).__name__)
    if own is None:
        # Without a head the inputs are all there is to a kind; the first of those that share them
        # asks nothing of the model's outputs.
        same = next(k for k in KINDS.values() if k.inputs[0] == given.inputs[0])
        return get_kind(same.name), f"{name} has no head for {task.kind}"
    learns = data_kind(own.name)
    if learns.inputs[0] != given.inputs[0]:
        raise DataError(
            f"{name} is {own.noun}, which looks at {learns.inputs[0].name!r}; the data has "
            f"{given.inputs[0].name!r}. Give data of the kind {own.name}."
        )
    if learns.target is None:
        return own, None
    if own.name != task.kind:
        return own, f"{name} is {own.noun}, the data is for {task.kind}"
    strange = set(task.label_names) - {str(label) for label in model.config.id2label.values()}
    if strange:
        return own, f"{name} has no class {min(strange)!r}"
    return own, None


@contextmanager
def own_padding(model: Any) -> Iterator[None]:
    """Batches of a decoder need a padding id; a model that had none is written without one."""
    padding = getattr(model.config, "pad_token_id", None)
    try:
        yield
    finally:
        if padding is None and getattr(model.config, "pad_token_id", None) is not None:
            model.config.pad_token_id = None
