"""All experts in one call per matrix: `torch.nn.functional.grouped_mm`.

Tokens are sorted by expert on their own device; nobody waits for the counts (see `order`). Weights
are read where they are, and every sum has one order: the same input gives the same bits, forward
and backward. Made of differentiable operations, so that it takes any activation, gating rule or
norm of the outputs.

torch computes grouped products in one GPU kernel for bfloat16 on devices of capability 9.0 and
10.x. Elsewhere on CUDA it runs a loop on the host, which waits for the offsets, so that a CUDA
graph cannot capture it; and it traces grouped products for the compiler in bfloat16 only.

Letters: T tokens, D width, E experts, e neurons of one expert, R rows of its first matrices, S
slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels.blocks import rows_of
from moduli.experts.kernels.eager import Between, activate
from moduli.experts.kernels.order import Order, order
from moduli.routing import Routing

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MATRICES = ("first", "up", "second")
ALIGNMENT = 16  # bytes


def grouped(
    x: Float[Tensor, "T D"], routing: Routing, experts: StackedFFN, between: Between
) -> Float[Tensor, "T D"]:
    """The same as `eager`, computing active slots only."""
    todo = order(routing, len(experts))
    rows = todo.spread(x)
    z = _bias(_product(rows, experts.first.mT, todo), experts.first_bias, todo)
    if experts.up is None:
        hidden = activate(z, experts, between)
    else:
        up = _bias(_product(rows, experts.up.mT, todo), experts.up_bias, todo)
        if between.gating is None:
            hidden = between.activation(z) * up
        else:
            hidden = between.gating(torch.cat([z, up], dim=-1))
    weights = routing.weights.to(x.dtype)
    if routing.active is not None:
        weights = weights.where(routing.active, 0)
    own = weights.reshape(-1, 1).index_select(0, todo.slots)
    if between.after is None:  # weigh the shorter rows
        y = todo.collect(_product(hidden * own, experts.second, todo))
        if experts.out_bias is None:
            return y
        return y + routing.gates(len(experts)).to(y.dtype) @ experts.out_bias.to(y.dtype)
    out = _bias(_product(hidden, experts.second, todo), experts.out_bias, todo)
    return todo.collect(between.after(out) * own)


def refuses(x: Tensor, experts: StackedFFN) -> str | None:
    """Why a grouped product cannot compute these experts, or None."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped products; 2.10 and newer have"
    reason = not_alike(x, experts)
    if reason is not None:
        return reason
    if x.dtype != torch.bfloat16 and torch.compiler.is_compiling():
        return f"torch compiles grouped products in bfloat16 only, and these are {x.dtype}"
    numbers = ALIGNMENT // x.element_size()
    widths = {"width": x.shape[1], "neurons per expert": experts.sizes[0]}
    for name, width in {**widths, "rows of the first matrix": rows_of(experts)[0]}.items():
        if width % numbers:
            return (
                f"grouped products need rows of a multiple of {ALIGNMENT} bytes, {numbers} numbers "
                f"of {x.dtype}, and its {name} are {width}"
            )
    for name in MATRICES:
        weights = getattr(experts, name)
        if weights is not None and not _aligned(weights, numbers):
            return (
                f"grouped products need one unit stride and the others multiples of {ALIGNMENT} "
                f"bytes, and those of {name} are {weights.stride()}"
            )
    return None


def not_alike(x: Tensor, experts: StackedFFN) -> str | None:
    """What keeps experts from being computed together, or None."""
    if experts.first.dim() != 3 or len(set(experts.sizes)) > 1:
        return "its experts differ in size"
    if x.dtype not in DTYPES:
        return f"it computes in {', '.join(map(str, DTYPES))}, and these are {x.dtype}"
    for name in MATRICES:
        weights = getattr(experts, name)
        if weights is not None and weights.dtype != x.dtype:
            return f"its tokens are {x.dtype} and {name} is {weights.dtype}"
    return None


def _aligned(weights: Tensor, numbers: int) -> bool:
    whole, (far, near) = weights.stride()[0], sorted(weights.stride()[1:], reverse=True)
    start = 0 if torch.compiler.is_compiling() else weights.storage_offset()  # not traceable
    return near == 1 and all(step % numbers == 0 for step in (whole, far, start))


def _product(rows: Tensor, weights: Tensor, todo: Order) -> Tensor:
    """rows[s] @ weights[expert of s].

    grouped_mm leaves rows of no expert unwritten, in its result and in the gradient of its
    operand; where there are some, they are made zero both ways.
    """
    y = F.grouped_mm(_zero_inactive(rows, todo).contiguous(), weights, offs=todo.ends)
    return _zero_inactive(y, todo)


def _zero_inactive(rows: Tensor, todo: Order) -> Tensor:
    return rows if todo.active is None else rows.where(todo.active[:, None], 0)


def _bias(rows: Tensor, bias: Tensor | None, todo: Order) -> Tensor:
    """Every expert's bias on its rows.

    As a product with zeros and ones, whose gradient is a product too; that of indexing adds the
    rows of an expert one by one, or in no fixed order.
    """
    if bias is None:
        return rows
    every = torch.arange(bias.shape[0], dtype=torch.int32, device=rows.device)
    chosen = (todo.experts[:, None] == every).to(rows.dtype)
    return torch.addmm(rows, chosen, bias.to(rows.dtype))
