"""Activations that kernels compute themselves, with their derivatives.

A kernel that saves pre-activations only must know the derivative; what is not in the table is left
to autograd (`moduli.experts.kernels.loop`). h stands for activations, z for pre-activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_aten = torch.ops.aten


@dataclass(frozen=True)
class Known:
    """One activation.

    Attributes:
        name: under which operators and the native kernel know it.
        forward: (z, out) -> out, elementwise; out may be z.
        backward: (gradient of h, z, out) -> out, the gradient of z.
    """

    name: str
    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _quick(z: Tensor, out: Tensor) -> Tensor:
    return torch.mul(z, torch.sigmoid(1.702 * z), out=out)


def _quick_backward(grad: Tensor, z: Tensor, out: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * z)
    return torch.mul(grad, s + 1.702 * z * s * (1 - s), out=out)


def _squared(z: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(z, 0, out=out).square_()


KNOWN: dict[str, Known] = {
    known.name: known
    for known in (
        Known(
            "gelu",
            lambda z, out: _aten.gelu.out(z, out=out),
            lambda grad, z, out: _aten.gelu_backward.grad_input(grad, z, grad_input=out),
        ),
        Known(
            "gelu_tanh",
            lambda z, out: _aten.gelu.out(z, approximate="tanh", out=out),
            lambda grad, z, out: _aten.gelu_backward.grad_input(
                grad, z, approximate="tanh", grad_input=out
            ),
        ),
        Known("quick_gelu", _quick, _quick_backward),
        Known(
            "silu",
            lambda z, out: _aten.silu.out(z, out=out),
            lambda grad, z, out: _aten.silu_backward.grad_input(grad, z, grad_input=out),
        ),
        Known(
            "relu",
            lambda z, out: torch.clamp_min(z, 0, out=out),
            lambda grad, z, out: _aten.threshold_backward.grad_input(grad, z, 0, grad_input=out),
        ),
        Known(
            "relu_squared",
            _squared,
            lambda grad, z, out: torch.mul(2 * grad, z.clamp_min(0), out=out),
        ),
    )
}

# Modules by exact type, those of transformers by the name of their class, so that transformers
# need not be imported. Its formulas for the tanh form of GELU differ in rounding only.
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu"}
_TRANSFORMERS = {
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu_squared",
    "SiLUActivation": "silu",
}
_FUNCTIONS: dict[Any, str] = {
    F.gelu: "gelu",
    torch.nn.functional.gelu: "gelu",
    F.silu: "silu",
    F.relu: "relu",
    torch.relu: "relu",
}


def known(activation: Callable[[Tensor], Tensor]) -> Known | None:
    """The table's entry for an activation, or None if it is not in the table."""
    name = _name(activation)
    return None if name is None else KNOWN[name]


def _name(activation: Callable[[Tensor], Tensor]) -> str | None:
    if isinstance(activation, nn.Module) and (
        activation._forward_hooks
        or activation._forward_pre_hooks
        or activation._backward_hooks
        or activation._backward_pre_hooks
        or "forward" in vars(activation)
    ):
        return None  # whoever hooked it wants to see what passes, whoever patched it to change it
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    kind: type = type(activation)
    if kind in _MODULES:
        return _MODULES[kind]
    if kind.__module__ == "transformers.activations":
        if kind.__name__ == "GELUActivation":
            inner: Any = activation
            return _FUNCTIONS.get(inner.act)
        return _TRANSFORMERS.get(kind.__name__)
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # not hashable
        return None
