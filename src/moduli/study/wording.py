"""Numbers and differences in words, the same in terminal and report.

No sentence says more than its interval carries: where the interval of a paired difference covers
zero, the sentence says that nothing was shown.
"""

from __future__ import annotations

from moduli.study.statistics import PairedDifference
from moduli.study.table import Table
from moduli.training.metrics import Metric

MINUS = "\N{MINUS SIGN}"


def headline(table: Table) -> list[str]:
    """What the numbers support, one sentence per method and place."""
    if len(table.rows) < 2:
        return ["Only one method has finished runs, so there is nothing to compare yet."]
    sentences = []
    for row in table.rows[1:]:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if column.kind != "one domain" and cell.difference is not None:
                place = "in-domain" if column.kind == "in-domain" else "out of domain"
                sentences.append(
                    claim(row.label, table.rows[0].label, place, cell.difference, table.metric)
                )
    return sentences


def claim(label: str, baseline: str, place: str, d: PairedDifference, metric: Metric) -> str:
    """One sentence on one paired difference that says no more than its interval does."""
    pairs = f"{d.n} paired seeds" if d.n > 1 else "1 seed"
    if d.interval is None:
        return (
            f"{label} against {baseline} {place}: {with_unit(d.mean, metric)} "
            f"({pairs}; too little for an interval)."
        )
    shown = f"95 % interval {interval_text(d.interval, metric)}, {pairs}"
    if d.sign == 0:
        return (
            f"No difference between {label} and {baseline} was shown {place}: "
            f"{with_unit(d.mean, metric)} on average ({shown})."
        )
    word = "higher" if d.sign > 0 else "lower"
    size = difference(abs(d.mean), metric).removeprefix("+")
    if metric.share:
        return f"{label} scored {word} than {baseline} {place} by {size} points ({shown})."
    better = "better" if (d.sign > 0) == metric.higher_is_better else "worse"
    return (
        f"{label} did {better} than {baseline} {place}: its {metric.title} was {word} by {size} "
        f"({shown})."
    )


def value(number: float, metric: Metric) -> str:
    """A score: a share in percent, anything else as it is."""
    return percent(number) if metric.share else f"{number:.3f}"


def difference(number: float, metric: Metric) -> str:
    """A difference of two scores with its sign: in points for shares."""
    if metric.share:
        return points(number)
    return "0" if number == 0 else f"{number:+.3f}".replace("-", MINUS)


def with_unit(number: float, metric: Metric) -> str:
    """A difference and what it is a difference of."""
    return f"{difference(number, metric)} {'points' if metric.share else 'in ' + metric.title}"


def percent(value: float) -> str:
    """0.853 as 85.3."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of two shares in points, with its sign: +0.4; only zero itself has none."""
    return "0.0" if value == 0 else f"{100 * value:+.1f}".replace("-", MINUS)


def interval_text(interval: tuple[float, float] | None, metric: Metric) -> str:
    """An interval of differences."""
    if interval is None:
        return "none"
    low, high = (difference(end, metric) for end in interval)
    return f"{low} to {high}"
