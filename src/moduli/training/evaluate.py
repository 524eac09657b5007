"""What a model says to rows of data, and how good that is.

Rows are batched by length, and the batches depend on the rows alone, so that equal weights give
equal bits: in training, after a resume, and in the new process that proves a checkpoint ordinary
(`moduli.training.plain`).

    N examples, C classes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moduli.allocator import release_growth
from moduli.errors import DataError
from moduli.training.kinds.base import Examples, Output, TaskKind, get_kind
from moduli.training.metrics import Scores
from moduli.training.plain import BATCH_SIZE, outputs_of_batch

TOKENS = 4096
"""Tokens in a batch of an evaluation, padding included: the logits of a language model have a row
as long as its vocabulary for each."""


def outputs_of(
    kind: TaskKind,
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    max_length: int = 64,
    batch_size: int = BATCH_SIZE,
) -> tuple[Examples, list[Output]]:
    """The examples made of `rows`, and what the model says to each.

    Examples are batched by length, so that little is padding; the batches (at most `batch_size`
    examples and `TOKENS` tokens) depend on the rows alone, so that equal weights give equal bits.

    Raises:
        DataError: no rows.
    """
    examples, batches = batches_of(kind, model, processor, rows, max_length, batch_size)
    found = []
    for members, batch in batches:
        found.append((members, outputs_of_batch(model, batch, kind.reduction)))
        release_growth()
    return examples, in_order(found)


def batches_of(
    kind: TaskKind,
    model: nn.Module,
    processor: Any,
    rows: Any,
    max_length: int = 64,
    batch_size: int = BATCH_SIZE,
) -> tuple[Examples, Iterator[tuple[list[int], dict[str, Tensor]]]]:
    """The examples made of `rows`, and batches of them with the places of their members.

    Raises:
        DataError: no rows.
    """
    if len(rows) == 0:
        raise DataError("There are no rows to predict; give at least one.")
    examples = kind.prepare(processor, rows, max_length)
    collate = kind.collator(model, processor, max_length)
    order = sorted(range(len(examples.items)), key=lambda i: (examples.lengths[i], i))

    def batches() -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        members: list[int] = []
        for i in order:  # the next is the longest so far, so it sets the width of its batch
            if len(members) == batch_size or (len(members) + 1) * examples.lengths[i] > TOKENS:
                if members:
                    yield members, collate([examples.items[m] for m in members])
                members = []
            members.append(i)
        yield members, collate([examples.items[m] for m in members])

    return examples, batches()


def in_order(found: Sequence[tuple[list[int], list[Output]]]) -> list[Output]:
    """Outputs of batches in the order of their examples."""
    placed = {
        i: output for members, outputs in found for i, output in zip(members, outputs, strict=True)
    }
    return [placed[i] for i in range(len(placed))]


def predict(
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
    *,
    kind: str = "classification",
    max_length: int = 64,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Logits `[N, C]` (float32, on the CPU) of `rows`, in their order; see `outputs_of`.

    Args:
        model: with a head that says one thing about a whole row.
        tokenizer: or another processor.
        rows: labels are not needed.
        kind: of the task.
        max_length: longer texts are cut.
        batch_size: rows per forward pass.

    Raises:
        DataError: no rows.
    """
    _, outputs = outputs_of(
        get_kind(kind), model, tokenizer, rows, max_length=max_length, batch_size=batch_size
    )
    return torch.stack([output["logits"] for output in outputs])


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
    *,
    kind: str = "classification",
    max_length: int = 64,
    batch_size: int = BATCH_SIZE,
) -> Scores:
    """Scores of the model on rows with the columns of the kind; see `outputs_of`."""
    task = get_kind(kind)
    examples, outputs = outputs_of(
        task, model, tokenizer, rows, max_length=max_length, batch_size=batch_size
    )
    return task.score(outputs, examples, rows)
