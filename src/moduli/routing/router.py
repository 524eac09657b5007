"""The base of all token routers: tokens [T, D] in, `Routing` out.

A router of your own overrides `scores` and nothing else:

    class NormRouter(Router):
        def __init__(self, hidden, num_experts, rule):
            super().__init__(num_experts, rule)
            self.gate = nn.Linear(hidden, num_experts, bias=False)

        def scores(self, x):
            return self.gate(F.normalize(x, dim=-1))
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moduli.routing.record import RouteContext, Routing
from moduli.routing.rule import Rule, route


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Suspends autocast, which scores must not see: they decide by small gaps."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    if available and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # entering autocast costs as much as scoring one token


class Router(nn.Module):
    """Scores tokens against experts and applies a `Rule`.

    Args:
        num_experts: E.
        rule: selection, combine weights, noise and capacity; may be replaced at run time, for
            example to change the number of experts per token.
    """

    learned = True  # False: the scores have no parameters of their own to train
    by_neurons = False  # True: scores come from the pre-activations of the neurons, not from x
    by_ids = False  # True: it looks tokens up by their ids, which the context has to bring

    def __init__(self, num_experts: int, rule: Rule) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.rule = rule

    def require_top_k(self, k: int) -> None:
        """Raise if the router cannot take k experts per token, however many there are.

        Raises:
            ConfigError: it cannot.
        """

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Score of each expert for each token; higher is better."""
        raise TypeError(f"{type(self).__name__} does not define scores(x)")

    def from_preactivations(
        self, z: Float[Tensor, "T F"], bias: Float[Tensor, " F"] | None
    ) -> Float[Tensor, "T E"]:
        """Scores from one number per neuron, experts one after the other.

        Args:
            z: what the first projection of the FFN returned.
            bias: the part of it that is the projection's bias, or None.
        """
        raise TypeError(f"{type(self).__name__} does not score by neurons")

    def select(self, scores: Float[Tensor, "T E"], context: RouteContext) -> Routing:
        """The routing that `rule` makes of given scores."""
        return route(scores, self.rule, context)

    def forward(self, x: Float[Tensor, "T D"], context: RouteContext) -> Routing:
        return self.select(self.scores(x), context)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.rule.top_k}, {self.rule.combine}"
