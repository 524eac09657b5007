"""What the scores of a study support: intervals and tests that admit how few runs there are.

Two methods run with the same seed share the new head, the data and their order, so their
difference varies less than either. A pair is a stratum (a training domain, a rotation) and a
seed. Strata are fixed and seeds are random: the mean is the mean over strata of the mean over
seeds, every stratum weighs the same, and only the spread within strata enters the interval.
Pairs count as independent, also those of one seed in different strata: they share the new head,
but no data.

    S strata, n_s pairs in stratum s with mean d_s and variance v_s
    mean = sum_s d_s / S,  error² = sum_s (v_s / n_s) / S²
    interval: Student's t with Satterthwaite's degrees of freedom

With one stratum that is the ordinary paired t test. With three seeds its interval is wide; the
bootstrap beside it has only ten different resamples of three values to draw from and is too
narrow, which is why no claim rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moduli.errors import ConfigError
from moduli.study.ranks import signed_rank

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 9999

K = TypeVar("K", bound=int | tuple[Hashable, int])
"""(stratum, seed), or a seed alone where there is one stratum."""


@dataclass(frozen=True)
class Summary:
    """Mean over strata of `n` values, and how far it can be trusted."""

    n: int
    mean: float
    sd: float | None
    """Sample standard deviation, pooled within strata; None if no stratum has two values."""
    error: float | None = None
    """Standard error of the mean; None without `sd`, or if no stratum has a spread."""
    df: float | None = None
    """Degrees of freedom of `error`."""
    interval: tuple[float, float] | None = None
    """Student's t, 95 %; None where `error` is."""
    bootstrap: tuple[float, float] | None = None
    """Percentile bootstrap over seeds within strata, 95 %; None where `error` is."""


@dataclass(frozen=True)
class PairedDifference:
    """Method minus baseline, pair by pair."""

    pairs: tuple[tuple[Hashable, int], ...]
    """(stratum, seed); the stratum is None where only seeds were given."""
    values: tuple[float, ...]
    mean: float
    sd: float | None
    """Of the differences, pooled within strata; None if no stratum has two pairs."""
    interval: tuple[float, float] | None
    """Stratified paired t, 95 %; None without `sd`, or if the differences do not vary."""
    bootstrap: tuple[float, float] | None
    """Percentile bootstrap over seeds within strata, 95 %; None where `interval` is."""
    p_t: float | None
    """Two-sided, of the t test that `interval` is made from; None where `interval` is."""
    p_wilcoxon: float | None
    """Two-sided and exact, of the signed-rank test over all pairs; None if all are zero."""
    resolves: float | None
    """The difference that as many such pairs show with 80 % power; None where `interval` is."""

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.values)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every pair."""
        return tuple(seed for _, seed in self.pairs)

    @property
    def sign(self) -> int:
        """+1 or -1 if the interval lies on one side of zero, else 0: nothing can be said."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return 0
        return 1 if self.mean > 0 else -1


def summarise(values: Sequence[float] | Mapping[K, float]) -> Summary:
    """Mean, standard deviation (n - 1 in the denominator) and intervals.

    Args:
        values: of one stratum; or by (stratum, seed), or by seed.
    """
    strata = _strata(_by_pair(values)) if isinstance(values, Mapping) else [list(values)]
    n = sum(map(len, strata))
    mean = math.fsum(_mean(group) for group in strata) / len(strata)
    spread = _spread(strata)
    if spread is None:
        return Summary(n, mean, None)
    sd, error, df = spread
    # Equal values are an accident of a small test set, not a certainty: no interval then.
    if not sd > 1e-12:
        return Summary(n, mean, sd)
    half = _t((1 + CONFIDENCE) / 2, df) * error
    return Summary(n, mean, sd, error, df, (mean - half, mean + half), _bootstrap(strata))


def paired_difference(
    method: Mapping[K, float], baseline: Mapping[K, float]
) -> PairedDifference | None:
    """Difference over the pairs that both have; None if they share none.

    Args:
        method: value by (stratum, seed), or by seed.
        baseline: the same.
    """
    from scipy.stats import t

    first, second = _by_pair(method), _by_pair(baseline)
    # by text, for strata of any type, so that the order in which runs ended does not matter
    pairs = tuple(sorted(first.keys() & second.keys(), key=lambda pair: (repr(pair[0]), pair[1])))
    if not pairs:
        return None
    differences = {pair: first[pair] - second[pair] for pair in pairs}
    values = tuple(differences.values())
    summary = summarise(differences)
    p_t = resolves = None
    if summary.error is not None and summary.df is not None:
        p_t = 2 * float(t.sf(abs(summary.mean) / summary.error, summary.df))
        resolves = detectable_difference(summary.error, summary.df)
    return PairedDifference(
        pairs=pairs,
        values=values,
        mean=summary.mean,
        sd=summary.sd,
        interval=summary.interval,
        bootstrap=summary.bootstrap,
        p_t=p_t,
        p_wilcoxon=signed_rank(values),
        resolves=resolves,
    )


