"""Which neurons of split FFNs are positive, in their original order and by expert.

The model runs once more on a few batches, and the pre-activations of every split layer are read
at its first projection. Only counts per block of neurons are kept.

Letters: T tokens, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moduli.inspect.record import ActivationPattern
from moduli.surgery.convert import recorded_layout
from moduli.surgery.layout import LayerLayout
from moduli.surgery.locate import FFN
from moduli.surgery.modular import routed_layers
from moduli.surgery.partition.observe import observe
from moduli.surgery.seam import RoutedActivation

TOKENS = 320
"""Tokens of a pattern, as in EMoE's figure."""


def activation_patterns(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], tokens: int = TOKENS
) -> tuple[ActivationPattern, ...]:
    """The pattern of every split layer over some real tokens of the batches.

    Args:
        model: any; layers whose experts have parameters of their own have no pattern.
        batches: keyword arguments of its forward.
        tokens: so many at most, evenly spaced over all.
    """
    split = {
        name: layer
        for name, layer in routed_layers(model).items()
        if isinstance(layer, RoutedActivation)
    }
    if not split or not batches:
        return ()
    orders = {
        layer.name: layer.order
        for layer in recorded_layout(model)[1].layers
        if isinstance(layer, LayerLayout)
    }
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in split}

    def see(ffn: FFN, x: Tensor, z: Tensor) -> None:
        layer = split[ffn.name]
        order = orders[ffn.name].to(z.device)
        positive = layer.activation(z) > 0
        moved = ffn.order is None
        by_expert = positive if moved else positive[:, order]
        original = torch.empty_like(positive)
        original[:, order] = by_expert
        blocks = torch.repeat_interleave(
            torch.arange(len(layer.sizes)), torch.tensor(layer.sizes)
        ).to(z.device)
        found[ffn.name].append(
            (per_block(original, blocks).cpu(), per_block(by_expert, blocks).cpu())
        )

    observe(model, [layer.ffn for layer in split.values()], batches, see)
    return tuple(
        _pattern(name, split[name].sizes, parts, tokens) for name, parts in found.items() if parts
    )


def per_block(positive: Bool[Tensor, "T F"], blocks: Int[Tensor, " F"]) -> Float[Tensor, "T E"]:
    """How many neurons of every block are positive."""
    counts = torch.zeros(len(positive), int(blocks.max()) + 1, device=positive.device)
    return counts.index_add_(1, blocks, positive.float())


def _pattern(
    name: str, sizes: tuple[int, ...], parts: Sequence[tuple[Tensor, Tensor]], tokens: int
) -> ActivationPattern:
    original, by_expert = (torch.cat(one).int() for one in zip(*parts, strict=True))
    rows = evenly(len(original), tokens)
    return ActivationPattern(
        layer=name,
        sizes=sizes,
        original=tuple(map(tuple, original[rows].tolist())),
        by_expert=tuple(map(tuple, by_expert[rows].tolist())),
    )


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` places, evenly spaced."""
    return [i * count // wanted for i in range(wanted)] if count > wanted else list(range(count))
