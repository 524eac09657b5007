"""MoEfication: the FFNs of a trained ReLU model as experts, of which a token uses a few.

1. Neurons are grouped into E experts of equal size, by their keys or by what fires together.
2. A router scores experts; the activations of all but the k best are set to 0, and the second
   matrix is applied with its bias once. At k = E the layer is the dense FFN.
3. Nothing of the model is trained for that. The best choice is the k experts with the largest
   positive activation (ground truth); a small network is fitted to guess it from the token.

Letters: D width, F neurons, E experts, k experts per token.
Source: MoEfication (Findings of ACL 2022), thunlp/MoEfication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from moduli.errors import ConfigError
from moduli.methods.base import DataMethod, Progress, settle
from moduli.surgery.conversion import Recipe
from moduli.surgery.partition import NamedSplit, Sample

SelectBy = Literal["ground_truth", "similarity", "mlp"]


@dataclass(frozen=True)
class MoEfication(DataMethod):
    """Settings of MoEfication.

    Attributes:
        num_experts: E. Published examples: 96 for T5-base, 128 for BERT-large with ReLU.
        top_k: experts per token, k; published examples use about a fifth of the experts.
        layers: "all" (as published), "last:2", "first:2", "every:2", a list of indices, or name
            patterns.
        split: how neurons are grouped: balanced "cluster" of keys, "coactivation" on data,
            "random", or "contiguous" blocks.
        select: how experts are scored: "ground_truth" by their positive activation, for which all
            neurons are computed; "similarity" of the token to the centre of their keys; "mlp", a
            network that conversion fits to the ground truth on data.
        router_epochs: passes over the inputs in the fit of "mlp".
        router_batch_size: tokens per step of it; None: 512 as published, fewer where there are
            fewer than 32768 tokens, since the first steps do harm.
        router_lr: of Adam in it.
        path: "auto", "masked" (compute all neurons, mask) or "fast" (chosen neurons only).
        seed: of clustering, random splits and the fit.
        cluster_seconds: time limit of clustering, per layer; None has none.
    """

    name: ClassVar[str] = "moefication"
    summary: ClassVar[str] = "sparse inference of trained ReLU FFNs (MoEfication)"

    num_experts: int = 32
    top_k: int = 8
    layers: str | Sequence[int] | Sequence[str] = "last:2"
    split: NamedSplit = "cluster"
    select: SelectBy = "similarity"
    router_epochs: int = 30
    router_batch_size: int | None = None
    router_lr: float = 0.01
    path: Literal["auto", "masked", "fast"] = "auto"
    seed: int = 0
    cluster_seconds: float | None = None

    def __post_init__(self) -> None:
        settle(self)
        for setting, known in (("split", NamedSplit), ("select", SelectBy)):
            if getattr(self, setting) not in get_args(known):
                raise ConfigError(
                    f"{setting} is {getattr(self, setting)!r}; it may be "
                    f"{', '.join(map(repr, get_args(known)))}"
                )
        if self.router_epochs < 0 or (self.router_batch_size or 1) < 1 or self.router_lr <= 0:
            raise ConfigError(
                f"router_epochs {self.router_epochs} may not be negative, router_batch_size "
                f"{self.router_batch_size} and router_lr {self.router_lr} have to be positive"
            )

    def recipe(self, progress: Progress | None, sample: Sample | None = None) -> Recipe:
        """Labels, router and its fit."""
        from moduli.methods.moefication.assemble import recipe

        return recipe(self, progress, sample)
