"""The kernel "triton": gather, products and activation fused, for small experts on a GPU.

An expert of few neurons costs more in moving rows of width D than in arithmetic. Here the first
product reads tokens where they are and writes activations only; the second writes every slot's row,
weighted, where the token's rows lie together, and they are summed in their order. Backward follows
the same plan. Of S x D numbers there is one buffer at a time, and none is kept for backward.

Nothing waits for the device (see `order`), no two programs write the same number, and products are
accumulated in float32. The device code is in `fused_device`. Tiles are of a fixed size: nobody has
tuned them.

Letters: T tokens, D width, E experts, e neurons of one expert, R rows of its first matrices, K
experts per token, S = T K slots.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moduli.experts.ffn import Fused, StackedFFN
from moduli.experts.kernels.activations import Known
from moduli.experts.kernels.blocks import gradients, rows_of
from moduli.experts.kernels.combine import expert_gates
from moduli.experts.kernels.grouped import not_alike
from moduli.experts.kernels.order import Order, order
from moduli.routing import Routing

ROWS, COLS, STEP = 64, 64, 32  # of a tile: rows, columns, and what a product takes in at once
LEAST = 16  # of any side of a tile, for tensor cores


def refuses(x: Tensor, experts: StackedFFN) -> str | None:
    """Why the Triton kernel cannot compute these experts, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"Triton does not compile for {x.device.type}; to try the kernel there, very slowly, "
            "set TRITON_INTERPRET=1 before Python starts"
        )
    if x.device.type != "cuda" and x.dtype == torch.bfloat16:
        return "Triton's interpreter has no products in torch.bfloat16"
    return not_alike(x, experts)


def forward(
    x: Tensor, routing: Routing, experts: StackedFFN, act: Known, z: Tensor | None
) -> Tensor:
    """The output [T, D]; pre-activations [S, R], gate before up, go to `z`."""
    job = _job(routing, len(experts))
    e, width = experts.sizes[0], x.shape[1]
    gate, up = _halves(experts.first, experts.up, experts.fused)
    gate_bias, up_bias = _halves(experts.first_bias, experts.up_bias, experts.fused)
    h = x.new_empty(job.slots, e)
    _launch(
        "first", job.grid(e), x, gate, up, gate_bias, up_bias, z, h,
        job.order.tokens, *job.tiles, len(experts), width, e,
        *x.stride(), *_steps(gate, 3), *_steps(up, 3),
        *_steps(gate_bias, 2), *_steps(up_bias, 2), rows_of(experts)[0],
        ACT=act.name, **_tile(e),
    )  # fmt: skip
    weights = routing.weights.contiguous()
    return _to_tokens(job, routing, (h, experts.second), None, experts.out_bias, weights)


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
    job = _job(routing, len(experts))
    e, (_, width) = experts.sizes[0], x.shape
    rows = rows_of(experts)[0]
    dz, h = x.new_empty(job.slots, rows), x.new_empty(job.slots, e)
    grid = job.grid(e)
    dot = torch.zeros(job.slots, grid[1], device=x.device)
    _launch(
        "hidden_gradient", grid,
        dy, experts.second, z, routing.weights.contiguous(), dz, h, dot,
        job.order.tokens, job.order.slots, *job.tiles, len(experts), width, e,
        *dy.stride(), *experts.second.stride(), rows,
        GATED=experts.gated, ACT=act.name, **_tile(e),
    )  # fmt: skip
    dz_gate, dz_up = (dz[:, :e], dz[:, e:]) if experts.gated else (dz, None)
    grads = gradients(experts, wanted[2:7])
    first, first_bias, up, up_bias, second = grads.whole
    gates, ups = _halves(first, up, experts.fused), _halves(first_bias, up_bias, experts.fused)
    for a, out, sums in zip((dz_gate, dz_up), gates, ups, strict=True):
        if a is not None:
            _outer(job, a, x, out, sums)
    _outer(job, h, dy, second, None)
    dx = None
    if wanted[0]:
        gate_rows, up_rows = _halves(experts.first, experts.up, experts.fused)
        assert gate_rows is not None
        other = None if dz_up is None or up_rows is None else (dz_up, up_rows)
        dx = _to_tokens(job, routing, (dz_gate, gate_rows), other, None, None)
    dweights = None
    if wanted[1]:
        dweights = dot.sum(dim=1).view(routing.weights.shape)
        if experts.out_bias is not None:
            own = (dy @ experts.out_bias.to(dy.dtype).T).gather(1, routing.experts)
            dweights += own if routing.active is None else own.where(routing.active, 0)
        dweights = dweights.to(routing.weights.dtype)
    dout = None
    if experts.out_bias is not None and wanted[7]:
        dout = expert_gates(routing, len(experts)).to(dy.dtype).T @ dy
    return [dx, dweights, *grads.whole, dout]


