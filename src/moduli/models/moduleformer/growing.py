"""Growing a ModuleFormer: new experts beside old ones that do not change.

Every layer gets new attention experts (a query and an output projection) and new feed-forward
experts, and each router a row for every new expert. Only these are trained; embeddings, norms, keys
and values, old experts, the routers' input layers and their old rows are frozen. The result is an
ordinary checkpoint with more experts.

What can move the old function is the softmax. With Z the sum of exp(logit) over old experts and Z'
over new ones, every old gate becomes Z / (Z + Z') of what it was, and a new expert may take the
place of an old one among the K best. `leakage` is Z' / (Z + Z'); it is measured at the start,
can be kept low in training (`replay`), and is 0 while the new experts are `closed`.

    fresh    new experts and rows are drawn as those of a new model
    copy     copies of experts and their rows, optionally with noise
    closed   fresh experts, with rows by which their logits are low for nearly every token; for
             "mlp" and "linear" gates (the cosines of a "gmm" gate are bounded)

Letters: T tokens, D width, G hidden width of a router, E experts, N new ones, K experts per token.
Source: ModuleFormer (arXiv 2306.04640). The published code has no code for growing; the three
starts and the leakage are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from moduli.errors import ConfigError, UnknownNameError, nearest
from moduli.models.moduleformer.configuration import ModuleFormerConfig
from moduli.models.moduleformer.experts import ExpertLinear, ModuleFormerExperts
from moduli.models.moduleformer.grown import (
    GrownExpertLinear,
    GrownExperts,
    GrownRouter,
    new_parameters,
    settle,
    train_only_new,
)
from moduli.models.moduleformer.leaking import LEAK, closing_rows, leaks
from moduli.models.moduleformer.sublayers import (
    ROWS,
    STACKS,
    Kind,
    Sublayer,
    decoder_of,
    expert_counts,
    require_plain,
    set_expert_counts,
    sublayers,
)
from moduli.models.moduleformer.usage import Batch, ExpertUse

Start = Literal["fresh", "copy", "closed"]


@dataclass(frozen=True)
class ExtendReport:
    """What `extend` did.

    Attributes:
        start: how the new experts begin.
        attention, feed_forward: experts of every layer, old and new.
        new_attention, new_feed_forward: new ones of every layer.
        trainable: parameters of the new experts and rows.
        parameters: of the whole model.
        leak: by router, the mean share of probability that new experts take.
        worst_leak: of any token at any router.
        measured_on: what this was measured on.
    """

    start: str
    attention: tuple[int, ...]
    feed_forward: tuple[int, ...]
    new_attention: int
    new_feed_forward: int
    trainable: int
    parameters: int
    leak: tuple[float, ...]
    worst_leak: float
    measured_on: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"added to each of {len(self.attention)} layers, start {self.start!r}:",
            f"{_listed(self.attention)} attention experts, {self.new_attention} of them new",
            f"{_listed(self.feed_forward)} feed-forward experts, {self.new_feed_forward} of them "
            "new",
            f"trainable: {self.trainable:,} of {self.parameters:,} parameters, the new ones",
            "probability of new experts at the start: "
            f"{sum(self.leak) / len(self.leak):.2%} on average over routers,",
            f"{self.worst_leak:.2%} for the worst token ({self.measured_on})",
        ]
        return "\n".join(lines)


def extend(
    model: Any,
    *,
    attention: int = 0,
    feed_forward: int = 0,
    start: Start = "fresh",
    use: ExpertUse | None = None,
    noise: float = 0.0,
    leak: float = LEAK,
    batches: Sequence[Batch] | None = None,
    generator: torch.Generator | None = None,
) -> ExtendReport:
    """Add experts to every layer, in place, and freeze everything else.

    Make the optimiser afterwards. The model saves and loads as an ordinary one at any time;
    `settle` makes ordinary modules of it again.

    Args:
        model: a ModuleFormer with or without a head; one that is still growing is settled first.
        attention: new attention experts of every layer.
        feed_forward: new feed-forward experts of every layer.
        start: see the file's head.
        use: with start="copy", of what `expert_use` measured: the least probable experts of every
            router are copied, which leaks least. None: the first ones, in turn.
        noise: with start="copy", standard deviation of what is added to copies, in units of
            theirs.
        leak: with start="closed", the share of probability that new experts may take at a router,
            on average over tokens.
        batches: keyword arguments of the model's forward, to measure leakage on, and to close new
            experts by; None: random vectors in front of every router.
        generator: of new parameters and random vectors, on the CPU; None is torch's own.

    Raises:
        ModelError: the model is no ModuleFormer, or its experts are not plain tensors.
        ConfigError: no expert or a negative number, or a start that this model cannot have.
        UnknownNameError: there is no such start.
    """
    added: dict[Kind, int] = {"attention": attention, "feed_forward": feed_forward}
    config = decoder_of(model).config
    _check(config.gate_type, added, start, use, noise, leak)
    if use is not None:
        use.require_of(sublayers(model))
    # Before anything changes: there may be none.
    closing = closing_rows(model, added, leak, batches, generator) if start == "closed" else {}
    settle(model)
    parts = sublayers(model)
    require_plain(parts)
    for i, part in enumerate(parts):
        if count := added[part.kind]:
            sources = None
            if start == "copy":
                probable = None if use is None else use.routers[i].probability
                sources = _sources(part.owner.gate.num_experts, count, probable)
            _grow(part, count, config, sources, noise, closing.get(i), generator)
    for kind, count in added.items():
        before = expert_counts(config, kind)
        set_expert_counts(model, kind, [number + count for number in before])
    train_only_new(model)
    shares = leaks(model, batches, generator)
    return ExtendReport(
        start=start,
        attention=tuple(expert_counts(config, "attention")),
        feed_forward=tuple(expert_counts(config, "feed_forward")),
        new_attention=attention,
        new_feed_forward=feed_forward,
        trainable=sum(p.numel() for p in new_parameters(model)),
        parameters=sum(p.numel() for p in model.parameters()),
        leak=tuple(float(share.mean()) for share in shares),
        worst_leak=max(float(share.max()) for share in shares),
        measured_on="random vectors" if batches is None else "given inputs",
    )


def _listed(counts: Sequence[int]) -> str:
    """One number where all are equal."""
    return ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def _check(
    gate: str,
    added: dict[Kind, int],
    start: str,
    use: ExpertUse | None,
    noise: float,
    leak: float,
) -> None:
    if min(added.values()) < 0 or max(added.values()) == 0:
        given = " and ".join(f"{count} {kind.replace('_', '-')}" for kind, count in added.items())
        raise ConfigError(
            f"{given} experts were asked for; add 1 or more of a kind, and 0 of one that is to "
            "stay (moduli.prune takes experts away)"
        )
    if start not in get_args(Start):
        raise UnknownNameError(f"start is {start!r}. {nearest(start, get_args(Start))}")
    if start != "copy" and (use is not None or noise):
        raise ConfigError(f"use and noise are of copies; start is {start!r}, choose 'copy'")
    if noise < 0:
        raise ConfigError(f"noise is {noise}; it is a standard deviation of 0 or more")
    if start == "closed" and gate == "gmm":
        raise ConfigError(
            "start='closed' needs logits without bounds, and those of 'gmm' gates are cosines; "
            "start='copy' with the use of experts leaks least, and a penalty "
            "on leakage keeps it low in training (--leakage, replay)"
        )
    if start == "closed" and not 0 < leak < 1:
        raise ConfigError(f"leak is {leak}; it is a share of probability, above 0 and below 1")


def _sources(experts: int, count: int, probable: Sequence[float] | None) -> list[int]:
    """Which experts are copied: in turn, the least probable ones first."""
    places = sorted(range(experts), key=lambda e: 0.0 if probable is None else probable[e])
    return [places[i % experts] for i in range(count)]


def _grow(
    part: Sublayer,
    count: int,
    config: ModuleFormerConfig,
    sources: list[int] | None,
    noise: float,
    rows: Tensor | None,
    generator: torch.Generator | None,
) -> None:
    """Replace the modules of one router and its experts by such as hold new ones too.

    Args:
        sources: experts to copy; None: draw new ones.
        rows: of the router, if they are neither copied nor drawn.
    """
    owner, gate = part.owner, part.owner.gate

    def new_of(like: Tensor, drawn: Tensor) -> nn.Parameter:
        if sources is not None:
            drawn = like.detach()[sources].float().cpu()
            if noise:
                spread = noise * drawn.std()
                drawn += spread * torch.randn(drawn.shape, generator=generator)
        return nn.Parameter(drawn.to(like))

    for name in STACKS[part.kind]:
        old = getattr(owner, name)
        new: Any
        if isinstance(old, ModuleFormerExperts):
            new = ModuleFormerExperts(config, count)
        else:
            new = ExpertLinear(count, *old.weight.shape[1:])
        for parameter, like in old.named_parameters():
            bound = 1 / like.shape[1]
            drawn = torch.empty(count, *like.shape[1:]).uniform_(-bound, bound, generator=generator)
            setattr(new, parameter, new_of(like, drawn))
        grown = GrownExperts if isinstance(old, ModuleFormerExperts) else GrownExpertLinear
        setattr(owner, name, grown(old, new).train(old.training))

    like = gate.get_parameter(ROWS[config.gate_type])
    if rows is None:
        std = 1.0 if config.gate_type == "gmm" else config.initializer_range
        rows = new_of(like, std * torch.randn(count, like.shape[1], generator=generator))
    made = GrownRouter(gate, ROWS[config.gate_type], nn.Parameter(rows.to(like)))
    owner.gate = made.train(gate.training)
