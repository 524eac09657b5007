"""Pruning a ModuleFormer: experts that given data hardly uses are cut out.

    1 tune on a task, with a concentration loss   (config.concentration_weight)
    2 measure the use of experts on its data      (expert_use)
    3 cut out those that are used least           (prune)

An expert goes with its matrices and its row of the router; the softmax is then over those that are
left, whose gates grow by 1 / (1 - probability of the dropped ones). The mean of that probability
is in the report: it says what to expect of the loss.

Letters: T tokens, E experts, K experts per token.
Source: ModuleFormer (arXiv 2306.04640). The published code has no code for pruning; which experts
are kept, and how many in which layer, is ours.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from moduli.errors import ConfigError, UnknownNameError, nearest
from moduli.models.moduleformer.grown import settle
from moduli.models.moduleformer.sublayers import (
    FIELDS,
    ROWS,
    STACKS,
    Kind,
    Sublayer,
    decoder_of,
    expert_counts,
    is_uniform,
    put_parameter,
    require_plain,
    set_expert_counts,
    sublayers,
)
from moduli.models.moduleformer.usage import ExpertUse, RouterUse

By = Literal["frequency", "mass"]


@dataclass(frozen=True)
class PrunedRouter:
    """What became of one router and its experts.

    Attributes:
        kind: of the experts.
        layer: number of the block.
        kept: experts that are left, by their old numbers, in ascending order.
        experts: how many there were.
        dropped_mass: mean over tokens of the probability of those that are gone.
        dropped_choices: share of the choices that chose one of them.
    """

    kind: Kind
    layer: int
    kept: tuple[int, ...]
    experts: int
    dropped_mass: float
    dropped_choices: float


@dataclass(frozen=True)
class ModuleFormerPruneReport:
    """What `prune` did.

    Attributes:
        by: the statistic that experts were ranked by.
        tokens: that it was measured on.
        uniform: whether all layers have as many experts, which the reference can load.
        routers: in the order of `router_logits` of an output.
        parameters: of the whole model, before and after.
    """

    by: str
    tokens: int
    uniform: bool
    routers: tuple[PrunedRouter, ...]
    parameters: tuple[int, int]

    @property
    def dropped_mass(self) -> float:
        """Mean over routers."""
        return sum(router.dropped_mass for router in self.routers) / len(self.routers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"dropped_mass": self.dropped_mass}

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"{after:,} of {before:,} parameters are left; experts ranked by {self.by} on "
            f"{self.tokens:,} tokens"
        ]
        for r in self.routers:
            lines.append(
                f"{r.kind.replace('_', '-')} {r.layer}: {len(r.kept)} of {r.experts} kept; dropped "
                f"{r.dropped_mass:.1%} of probability, {r.dropped_choices:.1%} of choices"
            )
        lines.append(f"dropped probability, mean over routers: {self.dropped_mass:.2%}")
        if not self.uniform:
            lines.append(
                "layers differ in their number of experts: moduli loads this model, the published "
                "code cannot"
            )
        return "\n".join(lines)


def prune(
    model: Any,
    use: ExpertUse,
    *,
    keep: int | float | None = None,
    by: By = "frequency",
    per_layer: bool = False,
    threshold: float | None = None,
) -> ModuleFormerPruneReport:
    """Cut out experts that are used least, in place.

    Args:
        model: a ModuleFormer with or without a head; one that is growing is settled first.
        use: of what `expert_use` measured on this model.
        keep: how much stays of each kind of experts: a float up to 1 is a share, rounded up, a
            whole number above 1 (or an int) their number in a layer.
        by: "frequency" or "mass", see `usage`.
        per_layer: rank the experts of all layers together, so that some layers keep more than
            others; otherwise every layer keeps as many.
        threshold: instead of `keep`: in every layer those stay whose statistic is not below it,
            and K in any case.

    Raises:
        ModelError: the model is no ModuleFormer, or its experts are not plain tensors.
        ConfigError: fewer than K experts, both or neither of `keep` and `threshold`, or a use of
            another model. The model is left as it was.
        UnknownNameError: there is no such statistic.
    """
    if by not in get_args(By):
        raise UnknownNameError(f"by is {by!r}. {nearest(by, get_args(By))}")
    check_keep(model, keep, threshold)
    decoder = decoder_of(model)
    use.require_of(sublayers(model))
    settle(model)
    parts = sublayers(model)
    require_plain(parts)
    before = sum(p.numel() for p in model.parameters())
    kept: dict[int, list[int]] = {}
    for kind, field in FIELDS.items():
        places = [i for i, part in enumerate(parts) if part.kind == kind]
        scores = [getattr(use.routers[i], by) for i in places]
        top_k = getattr(decoder.config, f"k_{field}")
        chosen = _choose(kind, scores, top_k, keep, per_layer, threshold)
        kept |= dict(zip(places, chosen, strict=True))
    for i, part in enumerate(parts):
        _cut(part, kept[i], ROWS[decoder.config.gate_type])
    for kind in FIELDS:
        counts = [len(kept[i]) for i, part in enumerate(parts) if part.kind == kind]
        set_expert_counts(model, kind, counts)
    return ModuleFormerPruneReport(
        by=by,
        tokens=use.tokens,
        uniform=is_uniform(decoder.config),
        routers=tuple(_report(router, kept[i]) for i, router in enumerate(use.routers)),
        parameters=(before, sum(p.numel() for p in model.parameters())),
    )


def check_keep(model: Any, keep: int | float | None, threshold: float | None) -> None:
    """Raise what `prune` would, before the use of experts has been measured.

    Raises:
        ModelError: the model is no ModuleFormer.
        ConfigError: fewer than K experts, a threshold that is no share, or both or neither of
            `keep` and `threshold`.
    """
    config = decoder_of(model).config
    if (keep is None) == (threshold is None):
        raise ConfigError("give exactly one of keep and threshold, such as keep=0.5")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(
            f"threshold is {threshold:g}; it is a share of the tokens, from 0 to 1, such as 0.05"
        )
    if keep is not None:
        if not math.isfinite(keep):
            raise ConfigError(f"keep is {keep}; it is a share such as 0.5, or a number of experts")
        for kind, field in FIELDS.items():
            for experts in expert_counts(config, kind):
                _number(kind, keep, experts, getattr(config, f"k_{field}"))


def _choose(
    kind: Kind,
    scores: list[tuple[float, ...]],
    top_k: int,
    keep: int | float | None,
    per_layer: bool,
    threshold: float | None,
) -> list[list[int]]:
    """Numbers of the experts to keep, layer by layer."""
    ranked = [sorted(range(len(s)), key=lambda e: (-s[e], e)) for s in scores]
    if threshold is not None:
        numbers = [max(top_k, sum(x >= threshold for x in s)) for s in scores]
    else:
        assert keep is not None
        numbers = [_number(kind, keep, len(s), top_k) for s in scores]
        if per_layer:
            numbers = _shared_out(scores, ranked, sum(numbers), top_k)
        elif len({len(s) for s in scores}) > 1:  # layers differ already, by an earlier pruning
            numbers = [min(numbers)] * len(numbers)
    return [sorted(order[:n]) for order, n in zip(ranked, numbers, strict=True)]


def _number(kind: Kind, keep: int | float, experts: int, top_k: int) -> int:
    """How many experts of a layer stay.

    Raises:
        ConfigError: more than there are, or fewer than a token uses.
    """
    title = kind.replace("_", "-")
    share = 0 < keep <= 1 and not isinstance(keep, int)
    if not share and (keep != int(keep) or keep > experts):
        raise ConfigError(
            f"keep={keep}: give a share above 0 and up to 1, or a number of experts; a layer has "
            f"{experts} {title} experts"
        )
    number = math.ceil(keep * experts - 1e-9) if share else int(keep)
    if number < top_k:
        nearest_share = math.ceil(100 * top_k / experts) / 100
        raise ConfigError(
            f"keep={keep} leaves {max(number, 0)} of {experts} {title} experts, but every token "
            f"uses {top_k} of them; keep at least {top_k}, or a share of {nearest_share:g}"
        )
    return number


def _shared_out(
    scores: list[tuple[float, ...]], ranked: list[list[int]], total: int, top_k: int
) -> list[int]:
    """So many experts over all layers, the most used ones, and K in each."""
    rest = [(-scores[layer][e], layer) for layer, order in enumerate(ranked) for e in order[top_k:]]
    numbers = [top_k] * len(ranked)
    for _, layer in sorted(rest)[: total - top_k * len(ranked)]:
        numbers[layer] += 1
    return numbers


@torch.no_grad()
def _cut(part: Sublayer, kept: list[int], rows: str) -> None:
    """Keep these experts and their rows."""
    gate = part.owner.gate
    stacks = [getattr(part.owner, name) for name in STACKS[part.kind]]
    each = [(stack, name) for stack in stacks for name, _ in stack.named_parameters()]
    for module, name in [*each, (gate, rows)]:
        old = module.get_parameter(name)
        put_parameter(module, name, old[kept], trains=old.requires_grad)
    gate.num_experts = len(kept)
    if part.kind == "feed_forward":
        part.owner.experts.num_experts = len(kept)


def _report(router: RouterUse, kept: list[int]) -> PrunedRouter:
    gone = set(range(len(router.frequency))) - set(kept)
    choices = math.fsum(router.frequency)
    return PrunedRouter(
        kind=router.kind,
        layer=router.layer,
        kept=tuple(kept),
        experts=len(router.frequency),
        dropped_mass=math.fsum(router.probability[e] for e in gone),
        dropped_choices=math.fsum(router.frequency[e] for e in gone) / choices,
    )
