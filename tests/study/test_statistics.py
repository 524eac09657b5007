"""Intervals and tests are those of the textbook, and nothing is claimed where they cover zero."""

import math
from collections.abc import Hashable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, t, ttest_1samp, ttest_rel

from moduli.errors import ConfigError
from moduli.study import statistics
from moduli.study.statistics import (
    PairedDifference,
    detectable_difference,
    holm,
    paired_difference,
    pairs_needed,
    summarise,
)

Values = dict[tuple[Hashable, int], float]


def against_zero(values: Values) -> PairedDifference:
    d = paired_difference(values, dict.fromkeys(values, 0.0))
    assert d is not None
    return d


def by_stratum(*strata: list[float]) -> Values:
    return {(f"s{i}", seed): v for i, vs in enumerate(strata) for seed, v in enumerate(vs)}


scores = st.floats(0, 1, allow_nan=False, width=16)


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=12))
@settings(max_examples=60, deadline=None)
def test_one_stratum_is_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    values, other = (list(column) for column in zip(*pairs, strict=True))
    d = paired_difference(dict(enumerate(values)), dict(enumerate(other)))
    assert d is not None
    if d.interval is None:
        assert len({a - b for a, b in pairs}) == 1
        return
    reference = ttest_rel(values, other)
    interval = reference.confidence_interval(0.95)
    assert d.interval == pytest.approx((interval.low, interval.high))
    assert d.p_t == pytest.approx(reference.pvalue, rel=1e-9, abs=1e-12)
    assert (d.sign != 0) == (reference.pvalue < 0.05)


def test_pairs_are_made_by_stratum_and_seed_and_what_has_no_partner_is_left_out() -> None:
    d = paired_difference({2: 0.5, 0: 0.9, 7: 0.1}, {0: 0.8, 2: 0.3, 5: 0.4})
    assert d is not None
    assert d.pairs == ((None, 0), (None, 2))
    assert d.seeds == (0, 2)
    assert d.values == pytest.approx((0.1, 0.2))
    assert paired_difference({1: 0.5}, {2: 0.5}) is None
    assert paired_difference({("books", 0): 0.5}, {("dvd", 0): 0.5}) is None


def test_a_seed_alone_is_one_stratum() -> None:
    values = {0: 0.3, 1: 0.1, 2: 0.25}
    assert summarise(values) == summarise(list(values.values()))
    named = against_zero({("books", seed): value for seed, value in values.items()})
    alone = paired_difference(values, dict.fromkeys(values, 0.0))
    assert alone is not None
    assert alone.interval == named.interval
    assert alone.p_wilcoxon == named.p_wilcoxon


def test_every_stratum_weighs_the_same_however_many_seeds_it_has() -> None:
    assert against_zero(by_stratum([0.1, 0.2, 0.3], [0.6])).mean == pytest.approx(0.4)


def test_differences_between_strata_do_not_widen_the_interval() -> None:
    near, far = ([0.1, 0.2, 0.3], [0.11, 0.2, 0.29]), ([0.1, 0.2, 0.3], [9.11, 9.2, 9.29])
    widths = []
    for strata in (near, far):
        interval = against_zero(by_stratum(*strata)).interval
        assert interval is not None
        widths.append(interval[1] - interval[0])
    assert widths[0] == pytest.approx(widths[1])


def test_the_stratified_error_and_its_degrees_of_freedom_by_hand() -> None:
    # variances 4 and 1, three and five values: error² = (4/3 + 1/5) / 4
    summary = summarise(by_stratum([-2.0, 0.0, 2.0], [-(2**0.5), 0.0, 0.0, 0.0, 2**0.5]))
    first, second = 4 / 3, 1 / 5
    assert summary.error == pytest.approx(math.sqrt(first + second) / 2)
    assert summary.df == pytest.approx((first + second) ** 2 / (first**2 / 2 + second**2 / 4))
    assert summary.sd == pytest.approx(math.sqrt((4 * 2 + 1 * 4) / 6))


def test_a_stratum_of_one_pair_borrows_the_pooled_variance() -> None:
    # one stratum with a spread: its variance counts for all three, so error² = v (1/2 + 1 + 1) / 9
    summary = summarise(by_stratum([0.0, 2.0], [5.0], [7.0]))
    assert summary.error == pytest.approx(math.sqrt(2 * 2.5) / 3)
    assert summary.df == pytest.approx(1)
    assert summarise(by_stratum([0.1], [0.2], [0.4])).interval is None


@pytest.mark.parametrize("values", [[0.1], [0.1, 0.1, 0.1]])
def test_without_a_spread_there_is_no_interval(values: list[float]) -> None:
    d = against_zero(by_stratum(values))
    assert d.interval is d.bootstrap is d.p_t is d.resolves is None
    assert d.sign == 0
    assert d.p_wilcoxon == 2 ** (1 - len(values))


