"""One class for a text, or for a pair of texts."""

from __future__ import annotations

from typing import Any

from moduli.training.batches import CollateTexts
from moduli.training.kinds import per_class
from moduli.training.kinds.base import TaskKind
from moduli.training.metrics import CLASS_METRICS


def _collator(model: Any, tokenizer: Any, max_length: int) -> CollateTexts:
    return CollateTexts(model, tokenizer, max_length, per_class.class_labels)


def _fits(config: Any) -> bool:
    return config.problem_type in (None, "single_label_classification") and config.num_labels > 1


KIND = TaskKind(
    name="classification",
    auto_class="AutoModelForSequenceClassification",
    noun="a classifier",
    columns=("text", "label"),
    metrics=CLASS_METRICS,
    load_processor=per_class.load_tokenizer,
    head=per_class.named_head,
    prepare=per_class.prepare_texts,
    collator=_collator,
    reduction="whole",
    score=per_class.score_classes,
    decide=per_class.best_class,
    describe=per_class.describe_classes("text"),
    fits=_fits,
    example=lambda text: {"text": text},
)
