"""The dense product with the neurons of other experts switched off.

Costs what the dense layer costs, whatever the routing, and no sorting: for experts so narrow, or
so many of them chosen, that nothing is won by leaving neurons out. Made of differentiable
operations without any look at the routing from the host, so that it can be compiled, captured in
a CUDA graph, differentiated twice and vmapped.

Letters: T tokens, D width, E experts, e neurons of one expert, F neurons of all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels.eager import Between, activate
from moduli.routing import Routing


def masked(
    x: Float[Tensor, "T D"], routing: Routing, experts: StackedFFN, between: Between
) -> Float[Tensor, "T D"]:
    """y = (act(x W1^T + b1) * gates, one per neuron) W2."""
    gates = routing.gates(len(experts)).to(x.dtype)
    z = _linear(x, experts.first, experts.first_bias)
    if experts.up is not None:
        z = torch.cat([z, _linear(x, experts.up, experts.up_bias)], dim=-1)
    if experts.first.dim() == 3:
        hidden = activate(z, experts, between) * gates[:, :, None]
    else:
        sizes = torch.tensor(experts.sizes, device=x.device)
        width = sum(experts.sizes)
        each = gates.repeat_interleave(sizes, dim=1, output_size=width)
        # Gate and up rows may stand one after the other within every expert.
        own = [2 * e for e in experts.sizes] if experts.fused else [z.shape[1]]
        hidden = torch.cat([activate(part, experts, between) for part in z.split(own, 1)], 1) * each
    y = hidden.flatten(1) @ experts.second.flatten(0, -2)
    return y if experts.out_bias is None else y + gates @ experts.out_bias.to(gates.dtype)


def _linear(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """[T, E, R] of stacked experts, [T, sum of R] of packed ones."""
    z = F.linear(x, rows.flatten(0, -2), None if bias is None else bias.flatten())
    stacked: Tensor = z.unflatten(1, rows.shape[:-1])
    return stacked
