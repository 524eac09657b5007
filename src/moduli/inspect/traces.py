"""Where every token of a text goes, layer by layer.

Letters: S sequence, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moduli.inspect.measure import real_tokens
from moduli.inspect.record import TokenTrace
from moduli.inspect.watching import ExpertLayer, Seen, strongest_first, watch
from moduli.surgery.evaluating import evaluating


@torch.no_grad()
def trace(
    model: nn.Module, processor: Any, layers: Sequence[ExpertLayer], batch: Mapping[str, Tensor]
) -> list[TokenTrace]:
    """The ways of the tokens of one example, one trace per stack of the model.

    Args:
        model: with experts.
        processor: its tokenizer, to name the tokens; parts of images and sounds have numbers.
        layers: of the model.
        batch: keyword arguments of its forward, for one example.
    """
    with watch(model) as seen, evaluating(model):
        model(**batch)
    found = []
    for stack in dict.fromkeys(layer.stack for layer in layers):
        names = [layer.name for layer in layers if layer.stack == stack]
        last = {one.layer: one for one in seen if one.layer in names}
        if not last:
            continue
        length = len(next(iter(last.values())).routing.experts)
        pieces = _pieces(processor, stack, batch, length)
        ways = {name: _ways(one) for name, one in last.items() if len(_ways(one)) == len(pieces)}
        found.append(
            TokenTrace(
                pieces=tuple(pieces),
                experts={name: tuple(e for e, _ in way) for name, way in ways.items()},
                weights={name: tuple(w for _, w in way) for name, way in ways.items()},
            )
        )
    return found


def _ways(seen: Seen) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Experts and weights of every real token, strongest first, without idle slots."""
    keep = real_tokens(seen)
    experts, weights = (one[keep].tolist() for one in strongest_first(seen.routing))
    return [
        (
            tuple(e for e in chosen if e >= 0),
            tuple(w for e, w in zip(chosen, mass, strict=True) if e >= 0),
        )
        for chosen, mass in zip(experts, weights, strict=True)
    ]


def _pieces(processor: Any, stack: str, batch: Mapping[str, Tensor], length: int) -> list[str]:
    """The tokens of a stack in words, or numbers where it does not read words."""
    side = "decoder_" if stack.endswith("decoder") else ""
    ids = batch.get(f"{side}input_ids")
    if ids is None or ids.numel() != length or not hasattr(processor, "convert_ids_to_tokens"):
        return [str(i) for i in range(length)]
    mask = batch.get(f"{side}attention_mask")
    kept = ids[0] if mask is None else ids[0][mask[0].bool()]
    return [_word(processor, int(one)) for one in kept]


def _word(tokenizer: Any, token: int) -> str:
    """A token as it stands in the text, with the space before it."""
    raw, word = tokenizer.convert_ids_to_tokens(token), str(tokenizer.decode([token]))
    # Byte-level and SentencePiece vocabularies mark the space that decoding one token may drop.
    starts = isinstance(raw, str) and raw[:1] in ("\u0120", "\u2581")
    return f" {word}" if starts and not word.startswith(" ") else word
