"""GMoE: some FFNs of a vision transformer become E full copies behind a cosine gate.

1. Every expert starts as a copy of the whole FFN, output bias included.
2. Scores are cosines of the projected token with one learned direction per expert, times a
   learned temperature; k experts are used, weighted by their softmax renormalised over the k.
3. A load-importance loss with noisy scores keeps experts in use.

The weights of k >= 2 experts sum to 1, so the layer starts at the dense function. Letters: E
experts, k experts per token.
Source: GMoE (ICLR 2023), Luodian/Generalizable-Mixture-of-Experts; the language variant is that of
qiuzh20/EMoE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from moduli.errors import ConfigError
from moduli.experts.bank import ExpertBank
from moduli.methods.base import OwnedMethod, settle
from moduli.routing import CosineRouter, Router, Rule
from moduli.surgery.conversion import OwnedRecipe
from moduli.surgery.locate import FFN
from moduli.surgery.owned import OutBias, Own
from moduli.surgery.routed import Aux, SeamOptions


@dataclass(frozen=True)
class GMoE(OwnedMethod):
    """Settings of GMoE.

    Attributes:
        num_experts: E.
        top_k: experts per token, k. At 1 the output is scaled by the gate's probability, as in
            Switch, so that the layer does not start at the dense function.
        layers: "all", "last:2", "first:2", "every:2", a list of indices, or name patterns.
        preset: "paper" is the reference's vision code: its capacity of 1.5, dropping tokens also
            at evaluation, its form of the auxiliary loss, padding routed. "paper-language" is
            that of the EMoE repository for language models, which in addition gives every expert
            1 / k of the output bias although weights sum to 1, so that the layer starts with b / k.
        noise: standard deviation of score noise in training, in units of 1 / E.
        aux: auxiliary balance loss: "none", "load_importance", "load_importance_paper" or
            "switch".
        aux_weight: its weight in the loss, per layer.
        capacity_factor: 0 drops no token; None: as the preset says.
        projection: width of the gate's projection.
        expert_dropout: dropout inside experts, in training.
    """

    name: ClassVar[str] = "gmoe"
    summary: ClassVar[str] = "full copies of FFNs behind a cosine gate (GMoE)"

    num_experts: int = 6
    top_k: int = 2
    layers: str | Sequence[int] | Sequence[str] = "last:1"
    preset: Literal["paper", "paper-language"] | None = None
    noise: float = 1.0
    aux: Aux | None = None
    aux_weight: float = 0.01
    capacity_factor: float | None = None
    projection: int = 256
    expert_dropout: float = 0.0

    def __post_init__(self) -> None:
        settle(self)
        if self.preset not in (None, "paper", "paper-language"):
            raise ConfigError(
                f"preset is {self.preset!r}; it may be 'paper', 'paper-language' or None"
            )
        if (self.aux or "load_importance").startswith("load_importance") and not self.noise:
            raise ConfigError(
                f"aux={self.aux or 'load_importance'!r} needs noise > 0 (its load is the chance "
                "that noise selects an expert); set noise=1.0, or use aux='switch' or 'none'"
            )

    def recipe(self) -> OwnedRecipe:
        """Full copies, the cosine gate, biases by the preset."""
        paper = self.preset is not None
        capacity = self.capacity_factor
        rule = Rule(
            top_k=self.top_k,
            combine="softmax",
            noise=self.noise,
            capacity_factor=(1.5 if paper else 0.0) if capacity is None else capacity,
            route_padding=paper,
        )
        aux: Aux = self.aux or ("load_importance_paper" if paper else "load_importance")
        options = SeamOptions(aux=aux, aux_weight=self.aux_weight, dropout=self.expert_dropout)
        out_bias: OutBias = "split" if self.preset == "paper-language" else "each"

        def router(ffn: FFN, bank: ExpertBank) -> Router:
            return CosineRouter(ffn.hidden, self.num_experts, rule, self.projection)

        return OwnedRecipe(
            method=self.name,
            config=self.to_dict(),
            layers=self.layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            members=lambda ffn: ([torch.arange(ffn.width)] * self.num_experts, None),
            own=Own(router, options, out_bias, self.top_k),
            check=lambda ffn: None,
        )
