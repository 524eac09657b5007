"""The routers of Switch Transformer and GShard: a linear gate, a capacity, one or two experts.

    h = W x in float32,  p = softmax(h)
    top-1 (Switch)   y = p_e FFN_e(x),  e = argmax p: the weight is not renormalised
    top-2 (GShard)   e1 = argmax p, e2 the best of the others; weights p_e1, p_e2 over their sum

GShard's second expert is taken always ("all"), drawn by Gumbel noise on the logits ("sampling"), or
kept with probability min(1, 2 g2) ("random"); the last two in training only. Renormalising "before"
tokens are dropped lets the weight of a dropped choice go; "after" gives it to the one that is left.
A choice that finds no slot is not computed, so that only the residual stream passes.

Jitter multiplies what the gate sees, elementwise, by U[1 - eps, 1 + eps] in training. It acts on a
copy: the experts get the tokens as they are. (transformers multiplies in place, so that its experts
see the jitter in float32 and not in bfloat16.)

Letters: T tokens, D width, E experts, K experts per token.
Sources: Switch Transformers (arXiv 2101.03961), GShard (arXiv 2006.16668), the gates of
facebookresearch/fairseq (branch nllb).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moduli.errors import ConfigError
from moduli.routing.capacity import Capacity
from moduli.routing.learned import LinearRouter
from moduli.routing.names import require_known
from moduli.routing.record import RouteContext, Routing
from moduli.routing.router import full_precision
from moduli.routing.rule import Rule, choose, combine_weights
from moduli.routing.topk import best

Second = Literal["all", "sampling", "random"]
Renormalise = Literal["before", "after"]
Weight = Literal["probability", "straight_through"]


class SwitchRouter(LinearRouter):
    """A linear gate in float32 with the selection of Switch and GShard.

    Padding is never dispatched where it is known.

    Args:
        hidden: D.
        num_experts: E.
        rule: `top_k` and `combine`, "probability" or "straight_through" (weight 1 with the
            gradient of log p); what else a rule says is in the other arguments.
        capacity: slots of an expert.
        second: how the choices after the first are made.
        renormalise: when the weights of several choices are made to sum to 1.
        times_experts: the weight of a single choice is its probability times E.
        jitter: eps.
        init: see `LinearRouter`.

    Raises:
        ConfigError: a name or number that cannot work.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        rule: Rule,
        *,
        capacity: Capacity | None = None,
        second: Second = "all",
        renormalise: Renormalise = "after",
        times_experts: bool = False,
        jitter: float = 0.0,
        init: Float[Tensor, "E D"] | None = None,
    ) -> None:
        super().__init__(hidden, num_experts, rule, init)
        require_known("second", second, Second)
        require_known("renormalise", renormalise, Renormalise)
        require_known("combine", rule.combine, Weight)
        if not 0 <= jitter < 1:
            raise ConfigError(
                f"jitter is {jitter:g}; it is a share of the input, from 0 to below 1"
            )
        self.capacity = capacity or Capacity(factor=None)
        self.second = second
        self.renormalise = renormalise
        self.times_experts = times_experts
        self.jitter = jitter

    def require_top_k(self, k: int) -> None:
        """Raise unless k is 1 (Switch), or 2 (GShard) and one expert has its probability."""
        if k not in (1, 2):
            raise ConfigError(
                f"top_k is {k}; a router of Switch takes 1 expert per token or, as GShard, 2. "
                "moduli.SparseUpcycling takes any number"
            )
        if k == 2 and (self.rule.combine != "probability" or self.times_experts):
            raise ConfigError(
                "top_k is 2, but this router gives a single expert another weight than its "
                "probability (gate_scale), and two of them the shares of theirs; leave it at 1, or "
                'convert with gate_scale="prob"'
            )

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        with full_precision(x.device):
            weight = self.gate.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            x = x.to(dtype)
            if self.training and self.jitter:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            return F.linear(x, weight.to(dtype))

    def select(self, scores: Float[Tensor, "T E"], context: RouteContext) -> Routing:
        """The experts of every token, the weights, and which choices found a slot."""
        experts = self._choices(scores, context)
        weights = combine_weights(scores, experts, self.rule)
        several = experts.shape[1] > 1
        if several and self.renormalise == "before":
            weights = _to_one(weights)
        wanted = self._wanted(weights, context)
        active = self.capacity.admits(scores, experts, wanted, context)
        if several and self.renormalise == "after":
            weights = _to_one(weights if active is None else weights * active)
        if self.times_experts and not several:
            weights = scores.shape[1] * weights
        return Routing(experts, weights, active, scores, scores)

    def _choices(self, scores: Float[Tensor, "T E"], context: RouteContext) -> Int[Tensor, "T K"]:
        if self.rule.top_k == 1 or self.second != "sampling" or not context.training:
            return choose(scores, self.rule)
        first = best(scores, 1)
        sample = torch.empty_like(scores).exponential_(generator=context.generator)
        gumbel = scores.detach() - sample.log()
        others = best(gumbel.scatter(1, first, -torch.inf), self.rule.top_k - 1)
        return torch.cat([first, others], dim=1)

    def _wanted(
        self, weights: Float[Tensor, "T K"], context: RouteContext
    ) -> Bool[Tensor, "T K"] | None:
        """Choices that ask for a slot: not those of padding, nor second ones left to chance."""
        wanted = None if context.real is None else context.real[:, None].expand(weights.shape)
        if self.second != "random" or not context.training or weights.shape[1] == 1:
            return wanted
        # A choice whose weight is half or more is kept; fresh draws lie below 1.
        draw = torch.rand(weights.shape, device=weights.device, generator=context.generator)
        kept = 2 * weights.detach() > draw
        kept[:, 0] = True
        return kept if wanted is None else kept & wanted

    def extra_repr(self) -> str:
        slots = "no limit" if self.capacity.factor is None else self.capacity.rounding
        return f"{super().extra_repr()}, capacity={slots}, second={self.second}"


def _to_one(weights: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
