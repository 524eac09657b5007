"""From scores to a routing: noise, selection, combine weights, capacity.

Letters: T tokens, E experts, K experts per token. Section numbers of papers are given where the
rule comes from one; the order of steps is that of EMoE's layer (Tutel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moduli.errors import ConfigError
from moduli.routing.capacity import capacity, slots
from moduli.routing.record import RouteContext, Routing
from moduli.routing.topk import best

Choose = Literal["top", "bottom", "not_top"]
Combine = Literal["one", "softmax", "probability", "straight_through"]

VECTOR = 16  # float32 numbers that a wide CPU computes at once


@dataclass(frozen=True)
class Rule:
    """How scores become a routing.

    Attributes:
        top_k: K.
        choose: "top" the K best experts, "bottom" the K worst, "not_top" the E - K others: the
            three arms of EMoE's negative-transfer analysis. Of equal scores the expert with the
            lower index comes first, in all three.
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
    noisy = add_noise(scores, rule, context)
    experts = choose(noisy, rule)
    if rule.combine == "one":
        weights = torch.ones(experts.shape, dtype=scores.dtype, device=scores.device)
    else:
        weights = combine_weights(noisy, experts, rule)
    return Routing(experts, weights, admitted(noisy, experts, rule, context), scores, noisy)


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


def choose(scores: Float[Tensor, "T E"], rule: Rule) -> Int[Tensor, "T K"]:
    """The experts that `rule` selects, in order of choice.

    Raises:
        ConfigError: more experts are asked for than there are.
    """
    num_experts = scores.shape[1]
    if not 1 <= rule.top_k <= num_experts:
        raise ConfigError(f"top_k is {rule.top_k}, but there are {num_experts} experts")
    if rule.choose == "top":
        return best(scores, rule.top_k)
    if rule.choose == "bottom":
        return best(-scores, rule.top_k)
    return best(scores, num_experts)[:, rule.top_k :]


def admitted(
    scores: Float[Tensor, "T E"], experts: Int[Tensor, "T K"], rule: Rule, context: RouteContext
) -> Bool[Tensor, "T K"] | None:
    """Which of the chosen slots fit the capacity of their expert; None: all, without capacity."""
    if rule.capacity_factor == 0:
        return None
    num_experts = scores.shape[1]
    real = None if rule.route_padding else context.real
    priority = scores.detach().softmax(dim=-1).amax(dim=-1) if rule.prioritized else None
    place = slots(experts, num_experts, priority, real)
    tokens = place.shape[0] if real is None else int(real.sum())
    return place < capacity(tokens, num_experts, rule.top_k, rule.capacity_factor)


def softmax_over_chosen(
    scores: Float[Tensor, "T E"], experts: Int[Tensor, "T K"]
) -> Float[Tensor, "T K"]:
    """Probabilities of the chosen experts, renormalised, in at least float32."""
    return _softmax(scores.gather(1, experts))


def _softmax(scores: Float[Tensor, "T N"]) -> Float[Tensor, "T N"]:
    """Over every row, in at least float32."""
    dtype = _at_least_float32(scores)
    tokens, length = scores.shape
    if scores.device.type == "cpu" and length < VECTOR and tokens > 1:
        # Rows shorter than a vector are done number by number; columns of tokens are not.
        return scores.T.softmax(dim=0, dtype=dtype).T.contiguous()
    return scores.softmax(dim=-1, dtype=dtype)


def _at_least_float32(scores: Tensor) -> torch.dtype:
    return scores.dtype if scores.dtype.itemsize >= 4 else torch.float32


def combine_weights(
    scores: Float[Tensor, "T E"], experts: Int[Tensor, "T K"], rule: Rule
) -> Float[Tensor, "T K"]:
    """Weights of the chosen experts as `rule.combine` says, which is not "one"."""
    if rule.combine == "straight_through":
        # Value 1, gradient d log p: the layer starts at the dense function at k = E. From the
        # logarithm, since a probability may be too small for a number.
        log_probs = scores.log_softmax(dim=-1, dtype=_at_least_float32(scores)).gather(1, experts)
        return 1 + (log_probs - log_probs.detach())
    single = experts.shape[1] == 1
    if rule.combine == "softmax" and rule.choose == "top" and not single:
        return softmax_over_chosen(scores, experts)
    probs = _softmax(scores).gather(1, experts)
    if single or rule.combine == "probability":
        return probs
    # Tutel's guard acts where experts far below the best are chosen: their weights stay small.
    return probs / probs.sum(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).eps)
