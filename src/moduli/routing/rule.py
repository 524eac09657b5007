"""From scores to a routing: noise, selection, combine weights, capacity.

Letters: T tokens, E experts, K experts per token. Section numbers of papers are given where the
rule comes from one; the order of steps is that of EMoE's layer (Tutel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moduli.errors import ConfigError
from moduli.routing.capacity import capacity, slots
from moduli.routing.record import RouteContext, Routing

Choose = Literal["top", "bottom", "not_top"]
Combine = Literal["one", "softmax", "probability", "straight_through"]


@dataclass(frozen=True)
class Rule:
    """How scores become a routing.

    Attributes:
        top_k: K.
        choose: "top" the K best experts, "bottom" the K worst, "not_top" the E - K others: the
            three arms of EMoE's negative-transfer analysis.
        combine: "one" every chosen expert counts fully (EMoE); "softmax" its probability,
            renormalised over the chosen ones if K > 1 (Tutel); "probability" is that without
            renormalising (Switch); "straight_through" counts fully but passes the gradient of the
            log-probability, so that a learned gate starts at the dense function.
        noise: standard deviation of the score noise in training, in units of 1 / E.
        capacity_factor: see `moduli.routing.capacity`; 0 drops nothing.
        prioritized: serve tokens in order of their best probability (batch-prioritised routing).
        route_padding: let padding tokens compete for capacity and enter losses, as the
            references do.
    """

    top_k: int
    choose: Choose = "top"
    combine: Combine = "one"
    noise: float = 0.0
    capacity_factor: float = 0.0
    prioritized: bool = True
    route_padding: bool = False


def route(scores: Float[Tensor, "T E"], rule: Rule, context: RouteContext) -> Routing:
    """Apply `rule` to `scores`.

    Raises:
        ConfigError: more experts are asked for than there are.
    """
    num_experts = scores.shape[1]
    if not 1 <= rule.top_k <= num_experts:
        raise ConfigError(f"top_k is {rule.top_k}, but there are {num_experts} experts")
    noisy = add_noise(scores, rule, context)
    experts = _choose(noisy, rule)
    plain = rule.combine == "one"
    needs_probs = not plain or (rule.capacity_factor != 0 and rule.prioritized)
    probs = noisy.softmax(dim=-1) if needs_probs else noisy
    if plain:
        weights = torch.ones(experts.shape, dtype=scores.dtype, device=scores.device)
    else:
        weights = _weights(noisy, probs, experts, rule.combine)
    active = None
    if rule.capacity_factor != 0:
        real = None if rule.route_padding else context.real
        priority = probs.detach().amax(dim=-1) if rule.prioritized else None
        place = slots(experts, num_experts, priority, real)
        tokens = place.shape[0] if real is None else int(real.sum())
        active = place < capacity(tokens, num_experts, rule.top_k, rule.capacity_factor)
    return Routing(experts, weights, active, scores, noisy)


def add_noise(
    scores: Float[Tensor, "T E"], rule: Rule, context: RouteContext
) -> Float[Tensor, "T E"]:
    """The scores that selection sees: in training with normal noise of `rule.noise` / E."""
    if not (context.training and rule.noise):
        return scores
    sample = context.noise
    if sample is None:
        sample = torch.empty_like(scores).normal_(generator=context.generator)
    return scores + rule.noise * sample / scores.shape[1]


def _choose(scores: Float[Tensor, "T E"], rule: Rule) -> Int[Tensor, "T K"]:
    if rule.choose == "top":
        return scores.topk(rule.top_k, dim=-1).indices
    if rule.choose == "bottom":
        return scores.topk(rule.top_k, dim=-1, largest=False).indices
    return scores.argsort(dim=-1, descending=True, stable=True)[:, rule.top_k :]


def _weights(
    scores: Float[Tensor, "T E"],
    probs: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    combine: Combine,
) -> Float[Tensor, "T K"]:
    if combine == "straight_through":
        # Value 1, gradient d log p: the layer starts at the dense function at k = E. From the
        # logarithm, since a probability may be too small for a number.
        log_probs = scores.log_softmax(dim=-1).gather(1, experts)
        return 1 + (log_probs - log_probs.detach())
    probs = probs.gather(1, experts)
    if probs.shape[1] == 1 or combine == "probability":
        return probs
    return probs / probs.sum(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).eps)
