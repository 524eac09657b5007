"""EMoE on a real model: labels, router and seam, put together from the rooms below.

Letters: D width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from moduli.errors import ConfigError
from moduli.methods.base import Progress
from moduli.methods.emoe.config import EMoE
from moduli.routing import AvgKRouter, CosineRouter, LinearRouter, Router, Rule, gate_from_keys
from moduli.surgery.conversion import Recipe
from moduli.surgery.convert import Split
from moduli.surgery.locate import FFN
from moduli.surgery.partition import (
    balanced_clusters,
    balanced_sizes,
    contiguous_labels,
    random_labels,
)
from moduli.surgery.routed import SeamOptions


def recipe(config: EMoE, progress: Progress | None) -> Recipe:
    """What `moduli.surgery.conversion` needs to know."""
    return Recipe(
        method=config.name,
        config=config.to_dict(),
        layers=config.layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        labels=lambda ffn: make_labels(config, ffn, progress),
        split=lambda ffn: split_of(config, ffn.gated),
        check=lambda ffn: check(config, ffn),
    )


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
