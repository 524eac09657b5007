"""Slots and capacity: how many tokens an expert may take, and which ones it drops.

The rules are those of the Tutel layer that EMoE uses: first choices of all tokens come before any
second choice, and inside one rank tokens are served by priority or by position.
Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Slots per expert, K * floor(|factor| * ceil(T / E)).

    A factor of 0 means that no token is dropped and has no capacity; asking for it raises. A
    negative factor means "no more than needed, at most this", which drops the same slots.

    Raises:
        ValueError: factor is 0.
    """
    if factor == 0:
        raise ValueError("a capacity factor of 0 drops nothing and has no capacity")
    return top_k * math.floor(abs(factor) * math.ceil(tokens / num_experts))


def slots(
    experts: Int[Tensor, "T K"],
    num_experts: int,
    priority: Float[Tensor, " T"] | None = None,
    real: Bool[Tensor, " T"] | None = None,
) -> Int[Tensor, "T K"]:
    """Position of every assignment in its expert's queue, from 0, before any capacity cut.

    Args:
        experts: expert of every slot, in order of choice.
        num_experts: E.
        priority: tokens with a higher one are served first within a rank (batch-prioritised
            routing); None serves in order of position.
        real: tokens that queue at all; the others (padding) take no place.
    """
    tokens, top_k = experts.shape
    device = experts.device
    if priority is None:
        order = torch.arange(tokens, device=device)
    else:
        order = torch.argsort(priority, descending=True, stable=True)
    queue = experts if real is None else experts.masked_fill(~real[:, None], num_experts)
    queue = queue[order].T.reshape(-1)  # rank by rank, each in order of service
    by_expert = torch.argsort(queue, stable=True)
    counts = torch.bincount(queue, minlength=num_experts + 1)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(queue)
    place[by_expert] = torch.arange(queue.numel(), device=device) - first[queue[by_expert]]
    served = torch.empty_like(experts)
    served[order] = place.reshape(top_k, tokens).T
    return served
