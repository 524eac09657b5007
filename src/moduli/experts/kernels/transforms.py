"""What our operators have no derivative for: refused in one place and in the same words.

They have gradients by `backward`, once. Transforms of `torch.func`, forward mode, second
derivatives and `vmap` would fail somewhere inside PyTorch, or give zeros without a word.
"""

from __future__ import annotations

from typing import Any

import torch

from moduli.errors import UnsupportedError


def refuse_transforms(what: str, instead: str) -> None:
    """Raise inside a transform that asks for a derivative; to be called before the operator.

    Args:
        what: is computed, for the message.
        instead: what has all derivatives, or that nothing has.

    Raises:
        UnsupportedError: in a transform of `torch.func` or in forward mode.
    """
    if torch.compiler.is_compiling():
        return
    inner = torch._C._functorch.peek_interpreter_stack()
    backwards = inner is not None and inner.key() == torch._C._functorch.TransformType.Grad
    if backwards or torch.autograd.forward_ad._current_level >= 0:
        raise UnsupportedError(
            f"gradients of {what} come by `backward` only, not by transforms of torch.func nor by "
            f"forward-mode differentiation; {instead}"
        )


def register_refusals(operator: str, what: str, instead: str) -> None:
    """Let an operator and its gradient, `{operator}_backward`, refuse `vmap`, and the gradient
    refuse to be differentiated.

    Args:
        operator: its qualified name.
        what, instead: as of `refuse_transforms`.
    """

    def no_second_derivative(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(f"the gradient of {what} has no gradient of its own; {instead}")

    def no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise UnsupportedError(
            f"{what} cannot be vmapped; make the mapped dimension part of the batch, or {instead}"
        )

    torch.library.register_autograd(f"{operator}_backward", no_second_derivative)
    for name in (operator, f"{operator}_backward"):
        torch.library.register_vmap(name, no_vmap)
