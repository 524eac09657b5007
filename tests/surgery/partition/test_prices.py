"""Assignment by prices: sizes kept, exactly optimal, and prices that prove it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moduli.surgery.partition.prices import Array, assign


def best_total(values: Array, sizes: Array) -> float:
    slots = np.repeat(values, sizes, axis=1)
    rows, columns = linear_sum_assignment(slots, maximize=True)
    return float(slots[rows, columns].sum())


def check(values: Array, sizes: Array, labels: Array, prices: Array) -> None:
    rows = np.arange(len(values))
    assert np.bincount(labels, minlength=len(sizes)).tolist() == sizes.tolist()
    assert values[rows, labels].sum() == pytest.approx(best_total(values, sizes), abs=1e-9)
    net = values - prices
    assert (net[rows, labels] >= net.max(1) - 1e-9).all(), "a row would rather be elsewhere"


@given(
    rows=st.integers(1, 60),
    clusters=st.integers(1, 12),
    levels=st.sampled_from([0, 1, 2, 5, None]),
    seed=st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_as_good_as_scipy_for_any_sizes_and_ties(
    rows: int, clusters: int, levels: int | None, seed: int
) -> None:
    """Few levels make ties, up to all values equal; sizes may be 0."""
    generator = np.random.default_rng(seed)
    if levels is None:
        values = generator.normal(size=(rows, clusters)) * generator.exponential(size=clusters)
    else:
        values = generator.integers(0, levels + 1, size=(rows, clusters)).astype(np.float64)
    sizes = np.bincount(generator.integers(0, clusters, size=rows), minlength=clusters)
    labels, prices = assign(values, sizes)
    check(values, sizes, labels, prices)


@pytest.mark.parametrize("clusters", [8, 50])
def test_prices_carry_over_to_a_similar_problem(clusters: int) -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(600, clusters)) + 2 * generator.normal(size=clusters)
    sizes = np.full(clusters, 600 // clusters)
    prices = assign(values, sizes)[1]
    given_prices = prices.copy()
    again, same = assign(values, sizes, prices)
    check(values, sizes, again, same)
    assert (prices == given_prices).all(), "the caller's prices are not written to"
    np.testing.assert_allclose(same, prices, atol=1e-9)
    near = values + 0.05 * generator.normal(size=values.shape)
    check(near, sizes, *assign(near, sizes, prices))
    check(near, sizes, *assign(near, sizes, 100 * generator.normal(size=clusters)))
