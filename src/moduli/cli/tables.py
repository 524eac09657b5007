"""Tables of scores for the terminal; they fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table as RichTable

from moduli.cli.output import table
from moduli.study.statistics import PairedDifference
from moduli.study.table import Table
from moduli.study.wording import interval_text, percent, points


def score_table(scores: Mapping[str, Mapping[str, Any]], train_domain: str | None) -> RichTable:
    """One row per domain: accuracy, balanced accuracy, macro-F1, loss, n."""
    rows = []
    for name, score in scores.items():
        rows.append(
            (
                f"{name} (trained on)" if name == train_domain else name,
                percent(score["accuracy"]),
                percent(score["balanced_accuracy"]),
                percent(score["macro_f1"]),
                f"{score['loss']:.3f}",
                str(score["n"]),
            )
        )
    return table(("domain", "accuracy", "balanced", "macro-F1", "loss", "n"), rows)


def accuracy_table(rows: Mapping[str, Mapping[str, float]]) -> RichTable:
    """Accuracy in percent: one row per model, one column per domain."""
    domains = list(next(iter(rows.values())))
    body = [(name, *(percent(found[domain]) for domain in domains)) for name, found in rows.items()]
    return table(("accuracy in %", *domains), body)


def mean_table(result: Table) -> RichTable:
    """Mean and standard deviation in every column, in percent."""
    rows = []
    for row in result.rows:
        cells = [row.label]
        for cell in row.cells:
            sd = "" if cell.summary.sd is None else f" ±{100 * cell.summary.sd:.1f}"
            cells.append(f"{percent(cell.summary.mean)}{sd}")
        rows.append(cells)
    return table(("", *_titles(result)), rows)


def difference_table(result: Table) -> RichTable:
    """Paired differences to the first row with their intervals: one line per row and column."""
    rows = []
    for row in result.rows[1:]:
        for title, cell in zip(_titles(result), row.cells, strict=True):
            if cell.difference is not None:
                rows.append((row.label, title, *_difference(cell.difference)))
    columns = ("", "tested on", "mean", "95 % (paired t)", "bootstrap", "per seed")
    return table(columns, rows, text=2)


def _difference(d: PairedDifference) -> Iterable[str]:
    return (
        points(d.mean),
        interval_text(d.interval),
        interval_text(d.bootstrap),
        " ".join(points(value) for value in d.values),
    )


def _titles(result: Table) -> list[str]:
    return ["out-of-dom." if c.kind == "out-of-domain" else c.title for c in result.columns]
