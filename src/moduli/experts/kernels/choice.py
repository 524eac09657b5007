"""Which kernel "auto" takes."""

from __future__ import annotations

from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels.eager import Between
from moduli.experts.kernels.registry import KERNELS
from moduli.routing import Routing


def choose(x: Tensor, routing: Routing, experts: StackedFFN, between: Between) -> str:
    """Name of the kernel for these operands."""
    for name in ("loop", "autograd"):
        if KERNELS[name].refuses(x, experts, between) is None:
            return name
    return "eager"
