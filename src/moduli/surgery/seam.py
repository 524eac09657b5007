"""The activation seam: a routed FFN keeps its stock projections; only its activation is replaced.

`RoutedActivation` sees the pre-activations of all neurons, lets the router choose experts, and
zeroes the neurons of the others (or scales each expert's neurons by its combine weight). PEFT,
quantisers, FSDP and savers find the classes and names they know. Where nothing stands in the way
a `FastFFN` on the block computes the same function on the chosen neurons alone.

Letters: B batch, S sequence, T tokens, D width, F neurons, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.experts.ffn import merged_out_bias
from moduli.routing import Router
from moduli.surgery.locate import FFN
from moduli.surgery.projection import base_of, bias_of
from moduli.surgery.routed import Pass, RoutedLayer, SeamOptions


class RoutedActivation(RoutedLayer):
    """Activation of an FFN whose neurons are grouped into experts, one after the other.

    Args:
        ffn: the FFN, its neurons in expert order, or with `order` where they cannot be moved.
        sizes: neurons per expert, in order.
        router: scores and chooses.
        options: see `SeamOptions`.
        shared: state of the pass, one object for all layers of a model.
        out_bias: one output bias per expert [E, D] instead of the FFN's own, or None.
        bias_top_k: k for which the sum over k experts of `out_bias` restored the FFN's own.
    """

    def __init__(
        self,
        ffn: FFN,
        sizes: tuple[int, ...],
        router: Router,
        options: SeamOptions,
        shared: Pass,
        out_bias: Float[Tensor, "E D"] | None = None,
        bias_top_k: int = 1,
    ) -> None:
        super().__init__(ffn, sizes, router, options, shared)
        self.activation = ffn.activation
        self.out_bias = None if out_bias is None else nn.Parameter(out_bias)
        self.bias_top_k = bias_top_k
        self._own_bias_trained = False  # whether the FFN's output bias was trainable before
        self._input: Tensor | None = None  # x of the FFN, stored by `remember_input`
        self._gates: Tensor | None = None  # [T, E], for the hook that adds the expert biases
        self.register_buffer("order", ffn.order, persistent=False)
        labels = None
        if ffn.order is not None:
            ordered = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            labels = torch.empty_like(ordered).scatter_(0, ffn.order.cpu(), ordered)
        self.register_buffer("labels", labels, persistent=False)

    labels: Tensor | None  # expert of every neuron, where the neurons have not been moved
    order: Tensor | None

    @property
    def needs_input(self) -> bool:
        """Whether scores come from the FFN's input rather than from its pre-activations."""
        return self.options.select != "gate" or not self.router.by_neurons

    def forward(self, z: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        if self.shared.dense:
            self._gates = self._input = None
            full: Tensor = self.activation(z)
            return full
        lead = z.shape[:-1]
        flat = z.reshape(-1, z.shape[-1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._differentiable):
            scores = self._scores(flat)
        routing = self.route(scores, lead)
        gates = routing.gates(self.num_experts).to(z.dtype)
        self._gates = gates if self.out_bias is not None else None
        hidden = self._activate(flat)
        if self.labels is not None:
            return (hidden * gates[:, self.labels]).reshape(z.shape)
        return mask_neurons(hidden, gates, self.sizes).reshape(z.shape)

    def _scores(self, z: Float[Tensor, "T F"]) -> Float[Tensor, "T E"]:
        if not self.needs_input:
            return self._from_neurons(z, self.ffn.key_bias())
        if self._input is None:
            raise ModelError(
                f"{self.ffn.name}: the router needs the FFN's input, but its first projection "
                "was not called through its module"
            )
        x, self._input = self._input, None
        x = x.reshape(-1, x.shape[-1])
        if self.options.select == "gate":
            return self.router.scores(x)
        quantity = self.ffn.up_output(x)
        if self.options.select.startswith("inter"):
            quantity = self.activation(z) * quantity
        if self.options.select.endswith("abs"):
            quantity = quantity.abs()
        return self._from_neurons(quantity, None)

    def _from_neurons(
        self, z: Float[Tensor, "T F"], bias: Float[Tensor, " F"] | None
    ) -> Float[Tensor, "T E"]:
        """Scores from one number per neuron."""
        z = z if self.order is None else z[:, self.order]
        return self.router.from_preactivations(z, bias)

    def _activate(self, z: Float[Tensor, "T F"]) -> Float[Tensor, "T F"]:
        p, before = self.options.dropout, self.options.dropout_before
        if before:
            hidden: Tensor = self.activation(nn.functional.dropout(z, p, self.training))
            return hidden
        return nn.functional.dropout(self.activation(z), p, self.training)

    def remember_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook on the first projection."""
        self._input = args[0]

    def add_expert_bias(self, module: nn.Module, args: object, y: Tensor) -> Tensor:
        """Forward hook on the last projection: its own bias out, those of the experts in."""
        if self.out_bias is None:
            return y
        own = bias_of(base_of(self.ffn.last))
        plain = y if own is None else y - own.detach()
        if self._gates is None:
            return plain + merged_out_bias(self.out_bias, self.bias_top_k).to(y.dtype)
        added = self._gates @ self.out_bias.to(self._gates.dtype)
        return plain + added.reshape(y.shape).to(y.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_input": None, "_gates": None}

    def freeze_own_bias(self) -> None:
        """Stop training the FFN's output bias, whose share lies in the experts from now on."""
        own = bias_of(base_of(self.ffn.last))
        if own is not None:
            self._own_bias_trained = own.requires_grad
            own.requires_grad_(False)

    def restore_own_bias(self) -> None:
        """Let the FFN's output bias train again if it did before."""
        own = bias_of(base_of(self.ffn.last))
        if own is not None and self.out_bias is not None:
            own.requires_grad_(self._own_bias_trained)


def mask_neurons(
    hidden: Float[Tensor, "T F"], gates: Float[Tensor, "T E"], sizes: tuple[int, ...]
) -> Float[Tensor, "T F"]:
    """Every neuron times the gate of its expert."""
    if len(set(sizes)) == 1:
        grouped = hidden.reshape(hidden.shape[0], len(sizes), sizes[0])
        return (grouped * gates[..., None]).reshape(hidden.shape)
    counts = torch.tensor(sizes, device=gates.device)
    return hidden * gates.repeat_interleave(counts, dim=-1, output_size=hidden.shape[-1])
