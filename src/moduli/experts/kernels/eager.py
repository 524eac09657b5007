"""The reference kernel: every expert on every token, weighted by the gate matrix.

Letters: T tokens, D width, E experts, e neurons of one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moduli.experts.ffn import ExpertFFN
from moduli.routing import Routing


def expert_forward(
    x: Float[Tensor, "T D"],
    experts: ExpertFFN,
    i: int,
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "T D"]:
    """Expert i on all of x, without its output bias."""
    bias = None if experts.key_bias is None else experts.key_bias[i]
    hidden = activation(F.linear(x, experts.keys[i], bias))
    if experts.up_keys is not None:
        up_bias = None if experts.up_bias is None else experts.up_bias[i]
        hidden = hidden * F.linear(x, experts.up_keys[i], up_bias)
    return hidden @ experts.values[i].to(hidden.dtype)


def eager(
    x: Float[Tensor, "T D"],
    routing: Routing,
    experts: ExpertFFN,
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "T D"]:
    """y_t = sum_i g_{t,i} (E_i(x_t) + d_i)."""
    gates = routing.gates(len(experts)).to(x.dtype)
    y = torch.zeros_like(x)
    for i in range(len(experts)):
        y = y + gates[:, i : i + 1] * expert_forward(x, experts, i, activation)
    return y if experts.out_bias is None else y + gates @ experts.out_bias
