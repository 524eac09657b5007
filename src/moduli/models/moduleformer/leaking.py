"""How much probability new experts take from old ones, and what keeps it low.

    leakage    mean over tokens of Z' / (Z + Z'), Z the sum of exp(logit) over old experts, Z' over
               new ones: on tokens of the old domain, what the old function loses
    row norm   sum of the squares of the new rows
    closing    rows w found by logistic regression with one class: the mean over tokens of
               log(1 + N exp(w h) / Z), which is not below the leakage, is made small enough. So
               the logits are low for every token, as by a bias, which these routers do not have

Letters: T tokens, D width, G hidden width of a router, E experts, N new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moduli.errors import ConfigError, DataError, ModelError
from moduli.models.moduleformer.grown import GrownRouter
from moduli.models.moduleformer.inputs import real_tokens
from moduli.models.moduleformer.sublayers import Kind, sublayers
from moduli.models.moduleformer.usage import Batch, router_outputs
from moduli.routing import RouteContext
from moduli.surgery.evaluating import evaluating

LEAK = 1e-3
"""Share of probability that leaves closed experts unnoticed, beside the rounding of bfloat16."""
VECTORS = 512
"""Random vectors per router, where no inputs are given."""
FITTED = 4096
"""Tokens to which closed rows are fitted, at least, where as many are given."""
STEPS = 50
"""Of the search for closed rows, which usually ends after some ten."""
RIDGE = 1e-4
"""In units of the mean curvature."""

See = Callable[[int, Tensor], None]


def leakage(
    model: Any, router_logits: Sequence[Tensor], attention_mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Mean of Z' / (Z + Z') over tokens, and over routers that have new experts.

    Args:
        model: a ModuleFormer that is growing.
        router_logits: of its output (`output_router_logits=True`), with their gradient.
        attention_mask: [B, S], 0 for padding, which is left out.

    Raises:
        ModelError: the model is not growing.
    """
    found = []
    for part, logits in zip(sublayers(model), router_logits, strict=True):
        gate = part.owner.gate
        if isinstance(gate, GrownRouter):
            share = _share(logits, len(gate.rows))
            if attention_mask is not None:
                real = real_tokens(attention_mask, len(logits) // len(attention_mask))
                assert real is not None
                share = share[real.to(share.device)]
            found.append(share.mean())
    if not found:
        raise ModelError("this model has no new experts: extend(model, ...) adds some")
    return torch.stack([share.to(found[0].device) for share in found]).mean()


def row_norm(model: Any) -> Float[Tensor, ""]:
    """Sum of the squares of all new rows of routers.

    Raises:
        ModelError: the model is not growing.
    """
    gates = [part.owner.gate for part in sublayers(model)]
    squares = [gate.rows.square().sum() for gate in gates if isinstance(gate, GrownRouter)]
    if not squares:
        raise ModelError("this model has no new experts: extend(model, ...) adds some")
    return torch.stack([square.to(squares[0].device) for square in squares]).sum()


@torch.no_grad()
def leaks(
    model: Any, batches: Sequence[Batch] | None, generator: torch.Generator | None = None
) -> list[Float[Tensor, " T"]]:
    """Z' / (Z + Z') of every token, for every router that has new experts.

    Args:
        model: a ModuleFormer that is growing.
        batches: keyword arguments of its forward; None: random vectors in front of each router.
        generator: of random vectors.
    """
    gates = [part.owner.gate for part in sublayers(model)]
    found: dict[int, list[Tensor]] = {}

    def see(i: int, x: Tensor) -> None:
        gate = gates[i]
        if isinstance(gate, GrownRouter):
            scores = gate.forward(x, RouteContext()).scores
            assert scores is not None
            found.setdefault(i, []).append(_share(scores, len(gate.rows)).cpu())

    _look(model, batches, generator, see)
    return [torch.cat(shares) for _, shares in sorted(found.items())]


@torch.no_grad()
def closing_rows(
    model: Any,
    added: Mapping[Kind, int],
    leak: float,
    batches: Sequence[Batch] | None,
    generator: torch.Generator | None,
) -> dict[int, Float[Tensor, "_ G"]]:
    """Rows by which new experts hardly matter, by the place of the router in `sublayers`.

    Args:
        model: a ModuleFormer with "mlp" or "linear" gates; of one that is growing already, new
            experts are old ones here.
        added: number of new experts by kind.
        leak: mean share of probability that they may take.
        batches: keyword arguments of its forward; None: random vectors in front of each router.
        generator: of random vectors.

    Raises:
        ConfigError: there are none, since hidden vectors have too little in common.
    """
    parts = sublayers(model)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def see(i: int, x: Tensor) -> None:
        if sum(len(h) for h, _ in found.setdefault(i, [])) < FITTED:
            gate = parts[i].owner.gate
            scores = gate.forward(x, RouteContext()).scores
            assert scores is not None
            for layer in getattr(gate, "old", gate).w_gate[:-1]:
                x = layer(x)
            found[i].append((x.float().cpu(), scores.float().logsumexp(-1).cpu()))

    _look(model, batches, generator, see)
    rows = {}
    for i, part in enumerate(parts):
        if number := added[part.kind]:
            h, log_z = (torch.cat(each) for each in zip(*found[i], strict=True))
            row, reached = _closing(h, log_z - math.log(number), leak)
            if reached > leak:
                seen = "random" if batches is None else "given"
                raise ConfigError(
                    f"{part.name}: no rows were found that leak as little as {leak:g}, only "
                    f"{reached:.2g}: {seen} hidden vectors have too little in common; use "
                    "start='copy', or give (other) inputs of the old domain"
                )
            rows[i] = row.repeat(number, 1)
    return rows


def _closing(
    h: Float[Tensor, "T G"], log_z: Float[Tensor, " T"], leak: float
) -> tuple[Float[Tensor, " G"], float]:
    """A row, and a bound of its leakage: Newton's method, until the bound is low enough."""
    h, log_z = h.double(), log_z.double()
    row = h.new_zeros(h.shape[1])
    best, reached = row, math.inf
    for _ in range(STEPS):
        logits = h @ row - log_z
        bound = float(F.softplus(logits).mean())
        if bound < reached:
            best, reached = row, bound
        if bound <= leak:
            break
        share = logits.sigmoid()[:, None]
        slope = (h * share).mean(0)
        curve = (h * (share * (1 - share))).T @ h / len(h)
        ridge = RIDGE * curve.diagonal().mean() + torch.finfo(h.dtype).tiny
        row = row - torch.linalg.solve(curve + ridge * torch.eye(len(row)).to(h), slope)
    return best.float(), reached


def _share(logits: Float[Tensor, "T E"], number: int) -> Float[Tensor, " T"]:
    """Probability of the last experts."""
    return logits.softmax(dim=-1, dtype=torch.float32)[:, -number:].sum(-1)


def _look(
    model: Any, batches: Sequence[Batch] | None, generator: torch.Generator | None, see: See
) -> None:
    """Show `see` what comes to every router: given inputs, or random ones behind its norm."""
    parts = sublayers(model)
    if batches is None:
        with evaluating(model):
            for i, part in enumerate(parts):
                x = torch.randn(VECTORS, part.norm.weight.shape[0], generator=generator)
                see(i, part.norm(x.to(part.norm.weight)))
        return

    def show(i: int, gate: Any, args: tuple[Any, ...]) -> None:
        x, context = args
        see(i, x if context.real is None else x[context.real.to(x.device)])

    gates = [part.owner.gate for part in parts]
    handles = [g.register_forward_pre_hook(partial(show, i)) for i, g in enumerate(gates)]
    seen = 0
    try:
        for _ in router_outputs(model, batches):
            seen += 1
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise DataError("batches is empty; give at least one, or None for random vectors")
