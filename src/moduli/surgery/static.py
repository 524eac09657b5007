"""Static pruning: every token uses the same experts, those that were used most.

The baseline that routing has to beat at equal cost. Neurons of the other experts are switched off
by zeros in the second projection, and the model is merged: an ordinary dense checkpoint with the
shapes it had before conversion, which computes what the routed model would if its routers always
chose these experts with weight 1. Letters: F neurons, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moduli.errors import ConfigError, ModelError
from moduli.surgery.fast import chosen_share
from moduli.surgery.merge import merge
from moduli.surgery.modular import require_modular
from moduli.surgery.projection import base_of, bias_of, in_dim, is_stock, weight_of
from moduli.surgery.routed import RoutedLayer
from moduli.surgery.seam import RoutedActivation


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one layer.

    Attributes:
        name: of the FFN's block.
        kept: experts that every token uses from now on, in ascending order.
        neurons: of those experts.
        of_neurons: F.
        dropped: share of the selections that chose another expert; 0 if there were none.
    """

    name: str
    kept: tuple[int, ...]
    neurons: int
    of_neurons: int
    dropped: float


@dataclass(frozen=True)
class PruneReport:
    """What `prune_statically` did."""

    layers: tuple[PrunedLayer, ...]

    @property
    def dropped(self) -> float:
        """Share of the selections that are gone, mean over layers."""
        return sum(layer.dropped for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        layers = [{**asdict(layer), "kept": list(layer.kept)} for layer in self.layers]
        return {"layers": layers, "dropped": self.dropped}

    def __str__(self) -> str:
        lines = [
            f"{layer.name}: {len(layer.kept)} experts kept ({layer.neurons} of {layer.of_neurons} "
            f"neurons), {layer.dropped:.1%} of the selections dropped"
            for layer in self.layers
        ]
        return "\n".join([f"statically pruned {len(self.layers)} layers to dense", *lines])


@torch.no_grad()
def prune_statically(
    model: nn.Module, usage: Mapping[str, Sequence[int | float]], keep: int | None = None
) -> PruneReport:
    """Keep the most used experts of every layer for every token, drop the others; in place.

    Afterwards the model is dense. The output bias of a shared bias stays as it is; of biases that
    experts have of their own, those of the kept ones are added.

    Args:
        model: a modular model whose experts are groups of its own neurons.
        usage: how often each of the E experts was chosen, on training data, by the layer's name.
        keep: experts that are kept; None: as many as a token uses now, in each layer.

    Returns:
        What was kept, and how much of what the routers chose is lost.

    Raises:
        ModelError: the model has no routed layers, or a second projection whose weights cannot be
            written (quantised, or with an adapter on it).
        ConfigError: experts that are copies, usage that does not fit the layers, or `keep` out of
            range. The model is left as it was.
    """
    chosen = {
        name: (_split_layer(name, layer), _most_used(name, layer, usage, keep))
        for name, layer in require_modular(model).items()
    }
    biases = []
    for layer, kept in chosen.values():
        last = layer.ffn.last
        gone = (~torch.isin(experts_of_neurons(layer), torch.tensor(kept))).nonzero().flatten()
        weight = weight_of(last)
        weight.index_fill_(in_dim(last), gone.to(weight.device), 0.0)
        if layer.out_bias is not None:
            biases.append((last, layer.out_bias[list(kept)].sum(dim=0)))
    merge(model)
    for last, bias in biases:
        own = bias_of(last)
        assert own is not None  # it was split over the experts
        own.copy_(bias)
    return PruneReport(
        tuple(_report(name, layer, kept, usage[name]) for name, (layer, kept) in chosen.items())
    )


def experts_of_neurons(layer: RoutedActivation) -> Int[Tensor, " F"]:
    """The expert of every neuron, in the order in which the converted FFN has them; on the CPU."""
    if layer.labels is not None:
        return layer.labels.cpu()
    return torch.arange(layer.num_experts).repeat_interleave(torch.tensor(layer.sizes))


def _split_layer(name: str, layer: RoutedLayer) -> RoutedActivation:
    if not isinstance(layer, RoutedActivation):
        raise ConfigError(
            f"static pruning drops neurons of experts that share one FFN, but the experts of "
            f"{name} have parameters of their own; moduli.merge(model) makes it dense"
        )
    last = layer.ffn.last
    if base_of(last) is not last or not is_stock(last):
        raise ModelError(
            f"{name}.{layer.ffn.family.last} is a {type(last).__name__}, whose neurons cannot be "
            "zeroed; merge its adapter first (merge_and_unload), or load the model unquantised"
        )
    return layer


def _most_used(
    name: str, layer: RoutedLayer, usage: Mapping[str, Sequence[int | float]], keep: int | None
) -> tuple[int, ...]:
    """Experts by usage, most first, the lower index first among equals; sorted."""
    if name not in usage or len(usage[name]) != layer.num_experts:
        given = f"{len(usage[name])} numbers" if name in usage else "nothing"
        raise ConfigError(
            f"usage has {given} for {name}, which has {layer.num_experts} experts; give one count "
            "per expert for every routed layer"
        )
    used = round(chosen_share(layer) * layer.num_experts)
    count = used if keep is None else keep
    if not 1 <= count <= layer.num_experts:
        raise ConfigError(
            f"keep={count}, but {name} has {layer.num_experts} experts; choose 1 to "
            f"{layer.num_experts}"
        )
    order = sorted(range(layer.num_experts), key=lambda e: (-float(usage[name][e]), e))
    return tuple(sorted(order[:count]))


def _report(
    name: str, layer: RoutedActivation, kept: tuple[int, ...], usage: Sequence[int | float]
) -> PrunedLayer:
    total = float(sum(usage))
    held = float(sum(usage[e] for e in kept))
    return PrunedLayer(
        name=name,
        kept=kept,
        neurons=sum(layer.sizes[e] for e in kept),
        of_neurons=sum(layer.sizes),
        dropped=(total - held) / total if total > 0 else 0.0,
    )
