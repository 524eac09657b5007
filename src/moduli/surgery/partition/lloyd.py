"""Balanced clustering by exchanges of many rows at once, each step an exact assignment.

Maximises Q = sum_i |S_i|^2 / n_i, with S_i the sum and n_i the number of the rows of cluster i.
That cluster i gets row u instead of another one is worth, with the others where they are,

    V[u, i] = (2 S_i . u + |u|^2) / n_i      S_i without u itself.

Each step computes V for all rows and assigns them anew so that sum V is largest at these sizes
(`prices.assign`). Leaving u out of its own cluster is what makes this stronger than Lloyd's
iteration with balanced clusters (k-means-constrained): there a row is drawn to the cluster it is
in by 2 |u|^2 / n_i, which holds small clusters in place. What it costs is the guarantee: rows
that move together may gain less than V promises, or lower Q. A step that lowers it is not taken,
and after one that gained too little only half as many rows, drawn at random, may move.

Letters: D width, F rows, E clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moduli.surgery.partition.prices import assign

Array = np.ndarray[Any, np.dtype[Any]]

LEAST = 1 / 8  # share of the rows that may move in a step, from 1 downwards
# A step gains too little if it gains less than this part of Q, were all rows free to move, or less
# than this part of what V promised. Rows that still swing to and fro find better clusterings of
# real keys than rows held back early; keys without structure swing for ever.
ENOUGH = 2e-4
KEPT = 0.05


def exchanges(
    u: Array, labels: Array, num_clusters: int, generator: np.random.Generator
) -> Iterator[tuple[int, float]]:
    """Improve `labels` in place; yields (rows moved, Q) after every step that raised Q.

    Args:
        u: [F, D] rows.
        labels: [F], naming every cluster; their sizes stay.
        num_clusters: E.
        generator: of the choice of rows that may move, where all is too many.
    """
    share = 1.0
    sizes = np.bincount(labels, minlength=num_clusters)
    square = np.einsum("fd,fd->f", u, u, dtype=np.float64)
    sums = cluster_sums(u, labels, num_clusters)
    quality = clustering_quality(sums, sizes)
    prices: Array | None = None
    while share >= LEAST and num_clusters > 1:
        free = np.arange(len(u))
        if share < 1:
            free = np.sort(generator.permutation(len(u))[: max(2, int(share * len(u)))])
        old = labels[free]
        rows = u if share == 1 else u[free]
        values = exchange_values(rows, square[free], old, sums, sizes)
        new, prices = assign(values, np.bincount(old, minlength=num_clusters), prices)
        moved = np.flatnonzero(new != old)
        promised = (values[moved, new[moved]] - values[moved, old[moved]]).sum()
        change = _one_hot(new[moved], num_clusters, u.dtype)
        change -= _one_hot(old[moved], num_clusters, u.dtype)
        raised = sums + change @ rows[moved]
        gain = clustering_quality(raised, sizes) - quality
        if gain > 0:
            sums, quality = raised, quality + gain
            labels[free] = new
            yield len(moved), quality
        small = gain <= ENOUGH * share * quality  # 0 of 0 too
        if small or (gain < KEPT * promised and share > LEAST):
            share /= 2


def exchange_values(u: Array, square: Array, labels: Array, sums: Array, sizes: Array) -> Array:
    """V [F, E] of the module's description, in float64."""
    values = (u @ sums.T).astype(np.float64)
    values *= 2.0 / sizes
    values += square[:, None] / sizes
    values[np.arange(len(u)), labels] -= 2.0 * square / sizes[labels]
    return values


def cluster_sums(u: Array, labels: Array, num_clusters: int) -> Array:
    """S [E, D]."""
    return _one_hot(labels, num_clusters, u.dtype) @ u


def clustering_quality(sums: Array, sizes: Array) -> float:
    """Q, summed in float64."""
    return float((np.einsum("ed,ed->e", sums, sums, dtype=np.float64) / sizes).sum())


def _one_hot(labels: Array, num_clusters: int, dtype: Any) -> Array:
    """[E, F]: a product with it adds the rows of every cluster up."""
    found = np.zeros((num_clusters, len(labels)), dtype)
    found[labels, np.arange(len(labels))] = 1
    return found
