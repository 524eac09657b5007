"""LLaMA-MoE on a real model: divisions, gate, and seam or bank, from the rooms below.

Letters: F neurons, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moduli.errors import ConfigError
from moduli.experts.bank import ExpertBank
from moduli.methods.base import Progress
from moduli.methods.llama_moe.config import LlamaMoE
from moduli.methods.llama_moe.groups import data_groups
from moduli.routing import NoisyTopKRouter, Router, Rule
from moduli.surgery.conversion import OwnedRecipe, Recipe
from moduli.surgery.convert import Split
from moduli.surgery.layers import choose_layers
from moduli.surgery.locate import FFN, find_ffns
from moduli.surgery.owned import Own
from moduli.surgery.partition import (
    Sample,
    balanced_sizes,
    greedy_labels,
    inner_sharing_members,
    inter_sharing,
    named_labels,
    neuron_importance,
    require_data,
)
from moduli.surgery.routed import SeamOptions

Members = tuple[Sequence[Int[Tensor, " _"]], Int[Tensor, " _"] | None]


def recipe(
    config: LlamaMoE, progress: Progress | None, sample: Sample | None
) -> Recipe | OwnedRecipe:
    """What `moduli.surgery.conversion` needs to know."""
    importance = importance_of(config, progress, sample)
    options = SeamOptions(aux=config.aux, aux_weight=config.aux_weight, path=config.path)

    def labels(ffn: FFN) -> Int[Tensor, " F"]:
        if config.split == "importance":
            return greedy_labels(importance(ffn))
        return named_labels(
            config.split,
            ffn,
            config.num_experts,
            seed=config.seed,
            time_limit=config.cluster_seconds,
            progress=progress,
        )

    if config.sharing == "none":
        return Recipe(
            method=config.name,
            config=config.to_dict(),
            layers=config.layers,
            num_experts=config.num_experts,
            top_k=config.top_k,
            labels=labels,
            split=lambda ffn: Split(
                lambda ffn, sizes: gate(config, ffn), options, "shared", config.top_k
            ),
            check=lambda ffn: check(config, ffn, sample),
        )

    def router(ffn: FFN, bank: ExpertBank) -> Router:
        return gate(config, ffn)

    return OwnedRecipe(
        method=config.name,
        config=config.to_dict(),
        layers=config.layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        members=lambda ffn: shared_members(config, importance(ffn)),
        own=Own(router, options, "shared", config.top_k),
        check=lambda ffn: check(config, ffn, sample),
    )


def check(config: LlamaMoE, ffn: FFN, sample: Sample | None) -> None:
    """Raise if the settings cannot work for this FFN.

    Raises:
        ConfigError: more experts than neurons, sizes that do not fit, or no data for importance.
    """
    balanced_sizes(ffn.width, config.num_experts)
    parts = config.num_experts + config.num_residual
    if config.sharing == "inter" and config.expert_size is None and ffn.width % parts:
        raise ConfigError(
            f"{config.num_residual} residual and {config.num_experts} routed experts cannot "
            f"divide the {ffn.width} neurons of {ffn.name} equally; choose numbers whose sum "
            f"divides {ffn.width}, or an expert_size, with which routed experts overlap"
        )
    if config.split == "importance":
        require_data(sample, "split='importance'")


def importance_of(
    config: LlamaMoE, progress: Progress | None, sample: Sample | None
) -> Callable[[FFN], Float[Tensor, "E F"]]:
    """Importance of the neurons of an FFN; measured for all layers when first asked for."""
    found: dict[str, Tensor] = {}

    def importance(ffn: FFN) -> Tensor:
        if not found:
            data = require_data(sample, "split='importance'")
            say = progress or (lambda line: None)
            found.update(
                neuron_importance(
                    data.model,
                    choose_layers(find_ffns(data.model), config.layers),
                    data_groups(data, config.num_experts, config.seed),
                    progress=lambda group, done: say(
                        f"importance: group {group + 1} of {config.num_experts}, {done} batches"
                    ),
                )
            )
        return found[ffn.name]

    return importance


def shared_members(config: LlamaMoE, importance: Float[Tensor, "E F"]) -> Members:
    """Neurons of every routed expert, and those that are always on, of experts that share."""
    width = importance.shape[1]
    if config.sharing == "inner":
        size = config.expert_size or width // config.num_experts
        return inner_sharing_members(importance, size), None
    split = inter_sharing(
        importance,
        config.expert_size or width // (config.num_experts + config.num_residual),
        config.num_residual,
        share=config.expert_size is not None,
    )
    return split.routed, torch.cat(split.residual)


def gate(config: LlamaMoE, ffn: FFN) -> NoisyTopKRouter:
    """The gate of a layer, seeded by its index."""
    scales = {"published": None, "dense": float(config.num_experts)}
    scale = scales[config.scale] if isinstance(config.scale, str) else float(config.scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed * 1_000_003 + ffn.index)
        return NoisyTopKRouter(
            ffn.hidden,
            config.num_experts,
            Rule(top_k=config.top_k, combine="softmax"),
            network=config.gate,
            scale=scale,
            noise_floor=config.noise_floor,
        )
