"""LLaMA-MoE: the neurons of FFNs, divided among experts behind a learned gate with noise.

1. Neurons are divided at random, by clusters of their keys, or by their importance for groups of
   data; by importance experts may also share neurons.
2. A gate that starts at 0 scores experts; its noise is learned, and is there in training only.
3. A token uses k experts, weighted by the softmax of their scores times a scale.
4. A loss on importance and load, weight 0.01, keeps experts in use.

The layer does not start at the dense function; the method goes on with continual pretraining.
Letters: F neurons, E experts, k experts per token.
Source: LLaMA-MoE (EMNLP 2024), pjlab-sys4nlp/llama-moe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from moduli.errors import ConfigError
from moduli.methods.base import DataMethod, Progress, settle
from moduli.routing.llama_moe import Network
from moduli.surgery.conversion import OwnedRecipe, Recipe
from moduli.surgery.partition import Sample

Division = Literal["random", "cluster", "importance"]
Sharing = Literal["none", "inner", "inter"]
Balance = Literal["noisy_top_k", "noisy_top_k_paper", "switch", "none"]


@dataclass(frozen=True)
class LlamaMoE(DataMethod):
    """Settings of LLaMA-MoE.

    Attributes:
        num_experts: E, those that the gate chooses from.
        top_k: experts per token, k.
        layers: "all" (as published), "last:2", "first:2", "every:2", a list of indices, or name
            patterns.
        split: "random", "cluster" by keys, or "importance" of neurons for groups of data, which
            conversion must then be given, with labels: as many batches as there are experts, each
            a group, or any number of batches of texts, whose rows are grouped by k-means on their
            mean input embedding.
        sharing: of neurons split by importance: "none" divides them; "inner" lets every expert
            have its most important ones, so that experts overlap; "inter" gives those that most
            experts want to residual experts, which are always on, and divides the others.
        num_residual: with "inter", residual experts.
        expert_size: neurons of an expert with "inner" (default F / E) and "inter" (default
            F / (E + residual), which has to divide). With "inter", a size of your own lets routed
            experts overlap.
        gate: "linear", which starts at 0, or "mlp" with one hidden layer.
        scale: of combine weights: "published" E / k; "dense" E, for which an even gate gives the
            dense layer at k = E, and on average over random choices of k < E; or a number.
        noise_floor: least standard deviation of the learned noise; None for no noise.
        aux: auxiliary balance loss: "noisy_top_k", "noisy_top_k_paper" (tells by the noise alone
            who was chosen, as the reference does), "switch" or "none".
        aux_weight: its weight in the loss, per layer.
        path: "auto", "masked" (compute all neurons, mask) or "fast" (chosen neurons only).
        seed: of splits, groups and the "mlp" gate.
        cluster_seconds: time limit of clustering, per layer; None has none.
    """

    name: ClassVar[str] = "llama-moe"
    summary: ClassVar[str] = "neurons divided among experts, learned noisy gate (LLaMA-MoE)"

    num_experts: int = 16
    top_k: int = 4
    layers: str | Sequence[int] | Sequence[str] = "last:2"
    split: Division = "random"
    sharing: Sharing = "none"
    num_residual: int = 1
    expert_size: int | None = None
    gate: Network = "linear"
    scale: Literal["published", "dense"] | float = "published"
    noise_floor: float | None = 0.01
    aux: Balance = "noisy_top_k"
    aux_weight: float = 0.01
    path: Literal["auto", "masked", "fast"] = "auto"
    seed: int = 0
    cluster_seconds: float | None = None

    def __post_init__(self) -> None:
        settle(self)
        choices: dict[str, Any] = {
            "split": Division,
            "sharing": Sharing,
            "gate": Network,
            "aux": Balance,
        }
        for setting, known in choices.items():
            if getattr(self, setting) not in get_args(known):
                raise ConfigError(
                    f"{setting} is {getattr(self, setting)!r}; it may be "
                    f"{', '.join(map(repr, get_args(known)))}"
                )
        if self.sharing != "none" and self.split != "importance":
            raise ConfigError(
                f"sharing={self.sharing!r} is decided by importance; use split='importance'"
            )
        if self.expert_size is not None and self.sharing == "none":
            raise ConfigError(
                "expert_size is for experts that share neurons; without sharing all neurons are "
                "divided among num_experts"
            )
        if self.num_residual < 1 or (self.expert_size or 1) < 1:
            raise ConfigError(
                f"num_residual {self.num_residual} and expert_size {self.expert_size} have to be "
                "positive; for no residual experts use sharing='none' or 'inner'"
            )
        positive = self.scale in ("published", "dense") or (
            isinstance(self.scale, int | float) and self.scale > 0
        )
        if not positive:
            raise ConfigError(
                f"scale is {self.scale!r}; it may be 'published', 'dense' or a positive number"
            )
        if self.noise_floor is not None and self.noise_floor <= 0:
            raise ConfigError(
                f"noise_floor is {self.noise_floor}; it has to be positive, or None for no noise"
            )

    def recipe(
        self, progress: Progress | None, sample: Sample | None = None
    ) -> Recipe | OwnedRecipe:
        """A partition and its gate, or copies where experts share neurons."""
        from moduli.methods.llama_moe.assemble import recipe

        return recipe(self, progress, sample)
