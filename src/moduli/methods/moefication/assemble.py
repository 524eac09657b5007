"""MoEfication on a real model: labels, router and seam, put together from the rooms below.

Letters: D width, F neurons, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moduli.methods.base import Progress
from moduli.methods.moefication.config import MoEfication
from moduli.methods.moefication.fit import fit_routers
from moduli.routing import GroundTruthRouter, MLPRouter, Router, Rule, SimilarityRouter
from moduli.routing.moefication import key_centers
from moduli.surgery.conversion import Recipe
from moduli.surgery.convert import Split
from moduli.surgery.locate import FFN
from moduli.surgery.partition import Sample, balanced_sizes, named_labels, require_data
from moduli.surgery.projection import weight_of
from moduli.surgery.routed import RoutedLayer, SeamOptions


def recipe(config: MoEfication, progress: Progress | None, sample: Sample | None) -> Recipe:
    """What `moduli.surgery.conversion` needs to know."""

    def fit(layers: Sequence[RoutedLayer]) -> None:
        data = require_data(sample, "select='mlp'")
        fit_routers(
            data.model,
            data.batches,
            epochs=config.router_epochs,
            batch_size=config.router_batch_size,
            lr=config.router_lr,
            seed=config.seed,
            progress=progress,
        )

    return Recipe(
        method=config.name,
        config=config.to_dict(),
        layers=config.layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        labels=lambda ffn: named_labels(
            config.split,
            ffn,
            config.num_experts,
            seed=config.seed,
            sample=sample,
            time_limit=config.cluster_seconds,
            progress=progress,
        ),
        split=lambda ffn: split_of(config),
        check=lambda ffn: check(config, ffn, sample),
        fit=fit if config.select == "mlp" else None,
    )


def check(config: MoEfication, ffn: FFN, sample: Sample | None) -> None:
    """Raise if the settings cannot work for this FFN; warn if they are not meant for it.

    Raises:
        ConfigError: more experts than neurons, or no data for what needs it.
    """
    balanced_sizes(ffn.width, config.num_experts)
    if config.split == "coactivation":
        require_data(sample, "split='coactivation'")
    if config.select == "mlp":
        require_data(sample, "select='mlp'")
    if not is_sparse(ffn.activation, weight_of(ffn.first)):
        warnings.warn(
            "the activation of this model is not 0 for negative numbers, as ReLU is. MoEfication "
            "presumes that most neurons are silent and selects experts by what is positive; the "
            "output errors in the report say how far that carries here",
            stacklevel=2,
        )


@torch.no_grad()
def is_sparse(activation: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    """Whether an activation silences neurons with a negative pre-activation."""
    negative = torch.linspace(-6, -0.01, 64, device=like.device)
    return not bool(activation(negative).any())


def split_of(config: MoEfication) -> Split:
    """Router and seam options."""
    rule = Rule(top_k=config.top_k)
    path = config.path
    if config.select == "ground_truth" and path == "auto":
        path = "masked"  # the choice has computed all neurons already

    def router(ffn: FFN, sizes: Sequence[int]) -> Router:
        if config.select == "ground_truth":
            return GroundTruthRouter(
                ffn.keys, sizes, rule, bias=ffn.key_bias, activation=ffn.activation
            )
        if config.select == "similarity":
            return SimilarityRouter(ffn.keys, sizes, rule)
        centers = key_centers(ffn.keys().detach(), sizes)
        network = MLPRouter(ffn.hidden, len(sizes), rule, init=centers)
        # The mask has no gradient: only `fit_routers` trains it.
        return network.requires_grad_(False)

    return Split(router, SeamOptions(path=path), "shared", config.top_k)
