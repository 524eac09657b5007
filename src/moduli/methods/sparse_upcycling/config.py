"""Sparse upcycling: FFNs become E copies of themselves behind a new linear router.

1. Every expert starts as a copy of the whole FFN, output bias included.
2. The router starts as small random numbers.
3. Either tokens choose their k best experts, or experts choose their best tokens (expert choice).

With k >= 2 and weights renormalised over the chosen experts the layer starts at the dense
function; so does expert choice, for every token that some expert takes. Letters: E experts, k
experts per token.
Source: Sparse Upcycling (ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from moduli.errors import ConfigError
from moduli.experts.bank import ExpertBank
from moduli.methods.base import OwnedMethod, Progress, settle
from moduli.routing import ExpertChoiceRouter, LinearRouter, Router, Rule
from moduli.surgery.conversion import OwnedRecipe, own_model
from moduli.surgery.inputs import Batches
from moduli.surgery.locate import FFN, stacks
from moduli.surgery.owned import Own
from moduli.surgery.report import ConversionReport
from moduli.surgery.routed import Aux, SeamOptions


@dataclass(frozen=True)
class SparseUpcycling(OwnedMethod):
    """Settings of sparse upcycling.

    Attributes:
        num_experts: E.
        top_k: experts per token, k; with expert choice the mean number of them.
        layers: "all", "last:2", "first:2", "every:2", a list of indices, or name patterns.
        routing: "token_choice", or "expert_choice" (encoders only: it looks at the whole batch).
        renormalise: divide the weights of the chosen experts by their sum. At k = 1 that would
            leave no gradient for the router, so that the weight is its probability there.
        router_std: standard deviation of the router's first weights.
        noise: standard deviation of score noise in training, in units of 1 / E.
        aux: auxiliary balance loss of token choice: "none", "load_importance",
            "load_importance_paper" or "switch"; expert choice needs none.
        aux_weight: its weight in the loss, per layer.
        capacity_factor: of token choice; 0 drops no token.
        seed: of the router's first weights.
    """

    name: ClassVar[str] = "sparse-upcycling"
    summary: ClassVar[str] = "full copies of FFNs behind a linear router (sparse upcycling)"

    num_experts: int = 8
    top_k: int = 2
    layers: str | Sequence[int] | Sequence[str] = "every:2"
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    renormalise: bool = True
    router_std: float = 0.02
    noise: float = 0.0
    aux: Aux | None = None
    aux_weight: float = 0.01
    capacity_factor: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self)
        if self.routing not in ("token_choice", "expert_choice"):
            raise ConfigError(
                f"routing is {self.routing!r}; it may be 'token_choice' or 'expert_choice'"
            )
        if self.aux is not None and self.aux.startswith("load_importance") and not self.noise:
            raise ConfigError(
                f"aux={self.aux!r} needs noise > 0 (its load is the chance that noise selects an "
                "expert); set noise=1.0, or use aux='switch'"
            )
        if self.routing == "expert_choice":
            if self.aux not in (None, "none"):
                raise ConfigError(
                    f"aux={self.aux!r} is for token choice; expert choice is balanced as it is"
                )
            if self.capacity_factor:
                raise ConfigError(
                    "capacity_factor is for token choice; with expert choice, top_k is the mean "
                    "number of experts per token"
                )

    def apply(
        self,
        model: nn.Module,
        *,
        batch: Batches | None = None,
        progress: Progress | None = None,
    ) -> ConversionReport:
        """Replace the chosen FFNs by experts; see `moduli.convert`."""
        recipe = self.recipe()
        if self.routing == "expert_choice":
            recipe = replace(recipe, check=lambda ffn: _require_bidirectional(model, ffn))
        return own_model(model, recipe, batch=batch, progress=progress)

    def recipe(self) -> OwnedRecipe:
        """Full copies behind a linear router."""
        rule = Rule(
            top_k=self.top_k,
            combine="softmax" if self.renormalise else "probability",
            noise=self.noise,
            capacity_factor=self.capacity_factor,
        )
        by_token = self.routing == "token_choice"
        aux: Aux = self.aux or ("switch" if by_token else "none")
        kind = LinearRouter if by_token else ExpertChoiceRouter

        def router(ffn: FFN, bank: ExpertBank) -> Router:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + ffn.index)
            start = torch.randn(self.num_experts, ffn.hidden, generator=generator)
            return kind(ffn.hidden, self.num_experts, rule, init=self.router_std * start)

        return OwnedRecipe(
            method=self.name,
            config=self.to_dict(),
            layers=self.layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            members=lambda ffn: ([torch.arange(ffn.width)] * self.num_experts, None),
            own=Own(router, SeamOptions(aux=aux, aux_weight=self.aux_weight), "each", self.top_k),
            check=lambda ffn: None,
        )


def _require_bidirectional(model: nn.Module, ffn: FFN) -> None:
    """Raise if later tokens must not change what this FFN does to earlier ones."""
    generates = getattr(type(model), "can_generate", lambda: False)()
    parts = stacks(model)
    in_encoder = any(s.endswith("encoder") and ffn.name.startswith(f"{s}.") for s in parts)
    if generates and not in_encoder:
        raise ConfigError(
            f"routing='expert_choice' looks at all tokens of a batch, later ones included, but "
            f"{ffn.name} belongs to a {type(model).__name__}, which predicts them one by one; use "
            "routing='token_choice'"
        )
