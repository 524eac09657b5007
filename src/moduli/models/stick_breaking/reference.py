"""Stick-breaking attention as one writes it down: all weights at once, differentiable by PyTorch.

With logits z_ij = q_i . k_j * scale, a query walks from its own position to the left and breaks
off sigma(z_ij) of what is left of a stick of length 1:

    A_ij = sigma(z_ij) prod_{j < l <= i} (1 - sigma(z_il))
    log A_ij = log sigma(z_ij) - sum_{j < l <= i} softplus(z_il)

Weights of a row sum to at most 1; what is left of the stick is not given to any value.

Letters: B batch, Hq heads of queries, H heads of keys, T queries, S keys, D width of keys, Dv
width of values.
Source: ModuleFormer (arXiv 2306.04640), IBM/ModuleFormer `stickbreaking_att`; Tan et al., arXiv
2410.17980.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from moduli.models.stick_breaking.sight import Sight, check


def stick_breaking_weights(
    query: Float[Tensor, "B Hq T D"],
    key: Float[Tensor, "B H S D"],
    *,
    key_mask: Bool[Tensor, "B S"] | None = None,
    segments: Integer[Tensor, "B S"] | None = None,
    scale: float | None = None,
    attend_current: bool = True,
) -> Float[Tensor, "B Hq T S"]:
    """The weight of every key for every query, in memory of T x S.

    Arguments are those of `stick_breaking_attention`.

    Raises:
        ConfigError: shapes or types do not fit together.
    """
    check(query, key, key, key_mask, segments, None)
    sight = Sight(query.shape[2], key.shape[2], attend_current, key_mask, segments)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return weights_and_rest(query, key, sight, scale)[0].to(query.dtype)


def weights_and_rest(
    query: Tensor, key: Tensor, sight: Sight, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights [B Hq T S] and what is left of the stick [B Hq T], in float32 or float64."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    key = key.to(dtype).repeat_interleave(group, dim=1)
    logits = (query.to(dtype) * scale) @ key.transpose(2, 3)
    every = slice(0, sight.keys)
    hidden = sight.hidden(slice(None), every, slice(0, sight.queries), query)
    # -logsigmoid(-z) is softplus(z), which PyTorch rounds to z from 20 on.
    spent = -F.logsigmoid(-logits)
    if hidden is not None:
        hidden = hidden.transpose(1, 2)[:, None]
        spent = spent.masked_fill(hidden, 0)
    # A sum over the right side alone: to subtract the key's own part from a total would cancel.
    up_to = spent.flip(-1).cumsum(-1).flip(-1)
    right = F.pad(up_to[..., 1:], (0, 1))
    weights = (F.logsigmoid(logits) - right).exp()
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0)
    return weights, (-up_to[..., 0]).exp()


def attention(
    query: Tensor, key: Tensor, value: Tensor, sight: Sight, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [B Hq T Dv] and what is left of the stick [B Hq T], in float32 or float64."""
    weights, rest = weights_and_rest(query, key, sight, scale)
    group = query.shape[1] // key.shape[1]
    return weights @ value.to(weights.dtype).repeat_interleave(group, dim=1), rest
