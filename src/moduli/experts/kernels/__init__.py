"""How experts are computed: plain functions with one signature, in one registry.

A kernel is `kernel(x, routing, experts, activation) -> y`; `eager` is the readable reference that
every other one is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moduli.errors import UnknownNameError, nearest
from moduli.experts.ffn import ExpertFFN
from moduli.experts.kernels.eager import eager
from moduli.experts.kernels.loop import loop
from moduli.routing import Routing

Activation = Callable[[Tensor], Tensor]
Kernel = Callable[[Tensor, Routing, ExpertFFN, Activation], Tensor]
KernelName = Literal["eager", "loop"]

KERNELS: dict[str, Kernel] = {"eager": eager, "loop": loop}


def run_experts(
    x: Float[Tensor, "T D"],
    routing: Routing,
    experts: ExpertFFN,
    activation: Activation,
    kernel: str = "loop",
) -> Float[Tensor, "T D"]:
    """Sum over the active slots of every token of weight * expert(token).

    Raises:
        UnknownNameError: there is no kernel of that name.
    """
    if kernel not in KERNELS:
        raise UnknownNameError(f"there is no kernel {kernel!r}. {nearest(kernel, KERNELS)}")
    return KERNELS[kernel](x, routing, experts, activation)
