"""The record that routers return and kernels read.

Letters: T tokens (batch x sequence), E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts each token uses, and how much of each.

    Attributes:
        experts: expert of every slot; always a valid index, also where the slot is not active.
        weights: combine weight of every slot.
        active: False where a slot is not computed (dropped by capacity, or a router that uses
            fewer than K experts for this token); None when all are.
        scores: what the router thought of every expert, without noise, for losses and reports.
        noisy_scores: the scores that selection saw; the same as `scores` when there is no noise.
    """

    experts: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    active: Bool[Tensor, "T K"] | None = None
    scores: Float[Tensor, "T E"] | None = None
    noisy_scores: Float[Tensor, "T E"] | None = None

    def gates(self, num_experts: int) -> Float[Tensor, "T {num_experts}"]:
        """The same routing as a matrix: weight of each expert for each token, 0 where unused."""
        weights = self.weights if self.active is None else self.weights * self.active
        empty = torch.zeros(
            weights.shape[0], num_experts, dtype=weights.dtype, device=weights.device
        )
        return empty.scatter_add(1, self.experts, weights)


@dataclass(frozen=True)
class RouteContext:
    """What a routing may depend on besides the token itself; passed along, never global.

    Attributes:
        training: whether noise is drawn.
        real: True for real tokens, False for padding; None when nothing is known of padding.
        noise: a standard normal sample to use instead of drawing one (to reproduce a run).
        generator: where noise is drawn from; None is torch's own, whose state gradient
            checkpointing restores when it runs a layer a second time.
        ids: the vocabulary's number of every token, for routers that look tokens up; None where
            they are not known, or nobody asked for them.
        shape: the leading dimensions that the tokens had, (B, S) where they are whole sequences.
    """

    training: bool = False
    real: Bool[Tensor, " T"] | None = None
    noise: Float[Tensor, "T E"] | None = None
    generator: torch.Generator | None = None
    ids: Int[Tensor, " T"] | None = None
    shape: tuple[int, ...] | None = None
