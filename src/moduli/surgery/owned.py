"""Owned experts in a model: an FFN is replaced by a router and a bank of experts of their own.

Where a block is an FFN and nothing else, the layer takes the block's place. Where the FFN is
inline in a larger forward (BERT, BART), the layer takes the place of the last projection, and the
first one and the activation become identities. The dense modules are kept without their weights,
so that merging can put them back.

    y = sum over slots of w * E_i(x)  [+ residual experts, always on]  [+ shared output bias]

Letters: T tokens, D width, F neurons, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.experts.average import average_experts
from moduli.experts.bank import ExpertBank
from moduli.experts.ffn import ExpertFFN, gather_experts
from moduli.routing import Router
from moduli.surgery.locate import FFN
from moduli.surgery.projection import base_of, bias_of, is_conv1d, rows, weight_of
from moduli.surgery.routed import Pass, RoutedLayer, SeamOptions

OutBias = Literal["each", "shared", "split"]


@dataclass(frozen=True)
class Own:
    """How a method gives an FFN experts of their own, besides who their neurons are.

    Attributes:
        router: makes the router of a layer from the FFN and the layer's bank.
        options: see `SeamOptions`; `select`, `path` and `dropout_before` are of no use here.
        out_bias: "each" expert has the FFN's output bias (right where weights sum to 1), "split"
            1 / k of it, "shared" adds it once.
        top_k: k, for split biases.
    """

    router: Callable[[FFN, ExpertBank], Router]
    options: SeamOptions
    out_bias: OutBias
    top_k: int


class OwnedExperts(RoutedLayer):
    """A router, a bank of experts, and what is added to their sum.

    Args:
        ffn: the dense FFN; its weights are copied into the experts, then dropped.
        members: neurons of every expert; they may overlap.
        own: router, options, biases.
        shared: see `RoutedLayer`.
        residual: neurons that always take part, outside the routed experts; None for none.
    """

    def __init__(
        self,
        ffn: FFN,
        members: Sequence[Int[Tensor, " _"]],
        own: Own,
        shared: Pass,
        residual: Int[Tensor, " _"] | None = None,
    ) -> None:
        bias = bias_of(ffn.last)
        block_dropout = _inner_dropout(ffn)
        dropout = 1 - (1 - own.options.dropout) * (1 - block_dropout)
        each = None
        if bias is not None and own.out_bias != "shared":
            scale = own.top_k if own.out_bias == "split" else 1
            each = (bias.detach() / scale).expand(len(members), -1)
        bank = ExpertBank(_gather(ffn, members, each), ffn.activation, dropout)
        trained = weight_of(ffn.first).requires_grad
        bank.requires_grad_(trained)
        sizes = tuple(len(m) for m in members)
        super().__init__(ffn, sizes, own.router(ffn, bank), own.options, shared)
        self.experts = bank
        self.residual = None
        if residual is not None:
            self.residual = ExpertBank(_gather(ffn, [residual], None), ffn.activation, dropout)
            self.residual.requires_grad_(trained)
        once = bias is not None and own.out_bias == "shared"
        self.out_bias = nn.Parameter(bias.detach().clone()) if once and bias is not None else None
        self.bias_scale = own.top_k if own.out_bias == "split" else 1
        self.members = tuple(m.cpu() for m in members)
        self.residual_members = None if residual is None else residual.cpu()
        self.width, self.hidden = ffn.width, ffn.hidden
        self.block_dropout = block_dropout  # the block's own, which now acts inside experts
        # Not registered: they have no weights until the layer is merged.
        self._dense = ({name: base_of(m) for name, m in ffn.projections.items()}, ffn.activation)
        # Registered, so that they learn whether the model trains.
        self.after = nn.ModuleList(ffn.after if ffn.family.entry == "forward" else [])

    @property
    def path(self) -> str:
        """Name of this module in the model."""
        inline = self.ffn.family.entry != "forward"
        return f"{self.ffn.name}.{self.ffn.family.last}" if inline else self.ffn.name

    @property
    def experts_input(self) -> nn.Module:
        """The module whose input is that of the FFN."""
        return self

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        flat = x.reshape(-1, x.shape[-1])
        y = self._merged_output(flat) if self.shared.dense else self._routed(flat, x.shape[:-1])
        y = y.reshape(x.shape)
        for module in self.after:
            y = module(y)
        return y

    def _routed(self, x: Float[Tensor, "T D"], lead: torch.Size) -> Float[Tensor, "T D"]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._differentiable):
            scores = self.router.scores(x)
        routing = self.route(scores, lead)
        weights = routing.weights.to(x.dtype)
        if routing.active is not None:
            weights = weights * routing.active
        y: Tensor = self.experts(x, routing.experts, weights)
        if self.residual is not None:
            slot = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
            y = y + self.residual(x, slot, torch.ones_like(slot, dtype=x.dtype))
        return y if self.out_bias is None else y + self.out_bias.to(y.dtype)

    def _merged_output(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        dense, _ = merged_experts(self)
        hidden = self.experts.act_fn(nn.functional.linear(x, dense.keys[0], _one(dense.key_bias)))
        if dense.up_keys is not None:
            hidden = hidden * nn.functional.linear(x, dense.up_keys[0], _one(dense.up_bias))
        y = hidden @ dense.values[0].to(hidden.dtype)
        return y if dense.out_bias is None else y + dense.out_bias[0].to(y.dtype)


def own_ffn(
    model: nn.Module,
    ffn: FFN,
    members: Sequence[Int[Tensor, " _"]],
    own: Own,
    shared: Pass,
    residual: Int[Tensor, " _"] | None = None,
) -> OwnedExperts:
    """Replace one FFN of `model` by experts of their own, copied from its neurons."""
    weight = weight_of(ffn.first)
    layer = OwnedExperts(ffn, members, own, shared, residual).to(weight.device)
    layer.train(ffn.block.training)
    for module in ffn.projections.values():
        module.to("meta")
    if layer.path == ffn.name:
        model.set_submodule(ffn.name, layer)
    else:
        ffn.block.set_submodule(ffn.family.first, nn.Identity())
        ffn.set_activation(nn.Identity())
        ffn.block.set_submodule(ffn.family.last, layer)
        if hasattr(ffn.block, "activation_dropout"):
            ffn.block.activation_dropout = 0.0  # type: ignore[assignment]
    return layer


def require_copyable(ffn: FFN) -> None:
    """Raise unless the weights of an FFN can be copied into experts.

    Raises:
        ModelError: it carries adapters, or its weights are not plain tensors.
    """
    for name, module in ffn.projections.items():
        if base_of(module) is not module:
            raise ModelError(
                f"{ffn.name}.{name} carries an adapter; experts are copies of the weights, so "
                "merge the adapter into them first (merge_and_unload)"
            )
    if not ffn.movable:
        kinds = sorted({type(base_of(m)).__name__ for m in ffn.projections.values()})
        raise ModelError(
            f"{ffn.name}: its projections ({', '.join(kinds)}) are not plain Linear or Conv1D "
            "layers, so they cannot be copied into experts; if they are quantised, load the model "
            "without"
        )


def require_no_adapter(layer: OwnedExperts) -> None:
    """Raise if PEFT has wrapped the bank of a layer (its `target_parameters`).

    Raises:
        ModelError: it has.
    """
    if base_of(layer.experts) is not layer.experts:
        raise ModelError(
            f"the experts of {layer.ffn.name} carry an adapter, which has no place in a dense FFN; "
            "merge it into them first (merge_and_unload)"
        )


def disown(model: nn.Module, layer: OwnedExperts) -> bool:
    """Put the dense FFN back, every neuron the mean of its copies.

    Returns:
        Whether anything had to be averaged, rather than moved.
    """
    dense, averaged = merged_experts(layer)
    ffn = layer.ffn
    projections, activation = layer._dense
    device = layer.experts.down_proj.device
    trained = layer.experts.down_proj.requires_grad
    for name, values in projection_state(layer, dense).items():
        path, _, kind = name.rpartition(".")
        setattr(projections[path], kind, nn.Parameter(values.to(device), requires_grad=trained))
    if layer.path == ffn.name:
        model.set_submodule(ffn.name, ffn.block)
    else:
        for name, module in projections.items():
            ffn.block.set_submodule(name, module)
        ffn.set_activation(activation)
        if hasattr(ffn.block, "activation_dropout"):
            ffn.block.activation_dropout = layer.block_dropout  # type: ignore[assignment]
    ffn.block.train(layer.training)
    return averaged


@torch.no_grad()
def projection_state(layer: OwnedExperts, dense: ExpertFFN) -> dict[str, Tensor]:
    """Tensors of the dense projections by "projection.weight" and "projection.bias"."""
    family, (projections, _) = layer.ffn.family, layer._dense
    weights = {family.first: dense.keys[0], family.last: dense.values[0].T}
    biases = {family.first: _one(dense.key_bias), family.last: None}
    if dense.out_bias is not None:
        biases[family.last] = dense.out_bias[0]
    if dense.up_keys is not None:
        up, up_bias = dense.up_keys[0], _one(dense.up_bias)
        if family.up is not None:
            weights[family.up], biases[family.up] = up, up_bias
        else:
            weights[family.first] = torch.cat([weights[family.first], up])
            first = biases[family.first]
            biases[family.first] = (
                None if first is None or up_bias is None else torch.cat([first, up_bias])
            )
    state = {}
    for path, weight in weights.items():
        module = projections[path]
        state[f"{path}.weight"] = (weight.T if is_conv1d(module) else weight).contiguous()
        bias = biases[path]
        if bias is not None and bias_of(module) is not None:
            state[f"{path}.bias"] = bias.contiguous()
    return state


def merged_experts(layer: OwnedExperts) -> tuple[ExpertFFN, bool]:
    """The dense FFN that the experts make as the only expert of the result, and whether any
    neuron had to be averaged; see `average_experts`."""
    require_no_adapter(layer)
    banks, members = [layer.experts.experts()], list(layer.members)
    if layer.residual is not None and layer.residual_members is not None:
        banks.append(layer.residual.experts())
        members.append(layer.residual_members)
    merged, averaged = average_experts(banks, members, layer.width)
    if layer.out_bias is not None:
        return replace(merged, out_bias=layer.out_bias[None]), averaged
    if merged.out_bias is None or bias_of(layer._dense[0][layer.ffn.family.last]) is None:
        return replace(merged, out_bias=None), averaged
    return replace(merged, out_bias=merged.out_bias * layer.bias_scale), averaged


def is_faithful(layer: OwnedExperts) -> bool:
    """Whether a dense FFN can compute what the experts do: copies of the whole FFN that are
    still equal and of which a token takes a mean, or a partition of its neurons."""
    _, averaged = merged_experts(layer)
    groups = list(layer.members)
    if layer.residual_members is not None:
        groups.append(layer.residual_members)
    everyone = torch.cat(groups)
    counts = torch.bincount(everyone, minlength=layer.width)
    whole = all(len(m) == layer.width for m in layer.members)
    whole = whole and layer.router.rule.combine != "one"  # a sum of k copies is no dense FFN
    return not averaged and (whole or bool((counts == 1).all()))


def _gather(
    ffn: FFN, members: Sequence[Tensor], out_bias: Float[Tensor, "E D"] | None
) -> ExpertFFN:
    keys, values = ffn.keys().detach(), rows(ffn.last).detach().T
    experts = gather_experts(
        keys, values, members, key_bias=_detached(ffn.key_bias()), out_bias=out_bias
    )
    up, up_bias = _detached(ffn.up_keys()), _detached(ffn.up_bias())
    return ExpertFFN(
        keys=experts.keys,
        values=experts.values,
        key_bias=experts.key_bias,
        up_keys=None if up is None else [up[m] for m in members],
        up_bias=None if up_bias is None else [up_bias[m] for m in members],
        out_bias=out_bias,
    )


def _inner_dropout(ffn: FFN) -> float:
    """Probability with which the block itself drops activations in training."""
    inline: Any = getattr(ffn.block, "activation_dropout", 0.0)
    modules = [m.p for m in ffn.inner if isinstance(m, nn.Dropout)]
    return float(inline if ffn.family.entry is None else sum(modules))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _one(parts: Sequence[Tensor] | None) -> Tensor | None:
    return None if parts is None else parts[0]
