"""Experts that are almost the same: cosine similarity of their parameters.

    s[e, f] = mean over tensors of <theta_e, theta_f> / (|theta_e| |theta_f|)

over the stacked tensors of experts that have parameters of their own. Experts that are groups of
neurons of one FFN hold different neurons each, in no common order, and are not compared.

Letters: E experts, P parameters of one expert in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moduli.routing import Router
from moduli.surgery.owned import OwnedExperts
from moduli.surgery.projection import base_of
from moduli.surgery.routed import RoutedLayer

SIMILAR = 0.95
"""Pairs of experts with a larger cosine similarity are called duplicates."""
CHUNK = 1 << 20
"""Parameters of one expert that are compared at a time."""


def duplicate_experts(layer: nn.Module) -> tuple[tuple[int, int, float], ...]:
    """Pairs (i, j, similarity) of almost equal experts, i < j.

    Args:
        layer: a `RoutedLayer`, a block of ours with its router, or an experts module of
            transformers.
    """
    stacked = expert_tensors(layer)
    if not stacked:
        return ()
    found = similarity(stacked)
    pairs = (found > SIMILAR).triu(1).nonzero().tolist()
    return tuple((i, j, float(found[i, j])) for i, j in pairs)


def expert_tensors(layer: nn.Module) -> list[Tensor]:
    """The stacked tensors [E, ...] of experts with parameters of their own; else none."""
    if isinstance(layer, OwnedExperts):
        module, count = base_of(layer.experts), layer.num_experts
    elif isinstance(layer, RoutedLayer):
        return []
    elif routers := [child for child in layer.children() if isinstance(child, Router)]:
        count = routers[0].num_experts
        others = [child for child in layer.children() if child is not routers[0]]
        return [
            p.detach()
            for child in others
            for p in child.parameters()
            if p.dim() >= 3 and len(p) == count
        ]
    else:
        module, count = layer, int(layer.num_experts)  # type: ignore[arg-type]
    return [
        p.detach()
        for p in module.parameters(recurse=False)
        if p.dim() >= 2 and len(p) == count and p.is_floating_point()
    ]


def similarity(stacked: Sequence[Float[Tensor, "E ..."]]) -> Float[Tensor, "E E"]:
    """Mean cosine similarity of experts over tensors; tensors that are 0 throughout are left out.

    Sums are made a chunk of parameters at a time, so that no copy of an expert is.
    """
    found = []
    for tensor in stacked:
        flat = tensor.flatten(1)
        gram = torch.zeros(len(flat), len(flat), dtype=torch.float64)
        for part in flat.split(CHUNK, dim=1):
            x = part.float()
            gram += (x @ x.T).cpu().double()
        length = gram.diagonal().sqrt()
        if length.any():
            found.append(
                gram / (length[:, None] * length).clamp_min(torch.finfo(torch.double).tiny)
            )
    if not found:
        return torch.eye(len(stacked[0]), dtype=torch.float64)
    return torch.stack(found).mean(0)
