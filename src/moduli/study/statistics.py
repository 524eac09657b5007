"""Means, spreads and paired differences over seeds, with intervals that admit how few there are.

Two methods run with the same seed share the new head, the data and their order, so their
difference varies less than either. The interval of the mean difference is Student's (paired t).
With three seeds it is wide; the bootstrap beside it has only ten different resamples of three
values to draw from and is too narrow, which is why no claim rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (None for one value) of `n` values."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class PairedDifference:
    """Method minus baseline, seed by seed."""

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    sd: float | None
    interval: tuple[float, float] | None
    """Paired t, 95 %; None with fewer than two pairs, or if all differences are equal."""
    bootstrap: tuple[float, float] | None
    """Percentile bootstrap over seeds, 95 %; None where `interval` is."""

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.values)

    @property
    def sign(self) -> int:
        """+1 or -1 if the interval lies on one side of zero, else 0: nothing can be said."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return 0
        return 1 if self.mean > 0 else -1


def summarise(values: Sequence[float]) -> Summary:
    """Mean and standard deviation (n - 1 in the denominator)."""
    n = len(values)
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return Summary(n, mean, sd)


def paired_difference(
    method: Mapping[int, float], baseline: Mapping[int, float]
) -> PairedDifference | None:
    """Difference over the seeds that both have; None if they share none.

    Args:
        method: value by seed.
        baseline: value by seed.
    """
    seeds = tuple(sorted(method.keys() & baseline.keys()))
    if not seeds:
        return None
    values = tuple(method[seed] - baseline[seed] for seed in seeds)
    summary = summarise(values)
    interval = bootstrap = None
    # Equal differences are an accident of a small test set, not a certainty: no interval then.
    if summary.sd is not None and summary.sd > 1e-12:
        interval = _student(summary)
        bootstrap = _bootstrap(values)
    return PairedDifference(seeds, values, summary.mean, summary.sd, interval, bootstrap)


def _student(summary: Summary) -> tuple[float, float]:
    from scipy.stats import t

    assert summary.sd is not None
    half = float(t.ppf((1 + CONFIDENCE) / 2, summary.n - 1)) * summary.sd / math.sqrt(summary.n)
    return summary.mean - half, summary.mean + half


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import bootstrap

    result = bootstrap(
        (np.asarray(values),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=9999,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return float(low), float(high)
