"""Stick-breaking attention, chosen by device: the function that models call.

Letters: B batch, Hq heads of queries, H heads of keys, T queries, S keys, D width of keys, Dv
width of values.
Source: ModuleFormer (arXiv 2306.04640), IBM/ModuleFormer `stickbreaking_att`; Tan et al., arXiv
2410.17980.
"""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Bool, Float, Integer
from torch import Tensor

from moduli.errors import ConfigError, UnknownNameError, nearest
from moduli.models.stick_breaking import ops, reference, single, triton
from moduli.models.stick_breaking.sight import Sight, check

Backend = Literal["auto", "reference", "blocked", "triton"]


def stick_breaking_attention(
    query: Float[Tensor, "B Hq T D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S Dv"],
    *,
    key_mask: Bool[Tensor, "B S"] | None = None,
    segments: Integer[Tensor, "B S"] | None = None,
    scale: float | None = None,
    attend_current: bool = True,
    return_remainder: bool = False,
    early_exit: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B Hq T Dv"] | tuple[Float[Tensor, "B Hq T Dv"], Float[Tensor, "B Hq T"]]:
    """Causal attention whose weights are pieces of a stick, the newest key breaking first.

    From its own position to the left, a query gives each key sigma(q . k * scale) of what is left
    of a stick of length 1; what remains at the end is not given to any value. There is nothing to
    normalise and no position embedding: keys may be appended (S > T: a cache) without change to
    what came before.

    Half precision is computed in float32. Gradients flow to query, key, value and from the
    remainder.

    Args:
        query: at the last T of S positions; head h reads key head h // (Hq // H).
        key: of all positions, the cache first.
        value: may be the same tensor as key.
        key_mask: True where a key exists; another has weight 0 and takes nothing from the stick.
        segments: number of the packed sequence that each position belongs to; queries see keys
            of their own only.
        scale: of the logits; None: 1 / sqrt(D).
        attend_current: whether a query sees the key at its own position; False: only earlier ones.
        return_remainder: also return what is left of the stick.
        early_exit: stop where all sticks of a tile have at most this share left, which drops no
            more weight than that; None: exact.
        backend: "reference" (all weights at once), "blocked" (tiles, memory of T D), "triton"
            (the same on CUDA), or "auto".

    Returns:
        outputs, and with `return_remainder` the remainder, both in the dtype of query.

    Raises:
        ConfigError: shapes or types do not fit together, or the backend cannot compute here.
        UnknownNameError: there is no such backend.
    """
    check(query, key, value, key_mask, segments, early_exit)
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    name = _chosen(query, key, value, backend)
    exit_at = early_exit or 0.0
    if name == "reference" or (name == "blocked" and single.takes(query, key, value)):
        sight = Sight(query.shape[2], key.shape[2], attend_current, key_mask, segments)
        if name == "reference":
            out, rest = reference.attention(query, key, value, sight, scale)
        else:
            out, rest = single.forward(query, key, value, sight, scale, exit_at)
    else:
        out, rest = ops.run(
            query, key, value, key_mask, segments, scale, attend_current, exit_at, name
        )
    out = out.to(query.dtype)
    return (out, rest.to(query.dtype)) if return_remainder else out


def _chosen(query: Tensor, key: Tensor, value: Tensor, backend: str) -> str:
    if backend not in get_args(Backend):
        raise UnknownNameError(
            f"there is no backend {backend!r}. {nearest(backend, get_args(Backend))}"
        )
    # Triton's interpreter is for trying the kernel, never for use.
    if backend not in ("auto", "triton") or (backend == "auto" and not query.is_cuda):
        return "blocked" if backend == "auto" else backend
    reason = triton.refuses(query, key, value)
    if backend == "triton" and reason is not None:
        raise ConfigError(
            f"backend 'triton' cannot compute this: {reason}; 'auto' chooses one that can"
        )
    return "triton" if reason is None else "blocked"
