"""Ranks are scipy's, ties included, and no test is made of what is too little for one."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import friedmanchisquare, rankdata, wilcoxon

from moduli.study.ranks import friedman, signed_rank


@given(st.lists(st.floats(-1, 1).filter(lambda v: abs(v) > 1e-6), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_without_ties_the_signed_rank_test_is_scipys_exact_one(values: list[float]) -> None:
    # what differs by less than rounding is a tie here
    values = list({round(abs(v), 6): round(v, 6) for v in values}.values())
    assert signed_rank(values) == pytest.approx(wilcoxon(values, method="exact").pvalue)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_with_ties_and_zeros_it_counts_all_signs(values: list[int]) -> None:
    kept = [v for v in values if v]
    p = signed_rank([v / 10 for v in values])
    if not kept:
        assert p is None
        return
    ranks = rankdata([abs(v) for v in kept])
    sums = [
        sum(r for r, up in zip(ranks, signs, strict=True) if up)
        for signs in itertools.product([False, True], repeat=len(kept))
    ]
    seen = sum(r for r, v in zip(ranks, kept, strict=True) if v > 0)
    low = sum(s <= seen for s in sums) / len(sums)
    high = sum(s >= seen for s in sums) / len(sums)
    assert p == pytest.approx(min(1.0, 2 * min(low, high)))


def test_rounding_does_not_hide_a_tie() -> None:
    assert signed_rank([0.9 - 0.8, 0.2 - 0.3, 0.4]) == signed_rank([0.1, -0.1, 0.4])
    assert signed_rank([0.1 + 0.2 - 0.3]) is None


@given(st.integers(3, 6), st.integers(2, 10), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_friedman_is_scipys(methods: int, datasets: int, seed: int) -> None:
    draw = random.Random(seed)
    scores = [[draw.randint(0, 8) / 10 for _ in range(datasets)] for _ in range(methods)]
    found = friedman({i: dict(enumerate(row)) for i, row in enumerate(scores)})
    assert found is not None
    reference = friedmanchisquare(*scores)
    if math.isnan(reference.statistic):
        assert found.chi2 is None
    else:
        assert found.chi2 == pytest.approx(reference.statistic)
        assert found.p == pytest.approx(reference.pvalue)
    assert sum(found.ranks.values()) == pytest.approx(methods * (methods + 1) / 2)


def test_rank_one_is_the_best_and_ties_share() -> None:
    table = {"a": {"x": 0.9, "y": 0.5}, "b": {"x": 0.8, "y": 0.5}, "c": {"x": 0.7, "y": 0.4}}
    higher, lower = friedman(table), friedman(table, higher_is_better=False)
    assert higher is not None
    assert lower is not None
    assert higher.ranks == {"a": 1.25, "b": 1.75, "c": 3.0}
    assert lower.ranks == {"a": 2.75, "b": 2.25, "c": 1.0}


@pytest.mark.parametrize(("methods", "q"), [(3, 2.343), (4, 2.569), (10, 3.164)])
def test_the_critical_difference_is_that_of_demsars_table(methods: int, q: float) -> None:
    """Table 5(a) of the paper: critical values for alpha = 0.05."""
    n = 14
    table = {i: {j: (i * (j + 1)) % 11 / 10 for j in range(n)} for i in range(methods)}
    found = friedman(table)
    assert found is not None
    assert found.critical_difference == pytest.approx(
        q * math.sqrt(methods * (methods + 1) / (6 * n)), rel=1e-3
    )


def test_only_data_sets_that_all_methods_have_count() -> None:
    found = friedman({"a": {"x": 0.9, "y": 0.1}, "b": {"x": 0.8, "z": 0.5}})
    assert found is not None
    assert found.datasets == ("x",)
    assert found.ranks == {"a": 1.0, "b": 2.0}
    assert friedman({"a": {"x": 0.9}, "b": {"y": 0.8}}) is None
    assert friedman({}) is None


@pytest.mark.parametrize(
    "table",
    [
        {"a": {"x": 0.9, "y": 0.5, "z": 0.1}, "b": {"x": 0.8, "y": 0.6, "z": 0.2}},
        {"a": {"x": 0.9}, "b": {"x": 0.8}, "c": {"x": 0.7}},
        {name: {"x": 0.9, "y": 0.5} for name in "abc"},
    ],
)
def test_too_little_for_a_test_has_ranks_alone(table: dict[str, dict[str, float]]) -> None:
    found = friedman(table)
    assert found is not None
    assert found.ranks.keys() == table.keys()
    assert found.chi2 is found.p is found.critical_difference is None
