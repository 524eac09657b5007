"""One batch several times in a pass: what goes into a model is repeated, what comes out is cut.

Every block of rows has experts of its own, so that K passes are one pass over K times the rows: the
same result, in one call. Letters: B rows of the batch, K how often it stands in the pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moduli.errors import ModelError

NOT_ROWS = ("cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask")
"""Arguments whose first dimension never is that of the batch."""


def named_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a forward by name."""
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def takes(model: nn.Module, name: str) -> bool:
    """Whether a forward takes an argument of this name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def row_count(model: nn.Module, arguments: Mapping[str, Any]) -> int:
    """B: rows of what the model, or the decoder of it, is given."""
    main = getattr(model, "main_input_name", "input_ids")
    for name in ("decoder_input_ids", "decoder_inputs_embeds", main, "inputs_embeds"):
        if isinstance(arguments.get(name), Tensor):
            return len(arguments[name])
    return next(len(value) for value in arguments.values() if isinstance(value, Tensor))


def require_padding_token(model: Any) -> None:
    """Raise if a model takes single rows only, for want of a padding token.

    Decoders that classify (by a head `score`) look for the last token of a row that is no padding.

    Raises:
        ModelError: it does.
    """
    if hasattr(model, "score") and model.config.get_text_config().pad_token_id is None:
        raise ModelError(
            f"this {type(model).__name__} reads a single row as it is and several only if it knows "
            "padding, and THOR passes every row several times in one batch; set "
            "model.config.pad_token_id (such as to tokenizer.pad_token_id)"
        )


def repeated(arguments: Mapping[str, Any], rows: int, times: int) -> dict[str, Any]:
    """The arguments with the batch `times` times; what has not `rows` rows stays as it is."""

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == rows:
            return torch.cat([value] * times)
        return value

    return {
        name: value if name in NOT_ROWS else _mapped(value, repeat)
        for name, value in arguments.items()
    }


def first_rows(output: Any, rows: int, times: int) -> Any:
    """The part of an output that belongs to the first `rows` of `times` as many."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == rows * times:
            return value[:rows]
        return value

    return _mapped(output, cut)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`change` of every tensor in nested tuples and model outputs; caches are left alone."""
    if isinstance(value, Mapping):  # a ModelOutput is one, too
        kept = {key: _mapped(inner, change) for key, inner in value.items()}
        return type(value)(**kept) if type(value) is not dict else kept
    if isinstance(value, tuple):
        return tuple(_mapped(inner, change) for inner in value)
    return change(value)


def carry_copies(cache: Any, times: int) -> None:
    """Let a cache that holds a batch `times` times be reordered by the beams of a single one."""
    reorder = getattr(cache, "reorder_cache", None)
    if reorder is None or isinstance(reorder, functools.partial):
        return
    cache.reorder_cache = functools.partial(_reorder, reorder, times)


def _reorder(reorder: Callable[[Tensor], None], times: int, beams: Tensor) -> None:
    reorder(torch.cat([beams + block * len(beams) for block in range(times)]))
