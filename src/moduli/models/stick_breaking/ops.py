"""Stick-breaking attention as one operator, `moduli::stick_breaking`.

To compile, checkpointing and FakeTensor it is one node with a known output shape; autograd sees
one function that saves its operands and, of every stick, what was left between tiles. Its gradient
has no gradient, and it cannot be vmapped: both say so.

Letters: B batch, Hq heads of queries, H heads of keys, G = Hq / H, R = B H rows, T queries, S keys,
D width of keys, Dv width of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moduli.experts.kernels.precision import fast_fp32
from moduli.experts.kernels.transforms import refuse_transforms, register_refusals
from moduli.models.stick_breaking import blocked, triton
from moduli.models.stick_breaking.sight import Sight

_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? segments, "
    "float scale, bool attend_current, float least, str backend"
)
_WHAT = "stick-breaking attention"
_INSTEAD = "choose backend='reference', which is made of differentiable operations"

torch.library.define(
    "moduli::stick_breaking", f"({_OPERANDS}, bool save) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "moduli::stick_breaking_backward",
    f"(Tensor? dout, Tensor? drest, Tensor rest, Tensor kept, {_OPERANDS}) "
    "-> (Tensor, Tensor, Tensor)",
)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments: Tensor | None,
    scale: float,
    attend_current: bool,
    least: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Outputs [B Hq T Dv] like query, and what is left of the stick [B Hq T] in float32 or
    float64."""
    refuse_transforms(_WHAT, _INSTEAD)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    out, rest, _ = torch.ops.moduli.stick_breaking(
        query, key, value, key_mask, segments, scale, attend_current, least, backend, save
    )
    return out, rest


BACKENDS: dict[str, Any] = {"blocked": blocked, "triton": triton}


@torch.library.impl("moduli::stick_breaking", "CompositeExplicitAutograd")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments: Tensor | None,
    scale: float,
    attend_current: bool,
    least: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    module = BACKENDS[backend]
    rows, sight = _rows(module, query, key, value, key_mask, segments, attend_current)
    kept = None
    if save:
        shape = module.kept_shape(*rows[0].shape[:3], key.shape[2])
        kept = rows[0].new_zeros(shape, dtype=_inside(query))
    with fast_fp32(None if query.device.type == "cpu" else False):
        out, rest = module.forward(*rows, sight, scale, least, kept)
    heads = query.shape[:3]
    out = out.view(*heads, value.shape[3]).to(query.dtype)
    return out, rest.view(heads), rest.new_empty(0) if kept is None else kept


@torch.library.register_fake("moduli::stick_breaking")  # type: ignore[untyped-decorator]
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, save = *args[:3], args[9]
    dtype, (B, heads, T, _), H = _inside(query), query.shape, key.shape[1]
    kept: tuple[Any, ...] = (0,)
    if save:
        kept = BACKENDS[args[8]].kept_shape(B * H, heads // H, T, key.shape[2])
    return (
        query.new_empty(B, heads, T, value.shape[3]),
        query.new_empty(B, heads, T, dtype=dtype),
        query.new_empty(kept, dtype=dtype),
    )


@torch.library.impl("moduli::stick_breaking_backward", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor | None,
    drest: Tensor | None,
    rest: Tensor,
    kept: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments: Tensor | None,
    scale: float,
    attend_current: bool,
    least: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = BACKENDS[backend]
    rows, sight = _rows(module, query, key, value, key_mask, segments, attend_current)
    group = rows[0].shape[:3]
    dout = rows[2].new_zeros(1).expand(*query.shape[:3], value.shape[3]) if dout is None else dout
    drest = torch.zeros_like(rest) if drest is None else drest
    dout = dout.to(rows[0].dtype).reshape(*group, value.shape[3])
    drest = drest.reshape(group)
    with fast_fp32(None if query.device.type == "cpu" else False):
        found = module.backward(dout, drest, *rows, rest.view(group), kept, sight, scale)
    # Without gaps, as the shapes that the compiler is told.
    dquery, dkey, dvalue = (
        grad.contiguous().view(t.shape).to(t.dtype)
        for grad, t in zip(found, (query, key, value), strict=True)
    )
    return dquery, dkey, dvalue


@torch.library.register_fake("moduli::stick_breaking_backward")  # type: ignore[untyped-decorator]
def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (t.new_empty(t.shape) for t in args[4:7])
    return query, key, value


def _inside(query: Tensor) -> torch.dtype:
    """The type that is computed in."""
    return torch.promote_types(query.dtype, torch.float32)


def _rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments: Tensor | None,
    attend_current: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], Sight]:
    """Queries [R G T D], keys [R S D] and values [R S Dv] as the backend reads them."""
    B, H, S, _ = key.shape
    dtype = _inside(query) if module is blocked else query.dtype
    q = query.to(dtype).reshape(B * H, query.shape[1] // H, *query.shape[2:])
    k, v = (t.to(dtype).reshape(B * H, *t.shape[2:]).contiguous() for t in (key, value))
    sight = Sight(query.shape[2], S, attend_current, key_mask, segments)
    return (q, k, v), sight.per_head(H)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], output[2], *inputs[:5])
    ctx.rest = inputs[5:9]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: Tensor | None, drest: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * 10
    if dout is not None or drest is not None:
        gradients = torch.ops.moduli.stick_breaking_backward(
            dout, drest, *ctx.saved_tensors, *ctx.rest
        )
        for i in range(3):
            found[i] = gradients[i] if ctx.needs_input_grad[i] else None
    return tuple(found)


torch.library.register_autograd("moduli::stick_breaking", _differentiate, setup_context=_setup)


register_refusals("moduli::stick_breaking", _WHAT, _INSTEAD)
