"""The routers of ModuleFormer: three ways to score experts, one rule.

    mlp      s = W3 gelu(W0 x + b0)            released models; the exact GELU
    linear   s = W0 x
    gmm      s = exp(t) cos(W x, c_e)

The gate of a chosen expert is its probability among all experts, which is not renormalised over
the chosen ones, so that the gates of a token sum to less than 1. In training `sample_topk` of the k
experts may be drawn by probability instead of being the best.
Letters: T tokens, D width, E experts, K experts per token, G hidden width of the router.
Source: IBM/ModuleFormer `utils/gate.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moduli.models.moduleformer.configuration import ModuleFormerConfig
from moduli.routing import RouteContext, Router, Routing, Rule

FLOOR = 1e-6  # every expert that is not yet taken can be drawn
NORM_FLOOR = 1e-12


class ModuleFormerRouter(Router):
    """A router of one layer. Parameters have the published names.

    Args:
        config: of the model.
        num_experts: E of this layer.
        top_k: K.
    """

    def __init__(self, config: ModuleFormerConfig, num_experts: int, top_k: int) -> None:
        super().__init__(num_experts, Rule(top_k, combine="probability"))
        self.sample = config.sample_topk
        width, hidden = config.n_embd, config.gating_size
        self.w_gate: nn.Module
        if config.gate_type == "mlp":
            self.w_gate = nn.Sequential(
                nn.Linear(width, hidden),
                nn.GELU(),
                nn.Dropout(config.moe_pdrop),
                nn.Linear(hidden, num_experts, bias=False),
            )
        elif config.gate_type == "linear":
            self.w_gate = nn.Sequential(nn.Linear(width, num_experts, bias=False))
        else:
            self.w_gate = nn.Linear(width, hidden, bias=False)
            self.expert_centroids = nn.Parameter(torch.empty(num_experts, hidden))
            self.temperature = nn.Parameter(torch.zeros(1))

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        z: Tensor = self.w_gate(x)
        if not hasattr(self, "expert_centroids"):
            return z
        cosine = F.normalize(z, dim=-1, eps=NORM_FLOOR) @ self.centroids().T
        return self.temperature.exp() * cosine

    def centroids(self) -> Float[Tensor, "E G"]:
        """Unit vectors of the experts, of a "gmm" router."""
        return F.normalize(self.expert_centroids, dim=-1, eps=NORM_FLOOR)

    def freeze(self, frozen: bool) -> None:
        """Leave it as it is in training, or let it learn."""
        self.requires_grad_(not frozen)

    def select(self, scores: Float[Tensor, "T E"], context: RouteContext) -> Routing:
        if not (self.sample and context.training):
            return super().select(scores, context)
        probs = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        experts = drawn(probs.detach(), self.rule.top_k, self.sample, context.generator)
        return Routing(experts, probs.gather(1, experts), None, scores, scores)


def drawn(
    probs: Float[Tensor, "T E"], top_k: int, sample: int, generator: torch.Generator | None = None
) -> Int[Tensor, "T K"]:
    """The best `top_k - sample` experts of every token, and `sample` others drawn by probability.

    Args:
        probs: over all experts.
        top_k: K.
        sample: how many are drawn, without replacement, in proportion to p + 1e-6.
        generator: where from; None is torch's own.
    """
    best = probs.topk(top_k - sample, dim=-1).indices
    left = (probs + FLOOR).scatter(1, best, 0.0)
    return torch.cat([best, torch.multinomial(left, sample, generator=generator)], dim=1)
