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
from moduli.routing import ExpertChoiceRouter, Router, SwitchRouter
from moduli.surgery.convert import (
    recorded_layout,
    set_layout,
    split_bias,
    uninstall,
)
from moduli.surgery.layout import CopiesLayout, LayerLayout, OwnedLayout
from moduli.surgery.modular import is_modular, require_modular, routed_layers, unwatch
from moduli.surgery.neurons import neuron_tensors, permute_neurons
from moduli.surgery.owned import (
    OwnedExperts,
    disown,
    is_faithful,
    merged_experts,
    projection_state,
    require_no_adapter,
)
from moduli.surgery.processes import gathered, reshard, whole_parameters
from moduli.surgery.projection import base_of, bias_of, is_sharded, placed_like, whole
from moduli.surgery.report import MergeReport
from moduli.surgery.routed import RoutedLayer
from moduli.surgery.seam import RoutedActivation
from moduli.surgery.stochastic import (
    have_parted,
    mean_tensors,
    merge_projections,
    require_mergeable,
    stochastic_projections,
)


@torch.no_grad()
def merge(model: nn.Module, *, exact: bool = False) -> MergeReport:
    """Make the model dense again, in place; all experts take part in every token from now on.

    Works through PEFT too: adapters on converted projections are moved to the original order of
    neurons, so that they fit the original base model. Of experts that are copies, every neuron
    becomes the mean of its copies. Weights sharded by FSDP2 stay sharded; every process calls this.

    Args:
        model: a modular model.
        exact: refuse if a dense FFN cannot compute what the experts do, instead of averaging and
            leaving out what the router's weights scale.

    Returns:
        What was merged and whether anything had to be averaged.

    Raises:
        ModelError: the model has no routed layers, or adapters that cannot be moved, or `exact`
            is impossible; it is left as it was.
    """
    layers = _routed(model)
    reshard(model)
    host, layout = recorded_layout(model)
    require_mergeable(model)  # whatever raises does so before any change
    if exact:
        _require_equal_copies(model)
    for entry in layout.layers:
        if isinstance(entry, CopiesLayout):
            continue
        layer = _layer_named(layers, entry.name)
        if isinstance(layer, RoutedActivation):
            _require_movable(layer, entry)
        if isinstance(layer, OwnedExperts):
            require_no_adapter(layer)
            _require_whole(layer)
        if exact:
            _require_exact(layer)
    averaged = parted_layers(model)
    merge_projections(host)
    for entry in layout.layers:
        if isinstance(entry, CopiesLayout):
            continue
        layer = _layer_named(layers, entry.name)
        if isinstance(layer, OwnedExperts):
            if disown(host, layer):
                averaged.append(f"experts of {entry.name}")
        elif isinstance(layer, RoutedActivation) and _close_seam(layer, entry):
            averaged.append(f"output bias of {entry.name}")
    unwatch(host)
    set_layout(host, None)
    return MergeReport([entry.name for entry in layout.layers], not averaged, averaged)


def _routed(model: nn.Module) -> dict[str, RoutedLayer]:
    """The routed layers, none if the model has stochastic experts instead.

    Raises:
        ModelError: it has neither.
    """
    return routed_layers(model) if is_modular(model) else require_modular(model)


def parted_layers(model: nn.Module) -> list[str]:
    """What of stochastic experts has to be averaged: layers whose copies are no longer equal."""
    found: dict[str, None] = {}
    for name, projection in stochastic_projections(model).items():
        if have_parted(projection):
            found[f"experts of {name}"] = None
    return list(found)


def _require_equal_copies(model: nn.Module) -> None:
    for one in parted_layers(model):
        raise ModelError(
            f"{one.removeprefix('experts of ')} cannot be merged exactly: its copies were trained "
            "apart. merge(model) averages them; moduli.save measures what that changes"
        )


def _close_seam(layer: RoutedActivation, entry: LayerLayout | OwnedLayout) -> bool:
    """Make one split FFN dense again; whether its output bias had to be averaged."""
    bias, changed = dense_bias(layer)
    own = bias_of(base_of(layer.ffn.last))
    if bias is not None and own is not None:
        own.copy_(placed_like(bias, own))
    uninstall(layer)
    if isinstance(entry, LayerLayout) and entry.moved:
        permute_neurons(layer.ffn, entry.order.argsort())
    return changed


def _require_movable(layer: RoutedActivation, entry: LayerLayout | OwnedLayout) -> None:
    if isinstance(entry, LayerLayout) and entry.moved:
        neuron_tensors(layer.ffn)


def _require_whole(layer: OwnedExperts) -> None:
    if any(map(is_sharded, layer.parameters())):
        raise ModelError(
            f"{layer.ffn.name} cannot be merged in place: its experts are sharded over processes, "
            "and the dense FFN has no place among the shards. moduli.save(model, directory), "
            "called by every process, writes the merged model"
        )


