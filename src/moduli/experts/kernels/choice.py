"""Which kernel "auto" takes."""

from __future__ import annotations

import torch
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels.eager import Between
from moduli.experts.kernels.registry import KERNELS
from moduli.routing import Routing


def choose(x: Tensor, routing: Routing, experts: StackedFFN, between: Between) -> str:
    """Name of the kernel for these operands."""
    # A compiler cannot follow the loop of "autograd", which asks for the number of rows.
    traced = torch.compiler.is_compiling()
    for name in ("loop", "masked") if traced else ("loop", "autograd"):
        if KERNELS[name].refuses(x, experts, between) is None:
            return name
    return "eager"
