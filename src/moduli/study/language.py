"""What is measured of a language model, and on what: texts, bits per byte, its use of experts.

Letters: E experts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from moduli.data.task import Task
from moduli.errors import ConfigError
from moduli.training.kinds.base import get_kind

KIND = "language-modeling"
LOAD_BATCHES = 8
"""Batches of every domain from which the load of the experts is read."""


def as_texts(task: Task) -> Task:
    """A task of another kind as one of texts, for a language model to read.

    Raises:
        ConfigError: its rows hold no text.
    """
    kind = get_kind(KIND)
    if task.kind == kind.name:
        return task
    if not set(kind.columns) <= set(get_kind(task.kind).columns):
        raise ConfigError(
            f"The model is {kind.noun}, which reads texts; {task.name!r} is a task of {task.kind} "
            "and has none. Give it one with texts, such as brown."
        )
    return dataclasses.replace(task, kind=kind.name, label_names=())


def domain_scores(model: Any, tokenizer: Any, rows: Any, max_length: int) -> dict[str, int | float]:
    """Scores of the language model on rows, with bits per byte, which do not depend on the
    tokenizer where it predicts every token of a text.

    Args:
        model: a causal language model.
        tokenizer: of it.
        rows: with a column "text".
        max_length: tokens that it sees at once.
    """
    from moduli.training.evaluate import evaluate

    found = evaluate(model, tokenizer, rows, kind=KIND, max_length=max_length).to_dict()
    count = sum(len(text.encode()) for text in rows["text"])
    return {**found, "bits_per_byte": found["loss"] * found["n"] / math.log(2) / count}


def expert_shares(
    model: Any, tokenizer: Any, tests: list[Any], max_length: int
) -> dict[str, list[float]]:
    """Share [E] of the tokens' choices that every expert has, by router; {} for a dense model.

    Args:
        model: a causal language model.
        tokenizer: of it.
        tests: tables of rows with texts.
        max_length: tokens that it sees at once.
    """
    from moduli.training.evaluate import batches_of

    if not hasattr(model.config, "output_router_logits"):
        return {}
    totals: list[Any] = []
    for rows in tests:
        _, batches = batches_of(get_kind(KIND), model, tokenizer, rows, max_length)
        for _, (_, batch) in zip(range(LOAD_BATCHES), batches, strict=False):
            inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
            with torch.no_grad():
                load = model.eval()(**inputs, output_router_logits=True).router_load
            totals = [a + b for a, b in zip(totals, load, strict=True)] if totals else list(load)
    names = [f"{i}.{part}" for i in range(len(totals) // 2) for part in ("attention", "ffn")]
    return {name: (total / total.sum()).tolist() for name, total in zip(names, totals, strict=True)}
