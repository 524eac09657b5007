"""The balance loss of gates with learned noise: Shazeer's importance and smooth load.

Letters: T tokens, E experts, K experts per token.
Source: Shazeer et al. 2017, appendix A; pjlab-sys4nlp/llama-moe `TopKBalancedNoisyGate`, which
weighs it by 0.01.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moduli.losses.balance import cv_squared


def smooth_load(
    scores: Float[Tensor, "T E"],
    noisy_scores: Float[Tensor, "T E"],
    spread: Float[Tensor, "T E"] | None,
    top_k: int,
    *,
    chosen_by: Literal["scores", "noise"] = "scores",
) -> Float[Tensor, " E"]:
    """Expected number of tokens of every expert, were its own noise drawn anew.

    The chance of expert i is that its clean score plus fresh noise exceeds the K-th largest of
    the other experts' noisy scores: the K-th largest of all if i was not chosen, else the next.

    Args:
        scores: without noise.
        noisy_scores: what selection saw.
        spread: standard deviation of the noise; None: there was none, and the load is a count,
            which has no gradient.
        top_k: K.
        chosen_by: how it is told which experts were chosen. LLaMA-MoE compares the noise alone
            with the threshold ("noise"), which says little about who was chosen.
    """
    num_experts = scores.shape[1]
    if spread is None or top_k == num_experts:
        chosen = noisy_scores.topk(top_k, dim=-1).indices
        return torch.bincount(chosen.flatten(), minlength=num_experts).to(scores.dtype)
    largest = noisy_scores.topk(top_k + 1, dim=-1).values
    if_out, if_in = largest[:, top_k - 1, None], largest[:, top_k, None]
    compared = noisy_scores if chosen_by == "scores" else noisy_scores - scores
    threshold = torch.where(compared > if_in, if_in, if_out)
    chance: Tensor = torch.special.ndtr((scores - threshold) / spread)
    return chance.sum(0)


def noisy_top_k_loss(
    scores: Float[Tensor, "T E"],
    noisy_scores: Float[Tensor, "T E"],
    spread: Float[Tensor, "T E"] | None,
    top_k: int,
    *,
    chosen_by: Literal["scores", "noise"] = "scores",
) -> Float[Tensor, ""]:
    """CV^2 of importance plus CV^2 of the smooth load.

    Importance of an expert is the sum over tokens of its softmax among the K chosen ones.

    Args:
        scores: without noise.
        noisy_scores: what selection saw.
        spread: standard deviation of the noise, as in a `NoisyRouting`, or None.
        top_k: K.
        chosen_by: see `smooth_load`.
    """
    top = noisy_scores.topk(top_k, dim=-1)
    weights = torch.zeros_like(scores).scatter(1, top.indices, top.values.softmax(dim=-1))
    load = smooth_load(scores, noisy_scores, spread, top_k, chosen_by=chosen_by)
    return cv_squared(weights.sum(0)) + cv_squared(load)
