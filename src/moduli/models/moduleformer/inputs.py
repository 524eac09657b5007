"""What a pass says about its tokens: padding, packed sequences, and where texts end.

Letters: B batch, T tokens of a pass, S tokens with those of the cache.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from moduli.errors import ConfigError
from moduli.models.moduleformer.attention import Tokens


def tokens_of(
    h: Float[Tensor, "B T D"],
    attention_mask: Tensor | None,
    position_ids: Int[Tensor, "_ T"] | None,
    past: Cache | None,
) -> Tokens:
    """The masks of a pass.

    Args:
        h: embeddings.
        attention_mask: [B, S], 0 for padding.
        position_ids: of packed sequences; not looked at with a mask or a filled cache.
        past: what came before.

    Raises:
        ConfigError: the mask or the cache is of another size, or the cache is none that grows.
    """
    batch, length = h.shape[:2]
    before = _checked_length(past, batch)
    if attention_mask is None:
        segments = None if before or position_ids is None else packed(position_ids, batch)
        return Tokens(segments=segments)
    wanted = (batch, before + length)
    if tuple(attention_mask.shape) != wanted:
        raise ConfigError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it is 0 for padding and 1 "
            f"for tokens, {wanted}: {batch} rows, {before} tokens of the cache and {length} new "
            "ones"
        )
    keys = attention_mask.to(device=h.device) != 0
    if not torch.compiler.is_compiling() and bool(keys.all()):
        return Tokens()
    return Tokens(keys=keys, real=keys[:, -length:].flatten())


def _checked_length(past: Cache | None, batch: int) -> int:
    """Tokens in a cache that fits."""
    if past is None:
        return 0
    if not isinstance(past, Cache):
        raise ConfigError(
            f"past_key_values is a {type(past).__name__}; it is a cache of transformers, such as "
            "DynamicCache(): leave it out at first, and give what the output has as "
            "past_key_values"
        )
    if past.is_compileable:
        raise ConfigError(
            "a static cache has its final length from the start, and here the number of keys says "
            "where a query stands; leave out cache_implementation, or choose 'dynamic'"
        )
    before = int(past.get_seq_length())
    if before:
        kept = past.layers[0].keys.shape[0]  # type: ignore[union-attr]
        if kept != batch:
            raise ConfigError(
                f"past_key_values is of {kept} sequences and the input has {batch}; repeat or "
                "reorder the cache (batch_repeat_interleave, reorder_cache), or start without one"
            )
    return before


def packed(position_ids: Int[Tensor, "_ T"], batch: int) -> Int[Tensor, "B T"] | None:
    """Number of the sequence of every token, where positions start anew; None if there is one."""
    step = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1)
    if not torch.compiler.is_compiling() and bool((step == 1).all()):
        return None
    return (step != 1).cumsum(dim=1).expand(batch, -1)


def real_tokens(attention_mask: Tensor | None, length: int) -> Bool[Tensor, " BT"] | None:
    """False for padding among the tokens of a pass, in one row; None if nothing says."""
    return None if attention_mask is None else (attention_mask[:, -length:] != 0).flatten()


def last_tokens(
    each: Float[Tensor, "B T L"],
    input_ids: Int[Tensor, "B T"] | None,
    attention_mask: Tensor | None,
    pad: int | None,
) -> Int[Tensor, " B"]:
    """Place of the last token of every text that is not padding.

    The reference counts tokens that are not the padding token, which is the same for texts padded
    on the right.

    Raises:
        ConfigError: several texts, and nothing says where each ends.
    """
    batch, length = each.shape[:2]
    if attention_mask is not None:
        real = attention_mask[:, -length:].to(each.device) != 0
    elif pad is not None and input_ids is not None:
        real = input_ids != pad
    elif batch == 1:
        real = torch.ones(1, length, dtype=torch.bool, device=each.device)
    else:
        raise ConfigError(
            f"{batch} texts, and nothing says where each ends: give an attention_mask, or set "
            "config.pad_token_id to the token that fills up shorter ones"
        )
    places = torch.arange(length, device=each.device)
    return (places * real).argmax(dim=1)
