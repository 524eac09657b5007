"""What kinds share that put one thing, text, image or sound, into one class.

C classes, N examples
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moduli.training.batches import token_lengths
from moduli.training.kinds.base import Examples, Output
from moduli.training.metrics import ClassScores, score


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def prepare_texts(tokenizer: Any, rows: Any, max_length: int) -> Examples:
    """Every row is an example, as long as its tokens are many."""
    return Examples.of(rows, token_lengths(tokenizer, rows, max_length))


def named_head(names: tuple[str, ...]) -> dict[str, Any]:
    """A head with one output per name."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def class_labels(rows: Any) -> Tensor:
    """The labels `[N]` of rows."""
    return torch.tensor([int(row["label"]) for row in rows])


def logits_of(outputs: Sequence[Output]) -> Tensor:
    """Logits `[N, C]`."""
    return torch.stack([output["logits"] for output in outputs])


def score_classes(outputs: Sequence[Output], examples: Examples, rows: Any) -> ClassScores:
    """See `moduli.training.metrics.score`."""
    return score(logits_of(outputs), class_labels(rows))


def best_class(output: Output) -> Tensor:
    """The class with the highest logit."""
    return output["logits"].argmax(-1, keepdim=True)


def class_names(model: Any) -> list[str]:
    """The names of a model's outputs."""
    return [str(model.config.id2label[i]) for i in range(model.config.num_labels)]


def describe_classes(column: str) -> Callable[..., list[dict[str, Any]]]:
    """A `describe` for rows whose input is in `column`."""

    def describe(
        model: Any,
        processor: Any,
        rows: Any,
        examples: Examples,
        outputs: Sequence[Output],
    ) -> list[dict[str, Any]]:
        """Label, its probability, and the probability of every label."""
        names = class_names(model)
        found = []
        for row, output in zip(rows, outputs, strict=True):
            shares = output["logits"].double().softmax(-1).tolist()
            best = max(range(len(shares)), key=shares.__getitem__)
            found.append(
                {
                    column: shown(row[column]),
                    "label": names[best],
                    "probability": shares[best],
                    "probabilities": dict(zip(names, shares, strict=True)),
                }
            )
        return found

    return describe


def shown(value: Any) -> Any:
    """An input as it is shown again: files by their path."""
    return value["path"] if isinstance(value, dict) else value
