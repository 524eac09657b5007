"""The steps that methods share: choose layers, make experts, install, measure, report.

A method that splits FFNs brings a `Recipe`: which layers, the expert of every neuron, the router.
A method whose experts have parameters of their own brings an `OwnedRecipe`.
Letters: F neurons, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxtyping import Int
from torch import Tensor, nn

from moduli.errors import CheckpointError
from moduli.surgery.convert import Split, own_ffns, require_dense, split_ffns
from moduli.surgery.inputs import Batches, as_list, probe_batch
from moduli.surgery.layers import LayerSpec, choose_layers
from moduli.surgery.layout import LayerLayout, Layout, OwnedLayout
from moduli.surgery.locate import FFN, find_ffns, survey
from moduli.surgery.owned import Own
from moduli.surgery.probe import layer_report, output_errors
from moduli.surgery.report import ConversionReport
from moduli.surgery.routed import RoutedLayer

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
        fit: called once with the routed layers before they are measured, for what has to be
            learned from data at conversion; None for nothing.
    """

    method: str
    config: Mapping[str, Any]
    layers: LayerSpec
    num_experts: int
    top_k: int
    labels: Callable[[FFN], Int[Tensor, " F"]]
    split: Callable[[FFN], Split]
    check: Callable[[FFN], object]
    fit: Callable[[Sequence[RoutedLayer]], object] | None = None


@dataclass(frozen=True)
class OwnedRecipe:
    """How one method gives the FFNs of a model experts of their own.

    Attributes:
        method, config, layers, num_experts, top_k, check: see `Recipe`.
        members: the neurons of every expert of an FFN, and those that always take part (or None).
        own: router, options and biases.
    """

    method: str
    config: Mapping[str, Any]
    layers: LayerSpec
    num_experts: int
    top_k: int
    members: Callable[[FFN], tuple[Sequence[Int[Tensor, " _"]], Int[Tensor, " _"] | None]]
    own: Own
    check: Callable[[FFN], object]


def split_model(
    model: nn.Module,
    recipe: Recipe,
    *,
    batch: Batches | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Split the FFNs of `model` in place and measure what that changed.

    Args:
        model: a dense model.
        recipe: see `Recipe`.
        batch: inputs to measure output errors on, the first if there are several; random ones
            otherwise.
        progress: called with a line of text per step.

    Raises:
        ModelError: no FFN that fits, or the model is modular already.
        ConfigError: settings that cannot work; the model is left as it was.
    """
    return _converted(model, recipe, _split_chosen, batch, progress)


def own_model(
    model: nn.Module,
    recipe: OwnedRecipe,
    *,
    batch: Batches | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Replace FFNs of `model` by experts of their own, in place; see `split_model`."""
    return _converted(model, recipe, _own_chosen, batch, progress)


R = TypeVar("R", Recipe, OwnedRecipe)


def _converted(
    model: nn.Module,
    recipe: R,
    install: Callable[[nn.Module, R, list[FFN], Progress], list[RoutedLayer]],
    batch: Batches | None,
    progress: Progress | None,
) -> ConversionReport:
    started = time.monotonic()
    require_dense(model)
    found, skipped = find_ffns(model), survey(model)[1]
    chosen = choose_layers(found, recipe.layers)
    for ffn in chosen:
        recipe.check(ffn)
    before = sum(p.numel() for p in model.parameters())
    routed = install(model, recipe, chosen, progress or (lambda line: None))
    errors, probe = measured_errors(model, next(iter(as_list(batch)), None))
    return ConversionReport(
        method=recipe.method,
        num_experts=recipe.num_experts,
        top_k=recipe.top_k,
        layers=[layer_report(layer, errors.get(layer.ffn.name)) for layer in routed],
        total_ffns=len(found),
        probe=probe,
        added_parameters=sum(p.numel() for p in model.parameters()) - before,
        seconds=time.monotonic() - started,
        skipped=[(r.name, r.reason) for r in skipped],
    )


def _split_chosen(
    model: nn.Module, recipe: Recipe, chosen: list[FFN], progress: Progress
) -> list[RoutedLayer]:
    labels = []
    for ffn in chosen:
        progress(f"{ffn.name}: {ffn.width} neurons, {recipe.num_experts} experts")
        labels.append(recipe.labels(ffn))
    split = recipe.split(chosen[0])
    routed = [*split_ffns(model, chosen, labels, split, recipe.method, recipe.config)]
    if recipe.fit is not None:
        recipe.fit(routed)
    return [*routed]


def _own_chosen(
    model: nn.Module, recipe: OwnedRecipe, chosen: list[FFN], progress: Progress
) -> list[RoutedLayer]:
    layers = []
    for ffn in chosen:
        progress(f"{ffn.name}: {recipe.num_experts} experts of their own")
        members, residual = recipe.members(ffn)
        layers.append(OwnedLayout(ffn.name, tuple(m.cpu() for m in members), residual))
    layout = Layout(recipe.method, recipe.config, layers)
    return [*own_ffns(model, chosen, layout, recipe.own)]


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
    labels = [layer.labels for layer in layout.layers if isinstance(layer, LayerLayout)]
    for ffn, one in zip(ffns, labels, strict=True):
        if one.numel() != ffn.width:
            raise CheckpointError(f"{one.numel()} labels for the {ffn.width} neurons of {ffn.name}")
    split_ffns(model, ffns, labels, split(ffns[0]), layout.method, layout.config, permuted=permuted)


def restore_owned(model: nn.Module, layout: Layout, own: Own) -> None:
    """Give the dense model of a checkpoint its experts again; their weights are loaded later.

    Raises:
        CheckpointError: the layout does not fit the model.
    """
    own_ffns(model, laid_out(model, layout), layout, own)


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
