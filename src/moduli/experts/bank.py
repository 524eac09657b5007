"""Owned experts: parameters of their own, stacked, on transformers' experts contract.

The tensors have the names, shapes and call of the expert modules of transformers, so that its
experts backends and its expert parallelism apply unchanged:

    gated      gate_up_proj [E, 2F, D], down_proj [E, D, F]
    plain      up_proj [E, F, D],       down_proj [E, D, F]
    biases     gate_up_proj_bias [E, 2F] or up_proj_bias [E, F], down_proj_bias [E, D]

Experts of unequal size are padded with neurons that are zero everywhere; where act(0) = 0 they
add nothing and receive no gradient. Letters: T tokens, D width, F neurons of an expert, E
experts, K experts per token.
Source of the contract: transformers `integrations/moe.py`, `use_experts_implementation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moduli.errors import ConfigError
from moduli.experts.ffn import ExpertFFN, StackedFFN
from moduli.experts.kernels import run_experts
from moduli.registration import kernel_of
from moduli.routing import Routing


class ExpertBank(nn.Module):
    """E FFN experts in stacked tensors.

    Args:
        experts: copied, so that the bank owns its parameters.
        activation: between the two matrices; shared with the model it came from.
        dropout: probability on the activations, in training.

    Attributes:
        implementation: None or "moduli" for our kernels, "moduli:NAME" for one of them, or the
            name of another experts backend of transformers ("grouped_mm", "batched_mm", ...).

    Raises:
        ConfigError: experts of unequal size whose activation is not 0 at 0.
    """

    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True

    def __init__(
        self, experts: ExpertFFN, activation: Callable[[Tensor], Tensor], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_experts = len(experts)
        self.sizes = tuple(len(keys) for keys in experts.keys)
        self.act_fn = activation
        self.dropout = dropout
        self.implementation: str | None = None
        self.has_gate = experts.up_keys is not None
        self.has_bias = experts.key_bias is not None or experts.out_bias is not None
        self._is_expert_parallel = False
        if len(set(self.sizes)) > 1 and float(activation(torch.zeros(1)).abs()) > 0:
            raise ConfigError(
                f"experts of unequal size ({min(self.sizes)} to {max(self.sizes)} neurons) need an "
                "activation that is 0 at 0, and this one is not; choose a number of experts that "
                "divides the neurons"
            )
        first = _stack(experts.keys)
        if experts.up_keys is not None:
            first = torch.cat([first, _stack(experts.up_keys)], dim=1)
        name = "gate_up_proj" if self.has_gate else "up_proj"
        self.register_parameter(name, nn.Parameter(first))
        self.down_proj = nn.Parameter(_stack(experts.values).transpose(1, 2).contiguous())
        if self.has_bias:
            bias = _biases(experts, first)
            self.register_parameter(f"{name}_bias", nn.Parameter(bias))
            if experts.out_bias is not None:
                self.down_proj_bias = nn.Parameter(experts.out_bias.detach().clone())
            else:  # backends want both biases or none
                nothing = first.new_zeros(len(experts), first.shape[2])
                self.register_buffer("down_proj_bias", nothing, persistent=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Sum over slots of weight * expert(token).

        Args:
            hidden_states: tokens.
            top_k_index: expert of every slot. Under expert parallelism an index that is not below
                `num_experts` stands for an expert on another rank and is left out.
            top_k_weights: 0 for slots that a router does not use.
        """
        kernel = kernel_of(self.implementation)
        if kernel is None:
            return self._stock(hidden_states, top_k_index, top_k_weights)
        here = top_k_index < self.num_experts
        active = here & (top_k_weights.detach() != 0)
        routing = Routing(top_k_index.where(here, 0), top_k_weights, active)
        dropping = self.dropout and self.training
        activation = self._drop_out if dropping else self.act_fn
        return run_experts(hidden_states, routing, self.stacked(), activation, kernel)

    def _stock(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        if self.dropout and self.training:
            raise ConfigError(
                f"implementation={self.implementation!r} knows no dropout inside experts; set "
                "dropout to 0 or implementation to None"
            )
        backend = ALL_EXPERTS_FUNCTIONS[self.implementation]
        y: Tensor = backend(self, x, index, weights.to(x.dtype))
        return y

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        """What backends of transformers call between the two matrices of a gated expert."""
        gate, up = gate_up_out.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _drop_out(self, z: Tensor) -> Tensor:
        return nn.functional.dropout(self.act_fn(z), self.dropout)

    def keys(self) -> Float[Tensor, "_ D"]:
        """Current keys of all experts, one expert after the other, without padding."""
        return torch.cat(list(self.experts().keys))

    def stacked(self) -> StackedFFN:
        """The experts as kernels read them, with the zero neurons that make them equally large;
        gradients arrive in the parameters."""
        name = "gate_up_proj" if self.has_gate else "up_proj"
        return StackedFFN(
            first=getattr(self, name),
            second=self.down_proj.mT,
            sizes=(self.down_proj.shape[2],) * self.down_proj.shape[0],
            first_bias=getattr(self, f"{name}_bias", None),
            out_bias=getattr(self, "down_proj_bias", None),
            fused="concatenated" if self.has_gate else None,
        )

    def experts(self) -> ExpertFFN:
        """The experts one by one, without padding, as views of the parameters."""
        whole = self.stacked()
        width = self.down_proj.shape[2]

        def cut(tensor: Tensor | None, start: int = 0) -> list[Tensor] | None:
            if tensor is None:
                return None
            parts = zip(tensor.unbind(), self.sizes, strict=True)
            return [rows[start : start + n] for rows, n in parts]

        keys, values = cut(whole.first), cut(whole.second)
        assert keys is not None
        assert values is not None
        return ExpertFFN(
            keys=keys,
            values=values,
            key_bias=cut(whole.first_bias),
            up_keys=cut(whole.first, width) if self.has_gate else None,
            up_bias=cut(whole.first_bias, width) if self.has_gate else None,
            out_bias=whole.out_bias,
        )

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, neurons={max(self.sizes)}"


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """[E, F, ...] from E tensors [f, ...], padded with zeros to the longest."""
    longest = max(len(part) for part in parts)
    out = parts[0].new_zeros(len(parts), longest, *parts[0].shape[1:])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part.detach()
    return out


def _biases(experts: ExpertFFN, first: Tensor) -> Tensor:
    """Bias of the first matrix [E, F] or [E, 2F]; zero where there is none."""
    width = max(len(keys) for keys in experts.keys)
    zeros = first.new_zeros(len(experts), width)
    halves = [zeros if experts.key_bias is None else _stack(experts.key_bias)]
    if experts.up_keys is not None:
        halves.append(zeros if experts.up_bias is None else _stack(experts.up_bias))
    return torch.cat(halves, dim=1)
