"""The reference kernel: every expert on every token, weighted by the gate matrix.

Letters: T tokens, D width, E experts, e neurons of one expert, R rows of its first matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels.blocks import Blocks, blocks, gate_and_up
from moduli.routing import Routing


@dataclass(frozen=True)
class Between:
    """What stands between and behind the two matrices of an expert.

    Attributes:
        activation: of pre-activations; of gated experts of those of the gate.
        gating: replaces "activation(gate) * up": called with all pre-activations [n, R] of an
            expert, in the order of the rows of its first matrix. None for the usual rule.
        after: applied to an expert's output [n, D] before it is weighted, or None.
    """

    activation: Callable[[Tensor], Tensor]
    gating: Callable[[Tensor], Tensor] | None = None
    after: Callable[[Tensor], Tensor] | None = None


def expert_output(
    x: Float[Tensor, "n D"], part: Blocks, experts: StackedFFN, i: int, between: Between
) -> Float[Tensor, "n D"]:
    """Expert i on all of x, not yet weighted."""
    assert part.first is not None
    assert part.second is not None
    z = F.linear(x, part.first, part.first_bias)
    if part.up is not None:
        z = torch.cat([z, F.linear(x, part.up, part.up_bias)], dim=-1)
    y = activate(z, experts, between) @ part.second
    if experts.out_bias is not None:
        y = y + experts.out_bias[i].to(y.dtype)
    return y if between.after is None else between.after(y)


def activate(
    z: Float[Tensor, "*n R"], experts: StackedFFN, between: Between
) -> Float[Tensor, "*n e"]:
    """What the second matrix gets to see."""
    if between.gating is not None:
        return between.gating(z)
    gate, up = gate_and_up(z, experts)
    hidden = between.activation(gate)
    return hidden if up is None else hidden * up


def eager(
    x: Float[Tensor, "T D"], routing: Routing, experts: StackedFFN, between: Between
) -> Float[Tensor, "T D"]:
    """y_t = sum_i g_{t,i} E_i(x_t)."""
    gates = routing.gates(len(experts)).to(x.dtype)
    y = torch.zeros_like(x)
    for i, part in enumerate(blocks(experts)):
        y = y + gates[:, i : i + 1] * expert_output(x, part, experts, i, between)
    return y
