"""Expert by expert in reused buffers: the cost of K of E experts, and little more, on CPU.

Forward, for expert i with the tokens t of its slots:

    z = x[t] W1_i^T + b1_i        kept for backward when gradients are wanted
    o = act(z) W2_i               written into its rows of one buffer [S, D]
    y = embedding_bag(o)          sums each token's slots with their weights

Backward needs x, z and the routing only: x[t] and dy[t] are gathered again. With g = dy[t],
dh = g W2_i^T is the gradient of an expert's activations at weight 1, so that the gradient of the
combine weight is rowsum(dh * h) without any stored output (the identity SonicMoE uses,
arXiv 2512.14080). Weight gradients are written into slices of one tensor shaped like the weights.

Letters: T tokens, D width, E experts, e neurons of one expert, R rows of its first matrices (e, or
2e of gated experts), K experts per token, S active slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels.activations import Known
from moduli.experts.kernels.blocks import (
    Blocks,
    activate_into,
    blocks,
    differentiate_into,
    gradients,
    rows_of,
)
from moduli.experts.kernels.combine import combine, expert_gates
from moduli.experts.kernels.plan import plan
from moduli.experts.kernels.workspace import take
from moduli.routing import Routing

# Rows of an expert are rounded up to this, since the product library builds code for every number
# of rows it meets. Rows beyond an expert's own are computed and never read.
ROWS = 32


def forward(
    x: Tensor, routing: Routing, experts: StackedFFN, act: Known, z: Tensor | None
) -> Tensor:
    """The output [T, D]; pre-activations [S, R] go to `z`, expert after expert."""
    todo = plan(routing.experts, routing.active, len(experts))
    total, most = len(todo.slots), _padded(max(todo.counts))
    out = take("out", total + ROWS, x.shape[1], like=x)
    gathered = take("x", most, x.shape[1], like=x)
    start = used = 0
    for part, count, width in zip(blocks(experts), todo.counts, rows_of(experts), strict=True):
        if count == 0:
            continue
        assert part.second is not None
        rows, e = _padded(count), part.second.shape[0]
        torch.index_select(x, 0, todo.tokens[start : start + count], out=gathered[:count])
        if z is None:
            pre = take("z", rows, width, like=x)
        else:  # rows beyond `count` are overwritten by the next expert
            pre = z[used : used + rows * width].view(rows, width)
        _first(gathered[:rows], part, pre)
        hidden = activate_into(pre, experts, act, take("h", rows, e, like=x))
        torch.mm(hidden, part.second, out=out[start : start + rows])
        start, used = start + count, used + count * width
    out[total] = 0  # where slots that are not active point
    if z is not None:
        z[used:] = 0
    y = combine(out[: total + 1], todo.place, routing.weights)
    if experts.out_bias is not None:
        y.addmm_(expert_gates(routing, len(experts)).to(y.dtype), experts.out_bias)
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
    total, most = len(todo.slots), _padded(max(todo.counts))
    grads = gradients(experts, wanted[2:7])
    dx_rows = take("out", total + ROWS, x.shape[1], like=x)
    xs, gs = (take(name, most, x.shape[1], like=x) for name in ("x", "g"))
    weights = routing.weights.reshape(-1).index_select(0, todo.slots).to(x.dtype)
    dweights = torch.zeros_like(routing.weights, memory_format=torch.contiguous_format)
    start = used = 0
    widths = rows_of(experts)
    for i, (part, grad) in enumerate(zip(blocks(experts), grads.parts, strict=True)):
        count, width = todo.counts[i], widths[i]
        if count == 0:
            grad.zero_()
            continue
        assert part.first is not None
        assert part.second is not None
        rows, e = _padded(count), part.second.shape[0]
        place = slice(start, start + count)
        for buffer, source in ((xs, x), (gs, dy)):
            torch.index_select(source, 0, todo.tokens[place], out=buffer[:count])
            buffer[count:rows] = 0  # they enter products over rows
        x_rows, g_rows = xs[:rows], gs[:rows]
        pre = z[used : used + rows * width].view(rows, width)
        gate = take("gate", rows, e, like=x) if experts.gated else None
        hidden = activate_into(pre, experts, act, take("h", rows, e, like=x), gate)
        dh = torch.mm(g_rows, part.second.T, out=take("dh", rows, e, like=x))
        if wanted[1]:
            own = (dh[:count] * hidden[:count]).sum(dim=1)
            if experts.out_bias is not None:
                own = own + gs[:count] @ experts.out_bias[i]
            dweights.view(-1)[todo.slots[place]] = own.to(dweights.dtype)
        scale = take("scale", rows, 1, like=x)
        scale[:count, 0], scale[count:] = weights[place], 0
        dh.mul_(scale)
        if grad.second is not None:
            torch.mm(hidden.mul_(scale).T, g_rows, out=grad.second)
        dpre = take("dz", rows, width, like=x)
        dz_gate, dz_up = differentiate_into(dh, pre, experts, act, gate, dpre)
        dx = dx_rows[start : start + rows]
        start, used = start + count, used + count * width
        dz_first = dpre if part.up is None else dz_gate
        _into(dz_first, x_rows, grad.first, grad.first_bias)
        if wanted[0]:
            torch.mm(dz_first, part.first, out=dx)
        if part.up is not None and dz_up is not None:
            _into(dz_up, x_rows, grad.up, grad.up_bias)
            if wanted[0]:
                dx.addmm_(dz_up, part.up)
    dx_rows[total] = 0
    dx_all = combine(dx_rows[: total + 1], todo.place, None) if wanted[0] else None
    dout = None
    if experts.out_bias is not None and wanted[7]:
        dout = expert_gates(routing, len(experts)).to(dy.dtype).T @ dy
    return [dx_all, dweights if wanted[1] else None, *grads.whole, dout]


def _padded(count: int) -> int:
    return -(-count // ROWS) * ROWS


def _first(x: Tensor, part: Blocks, pre: Tensor) -> None:
    """Pre-activations of one expert into `pre` [n, R]."""
    assert part.first is not None
    _linear(x, part.first, part.first_bias, pre[:, : part.first.shape[0]])
    if part.up is not None:
        _linear(x, part.up, part.up_bias, pre[:, part.first.shape[0] :])


def _linear(x: Tensor, rows: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, rows.T, out=out)
    else:  # in one step, so that short types are rounded once, as `F.linear` does
        torch.addmm(bias, x, rows.T, out=out)


def _into(dz: Tensor, x: Tensor, grad: Tensor | None, grad_bias: Tensor | None) -> None:
    """Gradients of one linear map into their slices."""
    if grad is not None:
        torch.mm(dz.T, x, out=grad)
    if grad_bias is not None:
        torch.sum(dz, dim=0, out=grad_bias)
