"""Test a tuned model: on every domain as it is, and again after each edit of the run's spec."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moduli.data.task import Task
from moduli.study.records import Variant
from moduli.study.spec import Edit, RunSpec, plain
from moduli.training.kinds.base import Examples, Output, TaskKind, get_kind

Numbers = dict[str, dict[str, int | float]]
Said = dict[str, tuple[Examples, list[Output]]]

ROWS_TO_COUNT = 512
"""Training rows on which the use of experts is counted, for static pruning."""


@dataclass(frozen=True)
class Tested:
    """Scores of a tuned model and of its edits."""

    scores: Numbers
    validation: Numbers
    variants: Mapping[str, Variant]


def test(
    spec: RunSpec,
    task: Task,
    model: Any,
    processor: Any,
    train: Any,
    tell: Callable[[str], None],
) -> Tested:
    """Scores on all test and validation splits, and on the test splits after every edit.

    Args:
        spec: of the run.
        task: its task.
        model: tuned; it may be changed by the last edit.
        processor: its tokenizer or another processor.
        train: rows that it was trained on.
        tell: called with the name of what is tested.
    """
    kind = get_kind(task.kind)
    length = spec.settings.max_length
    validation = {n: s.validation for n, s in task.domains.items() if s.validation is not None}
    tests = {n: s.test for n, s in task.domains.items() if s.test is not None}
    chosen_by = _scores(
        kind, _said(kind, model, processor, validation, length, "validation", tell), validation
    )
    said = _said(kind, model, processor, tests, length, "test", tell)
    variants = {}
    for edit in spec.edits:
        last = edit is spec.edits[-1]
        edited = model if last else copy.deepcopy(model)
        report = _edit(edit, edited, processor, kind, train, length)
        other = _said(kind, edited, processor, tests, length, edit.label, tell)
        changed = {name: kind.changed(said[name][1], other[name][1]) for name in tests}
        variants[edit.label] = Variant(_scores(kind, other, tests), changed, report)
    return Tested(_scores(kind, said, tests), chosen_by, variants)


def _edit(
    edit: Edit, model: Any, processor: Any, kind: TaskKind, train: Any, length: int
) -> dict[str, Any] | None:
    """Change `model` in place and say what that did."""
    import moduli
    from moduli.study.sample import rows_to_show, sample_batches
    from moduli.surgery.static import prune_statically

    if edit.name == "merged":
        return _plain(moduli.merge(model).to_dict())
    if edit.name == "pruned":
        rows = train.select(range(min(ROWS_TO_COUNT, len(train))))
        usage = expert_usage(model, processor, kind, rows, length)
        return _plain(prune_statically(model, usage).to_dict())
    assert edit.method is not None
    method = edit.method.build()
    count = rows_to_show(method)
    batches = sample_batches(method, model, processor, kind, train, count=count, max_length=length)
    report = moduli.convert(model, method, batch=batches)
    return None if report is None else _plain(report.to_dict())


def expert_usage(
    model: Any, processor: Any, kind: TaskKind, rows: Any, max_length: int
) -> dict[str, tuple[float, ...]]:
    """Share of the selections by tokens of `rows` that went to each expert, by layer."""
    from moduli.inspect.inspecting import inspect_model

    seen = inspect_model(
        model,
        processor,
        rows.to_list(),
        kind=kind.name,
        max_rows=None,
        max_length=max_length,
        coselection=False,
        activations=False,
    )
    return {layer.name: layer.load for layer in seen.layers}


def _said(
    kind: TaskKind,
    model: Any,
    processor: Any,
    rows: Mapping[str, Any],
    max_length: int,
    what: str,
    tell: Callable[[str], None],
) -> Said:
    from moduli.training.evaluate import outputs_of

    found = {}
    for name, split in rows.items():
        tell(f"{name}, {what}")
        found[name] = outputs_of(kind, model, processor, split, max_length=max_length)
    return found


def _scores(kind: TaskKind, said: Said, rows: Mapping[str, Any]) -> Numbers:
    return {
        name: kind.score(outputs, examples, rows[name]).to_dict()
        for name, (examples, outputs) in said.items()
    }


def _plain(report: Any) -> dict[str, Any]:
    data: dict[str, Any] = plain(report)
    return data
