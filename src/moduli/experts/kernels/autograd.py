"""Expert by expert with ordinary differentiable operations: for what other kernels do not know.

Any activation or gating rule, and anything applied to an expert's output before it is weighted
(the post-norm of some families). Tokens are sorted by expert once; each expert then reads one
contiguous run of rows. Letters: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels.blocks import blocks
from moduli.experts.kernels.eager import Between, expert_output
from moduli.experts.kernels.plan import plan
from moduli.routing import Routing


def autograd(
    x: Float[Tensor, "T D"], routing: Routing, experts: StackedFFN, between: Between
) -> Float[Tensor, "T D"]:
    """The same as `eager`, computing active slots only."""
    todo = plan(routing.experts, routing.active, len(experts))
    rows = x.index_select(0, todo.tokens).split(todo.counts)
    parts = [
        expert_output(run, part, experts, i, between)
        for i, (run, part) in enumerate(zip(rows, blocks(experts), strict=True))
        if len(run) > 0
    ]
    if not parts:  # no slot is active; keep the graph, which other ranks may wait for
        return x * 0 + routing.weights.sum().to(x.dtype) * 0
    done = torch.cat(parts)
    weights = routing.weights.reshape(-1)[todo.slots].to(done.dtype)
    y = torch.zeros_like(x, dtype=done.dtype)
    return y.index_add(0, todo.tokens, done * weights[:, None])
