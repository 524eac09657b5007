"""A modular model as a whole: its routed layers, what they share in a pass, and `moduli.dense`.

The layers themselves are in `moduli.surgery.seam`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.routing import AvgKRouter
from moduli.surgery.seam import Pass, RoutedActivation


class ModelHook:
    """A hook of ours on the whole model; `moduli.merge` removes them all."""


class PassHook(ModelHook):
    """Forward pre-hook of the whole model: notes which tokens are real, re-ties kept gates."""

    def __init__(self, shared: Pass, position: int | None) -> None:
        self.shared = shared
        self.position = position  # of attention_mask among positional arguments

    def __call__(
        self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        if getattr(model, "_is_replica", False):
            raise ModelError(
                "nn.DataParallel runs copies of a model in threads, which routed layers do not "
                "support; start one process per device instead (torchrun), as for "
                "DistributedDataParallel, or show the process one device"
            )
        mask = kwargs.get("attention_mask")
        if mask is None and self.position is not None and self.position < len(args):
            mask = args[self.position]
        known = isinstance(mask, Tensor) and mask.dim() == 2
        self.shared.real = mask.bool() if isinstance(mask, Tensor) and known else None
        for layer in routed_layers(model).values():
            layer.auxiliary, layer.lost_auxiliary = None, False
            if isinstance(layer.router, AvgKRouter):
                layer.router.update()
                layer.router.stale = layer.training


def routed_layers(model: nn.Module) -> dict[str, RoutedActivation]:
    """Routed layers by the name of their FFN block, in model order."""
    return {m.ffn.name: m for m in model.modules() if isinstance(m, RoutedActivation)}


def require_modular(model: nn.Module) -> dict[str, RoutedActivation]:
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
    """Whether the model has routed layers."""
    return any(isinstance(m, RoutedActivation) for m in model.modules())


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Within the block every expert of every layer takes part, as after `moduli.merge`.

    Raises:
        ModelError: the model has no routed layers.
    """
    states = {id(layer.shared): layer.shared for layer in require_modular(model).values()}
    before = {key: state.dense for key, state in states.items()}
    for state in states.values():
        state.dense = True
    try:
        yield
    finally:
        for key, state in states.items():
            state.dense = before[key]
