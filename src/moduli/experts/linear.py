"""One matrix per expert, on rows that are sorted by expert.

    y_s = x_s W_e   for every slot s of expert e

It is what experts need that are not whole FFNs, such as the query and output projections of
attention experts. The matrices may come in several parts, one after the other by expert, so that
some can be frozen while others learn; only parts that ask for a gradient get one.

One operator, `moduli::routed_linear`, to compiling and checkpointing. In bfloat16 on CUDA it is one
grouped product, elsewhere a product per expert that has rows.
Letters: S slots, I width in, O width out, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moduli.experts.kernels.order import Order
from moduli.experts.kernels.transforms import refuse_transforms, register_refusals

_WHAT = "routed matrices"
_INSTEAD = "compute rows @ W[e] expert by expert, which is made of differentiable operations"


def routed_linear(
    rows: Float[Tensor, "S I"], weights: Sequence[Float[Tensor, "_ I O"]], order: Order
) -> Float[Tensor, "S O"]:
    """rows[s] @ weights[expert of s].

    Args:
        rows: in the order of `order`.
        weights: matrices of the experts, those of the first experts first.
        order: slots sorted by expert; rows of slots that are not active come out as 0.
    """
    rows, weights = _autocast(rows), list(weights)
    grouped = rows.is_cuda and rows.dtype == torch.bfloat16 and len(weights) == 1
    if (
        grouped
        and order.active is None
        and hasattr(F, "grouped_mm")
        and _aligned(*weights[0].shape)
    ):
        y: Tensor = F.grouped_mm(rows, weights[0].to(rows.dtype), offs=order.ends)
        return y
    refuse_transforms(_WHAT, _INSTEAD)
    if torch.is_grad_enabled() or _watched(rows):
        return torch.ops.moduli.routed_linear(rows, weights, order.ends)  # type: ignore[no-any-return]
    return _products(rows, weights, order.ends)


def _watched(rows: Tensor) -> bool:
    """Whether somebody has to see the operator, whose dispatch takes longer than a token does."""
    return (
        type(rows) is not Tensor
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )


def _aligned(_: int, inner: int, outer: int) -> bool:
    return inner % 8 == 0 and outer % 8 == 0  # rows of multiples of 16 bytes


def _autocast(rows: Tensor) -> Tensor:
    """What autocast would have made of the input of `F.linear`.

    The matrices follow one by one where they are used: all of them would take longer than the
    products of a few tokens, which use few experts.
    """
    device = rows.device.type
    available = torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device) or rows.dtype == torch.float64:
        return rows
    return rows.to(torch.get_autocast_dtype(device))


def _parts(ends: Tensor, weights: Sequence[Tensor]) -> list[tuple[int, int, int, int]]:
    """(part, place in it, first row, row after the last) of every expert that has rows."""
    found, start, expert = [], 0, 0
    bounds = ends.tolist()
    for number, part in enumerate(weights):
        for place in range(part.shape[0]):
            end = bounds[expert]
            if end > start:
                found.append((number, place, start, end))
            start, expert = end, expert + 1
    return found


def _products(rows: Tensor, weights: Sequence[Tensor], ends: Tensor) -> Tensor:
    parts = _parts(ends, weights)
    y = rows.new_empty(rows.shape[0], weights[0].shape[2])
    for number, place, start, end in parts:
        matrix = weights[number][place].to(rows.dtype)
        torch.mm(rows[start:end], matrix, out=y[start:end])
    y[parts[-1][3] if parts else 0 :] = 0
    return y


@torch.library.custom_op(
    "moduli::routed_linear",
    mutates_args=(),
    schema="(Tensor rows, Tensor[] weights, Tensor ends) -> Tensor",
)
def _operator(rows: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    return _products(rows, weights, ends)


@_operator.register_fake
def _fake(rows: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights[0].shape[2])


@torch.library.custom_op(
    "moduli::routed_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor[] weights, Tensor ends, bool[] wanted) -> Tensor[]",
)
def _backward(
    grad: Tensor, rows: Tensor, weights: list[Tensor], ends: Tensor, wanted: list[bool]
) -> list[Tensor]:
    """The gradient of the rows if wanted[0], and of every part that is wanted."""
    parts = _parts(ends, weights)
    grad = grad.contiguous()
    found = []
    if wanted[0]:
        dx = torch.empty_like(rows)
        for number, place, start, end in parts:
            matrix = weights[number][place].to(grad.dtype)
            torch.mm(grad[start:end], matrix.T, out=dx[start:end])
        dx[parts[-1][3] if parts else 0 :] = 0
        found.append(dx)
    for i, want in enumerate(wanted[1:]):
        if want:
            dw = torch.zeros_like(weights[i], memory_format=torch.contiguous_format)
            for number, place, start, end in parts:
                if number == i:
                    _product_into(dw[place], rows[start:end].T, grad[start:end])
            found.append(dw)
    return found


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:  # under autocast
        out.copy_(a @ b)


@_backward.register_fake
def _backward_fake(
    grad: Tensor, rows: Tensor, weights: list[Tensor], ends: Tensor, wanted: list[bool]
) -> list[Tensor]:
    given = zip([rows, *weights], wanted, strict=True)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, want in given if want]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, ends = inputs
    ctx.save_for_backward(rows, ends, *weights)
    ctx.wanted = [rows.requires_grad, *(part.requires_grad for part in weights)]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, ends, *weights = ctx.saved_tensors
    found = iter(torch.ops.moduli.routed_linear_backward(grad, rows, weights, ends, ctx.wanted))
    each = [next(found) if want else None for want in ctx.wanted]
    return each[0], each[1:], None


_operator.register_autograd(_differentiate, setup_context=_setup)


register_refusals("moduli::routed_linear", _WHAT, _INSTEAD)
