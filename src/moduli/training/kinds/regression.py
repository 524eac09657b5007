"""A number for a text, or for a pair of texts.

N examples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moduli.training.batches import CollateTexts
from moduli.training.kinds import per_class
from moduli.training.kinds.base import Examples, Output, TaskKind
from moduli.training.metrics import Metric, Scores


@dataclass(frozen=True)
class NumberScores(Scores):
    """Correlations are NaN where the labels or the predictions are all equal."""

    mse: float
    """Mean squared error, which training minimises."""
    pearson: float
    spearman: float


def _labels(rows: Any) -> Tensor:
    return torch.tensor([float(row["label"]) for row in rows])


def _collator(model: Any, tokenizer: Any, max_length: int) -> CollateTexts:
    return CollateTexts(model, tokenizer, max_length, _labels)


def _head(names: tuple[str, ...]) -> dict[str, Any]:
    return {"num_labels": 1, "problem_type": "regression"}


def _score(outputs: Sequence[Output], examples: Examples, rows: Any) -> NumberScores:
    from scipy.stats import pearsonr, spearmanr

    predicted = per_class.logits_of(outputs)[:, 0].double()
    truth = torch.tensor([float(row["label"]) for row in rows], dtype=torch.float64)
    nan = float("nan")
    varies = bool((predicted != predicted[0]).any() and (truth != truth[0]).any())
    return NumberScores(
        n=len(rows),
        mse=float((predicted - truth).square().mean()),
        pearson=float(pearsonr(predicted.numpy(), truth.numpy()).statistic) if varies else nan,
        spearman=float(spearmanr(predicted.numpy(), truth.numpy()).statistic) if varies else nan,
    )


def _describe(
    model: Any, processor: Any, rows: Any, examples: Examples, outputs: Sequence[Output]
) -> list[dict[str, Any]]:
    return [
        {"text": row["text"], "value": float(output["logits"][0])}
        for row, output in zip(rows, outputs, strict=True)
    ]


KIND = TaskKind(
    name="regression",
    auto_class="AutoModelForSequenceClassification",
    noun="a regression model",
    columns=("text", "label"),
    metrics=(
        Metric("mse", "mean squared error", higher_is_better=False, share=False),
        Metric(
            "pearson",
            "Pearson correlation",
            share=False,
            note="Of predictions and labels: it does not ask for the right scale, only for a "
            "straight line.",
        ),
        Metric("spearman", "Spearman correlation", share=False),
    ),
    load_processor=per_class.load_tokenizer,
    head=_head,
    prepare=per_class.prepare_texts,
    collator=_collator,
    reduction="whole",
    score=_score,
    # a prediction counts as changed when its second decimal does
    decide=lambda output: output["logits"].mul(100).round(),
    describe=_describe,
    fits=lambda config: config.problem_type == "regression" or config.num_labels == 1,
    example=lambda text: {"text": text},
)
