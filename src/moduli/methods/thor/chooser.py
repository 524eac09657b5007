"""Which experts compute: the routing plan in training, an inference mode in evaluation.

    random_token     an expert per token and layer
    random_sentence  an expert per sentence and layer: a hash of (seed, layer, the sentence's own
                     tokens), so that it depends on nothing else in the batch, not on padding, and
                     is the same for all beams and all steps of decoding
    random_position  an expert per position and layer, shared by all sentences: what the reference
                     computes where it says "sentence"
    random_batch     an expert per layer
    fixed:k          expert k everywhere, at the cost of the dense model
    ensemble_layer   in every layer the mean of all experts' outputs
    ensemble_prob    one pass per expert, of whose probabilities the mean is taken
    average          one FFN with the mean of all experts' weights: what `moduli.merge` makes

Letters: B sentences, R rows of a batch (a multiple of B with beams), T tokens, N experts.
Source: THOR (arXiv 2110.04260); microsoft/Stochastic-Mixture-of-Experts.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moduli.errors import ConfigError, ModelError, nearest
from moduli.methods.thor.plan import RoutingPlan, hashed, seeded
from moduli.surgery.stochastic import Choice, Chooser

MODES = (
    "average",
    "ensemble_layer",
    "ensemble_prob",
    "random_batch",
    "random_position",
    "random_sentence",
    "random_token",
)


def check_mode(mode: str, num_experts: int) -> int | None:
    """The k of "fixed:k", None for another mode.

    Raises:
        ConfigError: there is no such mode, or no such expert.
    """
    if mode in MODES:
        return None
    fixed = re.fullmatch(r"fixed:(-?\d+)", mode)
    if fixed is None:
        raise ConfigError(
            f"there is no inference mode {mode!r}. {nearest(mode, (*MODES, 'fixed:0'))}"
        )
    k = int(fixed[1])
    if not 0 <= k < num_experts:
        raise ConfigError(
            f"inference is {mode!r}, but the experts are fixed:0 to fixed:{num_experts - 1}"
        )
    return k


class ThorChooser(Chooser):
    """Names the experts of every layer of one model.

    Attributes:
        num_experts: N.
        mode: of evaluation.
        seed: of what evaluation draws.
        plan: of the training forward that runs, or whose backward does; None between.
        ensemble: whether the batch of this pass stands in it N times, once for every expert.
        sentences: that the pass reads or goes on with, for random_sentence; None: not known.
        encoded: what the last encoder has made of them, until a decoder goes on with it.
    """

    def __init__(self, num_experts: int, mode: str, seed: int) -> None:
        self.num_experts = num_experts
        self.plan: RoutingPlan | None = None
        self.ensemble = False
        self.set_mode(mode, seed)

    def set_mode(self, mode: str, seed: int) -> None:
        """Evaluate in `mode` from now on; random modes start anew from `seed`.

        Raises:
            ConfigError: there is no such mode, or no such expert.
        """
        self.fixed = check_mode(mode, self.num_experts)
        self.mode, self.seed = mode, seed
        self.generator = seeded(seed)
        self.sentences: list[bytes] | None = None
        self.encoded: Tensor | None = None
        self._drawn: dict[int, Choice] = {}

    @property
    def copies(self) -> int:
        """How often the batch has to stand in a pass of evaluation."""
        return self.num_experts if self.mode == "ensemble_prob" and not self.dense else 1

    def choose(self, layer: int, lead: torch.Size, training: bool) -> Choice:
        """See `Chooser`."""
        if training:
            if self.plan is None:
                raise ModelError(
                    "experts are drawn by a training forward of the whole model, and this call is "
                    "of a part of it; call the model itself (give it the inputs of its encoder, "
                    "too), or the part after eval()"
                )
            experts = tuple(one[layer] for one in self.plan.experts)
            return experts if len(experts) > 1 else experts[0]
        if self.fixed is not None:
            return self.fixed
        if self.mode == "average":
            return "mean"
        if self.mode == "ensemble_layer":
            return "each"
        if self.mode == "ensemble_prob":
            return self._every_expert()
        if layer not in self._drawn:
            self._drawn[layer] = self._draw(layer, lead)
        return self._drawn[layer]

    def snapshot(self) -> dict[str, Any]:
        """See `Recalled`."""
        return {**super().snapshot(), "plan": self.plan}

    def start_pass(self) -> None:
        """Forget what a pass has left that did not come to its end."""
        self.end_recall()
        self._drawn.clear()

    def finish(self, layer: int) -> None:
        """See `Chooser`: what was drawn for one call of an FFN holds for that call only."""
        self._drawn.pop(layer, None)

    def _every_expert(self) -> Choice:
        if not self.ensemble:
            raise ModelError(
                "inference mode ensemble_prob runs the whole model once per expert; call the "
                "model itself, or its encoder, not a part of it"
            )
        return tuple(range(self.num_experts))

    def _draw(self, layer: int, lead: torch.Size) -> Choice:
        if self.mode == "random_sentence":
            return self._by_sentence(layer, lead)
        if self.mode == "random_batch":
            return int(self._random(()))
        if self.mode == "random_token":
            return self._random(lead).flatten()
        if len(lead) != 2:
            raise ModelError(
                "random_position needs inputs [batch, positions, width], but this model flattens "
                "them before its FFNs; use random_token or random_sentence"
            )
        return self._random(lead[1:]).expand(lead).flatten()

    def _random(self, shape: tuple[int, ...]) -> Int[Tensor, "*shape"]:
        return torch.randint(self.num_experts, shape, generator=self.generator)

    def _by_sentence(self, layer: int, lead: torch.Size) -> Choice:
        tokens = lead.numel()
        if not self.sentences or tokens % len(self.sentences):
            known = "none" if self.sentences is None else str(len(self.sentences))
            raise ModelError(
                f"random_sentence chooses an expert for every sentence that the model reads; it "
                f"has read {known}, but is now given {tuple(lead)} tokens. Call the model itself "
                "(or its encoder, then the model) on the same sentences, with a cache that it has "
                "filled in this mode if any"
            )
        start = repr((self.seed, layer)).encode()
        experts = [hashed(start + one) % self.num_experts for one in self.sentences]
        each = tokens // len(experts)  # beams of a sentence stand next to each other
        return torch.tensor(experts).repeat_interleave(each)
