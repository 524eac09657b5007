"""Stick-breaking attention in tiles: memory of T D, every tile of keys read once per group.

Queries are taken in blocks, and each block walks over the keys from right to left. A tile of
logits [keys, queries] is turned into weights where it lies, and what is left of every stick goes
on to the next tile (`tiles` has that step, in PyTorch and in C++). When nothing is left, or less
than was asked for, the walk stops.

For gradients forward keeps what was left at the right edge of every tile. Backward computes tiles
again from left to right, so that a sum over the left side grows from its smallest terms; to take
it as a difference of the total and the right side loses several digits.

Letters: R rows = batch x heads of keys, G queries per key (heads of a group), T times, S keys, D
width of keys, Dv width of values; a tile has C = G x times columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moduli.experts.kernels.workspace import take
from moduli.models.stick_breaking import tiles
from moduli.models.stick_breaking.sight import Sight


def kept_shape(rows: int, group: int, times: int, keys: int) -> tuple[int, int, int, int]:
    """Shape of what forward keeps for backward."""
    return -(-keys // tiles.keys_per_tile(keys, group * times)), rows, group, times


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sight: Sight,
    scale: float,
    least: float,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs [R G T Dv] and what is left of every stick [R G T].

    Args:
        query: [R G T D].
        key: [R S D].
        value: [R S Dv].
        sight: what is seen, for R rows.
        scale: of the logits.
        least: a block stops when no stick has more left than this.
        kept: zeros of `kept_shape`, filled with what was left to the right of every tile.
    """
    R, G, T, _ = query.shape
    out = query.new_empty(R, G, T, value.shape[2])
    rest = query.new_empty(R, G, T)
    step = tiles.keys_per_tile(sight.keys, G * T)
    for rows, times in _blocks(query, step):
        q = _columns("query", query[rows, :, times]).mul_(scale)
        left = take("stick left", *q.shape[:2], like=query).fill_(1)
        y = take("stick out", *q.shape[:2], value.shape[2], like=query).zero_()
        for n, keys in _right_to_left(sight.end(times.stop - 1), step):
            if kept is not None:
                kept[n, rows, :, times] = left.unflatten(1, (G, -1))
            weights = _logits(q, key[rows, keys], sight, rows, keys, times)
            tiles.spend(weights, left)
            y.baddbmm_(weights.transpose(1, 2), value[rows, keys])
            if _nothing_left(left, least):
                break
        out[rows, :, times] = y.unflatten(1, (G, -1))
        rest[rows, :, times] = left.unflatten(1, (G, -1))
    return out, rest


def backward(
    dout: Tensor,
    drest: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rest: Tensor,
    kept: Tensor,
    sight: Sight,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped like them.

    With A the weights and P_ij = r_i dr_i + sum_{l <= j} A_il (dout_i . v_l),

        dz_ij = A_ij (dout_i . v_j) - sigma(z_ij) P_ij

    Args:
        dout: gradient of the outputs [R G T Dv].
        drest: gradient dr of what is left of every stick [R G T].
        query, key, value, sight, scale: as of `forward`.
        rest: r, as `forward` returned it.
        kept: as `forward` filled it.
    """
    _, G, T, _ = query.shape
    dquery, dkey, dvalue = (torch.zeros_like(t) for t in (query, key, value))
    step = tiles.keys_per_tile(sight.keys, G * T)
    for rows, times in _blocks(query, step):
        q = _columns("query", query[rows, :, times]).mul_(scale)
        dy = _columns("dout", dout[rows, :, times])
        dq = take("stick dquery", *q.shape, like=query).zero_()
        before = take("stick before", *q.shape[:2], like=query)
        before.unflatten(1, (G, -1)).copy_(rest[rows, :, times]).mul_(drest[rows, :, times])
        left = take("stick left", *q.shape[:2], like=query)
        for n, keys in reversed(list(_right_to_left(sight.end(times.stop - 1), step))):
            left.unflatten(1, (G, -1)).copy_(kept[n, rows, :, times])
            if _nothing_left(left, 0.0):
                continue
            k, v = key[rows, keys], value[rows, keys]
            weights = _logits(q, k, sight, rows, keys, times)
            slope = take("stick slope", *weights.shape, like=query)
            torch.bmm(v, dy.transpose(1, 2), out=slope)
            tiles.differentiate(weights, slope, left, before)
            dvalue[rows, keys].baddbmm_(weights, dy)
            dkey[rows, keys].baddbmm_(slope, q)
            dq.baddbmm_(slope.transpose(1, 2), k)
        dquery[rows, :, times] = dq.mul_(scale).unflatten(1, (G, -1))
    return dquery, dkey, dvalue


def _blocks(query: Tensor, step: int) -> Iterator[tuple[slice, slice]]:
    """Rows and times of every block of queries."""
    R, G, T, _ = query.shape
    height, width = tiles.rows_and_times(R, G, T, step)
    for first in range(0, R, height):
        for time in range(0, T, width):
            yield slice(first, min(first + height, R)), slice(time, min(time + width, T))


def _right_to_left(end: int, step: int) -> Iterator[tuple[int, slice]]:
    """Number and positions of every tile of keys up to `end`."""
    for n in reversed(range(-(-end // step))):
        yield n, slice(n * step, min((n + 1) * step, end))


def _columns(name: str, part: Tensor) -> Tensor:
    """A copy of [rows G times D] as [rows C D]."""
    p, G, times, width = part.shape
    copy = take(f"stick {name}", p, G * times, width, like=part)
    copy.view(part.shape).copy_(part)
    return copy


def _logits(q: Tensor, k: Tensor, sight: Sight, rows: slice, keys: slice, times: slice) -> Tensor:
    """Logits [rows, keys, C], -inf where nothing is seen."""
    logits = take("stick tile", k.shape[0], k.shape[1], q.shape[1], like=q)
    torch.bmm(k, q.transpose(1, 2), out=logits)
    hidden = sight.hidden(rows, keys, times, q)
    if hidden is not None:
        grouped = logits.view(*logits.shape[:2], -1, times.stop - times.start)
        grouped.masked_fill_(hidden[:, :, None], -torch.inf)
    return logits


def _nothing_left(left: Tensor, least: float) -> bool:
    """Whether no stick has more than `least`; where asking waits for a device, only if it is
    worth it."""
    return (left.device.type == "cpu" or least > 0) and float(left.amax()) <= least
