"""Experts modules of transformers, read as what kernels run.

transformers marks its experts modules with `use_experts_implementation`: stacked parameters, a few
flags that say how they lie, and one call. This file turns such a module into views of its own
parameters, so that gradients arrive where they should and nothing is copied:

    plain      up_proj [E, F, D],       down_proj [E, D, F]
    gated      gate_up_proj [E, 2F, D], down_proj [E, D, F]
    transposed the same with the last two dimensions exchanged
    biases     up_proj_bias [E, F] or gate_up_proj_bias [E, 2F], down_proj_bias [E, D]

Between the matrices stands `act_fn`, or `act_fn(gate) * up`, or the module's own `_apply_gate`;
behind the second there may be a `post_expert_norm`.
Letters: T tokens, D width, F neurons of an expert, E experts, K experts per token.
Source of the contract: transformers `integrations/moe.py`, `use_experts_implementation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from moduli.experts.ffn import Fused, StackedFFN
from moduli.experts.kernels import run_experts
from moduli.routing import Routing


def experts_forward(
    module: Any,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
    kernel: str = "auto",
) -> Float[Tensor, "T D"]:
    """The forward of an experts module of transformers, by our kernels.

    Args:
        module: an instance of a class under `use_experts_implementation`.
        hidden_states: tokens.
        top_k_index: expert of every slot. Under expert parallelism an index that is not below
            `num_experts` stands for an expert of another rank and is left out.
        top_k_weights: combine weights, in any floating type. A weight of 0 is a weight like any
            other, since the router may learn from it.
        kernel: as in `run_experts`.
    """
    active = None
    if module._is_expert_parallel:
        active = top_k_index < module.num_experts
        top_k_index = top_k_index.where(active, 0)
    gating = own_gate(module)
    y = run_experts(
        hidden_states,
        Routing(top_k_index, top_k_weights, active),
        stacked(module),
        gating or module.act_fn,
        kernel,
        gating=gating,
        after=module.post_expert_norm if module.has_post_expert_norm else None,
    )
    return y.to(hidden_states.dtype)


def stacked(module: Any) -> StackedFFN:
    """The experts of a module as views of its parameters."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    first, second = getattr(module, name), module.down_proj
    if module.is_transposed:
        first = first.transpose(1, 2)
    else:
        second = second.transpose(1, 2)
    fused: Fused = "concatenated" if module.is_concatenated else "interleaved"
    return StackedFFN(
        first=first,
        second=second,
        sizes=(second.shape[1],) * second.shape[0],
        first_bias=getattr(module, f"{name}_bias") if module.has_bias else None,
        out_bias=module.down_proj_bias if module.has_bias else None,
        fused=fused if module.has_gate else None,
    )


def own_gate(module: Any) -> Callable[[Tensor], Tensor] | None:
    """What a gated module computes between its matrices, unless it is `act_fn(gate) * up`."""
    from transformers.integrations.moe import _default_apply_gate

    default = (
        type(module)._apply_gate is _default_apply_gate
    )  # takes halves, whatever the flag says
    if not module.has_gate or (default and module.is_concatenated):
        return None
    gate: Callable[[Tensor], Tensor] = module._apply_gate
    return gate
