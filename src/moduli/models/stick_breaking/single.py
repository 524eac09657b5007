"""One query per sequence and no gradient: decoding, in one pass over the cache.

No tile is worth its making for a single query. C++ (`scan.cpp`) reads keys and values where they
lie, the newest first, and stops where nothing is left of the sticks of a head. It is called past
the operator of `ops`, which costs more than a short cache does; so where something other than
PyTorch itself looks on (compile, transforms, tensors that are not plain), or there is no compiler,
`ops` computes it.

Letters: B batch, Hq heads of queries, H heads of keys, S keys, D width of keys, Dv width of values.
"""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from moduli.models.stick_breaking import native
from moduli.models.stick_breaking.sight import Sight

DTYPES = (torch.float32, torch.bfloat16)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these are the operands of such a call."""
    if torch.compiler.is_compiling() or query.shape[2] != 1:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return False
    plain = all(
        type(t) is Tensor and t.device.type == "cpu" and t.dtype == query.dtype
        for t in (query, key, value)
    )
    return (
        plain
        and query.dtype in DTYPES
        and torch._C._functorch.peek_interpreter_stack() is None
        and native.library() is not None
    )


def forward(
    query: Float[Tensor, "B Hq 1 D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S Dv"],
    sight: Sight,
    scale: float,
    least: float,
) -> tuple[Float[Tensor, "B Hq 1 Dv"], Float[Tensor, "B Hq 1"]]:
    """Outputs and what is left of every stick, in float32.

    Args:
        query, key, value: what `takes` says yes to.
        sight: what is seen, for B rows.
        scale: of the logits.
        least: a head stops when no stick of its queries has more left than this.
    """
    found = native.library()
    assert found is not None  # `takes` was asked
    batch, heads, _, width = query.shape
    query = query.contiguous()
    key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (key, value))
    seen = _seen(sight)
    out = torch.empty(batch, heads, 1, value.shape[3], dtype=torch.float32)
    rest = torch.empty(batch, heads, 1, dtype=torch.float32)
    sizes = (
        batch, key.shape[1], heads // key.shape[1], sight.end(0), width, value.shape[3],
        *key.stride()[:3], *value.stride()[:3], 0 if seen is None else seen.stride(0),
    )  # fmt: skip
    found.moduli_stick_decode(
        query.data_ptr(), key.data_ptr(), value.data_ptr(),
        None if seen is None else seen.data_ptr(), out.data_ptr(), rest.data_ptr(),
        (ctypes.c_int64 * len(sizes))(*sizes), scale, least,
        query.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out, rest


def _seen(sight: Sight) -> Tensor | None:
    """Keys that are seen [B S], or None for all."""
    seen = sight.key_mask
    if sight.segments is not None:
        own = sight.segments == sight.segments[:, -1:]
        seen = own if seen is None else own & seen
    return None if seen is None else seen.contiguous()
