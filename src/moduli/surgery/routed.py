"""What every routed layer has: a router, what it observes, and its auxiliary loss.

Two kinds of layer stand on it: the activation seam over neurons of a dense FFN
(`moduli.surgery.seam`) and banks of experts with parameters of their own
(`moduli.surgery.owned`).

Letters: B batch, S sequence, T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moduli.losses.balance import load_importance_loss, switch_loss
from moduli.losses.noisy_top_k import noisy_top_k_loss
from moduli.losses.z_loss import z_loss
from moduli.routing import AvgKRouter, NoisyRouting, RouteContext, Router, Routing
from moduli.surgery.locate import FFN
from moduli.surgery.recall import Recalled

Select = Literal["gate", "up", "up_abs", "inter", "inter_abs"]
Aux = Literal["none", "load_importance", "load_importance_paper", "switch"]
NoisyAux = Literal["noisy_top_k", "noisy_top_k_paper"]
"""Of routers that learn their noise; "paper" tells who was chosen as LLaMA-MoE's code does."""
FirstAux = Literal["first_choice", "first_choice_paper", "z"]
"""The Switch loss on first choices; "paper" lets padding dilute its means. "z": z-loss alone."""


@dataclass
class Pass(Recalled):
    """What all routed layers of one model share during a forward pass of it.

    Attributes:
        masks: [B, S] masks of real tokens, from the attention masks of the model, by the name of
            the stack they belong to ("" for the whole model); None if unknown.
        dense: True while `moduli.dense` is active: every neuron takes part.
        record: called with (layer name, routing, real mask per token) for every routed layer.
        noise: standard normal samples by layer name, to reproduce a run.
        targets: [B, M] mask of inputs of a decoder that have a label; None without labels.
        ids: [B, S] numbers of the tokens in the vocabulary, by the name of the stack like `masks`;
            kept only for routers that look tokens up.
    """

    masks: dict[str, Tensor | None] = field(default_factory=dict)
    dense: bool = False
    record: Callable[[str, Routing, Tensor | None], None] | None = None
    noise: dict[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None
    ids: dict[str, Tensor | None] = field(default_factory=dict)

    def snapshot(self) -> dict[str, Any]:
        """See `Recalled`."""
        return {"masks": dict(self.masks), "ids": dict(self.ids), "dense": self.dense}

    def context(self, shape: torch.Size, training: bool, name: str) -> RouteContext:
        """The route context of a layer whose input has leading dimensions `shape`."""
        return RouteContext(
            training=training,
            real=self.real_tokens(shape, name),
            noise=self.noise.get(name),
            ids=_of_stack(self.ids, shape, name),
            shape=tuple(shape),
        )

    def real_tokens(self, shape: torch.Size, name: str) -> Bool[Tensor, " T"] | None:
        """Which tokens of a layer are real; None if its stack got no mask that fits `shape`."""
        return _of_stack(self.masks, shape, name)


def _of_stack(found: dict[str, Tensor | None], shape: torch.Size, name: str) -> Tensor | None:
    """What the stack of layer `name` was given for tokens of `shape`, flat; None if none fits."""
    for stack, given in found.items():
        if given is None or not f"{name}.".startswith(f"{stack}." if stack else ""):
            continue
        if len(shape) == 1 and given.numel() == shape[0]:  # the model flattens its tokens (OPT)
            return given.reshape(-1)
        if len(shape) != 2 or given.shape[0] != shape[0]:
            continue
        # With a cache a mask is longer than the new tokens: the last columns are theirs.
        # An encoder has no cache; a longer mask is one of its input before it was shortened.
        longer = given.shape[1] > shape[1] and not stack.endswith("encoder")
        if longer or given.shape[1] == shape[1]:
            return given[:, -shape[1] :].reshape(-1)
    return None


@dataclass(frozen=True)
class SeamOptions:
    """How a routed layer treats what lies around its routing.

    Attributes:
        select: which quantity scores experts of a gated FFN (avg-k on the gate projection, or
            the mean over neurons of the named one).
        aux: auxiliary loss of the layer, computed in training only.
        aux_weight: its weight in the loss.
        z_share: of the router's z-loss that comes on top, in units of `aux_weight`; has no meaning
            without an auxiliary loss on first choices.
        dropout: probability inside experts, in training.
        dropout_before: drop pre-activations (EMoE's language code) instead of activations.
        path: "auto" computes only chosen neurons where that is possible and pays off, "masked"
            never, "fast" wherever it is possible.
    """

    select: Select = "gate"
    aux: Aux | NoisyAux | FirstAux = "none"
    aux_weight: float = 0.01
    z_share: float = 0.0
    dropout: float = 0.0
    dropout_before: bool = False
    path: Literal["auto", "masked", "fast"] = "auto"


class RoutedLayer(nn.Module):
    """An FFN that is computed by experts which a router chooses.

    Args:
        ffn: the FFN it stands for.
        sizes: neurons per expert.
        router: scores and chooses.
        options: see `SeamOptions`.
        shared: state of the pass, one object for all layers of a model.
    """

    def __init__(
        self,
        ffn: FFN,
        sizes: tuple[int, ...],
        router: Router,
        options: SeamOptions,
        shared: Pass,
    ) -> None:
        super().__init__()
        self.router = router
        self.options = options
        self.sizes = sizes
        self.shared = shared
        self._ffn = (ffn,)  # in a tuple, so that the block does not become a sub-module of itself
        self.auxiliary: Tensor | None = None  # unweighted, of the last training forward
        self.lost_auxiliary = False  # it was due, but gradients were off
        self.register_state_dict_pre_hook(_settle)  # type: ignore[no-untyped-call]

    @property
    def ffn(self) -> FFN:
        return self._ffn[0]

    @property
    def num_experts(self) -> int:
        return len(self.sizes)

    @property
    def path(self) -> str:
        """Name of this module in the model."""
        return f"{self.ffn.name}.{self.ffn.family.act}"

    @property
    def experts_input(self) -> nn.Module:
        """The module whose input is that of the FFN."""
        return self.ffn.first

    def route(self, scores: Float[Tensor, "T E"], lead: torch.Size) -> Routing:
        """Routing from scores, with everything that is observed on the way."""
        context = self.shared.context(lead, self.training, self.ffn.name)
        routing = self.router.select(scores, context)
        if self.shared.record is not None:
            self.shared.record(self.ffn.name, routing, context.real)
        if self.training and self.options.aux != "none":
            self.lost_auxiliary = not torch.is_grad_enabled()
            if not self.lost_auxiliary:
                self.auxiliary = self._auxiliary(routing, context)
        return routing

    @property
    def _differentiable(self) -> bool:
        """Whether anything uses the gradient of the scores."""
        rule = self.router.rule
        return self.options.aux != "none" or rule.combine != "one"

    def _auxiliary(self, routing: Routing, context: RouteContext) -> Tensor:
        assert routing.scores is not None
        assert routing.noisy_scores is not None
        scores, noisy, experts = routing.scores, routing.noisy_scores, routing.experts
        if self.options.aux in ("first_choice", "first_choice_paper", "z"):
            return self._of_first_choices(scores, experts[:, :1], context.real)
        keep = None if self.router.rule.route_padding else context.real
        if keep is not None:
            scores, noisy, experts = scores[keep], noisy[keep], experts[keep]
        if self.options.aux == "switch":
            return switch_loss(scores, experts)
        rule = self.router.rule
        if self.options.aux in ("noisy_top_k", "noisy_top_k_paper"):
            assert isinstance(routing, NoisyRouting)
            spread = routing.spread
            if keep is not None and spread is not None:
                spread = spread[keep]
            return noisy_top_k_loss(
                scores,
                noisy,
                spread,
                rule.top_k,
                chosen_by="noise" if self.options.aux == "noisy_top_k_paper" else "scores",
            )
        paper = self.options.aux == "load_importance_paper"
        compare = "probabilities" if paper else "scores"
        return load_importance_loss(scores, noisy, rule.top_k, rule.noise, compare=compare)

    def _of_first_choices(
        self,
        scores: Float[Tensor, "T E"],
        first: Int[Tensor, "T 1"],
        real: Bool[Tensor, " T"] | None,
    ) -> Tensor:
        diluted = self.options.aux == "first_choice_paper"
        if real is not None and not diluted:
            scores, first, real = scores[real], first[real], None
        if not len(scores):
            return scores.sum()  # padding alone, which has no mean: nothing, with a graph
        if self.options.aux == "z":
            return z_loss(scores)
        loss = switch_loss(scores, first, real)
        return loss + self.options.z_share * z_loss(scores) if self.options.z_share else loss

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of the last pass have a graph, which can neither be copied nor pickled.
        return {**self.__dict__, "auxiliary": None}

    def extra_repr(self) -> str:
        low, high = min(self.sizes), max(self.sizes)
        return f"neurons={low}" if low == high else f"neurons={low}..{high}"


def _settle(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before a state dict: make a due update of a kept gate, since a resumed run cannot."""
    router = layer.router
    if isinstance(router, AvgKRouter):
        due = router.stale
        router.update()
        # Without momentum it may be repeated, should an optimiser step be still to come.
        router.stale = due and router.momentum == 0
