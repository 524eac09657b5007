"""The order in which slots are computed: sorted by expert.

Letters: T tokens, E experts, K experts per token, S active slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Slots in the order of their experts; within an expert in the order of tokens.

    Attributes:
        slots: which slot stands at each place.
        tokens: which token.
        place: where each slot went; S for a slot that is not active.
        counts: slots of every expert.
    """

    slots: Int[Tensor, " S"]
    tokens: Int[Tensor, " S"]
    place: Int[Tensor, "T K"]
    counts: list[int]


def plan(experts: Int[Tensor, "T K"], active: Bool[Tensor, "T K"] | None, num_experts: int) -> Plan:
    """Sort the slots of a routing; waits for the device once, to know the counts."""
    ids = experts.reshape(-1)
    if active is not None:
        ids = torch.where(active.reshape(-1), ids, num_experts)
    # Narrow keys sort several times faster on CPU.
    ids = ids.to(
        torch.uint8 if num_experts < 256 else torch.int16 if num_experts < 32768 else ids.dtype
    )
    order = ids.sort(stable=True).indices
    counts = torch.bincount(ids, minlength=num_experts + 1).tolist()[:num_experts]
    used = sum(counts)
    place = torch.empty_like(order)
    place.scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    if used < order.shape[0]:
        place.clamp_(max=used)
        order = order[:used]
    return Plan(order, order // experts.shape[1], place.view(experts.shape), counts)
