"""Expert choice: every expert takes the tokens it scores highest, instead of the other way round.

    S = softmax over experts of x W;  expert i takes the C tokens with the largest S[:, i],
    C = k T / E

Load is balanced by construction. A token may be taken by several experts or by none, and who is
taken depends on all tokens of the batch, later ones included, so that it does not suit
autoregressive decoders. Letters: T tokens, D width, E experts.
Source: expert-choice routing (NeurIPS 2022); sparse upcycling (ICLR 2023) uses it in encoders.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moduli.routing.learned import LinearRouter
from moduli.routing.record import RouteContext, Routing
from moduli.routing.rule import add_noise


class ExpertChoiceRouter(LinearRouter):
    """A linear gate by which experts choose tokens.

    Args:
        hidden: D.
        num_experts: E.
        rule: `top_k` is the mean number of experts per token (the capacity factor);
            `combine="softmax"` scales the weights of a token to sum to 1, "probability" leaves
            them as they are; padding takes no place unless `route_padding`.
        init: see `LinearRouter`.
    """

    def select(self, scores: Float[Tensor, "T E"], context: RouteContext) -> Routing:
        """All E slots of every token, active where the expert has taken it."""
        rule = self.rule
        noisy = add_noise(scores, rule, context)
        probs = noisy.softmax(dim=-1)
        real = None if rule.route_padding else context.real
        ranked = probs.detach()
        tokens = len(scores)
        if real is not None:
            ranked = ranked.masked_fill(~real[:, None], -1.0)
            tokens = int(real.sum())
        taken = min(tokens, max(1, round(rule.top_k * tokens / self.num_experts)))
        active = torch.zeros_like(probs, dtype=torch.bool)
        if tokens:
            active.scatter_(0, ranked.topk(taken, dim=0).indices, True)
        weights = probs * active
        if rule.combine == "softmax":
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(
                torch.finfo(probs.dtype).eps
            )
        experts = torch.arange(self.num_experts, device=scores.device).expand_as(probs)
        return Routing(experts, weights, active, scores, noisy)
