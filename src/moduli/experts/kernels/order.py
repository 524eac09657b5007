"""The order of slots by expert, worked out where the tokens are.

`plan` waits for the device, to know how many rows each expert has. Nothing here does: all shapes
follow from T, K and E alone, slots that are not active are sorted behind the others, and what an
expert has is a tensor that only kernels read. So it can be traced, compiled and captured in a CUDA
graph.

Letters: T tokens, D width, E experts, K experts per token, S = T K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moduli.routing import Routing


@dataclass(frozen=True)
class Order:
    """Slots in the order of their experts, those that are not active last.

    Attributes:
        slots: which slot stands at each place.
        tokens: which token.
        place: where each slot went.
        experts: expert at each place; E behind the last active slot.
        ends: the place where the rows of each expert end.
        active: which places hold an active slot; None if all do.
    """

    slots: Int[Tensor, " S"]
    tokens: Int[Tensor, " S"]
    place: Int[Tensor, "T K"]
    experts: Int[Tensor, " S"]
    ends: Int[Tensor, " E"]
    active: Bool[Tensor, " S"] | None

    def spread(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "S D"]:
        """The row of every slot's token."""
        rows: Tensor = _Spread.apply(x, self.tokens, self.place)  # type: ignore[no-untyped-call]
        return rows

    def collect(self, rows: Float[Tensor, "S D"]) -> Float[Tensor, "T D"]:
        """The sum of every token's rows."""
        y: Tensor = _Collect.apply(rows, self.tokens, self.place)  # type: ignore[no-untyped-call]
        return y


def order(routing: Routing, num_experts: int) -> Order:
    """Sort the slots of a routing by expert, within an expert by token."""
    ids = routing.experts.reshape(-1).int()
    if routing.active is not None:
        ids = torch.where(routing.active.reshape(-1), ids, num_experts)
    experts, slots = ids.sort(stable=True)
    every = torch.arange(num_experts, dtype=torch.int32, device=ids.device)
    place = torch.empty_like(slots)
    place = place.scatter(0, slots, torch.arange(slots.shape[0], device=ids.device))
    return Order(
        slots=slots,
        tokens=slots // routing.experts.shape[1],
        place=place.view(routing.experts.shape),
        experts=experts,
        # What is sorted needs no histogram, and so no atomic additions.
        ends=torch.searchsorted(experts, every, right=True, out_int32=True),
        active=None if routing.active is None else experts < num_experts,
    )


class _Spread(torch.autograd.Function):
    """x[tokens]; unlike that of indexing, its gradient is summed in one order."""

    @staticmethod
    def forward(x: Tensor, tokens: Tensor, place: Tensor) -> Tensor:
        return x.index_select(0, tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Collect.apply(grad, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]


class _Collect(torch.autograd.Function):
    """The adjoint of `_Spread`, which is the gradient of this one."""

    @staticmethod
    def forward(rows: Tensor, tokens: Tensor, place: Tensor) -> Tensor:
        own = rows.index_select(0, place.flatten())
        return own.view(*place.shape, rows.shape[1]).sum(dim=1)  # short types in float32

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]
