"""Measuring a conversion: how far routed FFNs are from dense ones on a batch of real inputs.

Letters: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moduli.surgery.fast import chosen_share, path_of
from moduli.surgery.modular import dense, require_modular
from moduli.surgery.partition.quality import split_quality
from moduli.surgery.projection import base_of, bias_of
from moduli.surgery.report import LayerReport
from moduli.surgery.seam import RoutedActivation


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
        layer.ffn.first.register_forward_pre_hook(keep(name)) for name, layer in layers.items()
    ]
    training = model.training
    try:
        model.eval()
        with dense(model):
            model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: _error(layers[name], x) for name, x in inputs.items()}


@torch.no_grad()
def merge_gap(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """|routed - merged| / |merged| of the model's first output tensor, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        routed = _first_tensor(model(**batch))
        with dense(model):
            merged = _first_tensor(model(**batch))
    finally:
        model.train(training)
    scale = float(merged.norm())
    return float((routed - merged).norm()) / scale if scale > 0 else 0.0


def _first_tensor(output: Any) -> Tensor:
    values = list(output.values()) if hasattr(output, "values") else list(output)
    return next(v for v in values if isinstance(v, Tensor) and v.dim() > 0).float()


def _error(layer: RoutedActivation, x: Float[Tensor, "*batch D"]) -> float:
    was = layer.training
    layer.eval()
    try:
        routed = ffn_output(layer, x)
        layer.shared.dense = True
        full = ffn_output(layer, x)
    finally:
        layer.shared.dense = False
        layer.train(was)
    bias = bias_of(base_of(layer.ffn.last))
    signal = full if bias is None else full - bias
    real = layer.shared.real_tokens(x.shape[:-1], layer.ffn.name)
    if real is not None:
        real = real.reshape(x.shape[:-1])
        routed, full, signal = routed[real], full[real], signal[real]
    scale = float(signal.float().norm())
    return float((routed - full).float().norm()) / scale if scale > 0 else 0.0


def ffn_output(layer: RoutedActivation, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    """What the last projection returns for x, through the modules (masked path)."""
    ffn = layer.ffn
    hidden = layer(ffn.first(x)[..., : ffn.width])
    if ffn.gated:
        hidden = hidden * ffn.up_output(x)
    y: Tensor = ffn.last(hidden)
    return y


def layer_report(layer: RoutedActivation, error: float | None) -> LayerReport:
    """Sizes, quality, cost and path of one routed layer."""
    ffn, sizes = layer.ffn, layer.sizes
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    matrices = 3 if ffn.gated else 2
    dense_cost = matrices * ffn.hidden * ffn.width
    chosen = chosen_share(layer)
    gate = ffn.hidden * len(sizes)
    gate += sum(p.numel() for p in layer.router.parameters()) if layer.router.learned else 0
    return LayerReport(
        name=ffn.name,
        neurons=ffn.width,
        sizes=(min(sizes), max(sizes)),
        quality=split_quality(ffn.keys(), labels),
        error=error,
        cost=(chosen * dense_cost + gate) / dense_cost,
        path=path_of(layer),
    )