def saved_size(tokens: int, top_k: int, experts: StackedFFN) -> int:
    """Numbers to keep for backward: R per slot."""
    return tokens * top_k * rows_of(experts)[0]


@dataclass(frozen=True)
class _Job:
    """The order of slots, cut into tiles of rows of one expert each.

    Attributes:
        order: of slots.
        starts: the place where the rows of each expert begin.
        tiles: expert of every tile (E: nothing to do), its first row, and where experts end.
    """

    order: Order
    starts: Tensor
    tiles: tuple[Tensor, Tensor, Tensor]

    @property
    def slots(self) -> int:
        return self.order.slots.shape[0]

    def grid(self, columns: int) -> tuple[int, int]:
        return self.tiles[0].shape[0], -(-columns // _tile(columns)["COLS"])


def _job(routing: Routing, num_experts: int) -> _Job:
    todo = order(routing, num_experts)
    counts = todo.ends.diff(prepend=todo.ends.new_zeros(1))
    tiles = (counts + ROWS - 1) // ROWS
    last = tiles.cumsum(0)
    # Every expert may leave one tile partly empty; how many do, only the device knows.
    most = todo.slots.shape[0] // ROWS + num_experts
    every = torch.arange(most, device=last.device)
    expert = torch.searchsorted(last, every, right=True)
    known = expert.clamp(max=num_experts - 1)
    starts = todo.ends - counts
    row = starts[known] + (every - last[known] + tiles[known]) * ROWS
    return _Job(todo, starts, (expert, row, todo.ends))


def _to_tokens(
    job: _Job,
    routing: Routing,
    product: tuple[Tensor, Tensor],
    another: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """The sum over every token's slots of rows @ matrix of the expert."""
    (rows, matrix), (more, other) = product, another or (None, None)
    count, inner, width = matrix.shape
    # Rows of slots that are not active stay zero.
    new = rows.new_empty if routing.active is None else rows.new_zeros
    out = new(job.slots, width)
    _launch(
        "second", job.grid(width), rows, matrix, more, other, bias, weights, out,
        job.order.slots, *job.tiles, count, inner, width,
        rows.stride(0), 0 if more is None else more.stride(0),
        *matrix.stride(), *_steps(other, 3), *_steps(bias, 2), **_tile(width),
    )  # fmt: skip
    return out.view(*routing.experts.shape, width).sum(dim=1)


def _outer(job: _Job, rows: Tensor, x: Tensor, out: Tensor | None, sums: Tensor | None) -> None:
    """Gradient of a matrix [E, e, D] from its two sides, and of its bias [E, e]."""
    if out is None:
        if sums is None:
            return
        out = x.new_empty(*sums.shape, x.shape[1])  # a frozen matrix whose bias learns
    count, e, width = out.shape
    tile = {"ROWS": _side(e), "COLS": _side(width), "STEP": STEP}
    grid = (count, -(-e // tile["ROWS"]), -(-width // tile["COLS"]))
    _launch(
        "outer", grid, rows, x, out, sums, job.order.tokens, job.starts, job.order.ends, e, width,
        rows.stride(0), *x.stride(), *out.stride(), *_steps(sums, 2), **tile,
    )  # fmt: skip


def _launch(name: str, grid: tuple[int, ...], first: Tensor, *rest: Any, **constants: Any) -> None:
    """Start programs on the device of the first tensor."""
    from moduli.experts.kernels import fused_device

    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        getattr(fused_device, name)[grid](first, *rest, **constants)


def _tile(columns: int) -> dict[str, Any]:
    return {"ROWS": ROWS, "COLS": _side(columns), "STEP": STEP}


def _side(length: int) -> int:
    """A power of two that covers a short side, or that of a whole tile."""
    return min(COLS, max(LEAST, 1 << (length - 1).bit_length()))


def _steps(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def _halves(
    first: Tensor | None, up: Tensor | None, fused: Fused | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gate and up part of a tensor [E, R, ...]."""
    if first is None or fused is None:
        return first, up
    if fused == "interleaved":
        return first[:, 0::2], first[:, 1::2]
    gate, other = first.chunk(2, dim=1)
    return gate, other
