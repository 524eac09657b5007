"""The router's z-loss: the mean over tokens of (logsumexp of the logits)^2.

It keeps logits small, so that rounding them in a low precision changes little.
Letters: T tokens, E experts.
Source: ST-MoE (arXiv 2202.08906).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def squared_logsumexp(logits: Float[Tensor, "T E"]) -> Float[Tensor, " T"]:
    """(logsumexp over experts)^2 of every token."""
    return logits.logsumexp(dim=-1).square()


def z_loss(logits: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Mean of `squared_logsumexp` over tokens; 0 only where the exponentials sum to 1."""
    return squared_logsumexp(logits).mean()
