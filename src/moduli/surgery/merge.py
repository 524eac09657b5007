"""Modular to dense, in place: neurons return to their original places.

For a partition nothing is computed, so that an untrained model comes back bit for bit. Only the
experts' own output biases (`preset="paper"`) are averaged, if they were trained.
Letters: D width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.experts.ffn import merged_out_bias
from moduli.surgery.convert import (
    recorded_layout,
    set_layout,
    split_bias,
    uninstall,
)
from moduli.surgery.modular import require_modular, unwatch
from moduli.surgery.neurons import neuron_tensors, permute_neurons
from moduli.surgery.projection import base_of, bias_of
from moduli.surgery.report import MergeReport
from moduli.surgery.seam import RoutedActivation


@torch.no_grad()
def merge(model: nn.Module) -> MergeReport:
    """Make the model dense again, in place; all experts take part in every token from now on.

    Works through PEFT too: adapters on converted projections are moved to the original order of
    neurons, so that they fit the original base model.

    Returns:
        What was merged and whether anything had to be averaged.

    Raises:
        ModelError: the model has no routed layers, or adapters that cannot be moved; it is left
            as it was.
    """
    layers = require_modular(model)
    host, layout = recorded_layout(model)
    for layer_layout in layout.layers:
        if layer_layout.moved:  # raises before any change
            neuron_tensors(_layer_named(layers, layer_layout.name).ffn)
    averaged = []
    for layer_layout in layout.layers:
        layer = _layer_named(layers, layer_layout.name)
        bias, changed = dense_bias(layer)
        own = bias_of(base_of(layer.ffn.last))
        if bias is not None and own is not None:
            own.copy_(bias)
        if changed:
            averaged.append(f"output bias of {layer.ffn.name}")
        uninstall(layer)
        if layer_layout.moved:
            permute_neurons(layer.ffn, layer_layout.order.argsort())
    unwatch(host)
    set_layout(host, None)
    return MergeReport([entry.name for entry in layout.layers], not averaged, averaged)


@torch.no_grad()
def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the merged model, without touching the model.

    Only tensors of converted layers are copied; parameters of routers and experts are left out.

    Raises:
        ModelError: the model has no routed layers.
    """
    layers = require_modular(model)
    _, layout = recorded_layout(model)
    state = dict(model.state_dict())
    ours = {
        id(tensor)
        for layer in layers.values()
        for name, tensor in layer.state_dict(keep_vars=True).items()
        if "modules_to_save." not in name  # a trained router is a part of the adapter, says PEFT
    }
    kept = model.state_dict(keep_vars=True)
    state = {name: tensor for name, tensor in state.items() if id(kept[name]) not in ours}
    names = {id(module): name for name, module in model.named_modules()}
    for layer_layout in layout.layers:
        layer = _layer_named(layers, layer_layout.name)
        prefix = names[id(layer.ffn.block)]
        inverse = layer_layout.order.argsort()
        if layer_layout.moved:
            for entry in neuron_tensors(layer.ffn):
                state[f"{prefix}.{entry.name}"] = entry.moved(inverse)
        bias, _ = dense_bias(layer)
        if bias is not None:
            last = layer.ffn.last
            path = layer.ffn.family.last + (".base_layer" if hasattr(last, "base_layer") else "")
            state[f"{prefix}.{path}.bias"] = bias
    return state


def dense_bias(layer: RoutedActivation) -> tuple[Tensor | None, bool]:
    """Output bias of the merged FFN and whether it was averaged; None to keep the FFN's own."""
    own = bias_of(base_of(layer.ffn.last))
    if layer.out_bias is None or own is None:
        return None, False
    untouched = split_bias(own, layer.num_experts, layer.bias_top_k)
    if torch.equal(layer.out_bias.to(untouched.dtype), untouched):
        return None, False
    return merged_out_bias(layer.out_bias, layer.bias_top_k).to(own.dtype), True


def _layer_named(layers: dict[str, RoutedActivation], name: str) -> RoutedActivation:
    if name not in layers:
        raise ModelError(f"the layout names {name!r}, which is not a routed layer of the model")
    return layers[name]
