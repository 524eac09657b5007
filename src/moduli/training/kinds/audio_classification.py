"""One class for a sound."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from moduli.data.media import audio_cell, read_audio
from moduli.training.kinds import per_class
from moduli.training.kinds.base import Examples, TaskKind
from moduli.training.metrics import CLASS_METRICS


def _load_processor(path: str) -> Any:
    import transformers

    loader: Any = transformers.AutoFeatureExtractor
    return loader.from_pretrained(path)


def _head(names: tuple[str, ...]) -> dict[str, Any]:
    return {**per_class.named_head(names), "ignore_mismatched_sizes": True}


def _prepare(extractor: Any, rows: Any, max_length: int) -> Examples:
    return Examples.of(rows)


def _collator(model: Any, extractor: Any, max_length: int) -> Callable[[Any], dict[str, Tensor]]:
    # Extractors of spectrograms pad to the length of their model; those of waveforms are to be
    # told to pad to the longest.
    padding = inspect.signature(extractor.__call__).parameters.get("padding")
    pad = {"padding": True} if padding is not None and padding.default is False else {}

    def collate(rows: Any) -> dict[str, Tensor]:
        """Features as the extractor makes them, and labels `[B]`."""
        rate = extractor.sampling_rate
        sounds = [read_audio(row["audio"], rate) for row in rows]
        batch: dict[str, Tensor] = dict(
            extractor(sounds, sampling_rate=rate, return_tensors="pt", **pad)
        )
        if "label" in rows[0]:
            batch["labels"] = per_class.class_labels(rows)
        return batch

    return collate


KIND = TaskKind(
    name="audio-classification",
    auto_class="AutoModelForAudioClassification",
    noun="a classifier of sounds",
    columns=("audio", "label"),
    metrics=CLASS_METRICS,
    load_processor=_load_processor,
    head=_head,
    prepare=_prepare,
    collator=_collator,
    reduction="whole",
    score=per_class.score_classes,
    decide=per_class.best_class,
    describe=per_class.describe_classes("audio"),
    files=True,
    example=lambda path: {"audio": audio_cell(path, None)},
)
