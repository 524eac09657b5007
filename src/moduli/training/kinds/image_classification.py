"""One class for a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moduli.data.media import image_cell, open_image
from moduli.training.kinds import per_class
from moduli.training.kinds.base import Examples, TaskKind
from moduli.training.metrics import CLASS_METRICS


def _load_processor(path: str) -> Any:
    import transformers

    loader: Any = transformers.AutoImageProcessor
    return loader.from_pretrained(path)


def _head(names: tuple[str, ...]) -> dict[str, Any]:
    """Image models usually come with the head of another task, which is replaced."""
    return {**per_class.named_head(names), "ignore_mismatched_sizes": True}


def _prepare(processor: Any, rows: Any, max_length: int) -> Examples:
    return Examples.of(rows)


def _collator(model: Any, processor: Any, max_length: int) -> Callable[[Any], dict[str, Tensor]]:
    def collate(rows: Any) -> dict[str, Tensor]:
        """Pixels as the processor makes them, and labels `[B]`."""
        images = [open_image(row["image"]) for row in rows]
        batch: dict[str, Tensor] = dict(processor(images=images, return_tensors="pt"))
        if "label" in rows[0]:
            batch["labels"] = per_class.class_labels(rows)
        return batch

    return collate


KIND = TaskKind(
    name="image-classification",
    auto_class="AutoModelForImageClassification",
    noun="a classifier of images",
    columns=("image", "label"),
    metrics=CLASS_METRICS,
    load_processor=_load_processor,
    head=_head,
    prepare=_prepare,
    collator=_collator,
    reduction="whole",
    score=per_class.score_classes,
    decide=per_class.best_class,
    describe=per_class.describe_classes("image"),
    files=True,
    example=lambda path: {"image": image_cell(path, None)},
)
