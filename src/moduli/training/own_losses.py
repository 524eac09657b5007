"""What a model adds to its loss, minimised where the loss is made of its logits by somebody else.

Models with experts add auxiliary losses when they are given labels. A training loop that computes
the loss itself (over all tokens of a step, with smoothed labels, ...) never asks for that sum, and
routers would be trained without. Within `own_losses` the sum travels with the logits: they stay
what they are, and on the way back the sum gets the gradient that it would have as part of the loss.

    B batch, S sequence, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def own_losses(model: nn.Module, micro_batches: int = 1) -> Iterator[None]:
    """Within the block every training pass of a language model without labels also trains what the
    model would add to its loss with them.

    Args:
        model: a causal language model of transformers, whose loss with labels of which none counts
            is what it adds: for ModuleFormer the weighted auxiliary losses.
        micro_batches: passes per optimiser step; each adds its share of their mean.
    """

    def ask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not model.training or not torch.is_grad_enabled() or "labels" in kwargs:
            return None
        none = torch.full_like(kwargs["input_ids"], -100)
        # a sum over no token, divided by 1, is 0, where their mean would be no number
        return args, {**kwargs, "labels": none, "num_items_in_batch": 1}

    def carry(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if "num_items_in_batch" in kwargs and output.loss is not None:
            apply: Any = _Carry.apply
            output.logits = apply(output.logits, output.loss / micro_batches)
            output.loss = None
        return output

    before = model.register_forward_pre_hook(ask, with_kwargs=True)
    after = model.register_forward_hook(carry, with_kwargs=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


class _Carry(torch.autograd.Function):
    """The logits, whose gradient comes with one for the term."""

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "B S V"], term: Float[Tensor, ""]
    ) -> Float[Tensor, "B S V"]:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, gradient.new_ones(())
