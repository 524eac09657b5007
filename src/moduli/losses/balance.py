"""Losses that spread tokens over experts.

Letters: T tokens, E experts, K experts per token.
Sources: `load_importance`: the loss of every EMoE configuration, inherited from Tutel and from
Shazeer et al. 2017; `switch`: Switch Transformers, equation 4, and facebookresearch/fairseq
`top1gate.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def cv_squared(v: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation over experts, with the unbiased variance."""
    if v.numel() == 1:
        return v.sum() * 0  # one expert is always balanced; its variance would be 0 / 0
    return v.var() / (v.mean() ** 2 + 1e-10)


def load_importance_loss(
    scores: Float[Tensor, "T E"],
    noisy_scores: Float[Tensor, "T E"],
    top_k: int,
    noise: float,
    *,
    compare: str = "scores",
) -> Float[Tensor, ""]:
    """Half the CV^2 of importance (summed probability) plus half that of the smooth load.

    The load of expert i is the sum over tokens of the chance that fresh noise lifts it over the
    threshold, the smallest selected noisy score.

    Args:
        scores: without noise.
        noisy_scores: what selection saw.
        top_k: K.
        noise: standard deviation of the noise in units of 1 / E; must be positive.
        compare: "scores" compares scores with the threshold, which is a score; "probabilities"
            compares probabilities with it, as Tutel and therefore EMoE do.

    Raises:
        ValueError: noise is not positive, so that there is no smooth load.
    """
    if noise <= 0:
        raise ValueError(f"the load of this loss is smooth only with noise > 0, not {noise}")
    probs = scores.softmax(dim=-1)
    threshold = noisy_scores.topk(top_k, dim=-1).values[:, -1:]
    measured = probs if compare == "probabilities" else scores
    chance = torch.special.ndtr((measured - threshold) / (noise / scores.shape[1]))
    return (cv_squared(probs.sum(0)) + cv_squared(chance.sum(0))) / 2


def switch_loss(
    scores: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    counted: Bool[Tensor, " T"] | None = None,
) -> Float[Tensor, ""]:
    """E * sum_i f_i P_i: f_i share of slots, P_i mean probability of expert i; 1 if even.

    Args:
        scores: of all experts.
        experts: the chosen ones; those of the first choice alone for GShard's loss.
        counted: tokens whose choices count in f, of which the others still dilute both means:
            what fairseq does with padding. None counts all; leave padding out of every argument
            for the loss of the real tokens.
    """
    num_experts = scores.shape[1]
    slots = experts.reshape(-1) if counted is None else experts[counted].reshape(-1)
    counts = torch.bincount(slots, minlength=num_experts)
    share = counts.to(scores.dtype) / experts.numel()
    return num_experts * (share * scores.softmax(dim=-1).mean(0)).sum()
