"""Which kernel "auto" takes.

On CPU the one that the cost model of this machine expects to be the fastest. On other devices, by
rule: `grouped` where it applies and experts are wide enough to gain by it, else `masked`.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import ops
from moduli.experts.kernels.cost import REPEATS, Shape, costs
from moduli.experts.kernels.eager import Between
from moduli.experts.kernels.registry import KERNELS
from moduli.routing import Routing

ON_CPU = ("native", "loop", "padded", "masked")


def choose(x: Tensor, routing: Routing, experts: StackedFFN, between: Between) -> str:
    """Name of the kernel for these operands."""
    able = [n for n in ON_CPU if KERNELS[n].refuses(x, experts, between) is None]
    if not set(able) - {"masked"}:
        return "masked" if able and torch.compiler.is_compiling() else "autograd"
    shape = Shape(
        tokens=x.shape[0],
        width=x.shape[1],
        experts=len(experts),
        top_k=routing.experts.shape[1],
        neurons=sum(experts.sizes) / len(experts),
        gated=experts.gated,
    )
    gradients = torch.is_grad_enabled() and ops.wants_gradient(x, routing, experts)
    return costs(x.dtype, gradients, able, measure).fastest(able, shape)


def measure(kernel: str, shape: Shape, dtype: torch.dtype, gradients: bool) -> float:
    """Seconds that a kernel takes for a random layer of a shape, at best."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        tensor = torch.randn(*size, generator=generator).to(dtype)
        return tensor.requires_grad_(gradients)

    T, D, E, e = shape.tokens, shape.width, shape.experts, int(shape.neurons)
    experts = StackedFFN(random(E, e, D), random(D, E * e).T.unflatten(0, (E, e)), (e,) * E)
    chosen = torch.rand(T, E, generator=generator).topk(shape.top_k).indices
    routing = Routing(chosen, torch.ones(T, shape.top_k, dtype=dtype))
    x, between = random(T, D), Between(F.gelu)
    best = float("inf")
    with torch.set_grad_enabled(gradients):
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            y = KERNELS[kernel].run(x, routing, experts, between)
            if gradients:
                y.sum().backward()
            best = min(best, time.perf_counter() - started)
    return best
