"""A modular model as a whole: its routed layers, what they share in a pass, and `moduli.dense`.

The layers themselves are in `moduli.surgery.seam`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.routing import AvgKRouter
from moduli.surgery.locate import stacks
from moduli.surgery.recall import recall_in_backward
from moduli.surgery.routed import Pass, RoutedLayer
from moduli.surgery.stochastic import StochasticProjection


class ModelHook:
    """A hook of ours on the whole model; `moduli.merge` removes them all."""


class HostHook(ModelHook):
    """One on the module itself whose config records the layout."""


class PassHook(HostHook):
    """Forward pre-hook of the whole model: a new pass begins, so re-tie kept gates."""

    def __init__(self, shared: Pass, labels: int | None) -> None:
        self.shared = shared
        self.labels = labels  # their position among arguments

    def __call__(
        self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        if getattr(model, "_is_replica", False):
            raise ModelError(
                "nn.DataParallel runs copies of a model in threads, which routed layers do not "
                "support; start one process per device instead (torchrun), as for "
                "DistributedDataParallel, or show the process one device"
            )
        self.shared.end_recall()
        labels = _table(args, kwargs, "labels", self.labels)
        known = labels is not None and not labels.is_floating_point()
        self.shared.targets = real_inputs(labels) if labels is not None and known else None
        for layer in routed_layers(model).values():
            layer.auxiliary, layer.lost_auxiliary = None, False
            if isinstance(layer.router, AvgKRouter):
                layer.router.update()
                layer.router.stale = layer.training


class RecallHook(HostHook):
    """Forward hook of the whole model: its backward finds the masks and ids of this pass."""

    def __init__(self, shared: Pass) -> None:
        self.shared = shared

    def __call__(self, model: nn.Module, args: object, output: Any) -> None:
        if model.training:
            recall_in_backward(output, self.shared, self.shared.snapshot())


class MaskHook(ModelHook):
    """Forward pre-hook of a stack (see `stacks`): notes which of its tokens are real.

    A decoder beside an encoder mostly gets no mask, since no token looks ahead to the padding; the
    labels tell.
    """

    def __init__(
        self, shared: Pass, stack: str, position: int | None, labelled: bool = False
    ) -> None:
        self.shared = shared
        self.stack = stack
        self.position = position  # of attention_mask among positional arguments
        self.labelled = labelled  # it is such a decoder

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        mask = _table(args, kwargs, "attention_mask", self.position)
        if mask is None and self.labelled:
            mask = self.shared.targets
        self.shared.masks[self.stack] = None if mask is None else mask.bool()


class IdsHook(ModelHook):
    """Forward pre-hook of a stack: notes the ids of its tokens, for routers that look them up."""

    def __init__(self, shared: Pass, stack: str, position: int) -> None:
        self.shared = shared
        self.stack = stack
        self.position = position  # of input_ids among positional arguments

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        self.shared.ids[self.stack] = _table(args, kwargs, "input_ids", self.position)


def _table(
    args: tuple[object, ...], kwargs: dict[str, object], name: str, position: int | None
) -> Tensor | None:
    """An argument of a forward, if it was given and is one number per token, by rows.

    Texts to choose from, [batch, choices, tokens], are rows of their own to the layers.
    """
    found = kwargs.get(name)
    if found is None and position is not None and position < len(args):
        found = args[position]
    fits = isinstance(found, Tensor) and found.dim() in (2, 3)
    return found.flatten(0, -2) if isinstance(found, Tensor) and fits else None


def real_inputs(labels: Int[Tensor, "B M"]) -> Bool[Tensor, "B M"]:
    """Which inputs of a decoder are real, by the label that each is to predict.

    The first one is, since it is what a decoder starts with, also where there is no target.
    """
    real = labels != -100
    real[:, :1] = True
    return real


def watch(model: Any, shared: Pass) -> None:
    """Register the hooks that keep `shared` up to date."""
    config = getattr(model, "config", None)
    decoder = model.get_decoder() if getattr(config, "is_encoder_decoder", False) else None
    names = list(inspect.signature(model.forward).parameters)
    labels = names.index("labels") if "labels" in names else None
    model.register_forward_pre_hook(PassHook(shared, labels), with_kwargs=True, prepend=True)
    model.register_forward_hook(RecallHook(shared))
    by_ids = any(layer.router.by_ids for layer in routed_layers(model).values())
    for name, stack in stacks(model).items():
        names = list(inspect.signature(stack.forward).parameters)
        position = names.index("attention_mask") if "attention_mask" in names else None
        labelled = stack is decoder
        hooks: list[MaskHook | IdsHook] = [MaskHook(shared, name, position, labelled)]
        if by_ids and "input_ids" in names:
            hooks.append(IdsHook(shared, name, names.index("input_ids")))
        for hook in hooks:
            stack.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def unwatch(model: nn.Module) -> None:
    """Remove every hook of ours that is not on a single layer."""
    for module in model.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key, hook in list[tuple[int, object]](hooks.items()):
                if isinstance(hook, ModelHook):
                    del hooks[key]
                    flags.pop(key, None)


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """Routed layers by the name of their FFN block, in model order."""
    return {m.ffn.name: m for m in model.modules() if isinstance(m, RoutedLayer)}


def require_modular(model: nn.Module) -> dict[str, RoutedLayer]:
    """The routed layers.

    Raises:
        ModelError: the model has none.
    """
    layers = routed_layers(model)
    if not layers:
        raise ModelError(
            f"this {type(model).__name__} has no routed layers; moduli.convert(model, ...) makes "
            "them, moduli.load(directory) brings back saved ones"
        )
    return layers


def is_modular(model: nn.Module) -> bool:
    """Whether the model has routed layers, or stochastic experts."""
    return any(isinstance(m, RoutedLayer | StochasticProjection) for m in model.modules())


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Within the block every expert of every layer takes part, as after `moduli.merge`.

    Raises:
        ModelError: the model has no experts of ours.
    """
    layers = [m for m in model.modules() if isinstance(m, RoutedLayer | StochasticProjection)]
    states = {id(layer.shared): layer.shared for layer in layers or require_modular(model).values()}
    before = {key: state.dense for key, state in states.items()}
    for state in states.values():
        state.dense = True
    try:
        yield
    finally:
        for key, state in states.items():
            state.dense = before[key]
