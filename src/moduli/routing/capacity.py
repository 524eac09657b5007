"""Slots and capacity: how many tokens an expert may take, and which ones it drops.

First choices of all tokens come before any second choice, and inside one rank tokens are served
by priority or by position. How many slots an expert has is rounded differently by every code base:

    fairseq       K floor(c ceil(T / E)), at evaluation a share of all tokens, ceil(f T)
    deepspeed     max(ceil(c K T / E), minimum), the product in float32, where 1.2 * 25 is above 30;
                  which tokens get the slots is left to chance
    tutel         K floor(|c| ceil(T / E)); c = 0 drops nothing, c < 0 takes no more than needed
    huggingface   a number of its own, counted in every sequence of the batch

Letters: T tokens, E experts, K experts per token, B sequences, c capacity factor, f share.
Sources: facebookresearch/fairseq (branch nllb), deepspeedai/DeepSpeed, microsoft/tutel, and
`switch_transformers` of huggingface/transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moduli.errors import ConfigError, ModelError
from moduli.routing.names import require_known
from moduli.routing.record import RouteContext

Rounding = Literal["fairseq", "deepspeed", "tutel", "huggingface"]
Order = Literal["position", "probability", "random"]


def capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Slots per expert as Tutel counts them, K * floor(|factor| * ceil(T / E)).

    A factor of 0 means that no token is dropped and has no capacity; asking for it raises. A
    negative factor means "no more than needed, at most this", which drops the same slots.

    Raises:
        ValueError: factor is 0.
    """
    if factor == 0:
        raise ValueError("a capacity factor of 0 drops nothing and has no capacity")
    return top_k * math.floor(abs(factor) * math.ceil(tokens / num_experts))


def slots(
    experts: Int[Tensor, "T K"],
    num_experts: int,
    priority: Float[Tensor, " T"] | None = None,
    real: Bool[Tensor, " T"] | Bool[Tensor, "T K"] | None = None,
) -> Int[Tensor, "T K"]:
    """Position of every assignment in its expert's queue, from 0, before any capacity cut.

    Args:
        experts: expert of every slot, in order of choice.
        num_experts: E.
        priority: tokens with a higher one are served first within a rank (batch-prioritised
            routing); None serves in order of position.
        real: tokens, or single choices of theirs, that queue at all; the others (padding) take
            no place.
    """
    tokens, top_k = experts.shape
    device = experts.device
    if priority is None:
        order = torch.arange(tokens, device=device)
    else:
        order = torch.argsort(priority, descending=True, stable=True)
    queue = experts
    if real is not None:
        left_out = ~real if real.dim() == 2 else ~real[:, None]
        queue = experts.masked_fill(left_out, num_experts)
    queue = queue[order].T.reshape(-1)  # rank by rank, each in order of service
    by_expert = torch.argsort(queue, stable=True)
    counts = torch.bincount(queue, minlength=num_experts + 1)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(queue)
    place[by_expert] = torch.arange(queue.numel(), device=device) - first[queue[by_expert]]
    served = torch.empty_like(experts)
    served[order] = place.reshape(top_k, tokens).T
    return served


