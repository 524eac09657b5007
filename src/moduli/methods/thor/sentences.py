"""The sentences that a model reads, by which random_sentence chooses experts, and whose they are.

A step of decoding sees a part of its sentences alone, or none of what an encoder has read. So they
are noted on what such a step is given: on the cache, and on the output of the encoder. Texts that
are written by turns keep their experts, and so do copies of a cache.

Letters: B sentences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moduli.errors import ModelError

_MARK = "_moduli_sentences"


def note(made: Any, sentences: list[bytes] | None) -> None:
    """Say on a cache or a tensor which sentences the pass has read that made it."""
    setattr(made, _MARK, sentences)


def noted(made: Any) -> list[bytes] | None:
    """The sentences of the pass that has made a cache or a tensor; None if nobody knows."""
    found: list[bytes] | None = getattr(made, _MARK, None)
    return found


def cache_in(output: Any) -> Any:
    """The cache in a model's output; None if there is none."""
    parts = output.values() if isinstance(output, Mapping) else output
    found = parts if isinstance(output, Mapping | tuple) else ()
    return next((part for part in found if hasattr(part, "get_seq_length")), None)


def sentences_in(module: nn.Module, arguments: dict[str, Any]) -> list[bytes]:
    """The real tokens of every row that a module reads, as bytes."""
    names = (getattr(module, "main_input_name", "input_ids"), "inputs_embeds")
    given = next((arguments[n] for n in names if isinstance(arguments.get(n), Tensor)), None)
    if given is None:
        raise ModelError(
            f"random_sentence has to see what {type(module).__name__} reads; give "
            f"{' or '.join(names)}"
        )
    given = given.detach().cpu()
    if not given.is_floating_point():
        given = given.long()  # the same ids, in whatever type
    real = _real_tokens(arguments.get("attention_mask"), given)
    rows = [row if real is None else row[real[i]] for i, row in enumerate(given)]
    return [bytes(row.contiguous().view(torch.uint8).numpy().tobytes()) for row in rows]


def _real_tokens(mask: Any, given: Tensor) -> Tensor | None:
    """Which tokens of what a module reads are real; None if all are, or if it reads no text."""
    if isinstance(mask, Tensor) and mask.dim() == 4:  # [B, heads, queries, S]: seen by any query
        mask = (mask == 0 if mask.is_floating_point() else mask.bool()).any(2).any(1)
    # Ids [B, T] or [B, choices, T], embeddings with a dimension more, or the samples of a sound.
    if isinstance(mask, Tensor) and mask.shape in (given.shape, given.shape[:-1]):
        return mask.bool().cpu()
    if mask is None or given.is_floating_point():
        return None
    raise ModelError(
        "random_sentence has to tell padding from tokens, and this attention_mask is not one "
        f"number per token of {tuple(given.shape)}; give a mask [batch, tokens], or take "
        "random_token"
    )
