"""What a forward pass knew, brought back while its backward runs.

Activation checkpointing computes layers again during the backward, when another forward may have
said something else since: masks, ids, experts that were drawn. A hook on a model's output has the
first word of that pass's backward, before any layer of it is computed again.
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


def recall_in_backward(output: Any, state: Recalled, then: dict[str, Any]) -> None:
    """Have the backward of a model's output call `state.recall(then)` first.

    While a graph is recorded nothing has to be brought back: recomputation is recorded with it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda grad: state.recall(then))
    elif isinstance(output, dict):  # a ModelOutput is one, too
        recall_in_backward(tuple(output.values()), state, then)
    elif isinstance(output, tuple):
        for part in output:
            recall_in_backward(part, state, then)
