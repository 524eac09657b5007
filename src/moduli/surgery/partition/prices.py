"""Exact assignment of rows to clusters of given sizes, by prices.

Wanted are labels l with n_e rows in cluster e and the largest sum_j V[j, l_j]. Give every cluster
a price p_e and every row its best cluster at these prices,

    l_j = argmax_e V[j, e] - p_e.

By duality such labels are optimal for the sizes they happen to have, whatever the prices. So the
work is in the sizes alone:

1. Prices. The cluster that is farthest from its size changes its price just so far that it
   has it: a coordinate step on the dual. A few of these leave most clusters off by one row.
2. Repair. On the graph of clusters, an edge a -> b costs what the cheapest row of a loses by going
   to b. Rows move along shortest paths from clusters with too many to clusters with too few, and
   the distances are added to the prices, at which every row is again where it likes it best.

Prices that are handed on to a similar problem leave little to do there.
Letters: F rows, E clusters. (min-cost flow by successive shortest paths: Ahuja, Magnanti and
Orlin, "Network Flows", section 9.7.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def assign(values: Array, sizes: Array, prices: Array | None = None) -> tuple[Array, Array]:
    """Labels of the best assignment with these sizes, and prices that prove it.

    Every row j has values[j, l_j] - prices[l_j] >= values[j, e] - prices[e] for all e, up to
    rounding.

    Args:
        values: [F, E] in float64, of putting row j into cluster e.
        sizes: [E] rows that each cluster gets; they sum to F, and may be 0.
        prices: [E] to start from; any will do, those of a similar problem are fast.
    """
    prices = np.zeros(len(sizes)) if prices is None else prices.copy()
    net = values - prices
    labels: Array = net.argmax(1)
    surplus = np.bincount(labels, minlength=len(sizes)) - sizes
    for _ in sizes:
        cluster = int(np.abs(surplus).argmax())
        if abs(surplus[cluster]) <= 1:
            break
        change = _set_price(net, labels, cluster, int(surplus[cluster]))
        net[:, cluster] -= change
        prices[cluster] += change
        surplus = np.bincount(labels, minlength=len(sizes)) - sizes
    if surplus.any():
        prices -= _repair(net, labels, surplus)
    return labels, prices


def _set_price(net: Array, labels: Array, cluster: int, surplus: int) -> float:
    """Change of price at which `cluster` loses its surplus, or wins what it lacks; moves rows."""
    if surplus > 0:
        members = np.flatnonzero(labels == cluster)
        offers = net[members]
        here = offers[:, cluster].copy()
        offers[:, cluster] = -np.inf
        second = offers.argmax(1)
        margin = here - offers[np.arange(len(members)), second]
        go = margin.argpartition(surplus - 1)[:surplus]
        labels[members[go]] = second[go]
        return float(margin[go].max())
    gap = net[np.arange(len(labels)), labels] - net[:, cluster]
    gap[labels == cluster] = np.inf
    come = gap.argpartition(-surplus - 1)[:-surplus]
    labels[come] = cluster
    return -float(gap[come].max())


def _repair(net: Array, labels: Array, surplus: Array) -> Array:
    """Make every surplus 0 by moves along shortest paths; returns by how much prices fall."""
    count = len(surplus)
    cost = np.full((count, count), np.inf)  # a -> b: least loss of a row of a that goes to b
    fall = np.zeros(count)
    changed = set(range(count))
    while surplus.any():
        for a in changed:
            offers = net[labels == a]
            cost[a] = (offers[:, a, None] - offers).min(0, initial=np.inf)
            cost[a, a] = np.inf
        # At the prices so far no row gains by moving: what is below 0 here is rounding.
        distance, before = _shortest(np.maximum(cost + fall[:, None] - fall, 0), surplus > 0)
        fall += distance
        changed = set()
        short = np.flatnonzero(surplus < 0)
        for end in short[distance[short].argsort(kind="stable")].tolist():
            changed |= _move(net, labels, surplus, cost, before, end)
    return fall


def _shortest(weights: Array, sources: Array) -> tuple[Array, Array]:
    """Distance of every cluster from the nearest source, and the one before it on the way."""
    distance = np.where(sources, 0.0, np.inf)
    before = np.full(len(weights), -1)
    front = np.flatnonzero(sources)
    while len(front):
        through = distance[front, None] + weights[front]
        found = through.min(0)
        closer = np.flatnonzero(found < distance)
        before[closer] = front[through[:, closer].argmin(0)]
        distance[closer] = found[closer]
        front = closer
    return distance, before


def _move(
    net: Array, labels: Array, surplus: Array, cost: Array, before: Array, end: int
) -> set[int]:
    """Move rows along the path to `end`; returns the clusters that it changed.

    A row may move only at the cost that the path was found with. An earlier path of the same
    round may have taken it: then nothing moves, and the next round finds another path.
    """
    steps: list[tuple[Array, int]] = []
    to = end
    while (a := int(before[to])) >= 0:
        members = np.flatnonzero(labels == a)
        steps.append((members[net[members, a] - net[members, to] <= cost[a, to]], to))
        to = a
    rows = min(int(surplus[to]), -int(surplus[end]), *(len(able) for able, _ in steps))
    if rows <= 0:
        return set()
    for able, cluster in steps:
        labels[able[:rows]] = cluster
    surplus[to] -= rows
    surplus[end] += rows
    return {to, *(cluster for _, cluster in steps)}
