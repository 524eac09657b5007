"""All experts in one batched product, each padded to the busiest one's number of rows.

A few large calls instead of several per expert: for few tokens and many narrow experts of about
equal load. Its cost follows the busiest expert, so a skewed routing is
sent to `loop`, which keeps the same numbers for backward.

Letters: T tokens, D width, E experts, e neurons of one expert, R rows of its first matrices, K
experts per token, n rows of the busiest expert (padded), S active slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import loop
from moduli.experts.kernels.activations import Known
from moduli.experts.kernels.blocks import activate_into, differentiate_into, gradients, rows_of
from moduli.experts.kernels.combine import combine, expert_gates
from moduli.experts.kernels.plan import Plan, plan
from moduli.experts.kernels.workspace import take
from moduli.routing import Routing

ROWS = 16
MAX_PADDING = 1.5  # rows computed over rows used


def forward(
    x: Tensor, routing: Routing, experts: StackedFFN, act: Known, z: Tensor | None
) -> Tensor:
    """The output [T, D]; pre-activations [S, R] go to `z`, expert after expert."""
    todo = plan(routing.experts, routing.active, len(experts))
    if _skewed(todo):
        return loop.forward(x, routing, experts, act, z)
    n, rows = _grid(todo)
    count = len(experts)
    xs = _gather(x, todo, rows, n, "x")
    pre = take("z", count, n, max(rows_of(experts)), like=x)
    _first(xs, experts, pre)
    if z is not None:
        kept = z.view(-1, pre.shape[2])
        torch.index_select(pre.flatten(0, 1), 0, rows, out=kept[: len(rows)])
    hidden = activate_into(pre, experts, act, take("h", count, n, experts.sizes[0], like=x))
    out = take("out", count * n + 1, x.shape[1], like=x)
    torch.bmm(hidden, _plain(experts.second, "second"), out=out[:-1].view(count, n, -1))
    out[-1] = 0  # where slots that are not active point
    y = combine(out, _places(todo, rows, count * n), routing.weights)
    if experts.out_bias is not None:
        y.addmm_(expert_gates(routing, count).to(y.dtype), experts.out_bias)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    routing: Routing,
    experts: StackedFFN,
    act: Known,
    z: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weights, first, first_bias, up, up_bias, second, out_bias, where wanted."""
    todo = plan(routing.experts, routing.active, len(experts))
    if _skewed(todo):
        return loop.backward(dy, x, routing, experts, act, z, wanted)
    n, rows = _grid(todo)
    count, e = len(experts), experts.sizes[0]
    grads = gradients(experts, wanted[2:7])
    first, first_bias, up, up_bias, second = grads.whole
    xs, gs = _gather(x, todo, rows, n, "x"), _gather(dy, todo, rows, n, "g")
    pre = take("z", count, n, max(rows_of(experts)), like=x).zero_()
    pre.flatten(0, 1).index_copy_(0, rows, z.view(-1, pre.shape[2])[: len(rows)])
    gate = take("gate", count, n, e, like=x) if experts.gated else None
    hidden = activate_into(pre, experts, act, take("h", count, n, e, like=x), gate)
    dh = torch.bmm(gs, _plain(experts.second, "second").mT, out=take("dh", count, n, e, like=x))
    dweights = None
    if wanted[1]:
        own = (dh * hidden).sum(dim=-1)
        if experts.out_bias is not None:
            own = own + torch.bmm(gs, experts.out_bias[:, :, None])[..., 0]
        dweights = torch.zeros_like(routing.weights, memory_format=torch.contiguous_format)
        dweights.view(-1)[todo.slots] = own.view(-1)[rows].to(dweights.dtype)
    scale = take("scale", count * n, 1, like=x).zero_()
    scale[rows, 0] = routing.weights.reshape(-1)[todo.slots].to(x.dtype)
    scale = scale.view(count, n, 1)
    dh.mul_(scale)
    if second is not None:
        _product_into(second, hidden.mul_(scale).mT, gs)
    dpre = take("dz", *pre.shape, like=x)
    dz_gate, dz_up = differentiate_into(dh, pre, experts, act, gate, dpre)
    dz_first = dpre if experts.up is None else dz_gate
    _into(dz_first, xs, first, first_bias)
    dx = take("out", count * n + 1, x.shape[1], like=x)
    dx_rows = dx[:-1].view(count, n, -1)
    if wanted[0]:
        torch.bmm(dz_first, _plain(experts.first, "first"), out=dx_rows)
    if experts.up is not None and dz_up is not None:
        _into(dz_up, xs, up, up_bias)
        if wanted[0]:
            dx_rows.baddbmm_(dz_up, _plain(experts.up, "first"))
    dx[-1] = 0
    dx_all = combine(dx, _places(todo, rows, count * n), None) if wanted[0] else None
    dout = None
    if experts.out_bias is not None and wanted[7]:
        dout = expert_gates(routing, count).to(dy.dtype).T @ dy
    return [dx_all, dweights, *grads.whole, dout]


