"""The steps that every method which splits FFNs shares: choose, group, install, measure, report.

A method brings a `Recipe`: which layers, the expert of every neuron, the router.
Letters: F neurons, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from moduli.errors import CheckpointError
from moduli.surgery.convert import Split, require_dense, split_ffns
from moduli.surgery.inputs import probe_batch
from moduli.surgery.layers import LayerSpec, choose_layers
from moduli.surgery.layout import Layout
from moduli.surgery.locate import FFN, find_ffns, survey
from moduli.surgery.probe import layer_report, output_errors
from moduli.surgery.report import ConversionReport

Progress = Callable[[str], None]
"""Called with one line per step of a long conversion."""


@dataclass(frozen=True)
class Recipe:
    """How one method splits the FFNs of a model.

    Attributes:
        method: its name, for the record.
        config: its settings, for the record; JSON-able.
        layers: see `moduli.surgery.layers`.
        num_experts: E.
        top_k: experts per token.
        labels: the expert of every neuron of an FFN.
        split: router, options and biases for an FFN.
        check: raises if the settings cannot work for an FFN; called before anything changes.
    """

    method: str
    config: Mapping[str, Any]
    layers: LayerSpec
    num_experts: int
    top_k: int
    labels: Callable[[FFN], Int[Tensor, " F"]]
    split: Callable[[FFN], Split]
    check: Callable[[FFN], object]


def split_model(
    model: nn.Module,
    recipe: Recipe,
    *,
    batch: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Split the FFNs of `model` in place and measure what that changed.

    Args:
        model: a dense model.
        recipe: see `Recipe`.
        batch: inputs to measure output errors on; random ones otherwise.
        progress: called with a line of text per step.

    Raises:
        ModelError: no FFN that fits, or the model is modular already.
        ConfigError: settings that cannot work; the model is left as it was.
    """
    started = time.monotonic()
    require_dense(model)
    found = find_ffns(model)
    chosen = choose_layers(found, recipe.layers)
    for ffn in chosen:
        recipe.check(ffn)
    labels = []
    for ffn in chosen:
        if progress is not None:
            progress(f"{ffn.name}: {ffn.width} neurons, {recipe.num_experts} experts")
        labels.append(recipe.labels(ffn))
    routed = split_ffns(
        model, chosen, labels, recipe.split(chosen[0]), recipe.method, recipe.config
    )
    errors, probe = measured_errors(model, batch)
    return ConversionReport(
        method=recipe.method,
        num_experts=recipe.num_experts,
        top_k=recipe.top_k,
        layers=[layer_report(layer, errors.get(layer.ffn.name)) for layer in routed],
        total_ffns=len(found),
        probe=probe,
        added_parameters=sum(p.numel() for layer in routed for p in layer.parameters()),
        seconds=time.monotonic() - started,
        skipped=[(r.name, r.reason) for r in survey(model)[1]],
    )


def measured_errors(
    model: nn.Module, batch: Mapping[str, Any] | None
) -> tuple[dict[str, float], str]:
    """Output error of every routed layer by name, and what it was measured on."""
    probe = ("the given inputs", dict(batch)) if batch is not None else probe_batch(model)
    return ({}, "") if probe is None else (output_errors(model, probe[1]), probe[0])


def restore_split(
    model: nn.Module, layout: Layout, split: Callable[[FFN], Split], *, permuted: bool
) -> None:
    """Route the dense model of a checkpoint by its stored layout, without any search.

    Raises:
        CheckpointError: the layout does not fit the model.
    """
    ffns = laid_out(model, layout)
    for ffn, layer in zip(ffns, layout.layers, strict=True):
        if layer.labels.numel() != ffn.width:
            raise CheckpointError(
                f"{layer.labels.numel()} labels for the {ffn.width} neurons of {ffn.name}"
            )
    labels = [layer.labels for layer in layout.layers]
    split_ffns(model, ffns, labels, split(ffns[0]), layout.method, layout.config, permuted=permuted)


def laid_out(model: nn.Module, layout: Layout) -> list[FFN]:
    """The FFNs that a layout names, in its order.

    Raises:
        CheckpointError: the model does not have one of them.
    """
    by_name = {ffn.name: ffn for ffn in find_ffns(model)}
    missing = [layer.name for layer in layout.layers if layer.name not in by_name]
    if missing:
        raise CheckpointError(f"the layout names FFNs that the model does not have: {missing}")
    return [by_name[layer.name] for layer in layout.layers]
