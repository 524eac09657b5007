"""Tables of scores for the terminal; they fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table as RichTable

from moduli.cli.output import table
from moduli.study.statistics import PairedDifference
from moduli.study.table import Table
from moduli.study.wording import difference, interval_text, percent, value
from moduli.training.kinds.base import TaskKind
from moduli.training.metrics import Metric


def score_table(
    scores: Mapping[str, Mapping[str, Any]], train_domains: Sequence[str], kind: TaskKind
) -> RichTable:
    """One row per domain: every metric of the kind, and n."""
    rows = []
    for name, found in scores.items():
        title = f"{name} (trained on)" if name in train_domains else name
        numbers = [value(found[metric.name], metric) for metric in kind.metrics]
        rows.append((title, *numbers, str(found["n"])))
    # a column is one word wide: "balanced", "micro-F1", "loss"
    titles = [metric.title.split(" ")[0] for metric in kind.metrics]
    return table(("domain", *titles, "n"), rows)


def accuracy_table(rows: Mapping[str, Mapping[str, float]]) -> RichTable:
    """Accuracy in percent: one row per model, one column per domain."""
    domains = list(next(iter(rows.values())))
    body = [(name, *(percent(found[domain]) for domain in domains)) for name, found in rows.items()]
    return table(("accuracy in %", *domains), body)


def mean_table(result: Table) -> RichTable:
    """Mean and standard deviation in every column; shares in percent."""
    rows = []
    for row in result.rows:
        cells = [row.label]
        for cell in row.cells:
            sd = cell.summary.sd
            spread = "" if sd is None else f" ±{value(sd, result.metric)}"
            cells.append(f"{value(cell.summary.mean, result.metric)}{spread}")
        rows.append(cells)
    return table(("", *_titles(result)), rows)


def difference_table(result: Table) -> RichTable:
    """Paired differences to the first row with their intervals: one line per row and column."""
    rows = []
    for row in result.rows[1:]:
        for title, cell in zip(_titles(result), row.cells, strict=True):
            if cell.difference is not None:
                rows.append((row.label, title, *_difference(cell.difference, result.metric)))
    columns = ("", "tested on", "mean", "95 % (paired t)", "bootstrap", "per seed")
    return table(columns, rows, text=2)


def _difference(d: PairedDifference, metric: Metric) -> Iterable[str]:
    return (
        difference(d.mean, metric),
        interval_text(d.interval, metric),
        interval_text(d.bootstrap, metric),
        " ".join(difference(one, metric) for one in d.values),
    )


def _titles(result: Table) -> list[str]:
    return ["out-of-dom." if c.kind == "out-of-domain" else c.title for c in result.columns]
