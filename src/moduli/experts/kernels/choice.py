"""Which kernel "auto" takes.

On CPU the one that the cost model of this machine expects to be the fastest. On other devices, by
rule: `grouped` where it applies and experts are wide enough to gain by it, else `masked`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import native, ops
from moduli.experts.kernels.cost import REPEATS, Shape, costs
from moduli.experts.kernels.eager import Between
from moduli.experts.kernels.registry import KERNELS, unusual
from moduli.routing import Routing

AT_RUN_TIME = "auto"
"""What a compiled graph contains: the operator, which chooses when it knows its operands."""


def choose(x: Tensor, routing: Routing, experts: StackedFFN, between: Between) -> str:
    """Name of the kernel for these operands; `AT_RUN_TIME` while a compiler looks on."""
    if unusual(between) is not None:
        # A compiler cannot follow the loop of "autograd", which asks for the number of rows.
        traced = torch.compiler.is_compiling() and not KERNELS["masked"].refuses(
            x, experts, between
        )
        return "masked" if traced else "autograd"
    if torch.compiler.is_compiling():
        return AT_RUN_TIME
    gradients = ops.wants_gradient(x, routing, experts)
    return fastest(x, routing, experts, gradients, ("native", "loop", "padded", "masked"))


def fastest(
    x: Tensor, routing: Routing, experts: StackedFFN, gradients: bool, among: Sequence[str]
) -> str:
    """The kernel that the cost model expects to be the fastest for a usual activation."""
    slots, count = routing.experts.numel(), len(experts)
    native_can = native.refuses(x, experts) is None
    if native_can and not gradients and slots <= native.FEW * min(slots, count):
        return "native"  # reads the weights where they lie, which nothing else can beat
    able = [name for name in among if name != "native" or native_can]
    if len(set(experts.sizes)) > 1 and "padded" in able:
        able.remove("padded")
    shape = Shape(
        tokens=x.shape[0],
        width=x.shape[1],
        experts=count,
        top_k=routing.experts.shape[1],
        neurons=sum(experts.sizes) / count,
        gated=experts.gated,
    )
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
    # What other processes do to the clock is not the kernel's cost; with threads it cannot be told.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    with torch.set_grad_enabled(gradients):
        for _ in range(REPEATS + 1):
            started = clock()
            y = KERNELS[kernel].run(x, routing, experts, between)
            if gradients:
                y.sum().backward()
            best = min(best, clock() - started)
    return best
