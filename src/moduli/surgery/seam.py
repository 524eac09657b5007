"""The activation seam: a routed FFN keeps its stock projections; only its activation is replaced.

`RoutedActivation` sees the pre-activations of all neurons, lets the router choose experts, and
zeroes the neurons of the others (or scales each expert's neurons by its combine weight). PEFT,
quantisers, FSDP and savers find the classes and names they know. Where nothing stands in the way
a `FastFFN` on the block computes the same function on the chosen neurons alone.

Letters: B batch, S sequence, T tokens, D width, F neurons, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.experts.ffn import merged_out_bias
from moduli.losses.balance import load_importance_loss, switch_loss
from moduli.routing import AvgKRouter, RouteContext, Router, Routing
from moduli.surgery.locate import FFN
from moduli.surgery.projection import base_of, bias_of

Select = Literal["gate", "up", "up_abs", "inter", "inter_abs"]
Aux = Literal["none", "load_importance", "load_importance_paper", "switch"]


@dataclass
class Pass:
    """What all routed layers of one model share during a forward pass of it.

    Attributes:
        masks: [B, S] masks of real tokens, from the attention masks of the model, by the name of
            the stack they belong to ("" for the whole model); None if unknown.
        dense: True while `moduli.dense` is active: every neuron takes part.
        record: called with (layer name, routing, real mask per token) for every routed layer.
        noise: standard normal samples by layer name, to reproduce a run.
    """

    masks: dict[str, Tensor | None] = field(default_factory=dict)
    dense: bool = False
    record: Callable[[str, Routing, Tensor | None], None] | None = None
    noise: dict[str, Tensor] = field(default_factory=dict)

    def context(self, shape: torch.Size, training: bool, name: str) -> RouteContext:
        """The route context of a layer whose input has leading dimensions `shape`."""
        return RouteContext(
            training=training, real=self.real_tokens(shape, name), noise=self.noise.get(name)
        )

    def real_tokens(self, shape: torch.Size, name: str) -> Bool[Tensor, " T"] | None:
        """Which tokens of a layer are real; None if its stack got no mask that fits `shape`."""
        for stack, mask in self.masks.items():
            if mask is None or not f"{name}.".startswith(f"{stack}." if stack else ""):
                continue
            if len(shape) != 2 or mask.shape[0] != shape[0]:
                continue
            # With a cache the mask is longer than the new tokens: the last columns are theirs.
            # An encoder has no cache; a longer mask is one of its input before it was shortened.
            longer = mask.shape[1] > shape[1] and not stack.endswith("encoder")
            if longer or mask.shape[1] == shape[1]:
                return mask[:, -shape[1] :].reshape(-1)
        return None


@dataclass(frozen=True)
class SeamOptions:
    """How a routed layer treats what lies around its routing.

    Attributes:
        select: which quantity scores experts of a gated FFN (avg-k on the gate projection, or
            the mean over neurons of the named one).
        aux: auxiliary loss of the layer, computed in training only.
        aux_weight: its weight in the loss.
        dropout: probability inside experts, in training.
        dropout_before: drop pre-activations (EMoE's language code) instead of activations.
        path: "auto" computes only chosen neurons where that is possible and pays off, "masked"
            never, "fast" wherever it is possible.
    """

    select: Select = "gate"
    aux: Aux = "none"
    aux_weight: float = 0.01
    dropout: float = 0.0
    dropout_before: bool = False
    path: Literal["auto", "masked", "fast"] = "auto"


class RoutedActivation(nn.Module):
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
        super().__init__()
        self.activation = ffn.activation
        self.router = router
        self.options = options
        self.sizes = sizes
        self.shared = shared
        self._ffn = (ffn,)  # in a tuple, so that the block does not become a sub-module of itself
        self.out_bias = None if out_bias is None else nn.Parameter(out_bias)
        self.bias_top_k = bias_top_k
        self.auxiliary: Tensor | None = None  # unweighted, of the last training forward
        self._own_bias_trained = False  # whether the FFN's output bias was trainable before
        self.lost_auxiliary = False  # it was due, but gradients were off
        self._input: Tensor | None = None  # x of the FFN, stored by `remember_input`
        self._gates: Tensor | None = None  # [T, E], for the hook that adds the expert biases
        self.register_buffer("order", ffn.order, persistent=False)
        labels = None
        if ffn.order is not None:
            ordered = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            labels = torch.empty_like(ordered).scatter_(0, ffn.order.cpu(), ordered)
        self.register_buffer("labels", labels, persistent=False)
        self.register_state_dict_pre_hook(_settle)  # type: ignore[no-untyped-call]

    labels: Tensor | None  # expert of every neuron, where the neurons have not been moved
    order: Tensor | None

    @property
    def ffn(self) -> FFN:
        return self._ffn[0]

    @property
    def num_experts(self) -> int:
        return len(self.sizes)

    @property
    def needs_input(self) -> bool:
        """Whether scores come from the FFN's input rather than from its pre-activations."""
        return self.options.select != "gate" or not self.router.by_neurons

    def forward(self, z: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        if self.shared.dense:
            self._gates = None
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

    def route(self, scores: Float[Tensor, "T E"], lead: torch.Size) -> Routing:
        """Routing from scores, with everything that is observed on the way."""
        context = self.shared.context(lead, self.training, self.ffn.name)
        routing = self.router.select(scores, context)
        if self.shared.record is not None:
            self.shared.record(self.ffn.name, routing, context.real)
        if self.training and self.options.aux != "none":
            self.lost_auxiliary = not torch.is_grad_enabled()
            if not self.lost_auxiliary:
                self.auxiliary = self._auxiliary(routing, context)
        return routing

    @property
    def _differentiable(self) -> bool:
        """Whether anything uses the gradient of the scores."""
        rule = self.router.rule
        return self.options.aux != "none" or rule.combine != "one"

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

    def _auxiliary(self, routing: Routing, context: RouteContext) -> Tensor:
        assert routing.scores is not None
        assert routing.noisy_scores is not None
        scores, noisy, experts = routing.scores, routing.noisy_scores, routing.experts
        if context.real is not None and not self.router.rule.route_padding:
            keep = context.real
            scores, noisy, experts = scores[keep], noisy[keep], experts[keep]
        if self.options.aux == "switch":
            return switch_loss(scores, experts)
        rule = self.router.rule
        paper = self.options.aux == "load_importance_paper"
        compare = "probabilities" if paper else "scores"
        return load_importance_loss(scores, noisy, rule.top_k, rule.noise, compare=compare)

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
        # Tensors of the last pass have a graph, which can neither be copied nor pickled.
        return {**self.__dict__, "auxiliary": None, "_input": None, "_gates": None}

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

    def extra_repr(self) -> str:
        low, high = min(self.sizes), max(self.sizes)
        return f"neurons={low}" if low == high else f"neurons={low}..{high}"


def _settle(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before a state dict: make a due update of a kept gate, since a resumed run cannot."""
    router = layer.router
    if isinstance(router, AvgKRouter):
        due = router.stale
        router.update()
        # Without momentum it may be repeated, should an optimiser step be still to come.
        router.stale = due and router.momentum == 0


def mask_neurons(
    hidden: Float[Tensor, "T F"], gates: Float[Tensor, "T E"], sizes: tuple[int, ...]
) -> Float[Tensor, "T F"]:
    """Every neuron times the gate of its expert."""
    if len(set(sizes)) == 1:
        grouped = hidden.reshape(hidden.shape[0], len(sizes), sizes[0])
        return (grouped * gates[..., None]).reshape(hidden.shape)
    counts = torch.tensor(sizes, device=gates.device)
    return hidden * gates.repeat_interleave(counts, dim=-1, output_size=hidden.shape[-1])
