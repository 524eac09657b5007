"""What a forward pass knew, brought back while its backward runs.

Activation checkpointing computes layers again during the backward, when another forward may have
said something else since: masks, ids, experts that were drawn. An identity on a model's output has
in its backward the first word of that pass, before any layer of it is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable


class Recalled:
    """State of a pass that its backward needs again; say in `snapshot` what it is.

    Attributes:
        outside: the state before the backward that runs; None while none does.
    """

    outside: dict[str, Any] | None = None

    def snapshot(self) -> dict[str, Any]:
        """Attributes and their values, now."""
        raise TypeError(f"{type(self).__name__} does not define snapshot()")

    def recall(self, then: dict[str, Any]) -> None:
        """Be as at a snapshot until the backward that runs has ended."""
        if self.outside is None:
            self.outside = self.snapshot()
            Variable._execution_engine.queue_callback(self.end_recall)
        vars(self).update(then)

    def end_recall(self) -> None:
        """Be as before the backward; one that has failed does not say so itself."""
        if self.outside is not None:
            vars(self).update(self.outside)
            self.outside = None


def recalling(output: Any, state: Recalled, then: dict[str, Any]) -> Any:
    """A model's output, whose backward calls `state.recall(then)` first.

    While a graph is recorded nothing has to be brought back: recomputation is recorded with it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return output
    if isinstance(output, dict):  # a ModelOutput is one, too
        for key, value in output.items():
            output[key] = recalling(value, state, then)
        return output
    if isinstance(output, tuple):
        parts = [recalling(value, state, then) for value in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    if isinstance(output, Tensor) and output.requires_grad:
        return _Recall.apply(output, state, then)  # type: ignore[no-untyped-call]
    return output


class _Recall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Recalled, then: dict[str, Any]) -> Tensor:
        ctx.state, ctx.then = state, then
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.state.recall(ctx.then)
        return grad, None, None
