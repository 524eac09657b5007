"""Dense to modular, in place: choose layers, group neurons, permute, put the seam in.

Methods call `split_ffns` with how they partition neurons and which router they use.
Letters: D width, F neurons, E experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor, nn

from moduli.errors import CheckpointError, ConfigError, ModelError
from moduli.routing import Router
from moduli.surgery.alignment import align_parameters
from moduli.surgery.fast import FastFFN
from moduli.surgery.layout import CopiesLayout, LayerLayout, Layout, OwnedLayout
from moduli.surgery.locate import FFN
from moduli.surgery.modular import HostHook, is_modular, require_modular, watch
from moduli.surgery.neurons import permute_neurons
from moduli.surgery.owned import Own, OwnedExperts, own_ffn, require_copyable
from moduli.surgery.projection import base_of, bias_of, is_sharded
from moduli.surgery.routed import Pass, SeamOptions
from moduli.surgery.seam import RoutedActivation

BuildRouter = Callable[[FFN, tuple[int, ...]], Router]


@dataclass(frozen=True)
class Split:
    """How a method turns an FFN into experts, besides the labels of its neurons.

    Attributes:
        router: makes the router of a layer from its FFN (neurons already in expert order) and
            the sizes of its experts.
        options: see `SeamOptions`.
        out_bias: "shared" adds the FFN's output bias once; "split" gives every expert 1 / k of
            it as a parameter of its own (EMoE's reference).
        top_k: k, for split biases.
    """

    router: BuildRouter
    options: SeamOptions
    out_bias: Literal["shared", "split"]
    top_k: int


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper; layouts name its modules.

    Raises:
        ModelError: it is wrapped for data-parallel training already.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ModelError(
            "the model is wrapped in DistributedDataParallel; convert it before wrapping, since "
            "conversion moves parameters"
        )
    if any(map(is_sharded, model.parameters())):
        raise ModelError(
            f"the weights of this {type(model).__name__} are sharded over processes (FSDP2 or "
            "tensor parallelism); convert it before sharding, since conversion moves neurons and "
            "may add parameters"
        )
    get_base = getattr(model, "get_base_model", None)
    base: nn.Module = model if get_base is None else get_base()
    return base


def require_dense(model: nn.Module) -> None:
    """Raise unless the model can be converted.

    Raises:
        ModelError: it has routed layers already, or its config says that its neurons are
            permuted.
    """
    if is_modular(model):
        raise ModelError(
            f"this {type(model).__name__} is modular already; moduli.merge(model) makes it dense"
        )
    if layout_of(model) is not None:
        raise ModelError(
            "the neurons of this checkpoint are in expert order (its config has a 'moduli' "
            "entry); moduli.load(directory) brings it back as a modular model"
        )


def split_ffns(
    model: nn.Module,
    ffns: Sequence[FFN],
    labels: Sequence[Int[Tensor, " F"]],
    split: Split,
    method: str,
    config: Mapping[str, Any],
    *,
    permuted: bool = False,
) -> list[RoutedActivation]:
    """Group the neurons of `ffns` by `labels` and route them; record it in `model.config`.

    Args:
        model: the whole model; changed in place.
        ffns: the layers to convert.
        labels: expert of every neuron of each, in original order.
        split: router, options and biases.
        method: name for the record.
        config: settings for the record; JSON-able.
        permuted: the weights are in expert order already (a checkpoint of a modular model).
    """
    align_parameters(model)
    layers = [
        LayerLayout(f.name, one.cpu().long(), moved=f.movable)
        for f, one in zip(ffns, labels, strict=True)
    ]
    shared = Pass()
    routed = []
    for ffn, layer in zip(ffns, layers, strict=True):
        if not layer.moved:
            ffn = dataclasses.replace(ffn, order=layer.order)
        elif not permuted:
            permute_neurons(ffn, layer.order)
        routed.append(install(ffn, layer.sizes, split, shared))
    watch(model, shared)
    set_layout(model, Layout(method, config, layers))
    return routed


def own_ffns(model: nn.Module, ffns: Sequence[FFN], layout: Layout, own: Own) -> list[OwnedExperts]:
    """Replace `ffns` by experts of their own as `layout` says; record it in `model.config`.

    Raises:
        ModelError: an FFN whose weights cannot be copied; nothing has changed.
    """
    layers = [layer for layer in layout.layers if isinstance(layer, OwnedLayout)]
    for ffn in ffns:
        require_copyable(ffn)
    shared = Pass()
    routed = [
        own_ffn(model, ffn, layer.members, own, shared, layer.residual)
        for ffn, layer in zip(ffns, layers, strict=True)
    ]
    align_parameters(model)
    watch(model, shared)
    set_layout(model, layout)
    return routed


def install(ffn: FFN, sizes: tuple[int, ...], split: Split, shared: Pass) -> RoutedActivation:
    """Put the seam into one FFN whose neurons are in expert order."""
    router = split.router(ffn, sizes).to(device=ffn.device)
    out_bias = None
    if split.out_bias == "split":
        own = bias_of(base_of(ffn.last))
        if own is not None:
            out_bias = split_bias(own.detach(), len(sizes), split.top_k)
    layer = RoutedActivation(ffn, sizes, router, split.options, shared, out_bias, split.top_k)
    layer.train(ffn.block.training)
    if out_bias is not None:
        layer.freeze_own_bias()
    if layer.needs_input:
        ffn.first.register_forward_pre_hook(layer.remember_input)
    if out_bias is not None:
        ffn.last.register_forward_hook(layer.add_expert_bias)
    ffn.set_activation(layer)
    entry = ffn.family.entry
    if entry is not None and hasattr(ffn.block, entry):
        setattr(ffn.block, entry, FastFFN(layer))
    return layer


def uninstall(layer: RoutedActivation) -> None:
    """Take the seam out of one FFN; its weights stay as they are."""
    ffn = layer.ffn
    layer.restore_own_bias()
    ffn.set_activation(layer.activation)
    entry = ffn.family.entry
    if entry is not None:
        ffn.block.__dict__.pop(entry, None)
    for module in ffn.projections.values():
        for inner in module.modules():  # an adapter may have come between since
            for hooks in (inner._forward_pre_hooks, inner._forward_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__self__", None) is layer:
                        del hooks[key]


def split_bias(bias: Tensor, num_experts: int, top_k: int) -> Tensor:
    """[E, D]: 1 / k of the output bias for every expert, so that k experts restore it."""
    return (bias / top_k).expand(num_experts, -1).clone()


def layout_of(model: nn.Module) -> Layout | None:
    """The layout that the model's config records, if any."""
    data = getattr(getattr(model, "config", None), "moduli", None)
    return None if data is None else Layout.from_dict(data)


def require_same_layout(model: nn.Module, checkpoint: Path) -> None:
    """Raise unless the weights in `checkpoint` are in the neuron order of `model`.

    Loading weights of another permutation into a model would mix up its neurons without any
    error, since all shapes agree.

    Args:
        model: modular or dense.
        checkpoint: a directory written by bare `save_pretrained`, such as a Trainer's.

    Raises:
        CheckpointError: the two orders differ.
    """
    mine = layout_of(model)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    stored = config.get("moduli")
    theirs = None if stored is None else Layout.from_dict(stored)
    if _orders(mine) != _orders(theirs):
        raise CheckpointError(
            f"{checkpoint} has its neurons in another order than the model (another method, seed "
            "or clustering); training cannot go on from it. moduli.load(directory) reads it as it "
            "is"
        )


def _orders(layout: Layout | None) -> dict[str, list[int]]:
    if layout is None:
        return {}
    return {x.name: _order(x) for x in layout.layers}


def _order(layer: LayerLayout | OwnedLayout | CopiesLayout) -> list[int]:
    if isinstance(layer, LayerLayout):
        return list(layer.labels.tolist())
    if isinstance(layer, CopiesLayout):
        return [layer.copies]
    return [i for group in layer.members for i in group.tolist()]


def set_layout(model: nn.Module, layout: Layout | None) -> None:
    """Record the layout in the model's config, or remove it."""
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(
            f"{type(model).__name__} has no config to record the layout in; "
            "moduli converts transformers models"
        )
    if layout is not None:
        config.moduli = layout.to_dict()
    elif hasattr(config, "moduli"):
        del config.moduli


def recorded_layout(model: nn.Module) -> tuple[nn.Module, Layout]:
    """The layout, and the module whose config records it (the model inside PEFT's wrapper).

    Raises:
        ModelError: no config has one.
    """
    for module in model.modules():
        if any(isinstance(hook, HostHook) for hook in module._forward_pre_hooks.values()):
            layout = layout_of(module)
            if layout is not None:
                return module, layout
    raise ModelError("the model is routed, but its config has lost the 'moduli' entry")


def set_top_k(model: nn.Module, k: int) -> None:
    """Use `k` experts per token from now on, in every routed layer; recorded in the config.

    Nothing else changes: shared output biases are added once for any k. Split biases
    (`preset="paper"`) were divided by the k of conversion, so that their sum changes with k, as
    it does in the reference.

    Raises:
        ConfigError: some layer has fewer than `k` experts, or k < 1, or its router cannot take k:
            Hash Layers takes 1, Switch 1 or 2. Nothing has changed.
        ModelError: the model has no routed layers.
    """
    layers = require_modular(model)
    for name, layer in layers.items():
        if not 1 <= k <= layer.num_experts:
            raise ConfigError(
                f"top_k={k}, but {name} has {layer.num_experts} experts; "
                f"choose 1 to {layer.num_experts}"
            )
        layer.router.require_top_k(k)
    for layer in layers.values():
        rule = dataclasses.replace(layer.router.rule, top_k=k)
        for module in layer.router.modules():  # PEFT's modules_to_save wraps a trained router
            if isinstance(module, Router):
                module.rule = rule
    host, layout = recorded_layout(model)
    set_layout(host, dataclasses.replace(layout, top_k=k))