def _skewed(todo: Plan) -> bool:
    """Whether so many rows would be padding that the loop over experts is the better way."""
    return max(todo.counts) * len(todo.counts) > MAX_PADDING * max(
        len(todo.slots), ROWS * len(todo.counts)
    )


def _grid(todo: Plan) -> tuple[int, Tensor]:
    """Rows per expert, and the row [S] of every slot among those of all experts."""
    n = max(ROWS, -(-max(todo.counts) // ROWS) * ROWS)
    device = todo.slots.device
    starts, skipped = [], 0
    for i, count in enumerate(todo.counts):
        starts.append(i * n - skipped)
        skipped += count
    offset = torch.tensor(starts, device=device).repeat_interleave(
        torch.tensor(todo.counts, device=device), output_size=len(todo.slots)
    )
    return n, offset + torch.arange(len(todo.slots), device=device)


def _gather(x: Tensor, todo: Plan, rows: Tensor, n: int, name: str) -> Tensor:
    count = len(todo.counts)
    buffer = take(name, count * n, x.shape[1], like=x).zero_()
    buffer.index_copy_(0, rows, x.index_select(0, todo.tokens))
    return buffer.view(count, n, -1)


def _places(todo: Plan, rows: Tensor, nowhere: int) -> Tensor:
    """Row of every slot [T, K]; `nowhere` for those that are not active."""
    return torch.cat([rows, rows.new_tensor([nowhere])])[todo.place]


def _first(x: Tensor, experts: StackedFFN, pre: Tensor) -> None:
    width = experts.first.shape[1]
    for rows, bias, out in (
        (experts.first, experts.first_bias, pre[..., :width]),
        (experts.up, experts.up_bias, pre[..., width:]),
    ):
        if rows is not None:
            columns = _plain(rows, "first").mT
            if bias is None:
                torch.bmm(x, columns, out=out)
            else:  # in one step, so that short types are rounded once, as `F.linear` does
                torch.baddbmm(bias[:, None], x, columns, out=out)


def _plain(weights: Tensor, name: str) -> Tensor:
    """The weights of all experts without gaps; batched products of other layouts may be computed
    by reference code, far slower than the copy."""
    if weights.is_contiguous():
        return weights
    return take(name, *weights.shape, like=weights).copy_(weights)


def _product_into(grad: Tensor, a: Tensor, b: Tensor) -> None:
    if grad.is_contiguous():
        torch.bmm(a, b, out=grad)
    else:
        grad.copy_(torch.bmm(a, b, out=take("grad", *grad.shape, like=grad)))


def _into(dz: Tensor, x: Tensor, grad: Tensor | None, grad_bias: Tensor | None) -> None:
    if grad is not None:
        _product_into(grad, dz.mT, x)
    if grad_bias is not None:
        torch.sum(dz, dim=1, out=grad_bias)
