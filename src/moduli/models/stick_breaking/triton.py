"""Stick-breaking attention on CUDA, by Triton: forward, and backward without locks or atomics.

The walk is that of `blocked`, a tile of queries to a program. Backward takes two launches: one
walks over the keys for every tile of queries, leaving its running sums at the edges of tiles, and
one goes over the queries for every tile of keys, starting from those sums. Every number has one
writer, so the same operands give the same bits. What is kept for backward is S / 32
numbers per query. Rows wider than a program holds are cut into parts with a program each, all of
which form the logits again. Tiles are of a fixed size: nobody has tuned them.

The device code is in `triton_device`. Letters: R rows of keys, G queries per key and time, T times,
S keys, D width of keys, Dv width of values.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moduli.models.stick_breaking.sight import Sight

WIDEST = {4: 64, 2: 256}  # columns of a row that a program holds, by the bytes of a number
LEAST = 1e-30  # less of a stick is taken for none
KEYS = 32  # of a tile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuses(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why Triton cannot compute these, or None."""
    if not _installed():
        return "the package triton is not installed"
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"Triton does not compile for {query.device.type}; to try it there, very slowly, set "
            "TRITON_INTERPRET=1 before Python starts"
        )
    if query.device.type != "cuda" and query.dtype == torch.bfloat16:
        return "Triton's interpreter has no products in torch.bfloat16"
    dtypes = (query.dtype, key.dtype, value.dtype)
    if query.dtype not in DTYPES or len(set(dtypes)) > 1:
        said = ", ".join(str(d) for d in dtypes)
        return f"it takes one dtype of float32, float16 and bfloat16, and these are {said}"
    return None


def _installed() -> bool:
    return find_spec("triton") is not None


# `torch.compile` asks, and does not look at how a package is found (see `experts.kernels.native`).
_installed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kept_shape(rows: int, group: int, times: int, keys: int) -> tuple[int, int, int, int]:
    """Shape of what forward keeps for backward; the last two are one, in the order of times."""
    return -(-keys // KEYS), rows, group, times


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sight: Sight,
    scale: float,
    least: float,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `blocked.forward`."""
    R, G, T, _ = query.shape
    out = query.new_empty(R, G, T, value.shape[2])
    rest = query.new_empty(R, G, T, dtype=torch.float32)
    tile = _tile(query, value)
    _launch(
        "forward", (-(-G * T // tile["QUERIES"]) * R, tile["PARTS"]),
        query.contiguous(), key, value, *_seen(sight), out, rest, kept,
        *_sizes(query, key, value), scale, math.log(max(least, LEAST)),
        CURRENT=int(sight.attend_current), **tile,
    )  # fmt: skip
    return out, rest


def backward(
    dout: Tensor,
    drest: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rest: Tensor,
    kept: Tensor,
    sight: Sight,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `blocked.backward`."""
    R, G, T, _ = query.shape
    query, dout = query.contiguous(), dout.contiguous()
    dquery, dkey, dvalue = (torch.empty_like(t) for t in (query, key, value))
    before = torch.empty_like(kept)
    tile = _tile(query, value)
    shared = (*_sizes(query, key, value), scale)
    constants = {"CURRENT": int(sight.attend_current), **tile}
    _launch(
        "query_gradient", (-(-G * T // tile["QUERIES"]) * R, tile["PARTS"]),
        query, key, value, *_seen(sight), dout, rest.contiguous(), drest.contiguous(), kept,
        before, dquery, *shared, **constants,
    )  # fmt: skip
    _launch(
        "key_gradient", (-(-sight.keys // KEYS) * R, tile["PARTS"]),
        query, key, value, *_seen(sight), dout, kept, before, dkey, dvalue, *shared, **constants,
    )  # fmt: skip
    return dquery, dkey, dvalue


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    R, G, T, D = query.shape
    return R, G, T, key.shape[1], D, value.shape[2]


def _seen(sight: Sight) -> tuple[Tensor | None, Tensor | None]:
    mask, segments = sight.key_mask, sight.segments
    return (
        None if mask is None else mask.to(torch.int8).contiguous(),
        None if segments is None else segments.contiguous(),
    )


def _tile(query: Tensor, value: Tensor) -> dict[str, int]:
    widest = WIDEST[query.element_size()]
    parts = -(-max(query.shape[3], value.shape[2]) // widest)
    width, values = (
        max(16, 1 << (-(-w // parts) - 1).bit_length()) for w in (query.shape[3], value.shape[2])
    )
    queries = 64 if max(width, values) <= 128 else 32
    return {"QUERIES": queries, "KEYS": KEYS, "WIDTH": width, "VALUES": values, "PARTS": parts}


def _launch(name: str, grid: tuple[int, ...], first: Tensor, *rest: Any, **constants: Any) -> None:
    """Start programs on the device of the first tensor."""
    from moduli.models.stick_breaking import triton_device

    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        getattr(triton_device, name)[grid](first, *rest, **constants)
