"""The next token of a text, by a model that sees the tokens before it.

A text longer than the model's length is cut into windows. Each window begins with the last token
of the one before, so that every token but the first of a text is predicted exactly once, and no
token is predicted from another text.

    M predicted tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moduli.errors import DataError, ModelError
from moduli.surgery.evaluating import evaluating
from moduli.surgery.modular import dense, is_modular
from moduli.training.batches import use_padding
from moduli.training.kinds import per_class, per_token
from moduli.training.kinds.base import Examples, Output, TaskKind
from moduli.training.metrics import Metric, Scores


@dataclass(frozen=True)
class TokenScores(Scores):
    """`n` is the number of predicted tokens."""

    loss: float
    """Mean cross-entropy per token, nats."""
    perplexity: float
    """exp(loss)."""
    accuracy: float
    """Share of tokens that were the likeliest one."""


def _prepare(tokenizer: Any, rows: Any, max_length: int) -> Examples:
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; the next token needs windows of 2 or more.")
    items, origin = [], []
    texts = [row["text"] for row in rows]
    for start in range(0, len(texts), 1000):
        encoded = tokenizer(texts[start : start + 1000], return_attention_mask=False, verbose=False)
        for number, ids in enumerate(encoded["input_ids"], start=start):
            for first in range(0, len(ids) - 1, max_length - 1):
                items.append(ids[first : first + max_length])
                origin.append(number)
    if not items:
        raise DataError("No text has two tokens, so there is no next token to learn.")
    return Examples(items, [len(item) for item in items], origin)


def _collator(model: Any, tokenizer: Any, max_length: int) -> Callable[[Any], dict[str, Tensor]]:
    use_padding(model, tokenizer)
    _require_causal(model)

    def collate(windows: Any) -> dict[str, Tensor]:
        """Ids, mask and labels `[B, S]`, padded at the end; the model shifts the labels."""
        ones = [[1] * len(window) for window in windows]
        labels = [[-100, *window[1:]] for window in windows]
        return {
            "input_ids": per_token.padded(windows, tokenizer.pad_token_id),
            "attention_mask": per_token.padded(ones, 0),
            "labels": per_token.padded(labels, -100),
        }

    return collate


def _require_causal(model: Any) -> None:
    """Raise if an output depends on a later token: a perfect score would mean nothing."""
    # Experts may be chosen by the whole text, which says nothing of the model itself.
    whole = dense(model) if is_modular(model) else nullcontext()
    with torch.no_grad(), evaluating(model), whole:
        pairs = torch.tensor([[1, 1], [1, 2]], device=model.device)
        one, other = (model(input_ids=pair[None]).logits[0, 0] for pair in pairs)
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{type(model).__name__} sees the tokens to the right of the one it predicts; "
            "language modelling needs a decoder, such as SmolLM2 or GPT-2."
        )


def _score(outputs: Sequence[Output], examples: Examples, rows: Any) -> TokenScores:
    found = per_token.joined(outputs)
    loss = float(found["nll"].double().mean())
    return TokenScores(
        n=len(found["nll"]),
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        accuracy=float((found["predicted"] == found["target"]).double().mean()),
    )


def _describe(
    model: Any, processor: Any, rows: Any, examples: Examples, outputs: Sequence[Output]
) -> list[dict[str, Any]]:
    """How well the model foresees each text."""
    totals, counts = [0.0] * len(rows), [0] * len(rows)
    for row, output in zip(examples.origin, outputs, strict=True):
        totals[row] += float(output["nll"].double().sum())
        counts[row] += output["nll"].numel()
    found = []
    for row, total, count in zip(rows, totals, counts, strict=True):
        loss = total / count if count else math.nan
        found.append({"text": row["text"], "tokens": count, "loss": loss})
    return found


KIND = TaskKind(
    name="language-modeling",
    auto_class="AutoModelForCausalLM",
    noun="a language model",
    columns=("text",),
    metrics=(
        Metric("loss", "loss per token", higher_is_better=False, share=False),
        Metric(
            "perplexity",
            "perplexity",
            higher_is_better=False,
            share=False,
            note="exp(loss): as if the model chose each token among so many that are equally "
            "likely.",
        ),
        Metric("accuracy", "next token right"),
    ),
    load_processor=per_class.load_tokenizer,
    head=lambda names: {},
    prepare=_prepare,
    collator=_collator,
    reduction="next tokens",
    score=_score,
    decide=lambda output: output["predicted"],
    describe=_describe,
    loss=per_token.next_token_loss,
    example=lambda text: {"text": text},
)