def test_equal_scores_have_no_test() -> None:
    d = against_zero(by_stratum([0.0, 0.0], [0.0]))
    assert (d.mean, d.p_t, d.p_wilcoxon, d.sign) == (0.0, None, None, 0)


@given(st.permutations(sorted(by_stratum([0.1, 0.5, 0.2], [0.3, 0.9], [0.4]).items())))
@settings(max_examples=20, deadline=None)
def test_the_order_of_runs_does_not_matter(items: list[tuple[tuple[str, int], float]]) -> None:
    ordered = against_zero(dict(sorted(items)))
    assert against_zero(dict(items)) == ordered


@pytest.mark.parametrize(
    ("sizes", "spreads"),
    [
        ((3,), (1.0,)),
        ((3, 3, 3, 3), (1.0, 1.0, 1.0, 1.0)),
        ((5, 8), (3.0, 0.5)),
        ((6, 6, 1), (1.0, 1.0, 1.0)),
    ],
)
def test_the_interval_covers_the_mean_of_the_strata_as_often_as_it_says(
    sizes: tuple[int, ...], spreads: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1500 studies whose strata have means of their own; the standard error is 0.6 %."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1)  # not what is tested, and most of the time
    rng = np.random.default_rng(0)
    truth = [1.0, -2.0, 0.5, 4.0][: len(sizes)]
    covered = 0
    for _ in range(1500):
        strata = [
            rng.normal(mean, sd, n).tolist()
            for mean, sd, n in zip(truth, spreads, sizes, strict=True)
        ]
        interval = summarise(by_stratum(*strata)).interval
        assert interval is not None
        covered += interval[0] <= np.mean(truth) <= interval[1]
    assert covered / 1500 == pytest.approx(0.95, abs=0.02)


def test_a_difference_that_the_study_resolves_is_shown_four_times_in_five() -> None:
    """The standard error of the share is 0.7 %; the approximation costs a little with few pairs."""
    rng = np.random.default_rng(0)
    for n, tolerance in [(4, 0.08), (20, 0.03)]:
        difference = detectable_difference(1 / math.sqrt(n), n - 1.0)
        pvalues = ttest_1samp(rng.normal(difference, 1, (3000, n)), 0, axis=1).pvalue
        assert np.mean(pvalues < 0.05) == pytest.approx(0.8, abs=tolerance)


def test_what_a_study_resolves_is_the_detectable_difference_of_its_own_spread() -> None:
    d = against_zero(by_stratum([0.1, 0.2, 0.4]))
    assert d.sd is not None
    assert d.resolves == pytest.approx(detectable_difference(d.sd / math.sqrt(3), 2.0))
    assert d.resolves == pytest.approx((t.ppf(0.975, 2) + t.ppf(0.8, 2)) * d.sd / math.sqrt(3))


@given(st.floats(0.01, 3), st.floats(0.05, 3), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_pairs_needed_are_the_fewest_that_do(sd: float, difference: float, strata: int) -> None:
    def detectable(n: int) -> float:
        return detectable_difference(sd / math.sqrt(strata * n), float(strata * (n - 1)))

    n = pairs_needed(sd, difference, strata)
    assert detectable(n) <= difference
    assert n == 2 or detectable(n - 1) > difference


@pytest.mark.parametrize(("sd", "difference", "strata"), [(1, 0, 1), (-1, 1, 1), (1, 1, 0)])
def test_pairs_needed_refuses_what_has_no_answer(sd: float, difference: float, strata: int) -> None:
    with pytest.raises(ConfigError, match="expected more than 0, 0 or more, and 1 or more"):
        pairs_needed(float(sd), float(difference), strata)


def test_the_bootstrap_resamples_within_strata() -> None:
    values = by_stratum([0.1, 0.2, 0.4, 0.3], [5.0, 5.3, 5.1])
    d = against_zero(values)
    reference = bootstrap(
        ([0.1, 0.2, 0.4, 0.3], [5.0, 5.3, 5.1]),
        lambda a, b, axis: (np.mean(a, axis=axis) + np.mean(b, axis=axis)) / 2,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    assert d.bootstrap == pytest.approx(tuple(reference.confidence_interval), abs=0.006)
    assert against_zero(values).bootstrap == d.bootstrap


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.6, None, 0.7]) == (1.0, None, 1.0)
    assert holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_lies_between_no_correction_and_bonferroni(pvalues: list[float]) -> None:
    adjusted = [p for p in holm(pvalues) if p is not None]
    assert all(p <= a <= min(1.0, p * len(pvalues)) for p, a in zip(pvalues, adjusted, strict=True))
    order = sorted(range(len(pvalues)), key=lambda i: pvalues[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_summary_is_the_sample_mean_and_deviation() -> None:
    summary = summarise([1.0, 2.0, 3.0, 4.0])
    assert (summary.n, summary.mean) == (4, 2.5)
    assert summary.sd == pytest.approx((5 / 3) ** 0.5)
    assert summarise([1.0]).sd is None
