"""Learned gates: linear, and the cosine gate of GMoE and EMoE-learn.

Letters: T tokens, D width, E experts, P width of the cosine projection.
Source: Tutel `top` and `cosine_top` gates as bundled with qiuzh20/EMoE.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moduli.routing.router import Router, full_precision
from moduli.routing.rule import Rule


class LinearRouter(Router):
    """Scores x @ gate.T with a trainable gate.

    Args:
        hidden: D.
        num_experts: E.
        rule: see `Rule`.
        init: starting gate [E, D], for example the mean keys; None keeps torch's default.
    """

    def __init__(
        self, hidden: int, num_experts: int, rule: Rule, init: Float[Tensor, "E D"] | None = None
    ) -> None:
        super().__init__(num_experts, rule)
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        if init is not None:
            with torch.no_grad():
                self.gate.weight.copy_(init)

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        with full_precision(x.device):
            weight = self.gate.weight
            return F.linear(x.to(weight.dtype), weight)


class CosineRouter(Router):
    """Cosine of the projected token with one learned direction per expert, times a temperature.

    s = normalise(P x + p) . normalise(M_i) * min(exp(tau), 100), tau starting at ln 2.

    Args:
        hidden: D.
        num_experts: E.
        rule: see `Rule`.
        projection: P, 256 in the reference.
    """

    MAX_TEMPERATURE = 100.0

    def __init__(self, hidden: int, num_experts: int, rule: Rule, projection: int = 256) -> None:
        super().__init__(num_experts, rule)
        self.temperature = nn.Parameter(torch.full((1,), math.log(2.0)))
        self.projector = nn.Linear(hidden, projection)
        self.directions = nn.Parameter(torch.empty(projection, num_experts).normal_(0, 0.01))

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        with full_precision(x.device):
            z = self.projector(x.to(self.directions.dtype))
            cosine = F.normalize(z, dim=-1) @ F.normalize(self.directions, dim=0)
            limit = math.log(self.MAX_TEMPERATURE)
            return cosine * self.temperature.clamp(max=limit).exp()
