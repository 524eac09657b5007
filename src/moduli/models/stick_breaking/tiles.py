"""One tile of stick-breaking attention: from logits to weights and their gradients, in place.

A tile has keys down its columns and queries along its rows, so that a step from one key to the
next is the same for many queries side by side. C++ does it in one pass where it can be compiled;
PyTorch in several.

Letters: P rows, N keys of the tile, C queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moduli.models.stick_breaking import native

BUDGET = 1 << 17  # numbers in the tiles of a step: they and their slopes stay in the cache
KEPT = 64  # tiles of keys at most, so that what is kept for backward grows as T does


def keys_per_tile(keys: int, queries: int) -> int:
    """N of all tiles but those at an edge, where each key has so many queries in all."""
    few = 8192 // queries  # decoding: the fewer queries, the longer the tiles
    return max(128, min(few, 2048), -(-keys // KEPT))


def rows_and_times(rows: int, group: int, times: int, step: int) -> tuple[int, int]:
    """Rows, and times of each, that one block of queries takes with tiles of `step` keys."""
    width = min(times, max(16, 128 // group))
    return max(1, min(rows, BUDGET // (step * group * width))), width


def spend(logits: Float[Tensor, "P N C"], left: Float[Tensor, "P C"]) -> None:
    """Turn logits into weights, and what was left at the right edge into what is at the left.

        weight_j = sigma(z_j) left_j,  left_{j-1} = left_j sigma(-z_j)

    Args:
        logits: z; -inf takes nothing.
        left: of every query's stick.
    """
    if native.usable(logits):
        native.spend(logits, left)
        return
    sticks = _sticks(logits, left)
    left.copy_(sticks[:, 0])
    logits.sigmoid_().mul_(sticks[:, 1:])


def differentiate(
    logits: Float[Tensor, "P N C"],
    slope: Float[Tensor, "P N C"],
    left: Float[Tensor, "P C"],
    before: Float[Tensor, "P C"],
) -> None:
    """Turn logits into weights, and slopes of the weights into slopes of the logits.

        P_j = before + sum_{l <= j} weight_l slope_l,  dz_j = weight_j slope_j - sigma(z_j) P_j

    Args:
        logits: z; -inf takes nothing.
        slope: derivative by each weight alone.
        left: of every query's stick at the right edge.
        before: P at the left edge; becomes P at the right edge.
    """
    if native.usable(logits):
        native.differentiate(logits, slope, left, before)
        return
    sticks = _sticks(logits, left)
    share, rest = torch.sigmoid(logits), torch.sigmoid(-logits)
    torch.mul(share, sticks[:, 1:], out=logits)
    slope.mul_(logits)
    sums = torch.cat([before[:, None], slope], dim=1).cumsum(dim=1)
    # sigma(-z) for 1 - sigma(z), of which nothing may be left where sigma rounds to 1.
    slope.mul_(rest).sub_(share.mul_(sums[:, :-1]))
    before.copy_(sums[:, -1])


def _sticks(logits: Tensor, left: Tensor) -> Tensor:
    """Sticks [P N+1 C]: before each key is served, and what is left of all at the front.

    By sums of logarithms: factors next to 1 would be rounded, all of them alike where logits are.
    """
    spent = torch.cat([left[:, None].log(), F.logsigmoid(-logits).flip(1)], dim=1)
    return spent.cumsum(dim=1).exp_().flip(1)
