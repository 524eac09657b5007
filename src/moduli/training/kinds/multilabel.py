"""Any number of labels for a text: one yes or no per label.

C labels, N examples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moduli.errors import DataError
from moduli.training.batches import CollateTexts
from moduli.training.kinds import per_class
from moduli.training.kinds.base import Examples, Output, TaskKind
from moduli.training.metrics import LOSS, Metric, Scores


@dataclass(frozen=True)
class LabelScores(Scores):
    """All but `loss` (mean binary cross-entropy, nats) and `n` (examples) are in [0, 1]."""

    micro_f1: float
    macro_f1: float
    subset_accuracy: float
    """Share of examples of which every label is right."""
    loss: float


def _head(names: tuple[str, ...]) -> dict[str, Any]:
    return {**per_class.named_head(names), "problem_type": "multi_label_classification"}


def _marks(rows: Any, labels: int) -> Tensor:
    """`[N, C]`, 1 where a label applies."""
    marks = torch.zeros(len(rows), labels)
    for i, row in enumerate(rows):
        if any(not 0 <= label < labels for label in row["label"]):
            raise DataError(f"A row has the labels {row['label']}; the model has {labels} labels.")
        marks[i, list(row["label"])] = 1.0
    return marks


def _collator(model: Any, tokenizer: Any, max_length: int) -> CollateTexts:
    labels = model.config.num_labels
    return CollateTexts(model, tokenizer, max_length, lambda rows: _marks(rows, labels))


def _score(outputs: Sequence[Output], examples: Examples, rows: Any) -> LabelScores:
    from sklearn.metrics import f1_score

    logits = per_class.logits_of(outputs)
    truth = _marks(rows, logits.shape[-1])
    predicted = logits > 0
    a, b = truth.bool().numpy(), predicted.numpy()
    return LabelScores(
        n=len(rows),
        micro_f1=float(f1_score(a, b, average="micro", zero_division=0)),
        macro_f1=float(f1_score(a, b, average="macro", zero_division=0)),
        subset_accuracy=float((a == b).all(axis=1).mean()),
        loss=float(
            torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), truth.double())
        ),
    )


def _describe(
    model: Any, processor: Any, rows: Any, examples: Examples, outputs: Sequence[Output]
) -> list[dict[str, Any]]:
    names = per_class.class_names(model)
    found = []
    for row, output in zip(rows, outputs, strict=True):
        shares = dict(zip(names, output["logits"].double().sigmoid().tolist(), strict=True))
        chosen = [name for name, share in shares.items() if share > 0.5]
        found.append({"text": row["text"], "labels": chosen, "probabilities": shares})
    return found


KIND = TaskKind(
    name="multilabel",
    auto_class="AutoModelForSequenceClassification",
    noun="a classifier with several labels",
    columns=("text", "label"),
    metrics=(
        Metric("micro_f1", "micro-F1"),
        Metric(
            "macro_f1",
            "macro-F1",
            note="The mean of the F1 of the labels: rare labels count as much as common ones.",
        ),
        Metric("subset_accuracy", "all right"),
        LOSS,
    ),
    load_processor=per_class.load_tokenizer,
    head=_head,
    prepare=per_class.prepare_texts,
    collator=_collator,
    reduction="whole",
    score=_score,
    decide=lambda output: (output["logits"] > 0)[None],
    describe=_describe,
    fits=lambda config: config.problem_type == "multi_label_classification",
    example=lambda text: {"text": text},
)
