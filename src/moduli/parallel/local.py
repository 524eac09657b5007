"""Routing that stays on a rank, and the groups of tokens and experts that make a rank.

Rank r has experts r L, ..., r L + L - 1. Where ranks are virtual, it has the r-th of R contiguous
groups of the batch's rows. If R does not divide the rows some groups are a row longer, others at
every step, so that a batch with few rows trains the experts of all ranks in turn.
Letters: B rows, T tokens, E experts, R ranks, L = E / R experts of a rank, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moduli.errors import ModelError
from moduli.routing import RouteContext, Routing

Part = tuple[int, slice]
"""A rank, and which tokens of a batch are its own."""


def parts_of(tokens: int, rows: int, ranks: int, step: int = 0) -> list[Part]:
    """The tokens of every virtual rank that has some.

    Args:
        tokens: T, row after row.
        rows: B.
        ranks: R.
        step: of the optimiser; the first of the longer groups is that of rank `step` mod R.

    Raises:
        ModelError: rows are not of equal length, so that nobody knows where one ends.
    """
    if rows == 0 or tokens == 0:
        return []
    if tokens % rows:
        raise ModelError(
            f"{tokens} tokens of {rows} rows: the rows have no common length, so that they cannot "
            "be told apart; pad the batch instead of packing it"
        )
    length, parts, start = tokens // rows, [], 0
    for rank in range(ranks):
        count = rows // ranks + ((rank - step) % ranks < rows % ranks)
        if count:
            parts.append((rank, slice(start * length, (start + count) * length)))
        start += count
    return parts


def wrapped(index: Int[Tensor, "T K"], parts: Sequence[Part], local: int) -> Int[Tensor, "T K"]:
    """Expert e of the token's rank instead: e mod L. Indices of its own stay what they are."""
    found = index % local
    for rank, own in parts:
        found[own] += rank * local
    return found


def best_of(scores: Float[Tensor, "T E"], rank: int, local: int) -> Int[Tensor, "T 1"]:
    """The rank's expert with the best score."""
    first = rank * local
    return first + scores[:, first : first + local].argmax(-1, keepdim=True)


def softmax_among(
    logits: Float[Tensor, "T E"], top_k: int, renormalised: bool, rank: int, local: int
) -> tuple[Float[Tensor, "T _"], Int[Tensor, "T _"]]:
    """Weights and indices: softmax over a rank's experts, the best of them, scaled to sum to 1."""
    first = rank * local
    probs = logits[:, first : first + local].softmax(-1, dtype=torch.float32)
    weights, index = probs.topk(min(top_k, local), dim=-1)
    if renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, first + index


def joined(routings: Sequence[Routing]) -> Routing:
    """The routing of all tokens from those of groups, in order."""
    columns: dict[str, Any] = {}
    for field in fields(routings[0]):
        values = [getattr(routing, field.name) for routing in routings]
        columns[field.name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
    return replace(routings[0], **columns)


def without_gradient(routing: Routing) -> Routing:
    """The same, whose scores no loss reaches."""
    scores, noisy = routing.scores, routing.noisy_scores
    return replace(
        routing,
        scores=None if scores is None else scores.detach(),
        noisy_scores=None if noisy is None else noisy.detach(),
    )


def within(context: RouteContext, own: slice) -> RouteContext:
    """What a context says of some of its tokens, which are whole rows."""
    tokens = own.stop - own.start
    shape = context.shape
    return replace(
        context,
        real=None if context.real is None else context.real[own],
        noise=None if context.noise is None else context.noise[own],
        ids=None if context.ids is None else context.ids[own],
        shape=None if shape is None else (tokens // math.prod(shape[1:]), *shape[1:]),
    )
