"""Expert by expert on its own tokens only: the cost of K of E experts instead of all.

Tokens are sorted by expert once; each expert then reads one contiguous run of rows. The loop has
host-side control flow (the number of rows of each expert), so it is for eager mode; compiled
layers mask activations instead.
Letters: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from moduli.experts.ffn import ExpertFFN
from moduli.experts.kernels.eager import expert_forward
from moduli.routing import Routing


def loop(
    x: Float[Tensor, "T D"],
    routing: Routing,
    experts: ExpertFFN,
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "T D"]:
    """The same as `eager`, computing active slots only."""
    top_k = routing.experts.shape[1]
    flat = routing.experts.reshape(-1)
    if routing.active is None:
        order = flat.argsort(stable=True)
    else:
        kept = routing.active.reshape(-1).nonzero().flatten()
        order = kept[flat[kept].argsort(stable=True)]
    counts = torch.bincount(flat[order], minlength=len(experts)).tolist()
    rows = x.index_select(0, order // top_k).split(counts)
    parts = [
        expert_forward(run, experts, i, activation) for i, run in enumerate(rows) if len(run) > 0
    ]
    if not parts:  # no slot is active; keep the graph, which other ranks may wait for
        return x * 0 + routing.weights.sum().to(x.dtype) * 0
    done = torch.cat(parts)
    weights = routing.weights.reshape(-1)[order].to(done.dtype)
    if experts.out_bias is not None:
        done = done + experts.out_bias.index_select(0, flat[order]).to(done.dtype)
    y = torch.zeros_like(x, dtype=done.dtype)
    return y.index_add(0, order // top_k, done * weights[:, None])
