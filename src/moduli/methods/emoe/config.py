"""EMoE: the neurons of a pretrained FFN, clustered by their keys, as experts of a sparse layer.

1. Balanced clustering of the L2-normalised keys of an FFN gives E groups of neurons.
2. The score of an expert for a token is the dot product of the token with its mean key (avg-k).
3. A token uses the k best experts, each with weight 1; nothing is added and nothing is learned
   besides the weights that were there. At k = E the layer is the dense FFN.

EMoE-learn is `gate="cosine"`. Letters: D width, F neurons, E experts, k experts per token.
Source: EMoE (NAACL 2024), qiuzh20/EMoE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from moduli.errors import ConfigError
from moduli.methods.base import DataMethod, Progress, settle
from moduli.routing import AvgKRouter, CosineRouter, LinearRouter, Router, Rule, gate_from_keys
from moduli.routing.rule import Choose, Combine
from moduli.surgery.conversion import OwnedRecipe, Recipe
from moduli.surgery.partition import NamedSplit, Sample
from moduli.surgery.routed import Aux, Select

# Settings left at None take these values, by preset.
DEFAULTS: dict[str | None, dict[str, Any]] = {
    None: {
        "noise": 0.0,
        "aux": "none",
        "capacity_factor": 0.0,
        "out_bias": "shared",
        "expert_dropout": 0.0,
        "dropout_before": False,
        "gate_momentum": None,
        "route_padding": False,
    },
    "paper": {
        "noise": 1.0,
        "aux": "load_importance_paper",
        "capacity_factor": 1.5,
        "out_bias": "split",
        "expert_dropout": 0.1,
        "dropout_before": True,
        "gate_momentum": 0.0,
        "route_padding": True,
    },
}
# The reference has a second code path, for gated FFNs: block masking and nothing else.
PAPER_GATED = {**DEFAULTS[None], "out_bias": "shared"}


@dataclass(frozen=True)
class EMoE(DataMethod):
    """Settings of EMoE. None means: as the preset says.

    Attributes:
        num_experts: E.
        top_k: experts per token, k.
        layers: "all", "last:2", "first:2", "every:2", a list of indices, or name patterns.
        preset: "paper" reproduces the reference (noise 1, auxiliary loss, capacity 1.5 with token
            dropping, output bias split over experts, dropout inside experts, a kept gate that is
            re-tied after every micro-batch; for gated FFNs none of these, as there).
        split: how neurons are grouped: "cluster" by balanced clustering of keys, "contiguous"
            blocks (what the reference's `random_cluster` builds), a seeded "random" shuffle, or
            "coactivation" of neurons on data, which conversion must then be given.
        expert_repeat: clusters per expert, r: expert i has clusters i, i + 1, ..., i + r - 1 (mod
            E). Above 1 experts overlap, so that they are copies with parameters of their own, and
            merging averages them; at E every expert is the whole FFN.
        gate: "avgk", or a learned "cosine" (EMoE-learn) or "linear" gate; "linear" starts at the
            mean keys.
        select: for gated FFNs: the quantity whose mean over an expert's neurons scores it.
        choose: "top", or the "bottom" and "not_top" arms of the negative-transfer analysis.
        combine: weight of a chosen expert: "one", "softmax" renormalised over the chosen (the
            reference's for learned gates), or "straight_through" (value 1, with gradient; the
            default for learned gates, since the layer then starts at the dense function).
        normalize_gate: cosine similarity in the avg-k score.
        gate_momentum: None computes the gate from live keys; a number m in [0, 1) keeps a gate
            that becomes m * gate + (1 - m) * mean keys after every training micro-batch.
        noise: standard deviation of score noise in training, in units of 1 / E.
        aux: auxiliary balance loss: "none", "load_importance", "load_importance_paper" (compares
            probabilities with a score threshold, as the reference does) or "switch".
        aux_weight: its weight in the loss, per layer.
        capacity_factor: 0 drops no token; see `moduli.routing.capacity`.
        prioritized: serve tokens by their best probability when capacity is short.
        route_padding: let padding compete for capacity and enter the auxiliary loss.
        out_bias: "shared" adds the FFN's output bias once, "split" 1 / k of it per expert.
        expert_dropout: dropout inside experts, in training.
        dropout_before: drop before the activation instead of after it.
        path: "auto", "masked" (compute all neurons, mask) or "fast" (chosen neurons only).
        seed: of clustering and random splits.
        cluster_seconds: time limit of clustering, per layer; None has none.
    """

    name: ClassVar[str] = "emoe"
    summary: ClassVar[str] = "experts from clustered FFN keys, avg-k gate (EMoE, EMoE-learn)"

    num_experts: int = 16
    top_k: int = 4
    layers: str | Sequence[int] | Sequence[str] = "last:2"
    preset: Literal["paper"] | None = None
    split: NamedSplit = "cluster"
    expert_repeat: int = 1
    gate: Literal["avgk", "cosine", "linear"] = "avgk"
    select: Select = "gate"
    choose: Choose = "top"
    combine: Combine | None = None
    normalize_gate: bool = False
    gate_momentum: float | None = None
    noise: float | None = None
    aux: Aux | None = None
    aux_weight: float = 0.01
    capacity_factor: float | None = None
    prioritized: bool = True
    route_padding: bool | None = None
    out_bias: Literal["shared", "split"] | None = None
    expert_dropout: float | None = None
    dropout_before: bool | None = None
    path: Literal["auto", "masked", "fast"] = "auto"
    seed: int = 0
    cluster_seconds: float | None = None

    def __post_init__(self) -> None:
        settle(self)
        if self.preset not in DEFAULTS:
            raise ConfigError(f"preset is {self.preset!r}; it may be 'paper' or None")
        if not 1 <= self.expert_repeat <= self.num_experts:
            raise ConfigError(
                f"expert_repeat is {self.expert_repeat}, but there are {self.num_experts} "
                f"clusters; choose 1 to {self.num_experts}"
            )
        if self.expert_repeat > 1 and self.select != "gate":
            raise ConfigError(
                f"select={self.select!r} scores neurons where they are; with expert_repeat > 1 "
                "use select='gate'"
            )
        if self.choose == "not_top" and self.top_k == self.num_experts:
            raise ConfigError("choose='not_top' with top_k = num_experts leaves no expert")
        if self.gate_momentum is not None and not 0 <= self.gate_momentum < 1:
            raise ConfigError(f"gate_momentum is {self.gate_momentum}; expected 0 <= m < 1")
        if self.gate != "avgk":
            avgk_only = {"normalize_gate": self.normalize_gate, "gate_momentum": self.gate_momentum}
            for name, value in avgk_only.items():
                if value not in (None, False):
                    raise ConfigError(f"{name} is for gate='avgk'; gate={self.gate!r} is learned")
            if self.select != "gate":
                raise ConfigError(f"select={self.select!r} is for gate='avgk'")
        resolved = self.resolved(gated=False)
        if resolved.aux and resolved.aux.startswith("load_importance") and not resolved.noise:
            raise ConfigError(
                f"aux={resolved.aux!r} needs noise > 0 (its load is the chance that noise selects "
                "an expert); set noise=1.0, or use aux='switch'"
            )

    def resolved(self, gated: bool) -> EMoE:
        """The same settings with every None replaced by its preset's value.

        Args:
            gated: for a gated FFN, on which the reference has no noise, loss, capacity or bias.
        """
        defaults = PAPER_GATED if self.preset and gated else DEFAULTS[self.preset]
        changes = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        if self.gate != "avgk":
            changes.pop("gate_momentum", None)
        if self.combine is None:
            learned = "softmax" if self.preset == "paper" else "straight_through"
            changes["combine"] = "one" if self.gate == "avgk" else learned
        new = object.__new__(type(self))  # without checking again, which would not end
        for f in dataclasses.fields(self):
            object.__setattr__(new, f.name, changes.get(f.name, getattr(self, f.name)))
        return new

    def recipe(
        self, progress: Progress | None, sample: Sample | None = None
    ) -> Recipe | OwnedRecipe:
        """Labels, router and seam of EMoE, or its bank of overlapping experts."""
        from moduli.methods.emoe.assemble import recipe

        return recipe(self, progress, sample)

    def make_router(
        self, hidden: int, keys: Callable[[], Tensor], sizes: Sequence[int], rule: Rule
    ) -> Router:
        """The router of one layer; a subclass with a router of its own overrides this.

        Args:
            hidden: D.
            keys: returns the current keys [F, D] of all experts, one expert after the other.
            sizes: neurons per expert.
            rule: selection, combine weights, noise and capacity.
        """
        if self.gate == "cosine":
            return CosineRouter(hidden, len(sizes), rule)
        if self.gate == "linear":
            means = gate_from_keys(keys().detach(), sizes)
            return LinearRouter(hidden, len(sizes), rule, init=means)
        normalize, momentum = self.normalize_gate, self.gate_momentum
        return AvgKRouter(keys, sizes, rule, normalize=normalize, momentum=momentum)
