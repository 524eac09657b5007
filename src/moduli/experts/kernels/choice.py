"""Which kernel "auto" takes.

On CPU the one that the cost model of this machine expects to be the fastest. On other devices, by
rule: `grouped` where it applies and experts are wide enough to gain by it, else `masked`.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import native, ops
from moduli.experts.kernels.calibration import clock
from moduli.experts.kernels.cost import PATIENCE, REPEATS, Shape, costs
from moduli.experts.kernels.eager import Between
from moduli.experts.kernels.registry import KERNELS, unusual
from moduli.routing import Routing

AT_RUN_TIME = "auto"
"""What a compiled graph contains: the operator, which chooses when it knows its operands."""


def choose(x: Tensor, routing: Routing, experts: StackedFFN, between: Between) -> str:
    """Name of the kernel for these operands; `AT_RUN_TIME` while a compiler looks on."""
    if unusual(between) is not None:
        if not torch.compiler.is_compiling():
            return "autograd"
        # A compiler cannot follow the loop of "autograd", which asks for the number of rows.
        return "eager" if KERNELS["masked"].refuses(x, experts, between) else "masked"
    if torch.compiler.is_compiling():
        return AT_RUN_TIME
    return fastest(x, routing, experts, ops.wants_gradient(x, routing, experts), masked=True)


def fastest(
    x: Tensor, routing: Routing, experts: StackedFFN, gradients: bool, *, masked: bool
) -> str:
    """The kernel that the cost model expects to be the fastest for a usual activation.

    Args:
        x: tokens.
        routing: of them.
        experts: of a layer.
        gradients: whether somebody may ask for them.
        masked: whether "masked" may be the answer, which is no operator.
    """
    if x.device.type != "cpu":
        return _on_device(x, experts)
    size = (x.shape[0], x.shape[1], experts.sizes, routing.experts.shape[1], experts.gated)
    same = experts.first.dtype == x.dtype
    return fastest_of_size(*size, x.dtype, gradients, masked, same, torch.get_num_threads())


def beats_masking(
    tokens: int, width: int, sizes: tuple[int, ...], top_k: int, *, gated: bool, like: Tensor
) -> bool:
    """Whether computing chosen experts alone should be faster than the dense product, masked.

    Args:
        tokens: T.
        width: D.
        sizes: neurons of every expert.
        top_k: K.
        gated: whether experts have two first matrices.
        like: dtype, device; a gradient is expected wherever gradients are on.
    """
    device = like.device.type
    if device != "cpu":
        return False
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else like.dtype
    found = fastest_of_size(
        tokens, width, sizes, top_k, gated, dtype, torch.is_grad_enabled(), True, True,
        torch.get_num_threads(),
    )  # fmt: skip
    return found != "masked"


@lru_cache(maxsize=4096)
def fastest_of_size(
    tokens: int, width: int, sizes: tuple[int, ...], top_k: int, gated: bool, dtype: torch.dtype,
    gradients: bool, masked: bool, native_may: bool, threads: int,
) -> str:  # fmt: skip
    """`fastest` on CPU, from sizes; `threads` is part of the key only."""
    if dtype not in (torch.float32, torch.bfloat16):
        return "loop"  # float64 and float16 are not worth measuring
    slots, count = tokens * top_k, len(sizes)
    able = ["loop", "padded"] if len(set(sizes)) == 1 else ["loop"]
    if native_may and native.unable(dtype, width) is None:
        if not gradients and slots <= native.FEW * min(slots, count):
            return "native"  # reads the weights where they lie, which nothing else can beat
        able.append("native")
    if masked:
        able.append("masked")
    shape = Shape(tokens, width, count, top_k, sum(sizes) / count, gated)
    return costs(dtype, gradients, able, measure).fastest(able, shape)


def _on_device(x: Tensor, experts: StackedFFN) -> str:
    return "loop"


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
        begun = time.perf_counter()
        for _ in range(REPEATS + 1):
            if time.perf_counter() - begun > PATIENCE and best < float("inf"):
                break
            started = clock()
            y = KERNELS[kernel].run(x, routing, experts, between)
            if gradients:
                y.sum().backward()
            best = min(best, clock() - started)
    return best
