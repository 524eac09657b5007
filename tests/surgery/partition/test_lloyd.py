"""Exchanges: each step raises Q by what it says, sizes stay, and V is its definition."""

from __future__ import annotations

import numpy as np
import pytest

from moduli.surgery.partition.lloyd import (
    Array,
    cluster_sums,
    clustering_quality,
    exchange_values,
    exchanges,
)
from moduli.surgery.partition.prices import assign


def quality(u: Array, labels: Array) -> float:
    """Q by its definition in float64."""
    clusters = [u[labels == i].astype(np.float64) for i in np.unique(labels)]
    return float(sum((rows.sum(0) ** 2).sum() / len(rows) for rows in clusters))


def unit_rows(width: int, dim: int, seed: int = 0) -> Array:
    u = np.random.default_rng(seed).normal(size=(width, dim)).astype(np.float32)
    return np.asarray(u / np.linalg.norm(u, axis=1, keepdims=True))


def test_values_are_what_a_row_adds_to_a_cluster_that_it_is_not_in() -> None:
    u = unit_rows(14, 5).astype(np.float64)
    labels = np.arange(14) % 4
    sizes = np.bincount(labels)
    square = (u**2).sum(1)
    values = exchange_values(u, square, labels, cluster_sums(u, labels, 4), sizes)
    for row in range(14):
        for cluster in range(4):
            others = np.flatnonzero((labels == cluster) & (np.arange(14) != row))
            without = u[others].sum(0)
            added = ((without + u[row]) ** 2).sum() - (without**2).sum()
            assert values[row, cluster] == pytest.approx(added / sizes[cluster])


@pytest.mark.parametrize(("width", "clusters"), [(300, 7), (96, 32), (40, 1), (12, 12)])
def test_every_step_raises_quality_and_keeps_sizes(width: int, clusters: int) -> None:
    u = unit_rows(width, 16)
    labels = np.random.default_rng(1).permutation(np.arange(width) % clusters)
    sizes = np.bincount(labels).tolist()
    last = quality(u, labels)
    for moved, found in exchanges(u, labels, clusters, np.random.default_rng(0)):
        assert moved > 1
        assert found > last - 1e-5
        assert found == pytest.approx(quality(u, labels), rel=1e-5)
        assert np.bincount(labels).tolist() == sizes
        last = found
    assert clustering_quality(cluster_sums(u, labels, clusters), np.array(sizes)) == (
        pytest.approx(last, rel=1e-5)
    )


def test_finds_more_than_lloyd_with_the_row_itself_in_its_cluster() -> None:
    """Balanced Lloyd, as k-means-constrained iterates, stops where exchanges still gain."""
    u = unit_rows(256, 24)
    start = np.random.default_rng(0).permutation(np.arange(256) % 32)
    sizes = np.bincount(start)
    lloyd = start.copy()
    for _ in range(100):
        values = (u @ (cluster_sums(u, lloyd, 32) / sizes[:, None]).T).astype(np.float64)
        new, _ = assign(values, sizes)
        if quality(u, new) <= quality(u, lloyd):
            break
        lloyd = new
    for _ in exchanges(u, labels := start.copy(), 32, np.random.default_rng(0)):
        pass
    mean = float((u.sum(0) ** 2).sum() / len(u))
    assert quality(u, labels) - mean > 1.1 * (quality(u, lloyd) - mean)