@dataclass(frozen=True)
class Capacity:
    """How many tokens an expert takes in a pass, and in which order they are served.

    Attributes:
        rounding: which code base's number it is, see the top of the file.
        factor: c; None drops nothing. Has no meaning for "huggingface".
        minimum: least number of slots, of "deepspeed".
        per_sequence: slots per sequence, of "huggingface".
        order: who is served first within a rank: by "position", by the "probability" of the
            token's best expert (batch-prioritised routing), or "random" in training and by
            position in evaluation (DeepSpeed's random token selection).
        in_evaluation: drop tokens in evaluation, too. An output then depends on what else is in
            the batch.
        share: f of "fairseq" in evaluation; 0 for the number of training.
        count_padding: T is all positions, as in the references, instead of the real tokens.

    Raises:
        ConfigError: a number that leaves an expert without slots, or a name that is none.
    """

    rounding: Rounding = "fairseq"
    factor: float | None = 1.0
    minimum: int = 4
    per_sequence: int = 64
    order: Order = "position"
    in_evaluation: bool = False
    share: float = 0.25
    count_padding: bool = False

    def __post_init__(self) -> None:
        require_known("rounding", self.rounding, Rounding)
        require_known("order", self.order, Order)
        if self.factor is not None and self.factor <= 0 and self.rounding != "tutel":
            raise ConfigError(
                f"a capacity factor of {self.factor:g} leaves experts without slots; give a "
                "positive one, or None to drop nothing (only rounding='tutel' knows 0 and "
                "negative ones)"
            )
        if self.minimum < 0 or self.per_sequence < 1 or not 0 <= self.share <= 1:
            raise ConfigError(
                f"an expert has at least minimum={self.minimum} slots, or "
                f"per_sequence={self.per_sequence}, or the share={self.share:g} of all tokens; "
                "choose 0 or more, 1 or more, and 0 to 1"
            )

    def drops(self, training: bool) -> bool:
        """Whether there is a limit at all; evaluation has a rule of its own."""
        limited = self.rounding == "huggingface" or bool(self.factor)
        return limited and (training or self.in_evaluation)

    def limit(self, tokens: int, num_experts: int, top_k: int, training: bool) -> int | None:
        """Slots per expert (per expert and sequence for "huggingface"); None: nothing is dropped.

        Args:
            tokens: T.
            num_experts: E.
            top_k: K.
            training: see `drops`.
        """
        if not self.drops(training):
            return None
        if self.rounding == "huggingface":
            return self.per_sequence
        assert self.factor is not None
        if self.rounding == "deepspeed":
            share = _single(tokens / num_experts) * _single(self.factor * top_k)
            return max(math.ceil(_single(share)), self.minimum)
        if self.rounding == "fairseq" and not training and self.share:
            return math.ceil(self.share * tokens)
        return capacity(tokens, num_experts, top_k, self.factor)

    def admits(
        self,
        scores: Float[Tensor, "T E"],
        experts: Int[Tensor, "T K"],
        wanted: Bool[Tensor, "T K"] | None,
        context: RouteContext,
    ) -> Bool[Tensor, "T K"] | None:
        """Which choices get a slot; None if all do.

        Args:
            scores: of all experts, for the order of service.
            experts: choices of every token, in order.
            wanted: choices that ask for a slot at all, without those of padding; None: all.
            context: of the pass.

        Raises:
            ModelError: sequences are to be counted and the tokens came without them.
        """
        if not self.drops(context.training):
            return wanted
        num_experts = scores.shape[1]
        tokens, top_k = experts.shape
        if context.real is not None and not self.count_padding:
            tokens = int(context.real.sum())
        limit = self.limit(tokens, num_experts, top_k, context.training)
        assert limit is not None
        queues = experts
        if self.rounding == "huggingface":
            sequences, rows = _sequences(context, experts)
            queues, num_experts = experts + rows[:, None] * num_experts, num_experts * sequences
        place = slots(queues, num_experts, self._priority(scores, context), wanted)
        return place < limit if wanted is None else (place < limit) & wanted

    def _priority(
        self, scores: Float[Tensor, "T E"], context: RouteContext
    ) -> Float[Tensor, " T"] | None:
        if self.order == "probability":
            return scores.detach().softmax(dim=-1).amax(dim=-1)
        if self.order == "random" and context.training:
            return torch.rand(len(scores), device=scores.device, generator=context.generator)
        return None


def _single(number: float) -> float:
    """The nearest float32 of a normal number."""
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def _sequences(context: RouteContext, experts: Int[Tensor, "T K"]) -> tuple[int, Int[Tensor, " T"]]:
    """Number of sequences, and the one of every token."""
    shape = context.shape
    if shape is None or len(shape) < 2 or math.prod(shape) != len(experts):
        raise ModelError(
            f"rounding='huggingface' counts slots in every sequence, and the {len(experts)} tokens "
            f"of this layer came in the shape {shape}, not as [batch, sequence]; choose 'fairseq', "
            "'deepspeed' or 'tutel'"
        )
    length = math.prod(shape[1:])
    return shape[0], torch.arange(len(experts), device=experts.device) // length
