"""What `extend` and `prune` share: the task for a model, and scores before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from moduli.cli.options import Data
from moduli.cli.output import Output, table
from moduli.data.task import Task

SHOWN = 2
"""Metrics of a kind that fit a line twice."""


def load_task_for(args: Data, model: str, verb: str, output: Output) -> Task:
    """The task that was named, taken as the kind that the model has a head for.

    Raises:
        CheckpointError: there is no such model.
        ModelError: it can be neither extended nor pruned.
    """
    from moduli.data import load_task, task_names
    from moduli.study.editing import require_editable
    from moduli.study.tuned import model_kind

    require_editable(model, verb)
    options = args.data_options()
    known = model_kind(model)
    if "kind" not in options and known is not None and args.data not in task_names():
        options["kind"] = known.name
    task = load_task(args.data, on_event=output.note, **options)
    for note in task.notes:
        output.note(note)
    return task


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
