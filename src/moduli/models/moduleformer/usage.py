"""How much a ModuleFormer uses each of its experts on given data.

    frequency    f_e = share of tokens whose chosen experts contain e; the f_e of a router sum to K
    mass         m_e = mean over tokens of p_e where e is chosen, 0 elsewhere
    probability  mean over tokens of p_e; sums to 1

with p the probability among all experts. Padding is left out.
Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moduli.errors import ConfigError, DataError
from moduli.models.moduleformer.inputs import real_tokens
from moduli.models.moduleformer.sublayers import Kind, Sublayer, decoder_of, sublayers
from moduli.surgery.evaluating import evaluating

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class RouterUse:
    """What one router did; see the file's head.

    Attributes:
        kind: of its experts.
        layer: number of the block.
        frequency, mass, probability: of every expert.
    """

    kind: Kind
    layer: int
    frequency: tuple[float, ...]
    mass: tuple[float, ...]
    probability: tuple[float, ...]

    @property
    def name(self) -> str:
        """For messages and reports."""
        return f"{self.kind} {self.layer}"


@dataclass(frozen=True)
class ExpertUse:
    """What all routers did, in the order of `router_logits` of an output.

    Attributes:
        tokens: that were seen, without padding.
        routers: one after the other.
    """

    tokens: int
    routers: tuple[RouterUse, ...]

    def require_of(self, parts: Sequence[Sublayer]) -> None:
        """Raise unless this is the use of a model with these routers.

        Raises:
            ConfigError: it is that of another one.
        """
        here = [(p.kind, p.layer, p.owner.gate.num_experts) for p in parts]
        there = [(r.kind, r.layer, len(r.frequency)) for r in self.routers]
        if here != there:
            raise ConfigError(
                f"use is of {len(there)} routers with {sum(n for *_, n in there)} experts, the "
                f"model has {len(here)} with {sum(n for *_, n in here)}; measure it on this model"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@torch.no_grad()
def expert_use(
    model: Any, batches: Iterable[Batch], *, on_batch: Callable[[int], None] | None = None
) -> ExpertUse:
    """How often every expert is chosen, and with how much probability.

    Args:
        model: a ModuleFormer with or without a head; it is run in evaluation mode.
        batches: keyword arguments of its forward; labels are not looked at.
        on_batch: called with the tokens seen so far.

    Raises:
        DataError: there are no tokens.
        ModelError: the model is no ModuleFormer.
    """
    parts = sublayers(model)
    sums: list[Tensor | None] = [None] * len(parts)
    tokens = 0
    for found, real in router_outputs(model, batches):
        tokens += len(found.router_logits[0]) if real is None else int(real.sum())
        told = zip(found.router_logits, found.router_experts, strict=True)
        for i, (logits, experts) in enumerate(told):
            more = _sums(logits, experts, real).cpu()
            before = sums[i]
            sums[i] = more if before is None else before + more
        if on_batch is not None:
            on_batch(tokens)
    if not tokens:
        raise DataError("There are no tokens to measure the use of experts on; give longer texts.")
    uses = []
    for part, total in zip(parts, sums, strict=True):
        assert total is not None
        frequency, mass, probability = (tuple(row) for row in (total / tokens).tolist())
        uses.append(RouterUse(part.kind, part.layer, frequency, mass, probability))
    return ExpertUse(tokens, tuple(uses))


def router_outputs(
    model: Any, batches: Iterable[Batch]
) -> Iterator[tuple[Any, Bool[Tensor, " T"] | None]]:
    """The decoder's output for every batch with what its routers said, and which tokens are
    real."""
    decoder = decoder_of(model)
    for batch in batches:
        inputs = {
            name: value.to(decoder.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name != "labels"
        }
        with evaluating(model):
            found = decoder(**inputs, output_router_logits=True, use_cache=False)
        length = found.last_hidden_state.shape[1]
        yield found, real_tokens(inputs.get("attention_mask"), length)


def _sums(
    logits: Float[Tensor, "T E"], experts: Int[Tensor, "T K"], real: Bool[Tensor, " T"] | None
) -> Float[Tensor, "3 E"]:
    """Over real tokens, in float64: choices, probability where chosen, probability."""
    probs = logits.softmax(dim=-1, dtype=torch.float32).double()
    chosen = torch.zeros_like(probs).scatter(1, experts, 1.0)
    each = torch.stack([chosen, chosen * probs, probs])
    if real is not None:
        each = each * real.to(each.device)[:, None]
    return each.sum(1)
