"""EMoE on a real model: labels, router and seam or bank, put together from the rooms below.

Letters: D width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from moduli.errors import ConfigError
from moduli.experts.bank import ExpertBank
from moduli.experts.ffn import members_of
from moduli.methods.base import Progress
from moduli.methods.emoe.config import EMoE
from moduli.routing import Router, Rule
from moduli.surgery.conversion import OwnedRecipe, Recipe
from moduli.surgery.convert import Split
from moduli.surgery.locate import FFN
from moduli.surgery.owned import Own
from moduli.surgery.partition import Sample, balanced_sizes, named_labels, require_data
from moduli.surgery.routed import SeamOptions


def recipe(
    config: EMoE, progress: Progress | None, sample: Sample | None = None
) -> Recipe | OwnedRecipe:
    """What `moduli.surgery.conversion` needs to know."""

    def labels(ffn: FFN) -> Int[Tensor, " F"]:
        return make_labels(config, ffn, progress, sample)

    if config.expert_repeat == 1:
        return Recipe(
            method=config.name,
            config=config.to_dict(),
            layers=config.layers,
            num_experts=config.num_experts,
            top_k=config.top_k,
            labels=labels,
            split=lambda ffn: split_of(config, ffn.gated),
            check=lambda ffn: check(config, ffn, sample),
        )
    return OwnedRecipe(
        method=config.name,
        config=config.to_dict(),
        layers=config.layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        members=lambda ffn: (
            members_of(labels(ffn), config.num_experts, config.expert_repeat),
            None,
        ),
        own=own_of(config),
        check=lambda ffn: check(config, ffn, sample),
    )


def check(config: EMoE, ffn: FFN, sample: Sample | None = None) -> None:
    """Raise if the settings cannot work for this FFN.

    Raises:
        ConfigError: more experts than neurons, a `select` rule on an FFN without a gate, a split
            that needs data without any, or repeated clusters by the reference's other code path.
    """
    balanced_sizes(ffn.width, config.num_experts)
    if config.select != "gate" and not ffn.gated:
        raise ConfigError(
            f"select={config.select!r} needs a gated FFN, but {ffn.name} ({ffn.family.name}) has "
            "no up projection beside its gate; use select='gate'"
        )
    if config.expert_repeat > 1 and config.preset == "paper" and ffn.gated:
        raise ConfigError(
            f"{ffn.name} ({ffn.family.name}) is a gated FFN, for which the reference has no "
            "repeated clusters; leave preset or expert_repeat out"
        )
    if config.split == "coactivation":
        require_data(sample, "split='coactivation'")


def make_labels(
    config: EMoE, ffn: FFN, progress: Progress | None = None, sample: Sample | None = None
) -> Int[Tensor, " F"]:
    """Cluster of every neuron, as `config.split` says."""
    return named_labels(
        config.split,
        ffn,
        config.num_experts,
        seed=config.seed,
        sample=sample,
        time_limit=config.cluster_seconds,
        progress=progress,
    )


def split_of(config: EMoE, gated: bool) -> Split:
    """Router, seam options and bias rule of the resolved settings, for experts in place."""
    c = config.resolved(gated)
    assert c.out_bias is not None

    def router(ffn: FFN, sizes: Sequence[int]) -> Router:
        return c.make_router(ffn.hidden, ffn.keys, sizes, rule_of(c))

    return Split(router, options_of(c), c.out_bias, c.top_k)


def own_of(config: EMoE) -> Own:
    """The same for experts of repeated clusters, which are copies."""
    c = config.resolved(gated=False)
    assert c.out_bias is not None

    def router(ffn: FFN, bank: ExpertBank) -> Router:
        return c.make_router(ffn.hidden, bank.keys, bank.sizes, rule_of(c))

    return Own(router, options_of(c), c.out_bias, c.top_k)


def options_of(c: EMoE) -> SeamOptions:
    """What lies around the routing, by resolved settings."""
    assert c.aux is not None
    return SeamOptions(
        select=c.select,
        aux=c.aux,
        aux_weight=c.aux_weight,
        dropout=c.expert_dropout or 0.0,
        dropout_before=bool(c.dropout_before),
        path=c.path,
    )


def rule_of(c: EMoE) -> Rule:
    """How scores become a routing, by resolved settings."""
    assert c.combine is not None
    return Rule(
        top_k=c.top_k,
        choose=c.choose,
        combine=c.combine,
        noise=c.noise or 0.0,
        capacity_factor=c.capacity_factor or 0.0,
        prioritized=c.prioritized,
        route_padding=bool(c.route_padding),
    )
