"""The auxiliary losses of a ModuleFormer, minimised where the loss is made of its logits.

The model adds them to its loss when it is given labels. A training loop that makes the loss itself
(over all tokens of a step, with smoothed labels, ...) gives none, and the routers would be trained
without them. Within `own_losses` they travel with the logits: these stay what they are, and on the
way back the auxiliary losses get the gradient that they would have as part of the loss.
Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moduli.models.moduleformer.auxiliary import auxiliary_loss


@contextmanager
def own_losses(model: Any, passes: int = 1) -> Iterator[None]:
    """Within the block every training pass without labels also trains the auxiliary losses.

    Args:
        model: a `ModuleFormerForCausalLM`.
        passes: per optimiser step; each adds its share of their mean.
    """
    config = model.config

    def ask(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, "output_router_logits": True}) if wanted(kwargs) else None

    def carry(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if wanted(kwargs):
            found = SimpleNamespace(**output, last_hidden_state=output.logits)
            _, total = auxiliary_loss(config, found, kwargs.get("attention_mask"))
            apply: Any = _Carry.apply
            output.logits = apply(output.logits, total / passes)
        return output

    def wanted(kwargs: dict[str, Any]) -> bool:
        return model.training and torch.is_grad_enabled() and kwargs.get("labels") is None

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
        ctx: Any, logits: Float[Tensor, "B T V"], term: Float[Tensor, ""]
    ) -> Float[Tensor, "B T V"]:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, gradient.new_ones(())
