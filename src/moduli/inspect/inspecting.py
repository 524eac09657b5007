"""Run a model over data and say what its experts do.

    inspection = inspect_model(model, tokenizer, task, max_rows=256)
    inspection.table(), inspection.figures(), inspection.write(path)

Letters: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from moduli.data.task import Splits, Task
from moduli.errors import ConfigError, DataError, ModelError
from moduli.inspect.activations import activation_patterns, evenly
from moduli.inspect.measure import Measure
from moduli.inspect.record import ActivationPattern, Inspection
from moduli.inspect.traces import trace
from moduli.inspect.watching import expert_layers, watch
from moduli.surgery.evaluating import evaluating
from moduli.training.evaluate import batches_of
from moduli.training.kinds.base import TaskKind, get_kind, kind_of_config

SPLITS = ("train", "validation", "test", "all")
PATTERN_ROWS = 32
"""Examples from which the tokens of activation patterns are taken."""
_ONE_LABEL = ("classification", "image-classification", "audio-classification")
_LABEL_PER_TOKEN = "token-classification"


def inspect_model(
    model: nn.Module,
    processor: Any,
    data: Task | Sequence[Mapping[str, Any]] | None = None,
    *,
    kind: str | None = None,
    split: str = "test",
    max_rows: int | None = 256,
    max_length: int = 64,
    texts: Sequence[Mapping[str, Any]] = (),
    title: str = "",
    coselection: bool = True,
    activations: bool = True,
    on_domain: Callable[[str], None] | None = None,
) -> Inspection:
    """What the experts of a model do on data; the model is not changed.

    Args:
        model: a modular model of ours, or an MoE model of transformers.
        processor: its tokenizer, image processor or feature extractor.
        data: a task, or rows with the columns of the kind, which are one domain, "all"; None to
            follow `texts` only.
        kind: of the task; by default that of `data`, or the one the model has a head for.
        split: of a task: train, validation, test, or all rows.
        max_rows: so many per domain at most, the first of the (shuffled) split; None for all.
        max_length: longer texts are cut.
        texts: rows whose tokens are followed one by one.
        title: of the inspection; the class of the model by default.
        coselection: count which experts are chosen together.
        activations: also count positive neurons of split layers, on a few rows run again.
        on_domain: called with the name of every domain before it is run.

    Raises:
        ModelError: the model has no experts, or none was used (`moduli.dense` is on).
        DataError: nothing to run, or no domain has this split.
        ConfigError: there is no such split or kind, or the kind is not known.
    """
    layers = expert_layers(model)
    task_kind = _kind(model, data, kind)
    if not data and not texts:
        raise DataError("There is nothing to run: give a task, rows or texts.")
    classes = data.label_names if isinstance(data, Task) else ()
    domains = _rows_by_domain(data, split, max_rows)
    measure = Measure(layers, classes)
    sample: list[Mapping[str, Any]] = []
    for name, rows in domains.items():
        if on_domain is not None:
            on_domain(name)
        _run(model, processor, task_kind, name, rows, max_length, measure)
        sample += rows
    traces = []
    for row in texts:
        _, batches = batches_of(task_kind, model, processor, [row], max_length, batch_size=1)
        for _, batch in batches:
            traces += trace(model, processor, layers, inputs_of(model, batch))
    if not domains:
        return Inspection(title or type(model).__name__, (), tokens=tuple(traces))
    found = measure.inspections(coselection=coselection)
    if not found:
        raise ModelError(
            f"no layer of this {type(model).__name__} chose an expert; leave `moduli.dense` first"
        )
    patterns: tuple[ActivationPattern, ...] = ()
    if activations:
        rows = [sample[i] for i in evenly(len(sample), PATTERN_ROWS)]
        _, batches = batches_of(task_kind, model, processor, rows, max_length)
        patterns = activation_patterns(model, [inputs_of(model, b) for _, b in batches])
    return Inspection(
        title=title or type(model).__name__,
        layers=found,
        overlap=measure.overlap(),
        overlap_by_chance=measure.overlap_by_chance(),
        domains=tuple(domains),
        classes=tuple(classes),
        tokens=tuple(traces),
        activations=patterns,
    )


@torch.no_grad()
def _run(
    model: nn.Module,
    processor: Any,
    kind: TaskKind,
    domain: str,
    rows: Sequence[Any],
    max_length: int,
    measure: Measure,
) -> None:
    """Run the model over the rows of one domain and count."""
    examples, batches = batches_of(kind, model, processor, rows, max_length)
    with watch(model) as seen, evaluating(model):
        for members, batch in batches:
            model(**inputs_of(model, batch))
            origin = [rows[examples.origin[i]] for i in members]
            measure.add(seen, domain, _labels(kind, origin, batch) if measure.classes else None)
            seen.clear()


def _labels(kind: TaskKind, rows: Sequence[Any], batch: Mapping[str, Tensor]) -> Tensor | None:
    """The class of every example or of every token; None where the kind has no single one."""
    if kind.name == _LABEL_PER_TOKEN:
        return batch["labels"]
    if kind.name in _ONE_LABEL and all(row.get("label") is not None for row in rows):
        return torch.tensor([int(row["label"]) for row in rows])
    return None


def inputs_of(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch goes into the model, on its device: all but labels."""
    return {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}


def _kind(model: Any, data: Any, name: str | None) -> TaskKind:
    if name is None and isinstance(data, Task):
        name = data.kind
    if name is not None:
        return get_kind(name)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = kind_of_config(base.config, type(base).__name__)
    if found is None:
        raise ConfigError(
            f"it is not known what inputs a {type(base).__name__} takes; give kind=, for example "
            "kind='classification' for texts"
        )
    return found


def _rows_by_domain(data: Any, split: str, max_rows: int | None) -> dict[str, list[Any]]:
    if split not in SPLITS:
        raise ConfigError(f"There is no split {split!r}; it is one of {', '.join(SPLITS)}.")
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"max_rows is {max_rows}; it must be at least 1, or None for all.")
    if not isinstance(data, Task):
        return {"all": list(islice(data, max_rows))} if data else {}
    found = {name: list(islice(_rows(s, split), max_rows)) for name, s in data.domains.items()}
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        there = [
            name
            for name in SPLITS[:-1]
            if any(getattr(splits, name) for splits in data.domains.values())
        ]
        hint = f"; there is {' and '.join(there)}, or all" if there else ""
        raise DataError(f"No domain of {data.name!r} has rows in its {split} split{hint}.")
    return found


def _rows(splits: Splits, split: str) -> Iterable[Any]:
    for name in SPLITS[:-1] if split == "all" else (split,):
        rows = getattr(splits, name)
        if rows is not None:
            yield from rows
