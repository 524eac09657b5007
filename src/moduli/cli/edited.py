"""What `extend` and `prune` share: scores before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from moduli.cli.output import table

SHOWN = 2
"""Metrics of a kind that fit a line twice."""


def score_changes(record: Mapping[str, Any], kind: str, trained: Sequence[str] = ()) -> Table:
    """One row per domain: the first metrics of the kind, before and after."""
    from moduli.study.wording import value
    from moduli.training.kinds.base import get_kind

    metrics = get_kind(kind).metrics[:SHOWN]
    rows = []
    for name, before in record["before"].items():
        after = record["after"][name]
        pairs = [(value(s[m.name], m)) for m in metrics for s in (before, after)]
        rows.append((f"{name} (trained on)" if name in trained else name, *pairs, str(after["n"])))
    titles = [title for m in metrics for title in (m.title.split(" ")[0], "after")]
    return table(("tested on", *titles, "n"), rows)
