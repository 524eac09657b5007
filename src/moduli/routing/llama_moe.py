"""The noisy top-k gate of LLaMA-MoE.

    clean_i = network_i(x),   spread_i = softplus(W x)_i + floor,   noisy = clean + n * spread,

n standard normal, in training only; the k largest noisy logits are chosen, and their softmax
(over those k alone) times a scale is the combine weight. With k = 1 the weight is the scale.

A gate that starts at 0 gives each of k experts the weight scale / k. LLaMA-MoE's scale N / k
compensates for the neurons that are left out as far as the experts agree; the sum over a random
choice equals the dense layer on average only with scale N.

Letters: T tokens, D width, E experts, K experts per token.
Source: LLaMA-MoE (EMNLP 2024); pjlab-sys4nlp/llama-moe `TopKBalancedNoisyGate`, after Shazeer et
al. 2017, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moduli.errors import ConfigError
from moduli.routing.record import RouteContext, Routing
from moduli.routing.router import Router, full_precision
from moduli.routing.rule import Rule, admitted, choose, softmax_over_chosen

Network = Literal["linear", "mlp"]


@dataclass(frozen=True)
class NoisyRouting(Routing):
    """A routing that says how much noise its scores had.

    Attributes:
        spread: standard deviation of the noise of every score; None where there was none.
    """

    spread: Float[Tensor, "T E"] | None = None


class NoisyTopKRouter(Router):
    """Scores by a small network, with learned noise in training.

    Args:
        hidden: D.
        num_experts: E.
        rule: combines by "softmax" and has no noise of its own.
        network: "linear" starts at 0, so that all experts are equal; "mlp" has one hidden layer
            of E tanh units and starts as torch does.
        scale: of the combine weights; None: E / K, with the K of now.
        noise_floor: least standard deviation of the noise; None: no noise at all.

    Raises:
        ConfigError: the rule has weights or noise of another kind.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        rule: Rule,
        *,
        network: Network = "linear",
        scale: float | None = None,
        noise_floor: float | None = 0.01,
    ) -> None:
        super().__init__(num_experts, rule)
        if rule.combine != "softmax" or rule.noise:
            raise ConfigError(
                "this gate weighs by the softmax of the chosen logits and learns its noise; its "
                f'rule must have combine="softmax" and noise=0, not {rule.combine!r} and '
                f"{rule.noise}"
            )
        self.scale = num_experts / rule.top_k if scale is None else scale
        self.noise_floor = noise_floor
        first = nn.Linear(hidden, num_experts, bias=False)
        if network == "linear":
            nn.init.zeros_(first.weight)
            self.network = nn.Sequential(first)
        else:
            second = nn.Linear(num_experts, num_experts, bias=False)
            self.network = nn.Sequential(first, nn.Tanh(), second)
        self.noise: nn.Linear | None = None
        if noise_floor is not None:
            self.noise = nn.Linear(hidden, num_experts, bias=False)
            nn.init.zeros_(self.noise.weight)
        self._spread: Tensor | None = None  # of the scores that `select` is about to be given

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        with full_precision(x.device):
            x = x.to(next(self.network.parameters()).dtype)
            self._spread = None
            if self.training and self.noise is not None and self.noise_floor is not None:
                self._spread = F.softplus(self.noise(x)) + self.noise_floor
            logits: Tensor = self.network(x)
            return logits

    def select(self, scores: Float[Tensor, "T E"], context: RouteContext) -> NoisyRouting:
        """The routing of the scores that were computed last, with their noise in training."""
        spread, self._spread = self._spread, None
        noisy = scores
        if context.training and spread is not None:
            sample = context.noise
            if sample is None:
                sample = torch.empty_like(scores).normal_(generator=context.generator)
            noisy = scores + sample * spread
        else:
            spread = None
        experts = choose(noisy, self.rule)
        weights = self.scale * softmax_over_chosen(noisy, experts)
        active = admitted(noisy, experts, self.rule, context)
        return NoisyRouting(experts, weights, active, scores, noisy, spread)

    def __getstate__(self) -> dict[str, object]:
        # It has a graph, which can neither be copied nor pickled.
        return {**self.__dict__, "_spread": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}"
