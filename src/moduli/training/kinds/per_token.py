"""What kinds share that predict a token or a tag at every position.

    B batch, C classes, M scored positions, S sequence

Their loss is the sum over positions divided by the number of positions in the whole optimiser
step, whatever batches the step is cut into: a mean per batch would weigh the positions of a short
batch more, and models of transformers do not agree on which of the two they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moduli.errors import DataError
from moduli.training.kinds.base import Output


def token_loss(
    outputs: object,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy at positions with a label, over the positions of the step.

    Args:
        outputs: of the model, with `logits` `[B, S, C]`.
        labels: `[B, S]`, -100 where there is none.
        num_items_in_batch: labels in the whole step; None: in this batch.
        label_smoothing: share of the target's mass that the other classes get, in equal parts
            (fairseq's, of which torch's own is C / (C - 1) times as much).
    """
    logits: Tensor = outputs.logits  # type: ignore[attr-defined]
    classes = logits.shape[-1]
    total = cross_entropy(
        logits.float().flatten(0, 1),
        labels.to(logits.device).flatten(),
        reduction="sum",
        label_smoothing=label_smoothing * classes / max(classes - 1, 1),
    )
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def next_token_loss(
    outputs: object, labels: Tensor, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """`token_loss` where position s is to say what stands at s + 1."""
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return token_loss(outputs, following, num_items_in_batch)


def joined(outputs: Sequence[Output]) -> Output:
    """The scored positions of all examples: `[M]` each.

    Raises:
        DataError: there is none.
    """
    together = {name: torch.cat([o[name] for o in outputs]) for name in outputs[0]}
    if not together["target"].numel():
        raise DataError("There is no token to score; give longer texts.")
    return together


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """`[B, S]` from rows of unequal length, padded at the end."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
