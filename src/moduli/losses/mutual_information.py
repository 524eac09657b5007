"""Losses on the statistics of a router: mutual information, switch with z, concentration.

All of them see the softmax over all experts, before any selection. With p_e(x) the probability of
expert e for token x, and means over the N tokens of a call:

    mutual information   H(e|x) - H(e) = -MI(e; x): sure per token, even over tokens
    switch               E sum_e P_e F_e + 0.1 mean_x (logsumexp_e s_e(x))^2
    concentration        H(e): all tokens on few experts, for tuning on one task before pruning

Padding is left out where a mask of real tokens is given. Where one router is used several times
(blocks that are shared over depth), its statistics are averaged over the calls before the loss is
taken.
Letters: T tokens, E experts, K experts per token.
Source: ModuleFormer (arXiv 2306.04640), IBM/ModuleFormer `utils/gate.py`; the concentration loss is
not in the published code and is the second term of mutual information, with the sign reversed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moduli.losses.z_loss import squared_logsumexp

EPS = 1e-8
Z_SHARE = 0.1


@dataclass(frozen=True)
class RouterStatistics:
    """What the losses need to know of one or several calls of a router.

    Attributes:
        mean_probability: of every expert.
        conditional_entropy: H(e|x), in nats.
        mass: summed probability of every expert.
        counts: tokens that chose every expert.
        squared_logsumexp: sum over tokens of (logsumexp of the logits)^2.
        tokens: how many there were.
    """

    mean_probability: Float[Tensor, " E"]
    conditional_entropy: Float[Tensor, ""]
    mass: Float[Tensor, " E"]
    counts: Float[Tensor, " E"]
    squared_logsumexp: Float[Tensor, ""]
    tokens: Float[Tensor, ""]


def router_statistics(
    logits: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    real: Bool[Tensor, " T"] | None = None,
    *,
    zero_padding: bool = False,
) -> RouterStatistics:
    """Statistics of one call.

    Args:
        logits: of all experts.
        experts: that were chosen.
        real: False for tokens to leave out; None keeps all.
        zero_padding: what the reference does with those instead: their logits and probabilities
            are 0, and they count in every mean.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    log_probs = logits.log_softmax(dim=-1)
    probs = log_probs.exp()
    # The reference counts gates above 0, so that a choice whose probability is 0 is none.
    chosen = torch.zeros_like(probs).scatter(1, experts, 1.0) * (probs > 0)
    log_probs = log_probs.where(probs > 0, 0)  # of a closed expert it is -inf, and 0 log 0 is 0
    tokens = torch.tensor(float(logits.shape[0]), device=logits.device)
    if real is not None:
        keep = real[:, None]
        probs, chosen = probs * keep, chosen * keep
        if zero_padding:
            logits = logits * keep
        else:
            tokens = real.sum().clamp_min(1).to(tokens.dtype)
    squared = squared_logsumexp(logits)
    if real is not None and not zero_padding:
        squared = squared * real
    return RouterStatistics(
        mean_probability=probs.sum(0) / tokens,
        conditional_entropy=-(probs * log_probs).sum() / tokens,
        mass=probs.sum(0),
        counts=chosen.sum(0),
        squared_logsumexp=squared.sum(),
        tokens=tokens,
    )


def accumulated(calls: Sequence[RouterStatistics]) -> RouterStatistics:
    """Statistics of several calls of one router: means of means, sums of sums."""

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(call, name) for call in calls]).mean(0)

    def total(name: str) -> Tensor:
        return torch.stack([getattr(call, name) for call in calls]).sum(0)

    return RouterStatistics(
        mean("mean_probability"), mean("conditional_entropy"), total("mass"), total("counts"),
        total("squared_logsumexp"), total("tokens"),
    )  # fmt: skip


def mutual_information_loss(found: RouterStatistics) -> Float[Tensor, ""]:
    """H(e|x) - H(e), between -log E and 0, in nats."""
    return found.conditional_entropy - concentration_loss(found)


def concentration_loss(found: RouterStatistics) -> Float[Tensor, ""]:
    """H(e), between 0 and log E, in nats."""
    mean = found.mean_probability
    return -(mean * (mean + EPS).log()).sum()


def switch_z_loss(found: RouterStatistics) -> Float[Tensor, ""]:
    """E sum of normalised mass times normalised counts (1 if even), plus a tenth of the z-loss."""
    mass = found.mass / found.mass.sum().clamp_min(1e-12)
    counts = found.counts / found.counts.sum().clamp_min(1e-12)
    return len(mass) * (mass * counts).sum() + Z_SHARE * found.squared_logsumexp / found.tokens
