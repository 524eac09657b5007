"""From one text to another, by a model with an encoder and a decoder.

Scores are teacher-forced: every token of the target is predicted from the source and the right
tokens before it. What the model writes by itself is what `describe` gives, by greedy search.

    M target tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moduli.errors import ModelError
from moduli.surgery.evaluating import evaluating
from moduli.surgery.modular import real_inputs
from moduli.training.batches import token_lengths, use_padding
from moduli.training.kinds import per_class, per_token
from moduli.training.kinds.base import Examples, Output, TaskKind
from moduli.training.metrics import Metric, Scores

GENERATE_BATCH = 16
GENERATE_TOKENS = 128
"""Longest text that is written, where the model's positions do not end before."""


@dataclass(frozen=True)
class TargetScores(Scores):
    """`n` is the number of target tokens."""

    loss: float
    """Mean cross-entropy per target token, nats."""
    accuracy: float
    """Share of target tokens that were the likeliest one."""
    exact: float
    """Share of targets of which every token was."""


def _prepare(tokenizer: Any, rows: Any, max_length: int) -> Examples:
    sources = ({"text": row["source"]} for row in rows)
    return Examples.of(rows, token_lengths(tokenizer, sources, max_length))


def _collator(model: Any, tokenizer: Any, max_length: int) -> Callable[[Any], dict[str, Tensor]]:
    use_padding(model, tokenizer)
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise ModelError(
            f"{type(model).__name__} does not say what its decoder starts with; models such as "
            "T5, BART and Marian do."
        )

    def collate(rows: Any) -> dict[str, Tensor]:
        """Source ids and mask `[B, S]`, target labels, the decoder's inputs and mask `[B, M]`."""
        cut = {"truncation": True, "max_length": max_length}
        sources = [row["source"] for row in rows]
        batch: dict[str, Tensor] = dict(
            tokenizer(sources, padding=True, return_tensors="pt", **cut)
        )
        batch.pop("token_type_ids", None)
        targets = [row.get("target", "") for row in rows]
        ids = tokenizer(text_target=targets, **cut)["input_ids"]
        labels = per_token.padded(ids, -100)
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
        made = {"decoder_input_ids": shifted, "decoder_attention_mask": real_inputs(labels).long()}
        return {**batch, **made, "labels": labels}

    return collate


def _score(outputs: Sequence[Output], examples: Examples, rows: Any) -> TargetScores:
    found = per_token.joined(outputs)
    whole = [bool((output["predicted"] == output["target"]).all()) for output in outputs]
    return TargetScores(
        n=len(found["nll"]),
        loss=float(found["nll"].double().mean()),
        accuracy=float((found["predicted"] == found["target"]).double().mean()),
        exact=sum(whole) / len(whole),
    )


def _describe(
    model: Any, processor: Any, rows: Any, examples: Examples, outputs: Sequence[Output]
) -> list[dict[str, Any]]:
    """What the model makes of each source, by greedy search."""
    positions = getattr(model.config, "max_position_embeddings", None) or processor.model_max_length
    found: list[dict[str, Any]] = []
    with evaluating(model):
        for start in range(0, len(rows), GENERATE_BATCH):
            sources = [rows[i]["source"] for i in range(start, len(rows))[:GENERATE_BATCH]]
            batch = processor(
                sources, padding=True, truncation=True, max_length=positions, return_tensors="pt"
            )
            batch.pop("token_type_ids", None)
            with torch.no_grad():
                written = model.generate(
                    **batch.to(model.device),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=min(GENERATE_TOKENS, positions - 1),
                )
            texts = processor.batch_decode(written, skip_special_tokens=True)
            found += [{"source": s, "target": t} for s, t in zip(sources, texts, strict=True)]
    return found


KIND = TaskKind(
    name="seq2seq",
    auto_class="AutoModelForSeq2SeqLM",
    noun="a model from text to text",
    columns=("source", "target"),
    metrics=(
        Metric("loss", "loss per token", higher_is_better=False, share=False),
        Metric(
            "accuracy",
            "tokens right",
            note="Share of target tokens that the model holds for the likeliest, given the source "
            "and the right tokens before.",
        ),
        Metric("exact", "targets right"),
    ),
    load_processor=per_class.load_tokenizer,
    head=lambda names: {},
    prepare=_prepare,
    collator=_collator,
    reduction="tokens",
    score=_score,
    decide=lambda output: output["predicted"],
    describe=_describe,
    loss=per_token.token_loss,
    example=lambda text: {"source": text},
)
