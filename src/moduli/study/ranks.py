"""Ranks: the signed-rank test of paired differences, and methods ranked over many test sets.

Differences on one test set are hardly normal, and scores on different test sets have no common
unit. Ranks ask neither. Methods are compared over test sets as Demšar (2006, Journal of Machine
Learning Research 7) does: average ranks, Friedman's test, Nemenyi's critical difference.

    k methods, n data sets
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

LEVEL = 0.05
"""Of the critical difference."""
DIGITS = 12
"""Values that agree so far are ties: 0.9 - 0.8 and 0.3 - 0.2 differ by rounding alone."""

M = TypeVar("M", bound=Hashable)
D = TypeVar("D", bound=Hashable)


@dataclass(frozen=True)
class Friedman:
    """Methods ranked on every data set, 1 for the best, and the ranks averaged."""

    ranks: Mapping[Hashable, float]
    datasets: tuple[Hashable, ...]
    """Those that all methods have; the others do not count."""
    chi2: float | None
    """Corrected for ties; None with fewer than 3 methods or 2 data sets, or if all are tied."""
    p: float | None
    critical_difference: float | None
    """Average ranks further apart than this differ at 5 % (Nemenyi); None where `chi2` is."""


def signed_rank(values: Sequence[float]) -> float | None:
    """Wilcoxon's signed-rank test without the zeros; exact, with ties too.

    The distribution of the sum of ranks is built up rank by rank. scipy goes through all 2^n signs
    when there are ties, which takes a second for 13 pairs, and approximates for more.
    """
    import numpy as np
    from scipy.stats import rankdata

    differences = np.round(values, DIGITS)
    differences = differences[differences != 0]
    if not differences.size:
        return None
    ranks = np.rint(2 * rankdata(np.abs(differences))).astype(int)  # halves only by ties
    chance = np.ones(1)
    for rank in ranks:
        nothing = np.zeros(rank)
        chance = (np.concatenate([chance, nothing]) + np.concatenate([nothing, chance])) / 2
    positive = int(ranks[differences > 0].sum())
    tail = min(positive, int(ranks.sum()) - positive)
    return min(1.0, 2 * float(chance[: tail + 1].sum()))


def friedman(
    table: Mapping[M, Mapping[D, float]], *, higher_is_better: bool = True
) -> Friedman | None:
    """Average ranks of methods over data sets; None if no data set has a score of every method.

    Args:
        table: score by method and data set.
        higher_is_better: which end of the scores has rank 1.
    """
    import numpy as np
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    shared = set.intersection(*(set(scores) for scores in table.values())) if table else set()
    datasets = tuple(sorted(shared, key=repr))
    if not datasets:
        return None
    k, n = len(table), len(datasets)
    scores = np.asarray([[own[dataset] for own in table.values()] for dataset in datasets])
    ranks = rankdata(np.round(-scores if higher_is_better else scores, DIGITS), axis=1)
    means: dict[Hashable, float] = dict(zip(table, ranks.mean(axis=0).tolist(), strict=True))
    if k < 3 or n < 2 or (ranks == ranks[:, :1]).all():
        return Friedman(means, datasets, None, None, None)
    test = friedmanchisquare(*ranks.T)
    critical = studentized_range.ppf(1 - LEVEL, k, math.inf) * math.sqrt(k * (k + 1) / (12 * n))
    return Friedman(means, datasets, float(test.statistic), float(test.pvalue), float(critical))
