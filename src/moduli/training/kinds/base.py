"""What training and evaluation have to know about a kind of task: one record per kind.

Nothing else in the library asks which kind it has; a new kind is a row in `moduli.data.kinds` (its
columns) and a file here, named like the kind, with a `KIND`.

    B batch, C classes, M scored positions of one example, N examples
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moduli.data.kinds import KINDS
from moduli.errors import CheckpointError, ConfigError, UnknownNameError, nearest
from moduli.training.metrics import Metric, Scores

Output = dict[str, Tensor]
"""What a model says to one example: "logits" [C], or for every scored position "nll" (nats),
"predicted" and "target" [M]; see `moduli.training.plain.REDUCTIONS`."""


@dataclass(frozen=True)
class Examples:
    """What is put into batches: rows, or pieces of rows that are too long.

    Attributes:
        items: for the collator.
        lengths: of each; examples of about one length meet in a batch.
        origin: index of the row that each comes from, ascending.
        decode: the text of ids that a model wrote, where it writes.
    """

    items: Any
    lengths: Sequence[int]
    origin: Sequence[int]
    decode: Callable[[Tensor], str] | None = None

    @classmethod
    def of(cls, rows: Any, lengths: Sequence[int] | None = None) -> Examples:
        """Every row is one example."""
        return cls(rows, [0] * len(rows) if lengths is None else lengths, range(len(rows)))


@dataclass(frozen=True)
class TaskKind:
    """The training side of a kind.

    Attributes:
        name: as in `Task.kind`.
        auto_class: name of the class in transformers that loads a model with the right head.
        noun: what such a model is called in messages.
        columns: of a row to train on.
        metrics: of its scores; the first is the one that models are chosen and compared by.
        load_processor: tokenizer, image processor or feature extractor of a model directory.
        head: from the names of the labels, keyword arguments for `auto_class.from_pretrained`.
        prepare: examples from processor, rows and longest length.
        collator: from model, processor and longest length, a function from examples to the
            model's inputs; "labels" are among them if the examples have a target.
        reduction: key of `moduli.training.plain.REDUCTIONS`: what is kept of the logits.
        score: from outputs, the examples they belong to, and rows.
        decide: the decisions in an output, one per row of the result.
        describe: from model, processor, rows, examples and outputs, a record per row for people.
        fits: whether a model's config speaks for this kind among those that share its class.
        loss: from output, labels and the number of labels in the whole step; where models do not
            agree on what they average over. None: the model's own mean over the examples.
        example: from a word on the command line (a text or a path), a row without target.
        files: whether that word is the path of a file.
        signatures: how metrics that other libraries compute were computed, as these write it.
    """

    name: str
    auto_class: str
    noun: str
    columns: tuple[str, ...]
    metrics: tuple[Metric, ...]
    load_processor: Callable[[str], Any]
    head: Callable[[tuple[str, ...]], dict[str, Any]]
    prepare: Callable[[Any, Any, int], Examples]
    collator: Callable[[Any, Any, int], Callable[[Any], dict[str, Tensor]]]
    reduction: str
    score: Callable[[Sequence[Output], Examples, Any], Scores]
    decide: Callable[[Output], Tensor]
    describe: Callable[[Any, Any, Any, Examples, Sequence[Output]], list[dict[str, Any]]]
    example: Callable[[str], dict[str, Any]]
    fits: Callable[[Any], bool] = lambda config: True
    loss: Callable[..., Tensor] | None = None
    files: bool = False
    signatures: Callable[[], dict[str, str]] = dict

    @property
    def primary(self) -> Metric:
        """The metric that models are chosen and compared by."""
        return self.metrics[0]

    def metric(self, name: str) -> Metric:
        """One of `metrics`.

        Raises:
            UnknownNameError: the kind has no such metric.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        known = [metric.name for metric in self.metrics]
        raise UnknownNameError(f"{self.name} has no metric {name!r}. {nearest(name, known)}")

    def better(self, scores: Mapping[str, Any]) -> tuple[float, float]:
        """A key by which the best of several scores comes first; ties go to the lower loss."""
        value = float(scores[self.primary.name])
        loss = float(scores.get("loss", 0.0))
        return (-value if self.primary.higher_is_better else value), loss

    def changed(self, before: Sequence[Output], after: Sequence[Output]) -> int:
        """How many decisions differ between two models on the same examples."""
        count = 0
        for one, other in zip(before, after, strict=True):
            differs = self.decide(one) != self.decide(other)
            count += int(differs.flatten(1).any(1).sum() if differs.dim() > 1 else differs.sum())
        return count


def get_kind(name: str) -> TaskKind:
    """The kind of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in KINDS:
        raise ConfigError(f"task_kind is {name!r}. {nearest(name, KINDS)}")
    module = import_module(f"moduli.training.kinds.{name.replace('-', '_')}")
    kind: TaskKind = module.KIND
    return kind


def kind_of_config(config: Any, architecture: str) -> TaskKind | None:
    """The kind whose models have this class and config, or None if it is none of ours."""
    import transformers

    for kind in map(get_kind, KINDS):
        mapping = getattr(transformers, kind.auto_class)._model_mapping
        found = mapping.get(type(config), None)
        classes = found if isinstance(found, tuple) else (found,)
        names = {c.__name__ for c in classes if c is not None}
        if architecture in names and kind.fits(config):
            return kind
    return None


def require_kind(model: Any, kind: TaskKind, title: str) -> None:
    """Raise unless the model has a head for tasks of this kind.

    Args:
        model: a transformers model.
        kind: of the task.
        title: what the user calls the model.

    Raises:
        CheckpointError: it has another one, or none.
    """
    found = kind_of_config(model.config, type(model).__name__)
    # Kinds may share their models: what one calls a translator is to the other from text to text.
    if found is None or found.noun != kind.noun:
        raise CheckpointError(
            f"{title} is a {type(model).__name__}"
            + (f" for {found.name}" if found is not None else "")
            + f", not {kind.noun}; `moduli tune` makes one of it."
        )


def same_outputs(one: Sequence[Output], other: Sequence[Output]) -> bool:
    """Whether two lists of outputs are equal, bit for bit."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(_bits(a[name]) == _bits(b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
