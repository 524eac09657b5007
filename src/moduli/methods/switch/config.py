"""Switch: FFNs become E copies behind a linear gate; a token uses one expert, or two (GShard).

1. Every expert starts as a copy of the whole FFN, or as small random numbers (`init_scale`).
2. A linear router in float32 takes the best expert, or the best two; jitter on its input alone.
3. In training an expert takes so many tokens and no more; what it drops passes by the residual.
4. A balance loss on first choices, with its minimum 1 at equal use, and the router's z-loss.

With one expert the output is scaled by its probability, so that copies do not start at the dense
function; `gate_scale` says what to do about it. The weights of two experts sum to 1. Letters: T
tokens, D width, F neurons, E experts, k experts per token.
Sources: Switch Transformers (arXiv 2101.03961), GShard (arXiv 2006.16668), ST-MoE (arXiv
2202.08906); the code of facebookresearch/fairseq (branch nllb).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moduli.errors import ConfigError
from moduli.experts.bank import ExpertBank
from moduli.methods.base import OwnedMethod, Progress, settle
from moduli.routing import Capacity, Router, Rule, SwitchRouter
from moduli.routing.capacity import Order, Rounding
from moduli.routing.names import require_known
from moduli.routing.switch import Renormalise, Second
from moduli.surgery.conversion import OwnedRecipe
from moduli.surgery.inputs import Batches
from moduli.surgery.locate import FFN
from moduli.surgery.modular import routed_layers
from moduli.surgery.owned import Own, OwnedExperts
from moduli.surgery.report import ConversionReport
from moduli.surgery.routed import FirstAux, SeamOptions

GateScale = Literal["prob", "prob_times_E", "one"]
Balance = Literal["switch", "none"]
Preset = Literal["paper"]


@dataclass(frozen=True)
class Switch(OwnedMethod):
    """Settings of Switch and GShard.

    Attributes:
        num_experts: E.
        top_k: experts per token, k: 1 (Switch) or 2 (GShard).
        layers: "all", "last:2", "first:2", "every:2", a list of indices, or name patterns.
        preset: "paper" is fairseq's code: tokens are dropped in evaluation, too, and padding,
            though never dispatched, counts in capacities and dilutes the balance loss.
        capacity_factor: slots of an expert relative to an equal share, in training; None drops
            nothing.
        rounding: how that becomes a number: "fairseq", "deepspeed", "tutel" (whose factor may be 0
            or negative), or "huggingface", which has `sequence_capacity` instead.
        min_capacity: least number of slots, of "deepspeed".
        sequence_capacity: slots per sequence, of "huggingface".
        order: who is served first: by "position", by "probability" (batch-prioritised), or at
            "random"; None: "random" with "deepspeed", "position" else.
        drop_in_evaluation: whether evaluation drops tokens, so that an output depends on its
            batch; None: as the preset says.
        evaluation_share: slots of an expert in evaluation as a share of all tokens, of "fairseq";
            0 for the number of training.
        gate_scale: weight of a single expert: its probability ("prob"), E times that, which starts
            near 1 ("prob_times_E"), or 1 with the gradient of log p ("one").
        second: how the second expert is found: "all" the second best, "sampling" by Gumbel noise,
            "random" the second best with probability min(1, 2 g2); in evaluation "all".
        renormalise: make the two weights sum to 1 "before" tokens are dropped, or "after".
        aux: the balance loss, "switch" or "none".
        aux_weight: its weight in the loss, per layer.
        z_weight: weight of the router's z-loss, per layer; ST-MoE has 0.001.
        jitter: eps of the factors U[1 - eps, 1 + eps] on the router's input, in training.
        router_std: standard deviation of the router's first weights.
        init_scale: s; experts and router start from a normal of standard deviation
            sqrt(s / fan-in), cut at two of them, for training from scratch; None: from copies.
        expert_dropout: dropout inside experts, in training.
        seed: of the first weights.
    """

    name: ClassVar[str] = "switch"
    summary: ClassVar[str] = "full copies of FFNs, one or two per token (Switch, GShard)"

    num_experts: int = 8
    top_k: int = 1
    layers: str | Sequence[int] | Sequence[str] = "every:2"
    preset: Preset | None = None
    capacity_factor: float | None = 1.25
    rounding: Rounding = "fairseq"
    min_capacity: int = 4
    sequence_capacity: int = 64
    order: Order | None = None
    drop_in_evaluation: bool | None = None
    evaluation_share: float = 0.25
    gate_scale: GateScale = "prob"
    second: Second = "all"
    renormalise: Renormalise = "after"
    aux: Balance = "switch"
    aux_weight: float = 0.01
    z_weight: float = 0.0
    jitter: float = 0.01
    router_std: float = 0.02
    init_scale: float | None = None
    expert_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_k not in (1, 2):
            raise ConfigError(
                f"top_k is {self.top_k}; it may be 1 (Switch) or 2 (GShard). "
                "moduli.SparseUpcycling takes any number of experts per token"
            )
        settle(self)
        require_known("gate_scale", self.gate_scale, GateScale)
        require_known("second", self.second, Second)
        require_known("renormalise", self.renormalise, Renormalise)
        require_known("aux", self.aux, Balance)
        if self.preset is not None:
            require_known("preset", self.preset, Preset)
        self._capacity()  # says what is wrong with the numbers
        if self.top_k == 2 and self.gate_scale != "prob":
            raise ConfigError(
                f"gate_scale={self.gate_scale!r} is for top_k=1; the weights of two experts sum to "
                "1 already"
            )
        for setting in ("aux_weight", "z_weight", "router_std"):
            if getattr(self, setting) < 0:
                raise ConfigError(f"{setting} is {getattr(self, setting)}; it has to be 0 or more")
        for setting in ("jitter", "expert_dropout"):
            if not 0 <= getattr(self, setting) < 1:
                raise ConfigError(
                    f"{setting} is {getattr(self, setting)}; it may be from 0 to below 1"
                )
        if self.init_scale is not None and self.init_scale <= 0:
            raise ConfigError(
                f"init_scale is {self.init_scale}; it has to be positive, or None to start from "
                "copies"
            )

    def apply(
        self,
        model: nn.Module,
        *,
        batch: Batches | None = None,
        progress: Progress | None = None,
    ) -> ConversionReport:
        """Replace the chosen FFNs by experts; see `moduli.convert`.

        With `init_scale` the report has no output errors: nothing of the dense FFNs is left.
        """
        report = super().apply(model, batch=batch, progress=progress)
        if self.init_scale is None:
            return report
        generator = torch.Generator().manual_seed(self.seed)
        for layer in routed_layers(model).values():
            if isinstance(layer, OwnedExperts):
                _start_small(layer, self.init_scale, generator)
        layers = [replace(layer, error=None) for layer in report.layers]
        return replace(report, layers=layers, probe="")

    def recipe(self) -> OwnedRecipe:
        """Full copies behind the linear gate."""
        rule = Rule(
            top_k=self.top_k,
            combine="straight_through" if self.gate_scale == "one" else "probability",
        )
        capacity = self._capacity()

        def router(ffn: FFN, bank: ExpertBank) -> Router:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + ffn.index)
            start = torch.randn(self.num_experts, ffn.hidden, generator=generator)
            return SwitchRouter(
                ffn.hidden,
                self.num_experts,
                rule,
                capacity=capacity,
                second=self.second,
                renormalise=self.renormalise,
                times_experts=self.gate_scale == "prob_times_E",
                jitter=self.jitter,
                init=self.router_std * start,
            )

        return OwnedRecipe(
            method=self.name,
            config=self.to_dict(),
            layers=self.layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            members=lambda ffn: ([torch.arange(ffn.width)] * self.num_experts, None),
            own=Own(router, self._options(), "each", self.top_k),
            check=lambda ffn: None,
        )

    def _capacity(self) -> Capacity:
        paper = self.preset == "paper"
        drop = paper if self.drop_in_evaluation is None else self.drop_in_evaluation
        return Capacity(
            rounding=self.rounding,
            factor=self.capacity_factor,
            minimum=self.min_capacity,
            per_sequence=self.sequence_capacity,
            order=self.order or ("random" if self.rounding == "deepspeed" else "position"),
            in_evaluation=drop,
            share=self.evaluation_share,
            count_padding=paper,
        )

    def _options(self) -> SeamOptions:
        aux: FirstAux = "first_choice_paper" if self.preset == "paper" else "first_choice"
        if self.aux == "switch" and self.aux_weight:
            share = self.z_weight / self.aux_weight
            return SeamOptions(
                aux=aux, aux_weight=self.aux_weight, z_share=share, dropout=self.expert_dropout
            )
        if self.z_weight:
            return SeamOptions(aux="z", aux_weight=self.z_weight, dropout=self.expert_dropout)
        return SeamOptions(dropout=self.expert_dropout)


@torch.no_grad()
def _start_small(layer: OwnedExperts, scale: float, generator: torch.Generator) -> None:
    """Experts and router of a layer from a cut normal of variance scale / fan-in; biases 0."""
    for name, parameter in [*layer.experts.named_parameters(), *layer.router.named_parameters()]:
        if name.endswith("bias"):
            parameter.zero_()
            continue
        std = math.sqrt(scale / parameter.shape[-1])
        drawn: Tensor = torch.empty(parameter.shape)
        nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
        parameter.copy_(drawn)
