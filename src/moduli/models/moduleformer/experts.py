"""The experts of ModuleFormer: feed-forward experts and attention experts.

    feed-forward   y = sum_r p_r act(x W1_r) W2_r
    attention      queries q_r = x Wq_r of the chosen experts; outputs y = sum_r p_r o_r Wo_r

Matrices lie as published, [expert, in, out], and have no biases. The feed-forward experts keep
transformers' experts contract (not gated, transposed), so that its backends and its expert
parallelism apply.
Letters: T tokens, D width, F neurons of an expert, A width of queries, E experts, K experts per
token.
Source: IBM/ModuleFormer `utils/moe.py`, `utils/parallel_experts.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from moduli.experts.kernels.order import Order
from moduli.experts.linear import routed_linear
from moduli.models.moduleformer.configuration import ModuleFormerConfig


@use_experts_implementation(has_gate=False, is_transposed=True)
class ModuleFormerExperts(nn.Module):
    """E feed-forward experts.

    Args:
        config: of the model.
        num_experts: E of this layer.
    """

    def __init__(self, config: ModuleFormerConfig, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up_proj = nn.Parameter(torch.empty(num_experts, config.n_embd, config.ffd_hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.ffd_hidden, config.n_embd))
        self.act_fn = ACT2FN[config.activation_function]

    def forward(
        self,
        hidden_states: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Sum over slots of weight * expert(token): the readable form, experts_implementation
        "eager"."""
        y = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # of another rank
                continue
            tokens, slots = torch.where(top_k_index == expert)
            hidden = self.act_fn(hidden_states[tokens] @ self.up_proj[expert])
            out = hidden @ self.down_proj[expert] * top_k_weights[tokens, slots, None]
            y.index_add_(0, tokens, out.to(y.dtype))
        return y


class ExpertLinear(nn.Module):
    """One matrix per expert.

    Args:
        num_experts: E.
        width_in, width_out: of every matrix.
    """

    def __init__(self, num_experts: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width_in, width_out))

    def forward(self, rows: Float[Tensor, "S I"], order: Order) -> Float[Tensor, "S O"]:
        return routed_linear(rows, [self.weight], order)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


def queries(x: Float[Tensor, "T D"], experts: nn.Module, order: Order) -> Float[Tensor, "T K A"]:
    """The queries of every token's experts, by `experts`, an `ExpertLinear`."""
    rows: Tensor = experts(order.spread(x), order)
    return rows.index_select(0, order.place.flatten()).view(*order.place.shape, -1)


def outputs(
    o: Float[Tensor, "T K A"], weights: Float[Tensor, "T K"], experts: nn.Module, order: Order
) -> Float[Tensor, "T D"]:
    """The weighted sum of what every token's experts make of their attention."""
    rows = (o * weights[..., None].to(o.dtype)).flatten(0, 1)  # the shorter rows are weighed
    return order.collect(experts(rows.index_select(0, order.slots), order))
