"""EMoE on a real model: labels, router and seam, put together from the rooms below.

Letters: D width, F neurons, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from moduli.errors import CheckpointError, ConfigError
from moduli.methods.base import Progress
from moduli.methods.emoe.config import EMoE
from moduli.routing import AvgKRouter, CosineRouter, LinearRouter, Router, Rule, gate_from_keys
from moduli.surgery.convert import Split, require_dense, split_ffns
from moduli.surgery.layers import choose_layers
from moduli.surgery.layout import Layout
from moduli.surgery.locate import FFN, find_ffns, survey
from moduli.surgery.partition import (
    balanced_clusters,
    balanced_sizes,
    contiguous_labels,
    random_labels,
)
from moduli.surgery.probe import layer_report, output_errors, probe_batch
from moduli.surgery.report import ConversionReport
from moduli.surgery.seam import SeamOptions
from moduli.training.auxiliary import wire_auxiliary_loss


def apply(
    config: EMoE,
    model: nn.Module,
    batch: Mapping[str, Any] | None,
    progress: Progress | None,
) -> ConversionReport:
    """Convert `model` in place and measure what that changed."""
    started = time.monotonic()
    require_dense(model)
    found = find_ffns(model)
    _, rejected = survey(model)
    chosen = choose_layers(found, config.layers)
    for ffn in chosen:
        check(config, ffn)
    labels = []
    for ffn in chosen:
        if progress is not None:
            progress(f"{ffn.name}: {config.split} split of {ffn.width} neurons")
        labels.append(make_labels(config, ffn, progress))
    routed = split_ffns(
        model, chosen, labels, split_of(config, chosen[0].gated), config.name, config.to_dict()
    )
    wire_auxiliary_loss(model)
    probe = ("the given inputs", dict(batch)) if batch is not None else probe_batch(model)
    errors = {} if probe is None else output_errors(model, probe[1])
    return ConversionReport(
        method=config.name,
        num_experts=config.num_experts,
        top_k=config.top_k,
        layers=[layer_report(layer, errors.get(layer.ffn.name)) for layer in routed],
        total_ffns=len(found),
        probe="" if probe is None else probe[0],
        added_parameters=sum(p.numel() for layer in routed for p in layer.parameters()),
        seconds=time.monotonic() - started,
        skipped=[(r.name, r.reason) for r in rejected],
    )


def restore(config: EMoE, model: nn.Module, layout: Layout, permuted: bool) -> None:
    """Route a model from a stored layout."""
    by_name = {ffn.name: ffn for ffn in find_ffns(model)}
    missing = [layer.name for layer in layout.layers if layer.name not in by_name]
    if missing:
        raise CheckpointError(f"the layout names FFNs that the model does not have: {missing}")
    ffns = [by_name[layer.name] for layer in layout.layers]
    labels = [layer.labels for layer in layout.layers]
    for ffn, one in zip(ffns, labels, strict=True):
        if one.numel() != ffn.width:
            raise CheckpointError(f"{one.numel()} labels for the {ffn.width} neurons of {ffn.name}")
    split = split_of(config, ffns[0].gated)
    split_ffns(model, ffns, labels, split, config.name, layout.config, permuted=permuted)
    wire_auxiliary_loss(model)


def check(config: EMoE, ffn: FFN) -> None:
    """Raise if the settings cannot work for this FFN.

    Raises:
        ConfigError: more experts than neurons, or a `select` rule on an FFN without a gate.
    """
    balanced_sizes(ffn.width, config.num_experts)
    if config.select != "gate" and not ffn.gated:
        raise ConfigError(
            f"select={config.select!r} needs a gated FFN, but {ffn.name} ({ffn.family.name}) has "
            "no up projection beside its gate; use select='gate'"
        )


def make_labels(config: EMoE, ffn: FFN, progress: Progress | None = None) -> Int[Tensor, " F"]:
    """Expert of every neuron, as `config.split` says."""
    if config.split == "contiguous":
        return contiguous_labels(ffn.width, config.num_experts)
    if config.split == "random":
        return random_labels(ffn.width, config.num_experts, config.seed + ffn.index)

    def report(done: int, swaps: int, share: float) -> None:
        if progress is not None:
            progress(f"{ffn.name}: pass {done}, {swaps} swaps, {share:.1%} explained")

    return balanced_clusters(
        ffn.keys(),
        config.num_experts,
        seed=config.seed,
        time_limit=config.cluster_seconds,
        progress=report,
    )


def split_of(config: EMoE, gated: bool) -> Split:
    """Router, seam options and bias rule of the resolved settings."""
    c = config.resolved(gated)
    assert c.combine is not None
    assert c.aux is not None
    assert c.out_bias is not None
    rule = Rule(
        top_k=c.top_k,
        choose=c.choose,
        combine=c.combine,
        noise=c.noise or 0.0,
        capacity_factor=c.capacity_factor or 0.0,
        prioritized=c.prioritized,
        route_padding=bool(c.route_padding),
    )
    options = SeamOptions(
        select=c.select,
        aux=c.aux,
        aux_weight=c.aux_weight,
        dropout=c.expert_dropout or 0.0,
        dropout_before=bool(c.dropout_before),
        path=c.path,
    )

    def router(ffn: FFN, sizes: Sequence[int]) -> Router:
        if c.gate == "cosine":
            return CosineRouter(ffn.hidden, len(sizes), rule)
        if c.gate == "linear":
            means = gate_from_keys(ffn.keys().detach(), sizes)
            return LinearRouter(ffn.hidden, len(sizes), rule, init=means)
        return AvgKRouter(
            ffn.keys, sizes, rule, normalize=c.normalize_gate, momentum=c.gate_momentum
        )

    return Split(router, options, c.out_bias, c.top_k)