def detectable_difference(error: float, df: float) -> float:
    """The true difference that a two-sided test at 5 % shows in four studies of five.

    (t_0.975 + t_0.8) · error, the usual approximation; slightly too small for very few pairs.

    Args:
        error: standard error of the mean difference.
        df: its degrees of freedom.
    """
    return (_t((1 + CONFIDENCE) / 2, df) + _t(POWER, df)) * error


def pairs_needed(sd: float, difference: float, strata: int = 1) -> int:
    """Seeds that every stratum needs for `detectable_difference` to be `difference` or less.

    Args:
        sd: of the paired differences within a stratum, the same in all.
        difference: to be shown, in the unit of `sd`.
        strata: how many there are.

    Raises:
        ConfigError: the difference or the number of strata is not positive, or `sd` is negative.
    """
    if not (difference > 0 and sd >= 0 and strata > 0):
        raise ConfigError(
            f"The difference {difference}, standard deviation {sd} and number of strata {strata} "
            f"were given; expected more than 0, 0 or more, and 1 or more."
        )
    # with infinitely many degrees of freedom fewer would do, so the search starts there
    least = (detectable_difference(sd, math.inf) / difference) ** 2 / strata
    n = max(2, math.ceil(least))
    while detectable_difference(sd / math.sqrt(strata * n), float(strata * (n - 1))) > difference:
        n += 1
    return n


def holm(pvalues: Sequence[float | None]) -> tuple[float | None, ...]:
    """P-values corrected for how many there are (Holm, 1979): the chance of any false finding.

    Args:
        pvalues: one for each test; None for a test that could not be made, which does not count.
    """
    adjusted: list[float | None] = [None] * len(pvalues)
    made = sorted((p, index) for index, p in enumerate(pvalues) if p is not None)
    largest = 0.0
    for rank, (p, index) in enumerate(made):
        largest = max(largest, min(1.0, p * (len(made) - rank)))
        adjusted[index] = largest
    return tuple(adjusted)


def _by_pair(values: Mapping[K, float]) -> dict[tuple[Hashable, int], float]:
    return {(None, key) if isinstance(key, int) else key: v for key, v in values.items()}


def _strata(values: Mapping[tuple[Hashable, int], float]) -> list[list[float]]:
    """The values of every stratum, in the order of their text: resamples depend on the order."""
    groups: dict[Hashable, list[float]] = {}
    for pair in sorted(values, key=lambda pair: (repr(pair[0]), pair[1])):
        groups.setdefault(pair[0], []).append(values[pair])
    return list(groups.values())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _spread(strata: Sequence[Sequence[float]]) -> tuple[float, float, float] | None:
    """Pooled standard deviation, standard error of the mean and its degrees of freedom."""
    several = [group for group in strata if len(group) > 1]
    if not several:
        return None
    degrees = sum(len(group) - 1 for group in several)
    variances = [
        math.fsum((v - _mean(group)) ** 2 for v in group) / (len(group) - 1) for group in several
    ]
    pooled = (
        math.fsum(v * (len(group) - 1) for v, group in zip(variances, several, strict=True))
        / degrees
    )
    # A stratum with one value borrows the pooled variance, so each v_s counts for it in part.
    alone = len(strata) - len(several)
    parts = [
        v * (1 / len(group) + alone * (len(group) - 1) / degrees)
        for v, group in zip(variances, several, strict=True)
    ]
    total = math.fsum(parts)
    squares = math.fsum(
        part**2 / (len(group) - 1) for part, group in zip(parts, several, strict=True)
    )
    df = total**2 / squares if squares > 0 else float(degrees)
    return math.sqrt(pooled), math.sqrt(total) / len(strata), df


def _t(share: float, df: float) -> float:
    from scipy.stats import t

    return float(t.ppf(share, df))


def _bootstrap(strata: Sequence[Sequence[float]]) -> tuple[float, float]:
    import numpy as np

    rng = np.random.default_rng(0)
    drawn = [rng.choice(group, (RESAMPLES, len(group))).mean(axis=1) for group in strata]
    low, high = np.quantile(
        np.mean(drawn, axis=0), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    ).tolist()
    return low, high
