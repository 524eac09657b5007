"""Numbers and differences in words, the same in terminal and report.

No sentence says more than its interval carries: where the interval of a paired difference covers
zero, the sentence says that nothing was shown, and beside it stands how small a difference the
study could have shown. Where several methods are compared, p-values are corrected for that, and
what no longer holds then is said not to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moduli.study.statistics import PairedDifference, holm, pairs_needed
from moduli.study.table import Cell, Row, Table
from moduli.training.metrics import Metric

MINUS = "\N{MINUS SIGN}"
PLACES = {"in-domain": "in-domain", "out-of-domain": "out of domain"}
MANY = 4
"""Rows beyond which the headline has one sentence per finding, not one per row."""
ALPHA = 0.05
"""A corrected p-value above this shows nothing."""


@dataclass(frozen=True)
class Claim:
    """A sentence of the headline, what the study could have shown (None without intervals), and
    the keys of the runs behind both."""

    text: str
    power: str | None = None
    runs: tuple[str, ...] = ()


def headline(table: Table) -> list[str]:
    """What the numbers support, one sentence per method and place."""
    return [claim.text for claim in claims(table)]


def claims(table: Table) -> list[Claim]:
    """The headline with the power of every statement on other domains.

    With more than four rows, methods of which the same can be said share a sentence, and models
    that were edited have none.
    """
    if len(table.rows) < 2:
        return [
            Claim(
                "Only one method has finished runs in every place, so there is nothing to compare "
                "yet."
            )
        ]
    rows = table.rows[1:]
    found = list(_grouped(table) if crowded(table) else _each(table, rows))
    if found:
        return found
    first = table.rows[0]
    what = (
        f"No method has a seed in common with {first.label}"
        if first.arm == 0
        else "The method that the others are compared with has no finished runs"
    )
    return [Claim(f"{what}, so there is nothing to compare yet.")]


def crowded(table: Table) -> bool:
    """Whether there are too many rows to speak of each."""
    return len(table.rows) - 1 > MANY


def adjusted(table: Table, place: int, name: str) -> list[float | None]:
    """P-values of all rows in a column, corrected for how many methods are compared (Holm).

    Args:
        table: methods and edits.
        place: index of the column.
        name: "p_t" or "p_wilcoxon".

    Returns:
        One per row. A method as tuned is corrected for the methods as tuned, an edited one for
        those with the same edit.
    """
    found: list[float | None] = [None] * len(table.rows)
    for edit in {row.edit for row in table.rows}:
        family = [i for i, row in enumerate(table.rows) if row.edit == edit]
        raw = [table.rows[i].cells[place].difference for i in family]
        corrected = holm([None if d is None else getattr(d, name) for d in raw])
        for i, p in zip(family, corrected, strict=True):
            found[i] = p
    return found


def claim(label: str, baseline: str, place: str, d: PairedDifference, metric: Metric) -> str:
    """One sentence on one paired difference that says no more than its interval does."""
    if d.interval is None:
        why = "too little for an interval" if d.sd is None else "equal in all, so no interval"
        return (
            f"{label} against {baseline} {place}: {with_unit(d.mean, metric)} "
            f"({pairs_text(d)}; {why})."
        )
    shown = f"95 % interval {interval_text(d.interval, metric)}, {pairs_text(d)}"
    if d.sign == 0:
        return (
            f"No difference between {label} and {baseline} was shown {place}: "
            f"{with_unit(d.mean, metric)} on average ({shown})."
        )
    word = "higher" if d.sign > 0 else "lower"
    if metric.share:
        return f"{label} scored {word} than {baseline} {place} by {size(d.mean, metric)} ({shown})."
    better = "better" if (d.sign > 0) == metric.higher_is_better else "worse"
    amount = difference(abs(d.mean), metric).removeprefix("+")
    return (
        f"{label} did {better} than {baseline} {place}: its {metric.title} was {word} by {amount} "
        f"({shown})."
    )


def corrected_claim(
    label: str,
    baseline: str,
    place: str,
    d: PairedDifference,
    metric: Metric,
    p: float | None,
    family: int,
) -> str:
    """As `claim`, for one of several comparisons that are made at once.

    Args:
        label: what is compared.
        baseline: with what.
        place: where it was tested.
        d: the difference.
        metric: of which.
        p: its p-value, corrected for the others (`moduli.study.statistics.holm`).
        family: how many comparisons it was corrected for.
    """
    text = claim(label, baseline, place, d, metric)
    if not d.sign or family < 2 or p is None:
        return text
    if p > ALPHA:
        return (
            f"{text[:-2]}), but corrected for {family} comparisons this is not shown "
            f"(p {_equals(p_text(p))})."
        )
    return f"{text[:-2]}; p {_equals(p_text(p))} corrected for {family} comparisons)."


def power(d: PairedDifference, metric: Metric) -> str | None:
    """How small a difference such pairs resolve, and what half of it takes; None if unknown."""
    if d.resolves is None or not d.sd:
        return None
    seeds = Counter(stratum for stratum, _ in d.pairs)
    needed = pairs_needed(d.sd, d.resolves / 2, len(seeds))
    fewest = min(seeds.values())  # an unfinished study has more of them in some places
    resolves = f"This study resolves differences of about {size(d.resolves, metric)} (80 % power)"
    if needed <= fewest:  # the spread of two seeds says little, and less where sources differ
        return f"{resolves}."
    half = f"to resolve half of that it would take about {needed} seeds instead of {fewest}"
    return f"{resolves}; {half}."


def pairs_text(d: PairedDifference) -> str:
    """How many pairs a difference rests on: "5 paired seeds", "15 paired runs on 3 sources"."""
    strata = len({stratum for stratum, _ in d.pairs})
    if strata > 1:
        return f"{d.n} paired runs on {strata} sources"
    return f"{d.n} paired seeds" if d.n > 1 else "1 seed"


def p_text(p: float | None) -> str:
    """A p-value: "0.034", "< 0.001", a dash where there was no test."""
    if p is None:
        return "–"
    return "<\N{NO-BREAK SPACE}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


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


def size(number: float, metric: Metric) -> str:
    """How large a difference is, without its sign."""
    if not metric.share:
        return f"{abs(number):.3f} in {metric.title}"
    large = 100 * abs(number)
    return f"{large:.1f} points" if large >= 0.1 else f"{large:.1g} points"


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


def duration(seconds: float) -> str:
    """A time in words, as roughly as it is known: "40 s", "12 min", "1 h 50 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _each(table: Table, rows: Sequence[Row]) -> Iterator[Claim]:
    baseline = table.rows[0].label
    corrected = [adjusted(table, place, "p_t") for place in range(len(table.columns))]
    for number, row in enumerate(rows, 1):
        for place, (column, cell) in enumerate(zip(table.columns, row.cells, strict=True)):
            d = cell.difference
            if column.kind == "one domain" or d is None:
                continue
            text = corrected_claim(
                row.label,
                baseline,
                PLACES[column.kind],
                d,
                table.metric,
                corrected[place][number],
                _family(table, corrected[place], row.edit),
            )
            told = column.kind == "out-of-domain" and row.edit is None
            yield Claim(text, power(d, table.metric) if told else None, cell.compared)


