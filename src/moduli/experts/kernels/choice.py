"""Which kernel "auto" takes.

On CPU the one that the cost model of this machine expects to be the fastest. On other devices, by
rule: `grouped` where the device has it and experts are wide enough to gain by it, else `masked`.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import native
from moduli.experts.kernels.calibration import clock
from moduli.experts.kernels.cost import PATIENCE, REPEATS, Shape, costs
from moduli.experts.kernels.eager import Between
from moduli.experts.kernels.registry import KERNELS, unusual
from moduli.routing import Routing

FUSED_SHARE = 0.4
"""Up to this share of the experts the fused kernel is always better than the dense product."""

AT_RUN_TIME = "auto"
"""What a compiled graph contains: the operator, which chooses when it knows its operands."""


def choose(x: Tensor, routing: Routing, experts: StackedFFN, between: Between) -> str:
    """Name of the kernel for these operands; `AT_RUN_TIME` while a compiler looks on."""
    if x.device.type != "cpu":
        return _on_device(x, experts, between)
    if torch._C._are_functorch_transforms_active():  # `torch.func` wants plain operations
        return "eager" if KERNELS["masked"].refuses(x, experts, between) else "masked"
    if unusual(between) is not None:
        if not torch.compiler.is_compiling():
            return "autograd"
        # A compiler cannot follow the loop of "autograd", which asks for the number of rows.
        return "eager" if KERNELS["masked"].refuses(x, experts, between) else "masked"
    return AT_RUN_TIME if torch.compiler.is_compiling() else fastest(x, routing, experts)


def fastest(x: Tensor, routing: Routing, experts: StackedFFN, *, operator: bool = False) -> str:
    """The kernel that the cost model of this CPU expects to be the fastest, for an activation
    that all know. `operator` leaves out "masked", which is no operator."""
    return fastest_of_size(
        *(x.shape[0], x.shape[1], experts.sizes, routing.experts.shape[1]),
        gated=experts.gated,
        dtype=x.dtype,
        operator=operator,
        native_may=experts.first.dtype == x.dtype,
        threads=torch.get_num_threads(),
    )


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
        like: has the dtype and device of the tokens.
    """
    if top_k >= len(sizes):
        return False
    device = like.device.type
    if device != "cpu":
        return _grouped_pays(like, sizes)
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else like.dtype
    threads = torch.get_num_threads()
    return (
        fastest_of_size(tokens, width, sizes, top_k, gated=gated, dtype=dtype, threads=threads)
        != "masked"
    )


@lru_cache(maxsize=4096)
def fastest_of_size(
    tokens: int,
    width: int,
    sizes: tuple[int, ...],
    top_k: int,
    *,
    gated: bool,
    dtype: torch.dtype,
    threads: int,
    operator: bool = False,
    native_may: bool = True,
) -> str:
    """`fastest`, from sizes. `threads` must be the present number and is part of the key only.

    The answer is the same with gradients and without, and so are the bits of the output: a
    forward that is repeated for checkpointing gives what the first one gave.
    """
    slots, count = tokens * top_k, len(sizes)
    able = ["loop", "padded"] if len(set(sizes)) == 1 else ["loop"]
    fused = native_may and native.unable(dtype, width) is None
    if fused:
        if slots <= native.FEW * min(slots, count):
            return "native"  # reads the weights where they lie, which nothing else can beat
        able.append("native")
    # Whatever was measured while the machine was busy: all neurons cost more than few of them.
    if not operator and not (fused and top_k <= FUSED_SHARE * count):
        able.append("masked")
    shape = Shape(tokens, width, count, top_k, sum(sizes) / count, gated)
    # float64 and float16 are not worth measuring; float32 ranks the others as well.
    measured = dtype if dtype == torch.bfloat16 else torch.float32
    return costs(measured, able, measure).fastest(able, shape)


# By arithmetic only, since nothing could be measured (docs/guide/kernels.md): narrower experts are
# bound by memory on accelerators, and older devices run grouped products one after the other.
MIN_NEURONS = 128
MIN_CAPABILITY = (9, 0)


def _grouped_pays(x: Tensor, sizes: tuple[int, ...]) -> bool:
    return (
        x.device.type == "cuda"
        and x.dtype == torch.bfloat16
        and sum(sizes) >= MIN_NEURONS * len(sizes)
        and torch.cuda.get_device_capability(x.device) >= MIN_CAPABILITY
    )


def _on_device(x: Tensor, experts: StackedFFN, between: Between) -> str:
    """On an accelerator: nothing that waits for it, if possible."""
    able = [n for n in ("grouped", "masked") if KERNELS[n].refuses(x, experts, between) is None]
    if "grouped" in able and ("masked" not in able or _grouped_pays(x, experts.sizes)):
        return "grouped"
    if "masked" in able:
        return "masked"
    return "loop" if unusual(between) is None else "autograd"


def measure(kernel: str, shape: Shape, dtype: torch.dtype) -> float:
    """Seconds that a kernel takes for a random layer of a shape, at best."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    T, D, E, e = shape.tokens, shape.width, shape.experts, int(shape.neurons)
    experts = StackedFFN(random(E, e, D), random(D, E * e).T.unflatten(0, (E, e)), (e,) * E)
    chosen = torch.rand(T, E, generator=generator).topk(shape.top_k).indices
    routing = Routing(chosen, torch.ones(T, shape.top_k, dtype=dtype))
    x, between = random(T, D), Between(F.gelu)
    best, begun = float("inf"), time.perf_counter()
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            started = clock()
            KERNELS[kernel].run(x, routing, experts, between)
            best = min(best, clock() - started)
            if time.perf_counter() - begun > PATIENCE:
                break
    return best
