"""The auxiliary losses and the load of a pass, from what its routers said.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moduli.losses.mutual_information import (
    concentration_loss,
    mutual_information_loss,
    router_statistics,
    switch_z_loss,
)
from moduli.models.moduleformer.configuration import ModuleFormerConfig
from moduli.models.moduleformer.inputs import real_tokens

IGNORED = -100


def router_losses(
    config: ModuleFormerConfig, found: Any, attention_mask: Tensor | None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The sums over routers of their balance losses and of their concentration losses.

    Balance is mutual information if the configuration says "mi", and the switch loss with a z-loss
    if it says anything else, as the reference has it.

    Args:
        config: of the model.
        found: output of the decoder with what its routers said.
        attention_mask: [B, S], whose padding is left out unless `count_padding` is set.
    """
    h = found.last_hidden_state
    real = None if config.count_padding else real_tokens(attention_mask, h.shape[1])
    balance_loss = mutual_information_loss if config.aux_loss_type == "mi" else switch_z_loss
    balance = concentration = torch.zeros((), device=h.device)
    for logits, experts in zip(found.router_logits, found.router_experts, strict=True):
        seen = None if real is None else real.to(logits.device)
        statistics = router_statistics(logits, experts, seen)
        balance = balance + balance_loss(statistics).to(h.device)
        concentration = concentration + concentration_loss(statistics).to(h.device)
    return balance, concentration


def share_of_step(
    labels: Int[Tensor, "B T"], num_items_in_batch: Tensor | int | None, shift_labels: Tensor | None
) -> Tensor | float:
    """The part of an optimiser step's targets that are in this pass.

    Trainer tells the targets of all passes of a step, and adds up their losses. What is a mean over
    a pass counts by its share of them.

    Args:
        labels: before they are shifted.
        num_items_in_batch: targets of the step; None if there is one pass.
        shift_labels: the targets, if they were shifted elsewhere.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    return (targets != IGNORED).sum() / num_items_in_batch


def expert_load(
    experts: Int[Tensor, "T K"], num_experts: int, real: Bool[Tensor, " T"] | None
) -> Int[Tensor, " E"]:
    """Tokens of every expert, without padding."""
    each = torch.ones_like(experts) if real is None else real[:, None].expand_as(experts).long()
    empty = experts.new_zeros(num_experts)
    return empty.scatter_add(0, experts.flatten(), each.to(experts.device).flatten())
