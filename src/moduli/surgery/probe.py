"""Measuring a conversion: how far routed FFNs are from dense ones on a batch of real inputs.

Letters: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moduli.routing import GroundTruthRouter
from moduli.surgery.evaluating import evaluating
from moduli.surgery.fast import chosen_share, path_of
from moduli.surgery.modular import dense, require_modular
from moduli.surgery.owned import OwnedExperts, merged_experts
from moduli.surgery.partition.quality import split_quality
from moduli.surgery.projection import base_of, bias_of
from moduli.surgery.report import LayerReport
from moduli.surgery.routed import RoutedLayer


@torch.no_grad()
def output_errors(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
    """Relative output error of every routed layer, each on the input the dense model gives it.

    |y_routed - y_dense| / |y_dense - b2| over real tokens (Frobenius norms).

    Args:
        model: a modular model; run once, in evaluation mode.
        batch: keyword arguments of its forward.
    """
    layers = require_modular(model)
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0].detach()

        return hook

    handles = [
        layer.experts_input.register_forward_pre_hook(keep(name)) for name, layer in layers.items()
    ]
    try:
        with evaluating(model), dense(model):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _error(layers[name], x) for name, x in inputs.items()}


@torch.no_grad()
def merge_gap(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """|routed - merged| / |merged| of the model's first output tensor, in evaluation mode."""
    with evaluating(model):
        routed = _first_tensor(model(**batch))
        with dense(model):
            merged = _first_tensor(model(**batch))
    scale = float(merged.norm())
    return float((routed - merged).norm()) / scale if scale > 0 else 0.0


def _first_tensor(output: Any) -> Tensor:
    values = list(output.values()) if hasattr(output, "values") else list(output)
    return next(v for v in values if isinstance(v, Tensor) and v.dim() > 0).float()


def _error(layer: RoutedLayer, x: Float[Tensor, "*batch D"]) -> float:
    with evaluating(layer):
        try:
            routed = ffn_output(layer, x)
            layer.shared.dense = True
            full = ffn_output(layer, x)
        finally:
            layer.shared.dense = False
    bias = output_bias(layer)
    signal = full if bias is None else full - bias
    real = layer.shared.real_tokens(x.shape[:-1], layer.ffn.name)
    if real is not None:
        real = real.reshape(x.shape[:-1])
        routed, full, signal = routed[real], full[real], signal[real]
    scale = float(signal.float().norm())
    return float((routed - full).float().norm()) / scale if scale > 0 else 0.0


def output_bias(layer: RoutedLayer) -> Tensor | None:
    """Output bias [D] of the dense FFN, or None."""
    if isinstance(layer, OwnedExperts):
        merged = merged_experts(layer)[0].out_bias
        return None if merged is None else merged[0]
    return bias_of(base_of(layer.ffn.last))


def ffn_output(layer: RoutedLayer, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    """What the last projection returns for x, through the modules (masked path)."""
    if isinstance(layer, OwnedExperts):
        owned: Tensor = layer(x)
        return owned
    ffn = layer.ffn
    hidden = layer(ffn.first(x)[..., : ffn.width])
    if ffn.gated:
        hidden = hidden * ffn.up_output(x)
    y: Tensor = ffn.last(hidden)
    return y


def layer_report(layer: RoutedLayer, error: float | None) -> LayerReport:
    """Sizes, quality, cost and path of one routed layer."""
    sizes, family = layer.sizes, layer.ffn.family
    neurons = sum(sizes) * chosen_share(layer)
    if isinstance(layer, OwnedExperts):
        hidden, width, quality = layer.hidden, layer.width, None
        if layer.residual_members is not None:
            neurons += layer.residual_members.numel()
    else:
        hidden, width = layer.ffn.hidden, layer.ffn.width
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        quality = split_quality(layer.ffn.keys(), labels)
    matrices = 3 if family.up is not None or family.fused else 2
    dense_cost = matrices * hidden * width
    gate = hidden * len(sizes)
    if layer.router.learned:
        gate = sum(p.numel() for p in layer.router.parameters())
    elif isinstance(layer.router, GroundTruthRouter):
        gate = hidden * width
    return LayerReport(
        name=layer.ffn.name,
        neurons=width,
        sizes=(min(sizes), max(sizes)),
        quality=quality,
        error=error,
        cost=(matrices * hidden * neurons + gate) / dense_cost,
        path=path_of(layer),
    )
