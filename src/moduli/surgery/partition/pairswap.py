"""Balanced clustering polished by exact pair swaps.

Q = sum_i |S_i|^2 / n_i, with S_i the sum and n_i the number of the rows of cluster i, changes by

    D[p, b] + D[q, a] - 2 u_p.u_q (1 / n_a + 1 / n_b),      D[p, b] = V[p, b] - V[p, a]

when p (of cluster a) and q (of b) swap places, with V of `lloyd`: what each move is worth alone,
and what is lost because neither meets the other. A pass looks up the best partner of every row,
block by block of the Gram matrix, and makes these swaps from the best downwards as far as they
still help. When a pass finds none, no swap of two rows raises Q by more than rounding.

Letters: D width, F rows, E clusters, B rows of a block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from moduli.surgery.partition.lloyd import cluster_sums, clustering_quality, exchange_values

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 256  # rows of the Gram matrix at a time
HELPS = 1e-6  # of 1 / n: less is rounding of float32


def swap_passes(
    u: Array, labels: Array, num_clusters: int, gram: Array | None, deadline: float | None
) -> Iterator[tuple[int, float]]:
    """Improve `labels` in place; yields (swaps, Q) after every pass, the last of them with none.

    Args:
        u: [F, D] rows.
        labels: [F], naming every cluster; their sizes stay.
        num_clusters: E.
        gram: [F, F] dot products, or None to compute them anew in each pass.
        deadline: of `time.monotonic`; a pass stops looking then.
    """
    sizes = np.bincount(labels, minlength=num_clusters)
    square = np.einsum("fd,fd->f", u, u, dtype=np.float64)
    swaps = 1
    while swaps and not (deadline is not None and time.monotonic() > deadline):
        sums = cluster_sums(u, labels, num_clusters)
        values = exchange_values(u, square, labels, sums, sizes)
        found = _partners(u, labels, values, 1.0 / sizes, gram, deadline)
        sums = sums.astype(np.float64)
        swaps = 0
        for p, q in found:
            a, b = labels[p], labels[q]
            change = u[q].astype(np.float64) - u[p]
            length = change @ change
            gain = (2 * sums[a] @ change + length) / sizes[a]
            gain -= (2 * sums[b] @ change - length) / sizes[b]
            if a != b and gain > HELPS / sizes.max():
                sums[a] += change
                sums[b] -= change
                labels[p], labels[q] = b, a
                swaps += 1
        yield swaps, clustering_quality(sums, sizes)


def _partners(
    u: Array,
    labels: Array,
    values: Array,
    inverse: Array,
    gram: Array | None,
    deadline: float | None,
) -> list[tuple[int, int]]:
    """Rows with the best partner of each, where swapping them helps, best first."""
    everyone = np.arange(len(u))
    alone = (values - values[everyone, labels][:, None]).astype(u.dtype)  # D
    alone[everyone, labels] = -np.inf  # partners are of another cluster
    of_all = np.ascontiguousarray(alone.T)
    inverse = inverse.astype(u.dtype)
    found: list[tuple[float, int, int]] = []
    # Most rows cannot gain, even from the most willing row of each cluster with the least dot
    # product that there is.
    willing = np.stack([alone[labels == b].max(0) for b in range(len(inverse))])  # b -> a
    hope = (alone + willing.T[labels]).max(1)
    least = float(-np.einsum("fd,fd->f", u, u).max()) if gram is None else gram.min(1)
    able = np.flatnonzero(hope - 4.0 * inverse.max() * least > HELPS * inverse.min())
    for first in range(0, len(able), BLOCK):
        if deadline is not None and time.monotonic() > deadline:
            break
        rows = able[first : first + BLOCK]
        dots = u[rows] @ u.T if gram is None else gram[rows]
        gain = (inverse[labels[rows], None] + inverse[labels]) * dots  # [B, F]
        gain *= -2.0
        gain += alone[rows].take(labels, axis=1)
        gain += of_all[labels[rows]]
        partner = gain.argmax(1)
        best = gain[np.arange(len(partner)), partner]
        for i in np.flatnonzero(best > HELPS * inverse.min()).tolist():
            found.append((-float(best[i]), int(rows[i]), int(partner[i])))
    return [(p, q) for _, p, q in sorted(found)]