def _grouped(table: Table) -> Iterator[Claim]:
    """For every place, the methods above the first one, those below it, and the rest."""
    baseline, metric = table.rows[0].label, table.metric
    tuned = [i for i, row in enumerate(table.rows) if i and row.edit is None]
    for place, column in enumerate(table.columns):
        if column.kind == "one domain":
            continue
        where = PLACES[column.kind]
        corrected = adjusted(table, place, "p_t")
        level = f"p at most {ALPHA}, corrected for {_family(table, corrected, None)} comparisons"
        lines: dict[str, list[tuple[str, Cell]]] = {
            f"Higher {metric.title} than {baseline} {where} ({level})": [],
            f"Lower {metric.title} than {baseline} {where} ({level})": [],
            f"No difference to {baseline} was shown {where}": [],
            f"Against {baseline} {where}, too few runs or all equal, so no interval": [],
        }
        higher, lower, unclear, alone = lines.values()
        for i in tuned:
            row, p = table.rows[i], corrected[i]
            cell = row.cells[place]
            d = cell.difference
            if d is None:
                continue
            said = f"{row.label} {difference(d.mean, metric)}"
            if d.interval is None:
                alone.append((said, cell))
                continue
            shown = p is not None and p <= ALPHA
            ends = interval_text(d.interval, metric)
            if d.sign and not shown:
                ends += f"; corrected p {_equals(p_text(p))}"
            found = (higher if d.sign > 0 else lower) if shown else unclear
            found.append((f"{said} ({ends})", cell))
        told = [(start, members) for start, members in lines.items() if members]
        for number, (start, members) in enumerate(told, 1):
            last = column.kind == "out-of-domain" and number == len(told)
            cells = [table.rows[i].cells[place] for i in tuned] if last else []
            behind = [cell for _, cell in members] + [c for c in cells if c.difference]
            yield Claim(
                f"{start}: {', '.join(text for text, _ in members)}.",
                _resolved(cells, metric),
                tuple(dict.fromkeys(key for cell in behind for key in cell.compared)),
            )


def _family(table: Table, corrected: Sequence[float | None], edit: str | None) -> int:
    """How many tests a p-value was corrected for: those that could be made with this edit."""
    return sum(
        p is not None and row.edit == edit for row, p in zip(table.rows, corrected, strict=True)
    )


def _resolved(cells: Sequence[Cell], metric: Metric) -> str | None:
    """The power line of a whole column: that of the cell in the middle; None without any."""
    known = [c.difference for c in cells if c.difference is not None and c.difference.resolves]
    if not known:
        return None
    known.sort(key=lambda d: d.resolves or 0.0)
    return power(known[len(known) // 2], metric)


def _equals(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"