def _require_exact(layer: RoutedLayer) -> None:
    if isinstance(layer, OwnedExperts) and not is_faithful(layer):
        raise ModelError(
            f"{layer.ffn.name} cannot be merged exactly: its experts overlap or were trained "
            "apart, and no single dense FFN computes what they do. merge(model) averages the "
            "copies of every neuron; moduli.save measures what that changes"
        )
    copies = isinstance(layer, OwnedExperts) and len(layer.members[0]) == layer.width
    if copies and not _sum_to_one(layer.router):
        raise ModelError(
            f"{layer.ffn.name} cannot be merged exactly: its experts are equal copies, but their "
            "output is scaled by weights that do not sum to 1, which no dense FFN does. "
            "merge(model) leaves the weights out; moduli.save measures what that changes"
        )
    if isinstance(layer, RoutedActivation) and dense_bias(layer)[1]:
        raise ModelError(
            f"{layer.ffn.name} cannot be merged exactly: the output biases of its experts were "
            "trained apart. merge(model) averages them"
        )


def _sum_to_one(router: Router) -> bool:
    """Whether a token's weights sum to 1, so that equal copies compute what the dense FFN does."""
    combine, several = router.rule.combine, router.rule.top_k > 1
    if router.by_ids or (several and isinstance(router, SwitchRouter)):
        return True
    if combine == "softmax":  # of one choice it is the probability
        return several or isinstance(router, ExpertChoiceRouter)
    return combine == "straight_through" and not several


def is_averaged(layer: RoutedLayer) -> bool:
    """Whether merging has to average anything in this layer."""
    if isinstance(layer, OwnedExperts):
        with whole_parameters(layer):
            return merged_experts(layer)[1]
    return isinstance(layer, RoutedActivation) and dense_bias(layer)[1]


@torch.no_grad()
def dense_state(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """State dict of the merged model, without touching the model.

    Only tensors of converted layers are copied; parameters of routers and experts are left out.
    Sharded tensors are gathered, for which every process must call this.

    Args:
        model: a modular model.
        keep: False in a process that only takes part in gathering; the result is of no use there.

    Raises:
        ModelError: the model has no routed layers.
    """
    layers, copies = _routed(model), stochastic_projections(model)
    reshard(model)
    _, layout = recorded_layout(model)
    ours = {
        id(tensor)
        for layer in (*layers.values(), *copies.values())
        for name, tensor in layer.state_dict(keep_vars=True).items()
        if "modules_to_save." not in name  # a trained router is a part of the adapter, says PEFT
    }
    kept = model.state_dict(keep_vars=True)
    state = gathered({n: tensor for n, tensor in kept.items() if id(tensor) not in ours}, keep)
    names = {id(module): name for name, module in model.named_modules()}
    for path, projection in copies.items():
        with whole_parameters(projection):
            merged = mean_tensors(projection)
        state |= {f"{path}.{name}": tensor for name, tensor in merged.items()}
    for entry in layout.layers:
        if isinstance(entry, CopiesLayout):
            continue
        layer = _layer_named(layers, entry.name)
        if isinstance(layer, OwnedExperts):
            block = names[id(layer)].removesuffix(layer.path) + entry.name
            with whole_parameters(layer):
                merged = projection_state(layer, merged_experts(layer)[0])
            state |= {f"{block}.{name}": tensor for name, tensor in merged.items()}
        elif isinstance(layer, RoutedActivation):
            prefix = names[id(layer.ffn.block)]
            if isinstance(entry, LayerLayout) and entry.moved:
                inverse = entry.order.argsort()
                for part in neuron_tensors(layer.ffn):
                    state[f"{prefix}.{part.name}"] = part.moved(inverse)
            bias, _ = dense_bias(layer)
            if bias is not None:
                wrapped = hasattr(layer.ffn.last, "base_layer")
                path = layer.ffn.family.last + (".base_layer" if wrapped else "")
                state[f"{prefix}.{path}.bias"] = bias
    return state


def dense_bias(layer: RoutedActivation) -> tuple[Tensor | None, bool]:
    """Output bias of the merged FFN and whether it was averaged; None to keep the FFN's own."""
    own = bias_of(base_of(layer.ffn.last))
    if layer.out_bias is None or own is None:
        return None, False
    untouched = split_bias(whole(own), layer.num_experts, layer.bias_top_k)
    out_bias = whole(layer.out_bias)
    if torch.equal(out_bias.to(untouched.dtype), untouched):
        return None, False
    return merged_out_bias(out_bias, layer.bias_top_k).to(own.dtype), True


def _layer_named(layers: dict[str, RoutedLayer], name: str) -> RoutedLayer:
    if name not in layers:
        raise ModelError(f"the layout names {name!r}, which is not a routed layer of the model")
    return layers[name]
