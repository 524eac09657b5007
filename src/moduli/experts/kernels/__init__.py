"""How experts are computed: plain functions with one signature, in one registry.

`eager` is the readable reference that every other kernel is tested against. `run_experts` takes
"auto" to the one that `choose` expects to be the fastest for the shape, dtype and device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from moduli.errors import ConfigError, UnknownNameError, nearest
from moduli.experts.ffn import ExpertFFN, StackedFFN, stack
from moduli.experts.kernels.choice import AT_RUN_TIME, beats_masking, choose
from moduli.experts.kernels.eager import Between
from moduli.experts.kernels.registry import KERNELS, Kernel, run_operator
from moduli.routing import Routing

__all__ = [
    "KERNELS",
    "Between",
    "Kernel",
    "beats_masking",
    "choose",
    "run_experts",
    "watch_kernels",
]

Activation = Callable[[Tensor], Tensor]


def run_experts(
    x: Float[Tensor, "T D"],
    routing: Routing,
    experts: StackedFFN | ExpertFFN,
    activation: Activation,
    kernel: str = "auto",
    *,
    gating: Activation | None = None,
    after: Activation | None = None,
) -> Float[Tensor, "T D"]:
    """Sum over the active slots of every token of weight * expert(token).

    Args:
        x: tokens.
        routing: who goes where.
        experts: stacked tensors; lists of tensors are stacked first, which copies them.
        activation: of pre-activations; of gated experts of those of the gate.
        kernel: a name of `KERNELS`, or "auto".
        gating: replaces "activation(gate) * up"; called with pre-activations [n, R] in the order
            of the rows of `experts.first`.
        after: applied to outputs of experts [n, D] before they are weighted.

    Raises:
        UnknownNameError: there is no kernel of that name.
        ConfigError: the kernel cannot compute these experts.
    """
    if isinstance(experts, ExpertFFN):
        experts = stack(experts)
    x, experts = _autocast(x, experts)
    between = Between(activation, gating, after)
    name = choose(x, routing, experts, between) if kernel == "auto" else kernel
    if name == AT_RUN_TIME:
        return run_operator(x, routing, experts, between, name)
    if name not in KERNELS:
        raise UnknownNameError(f"there is no kernel {kernel!r}. {nearest(kernel, KERNELS)}")
    for seen in _WATCHERS:
        seen[name] += 1
    entry = KERNELS[name]
    if kernel != "auto":
        reason = entry.refuses(x, experts, between)
        if reason is not None:
            raise ConfigError(
                f"kernel={kernel!r} cannot compute this layer: {reason}. kernel='auto' takes one "
                "that can"
            )
    return entry.run(x, routing, experts, between)


@contextmanager
def watch_kernels() -> Iterator[Counter[str]]:
    """How often every kernel runs inside the block, by name."""
    seen: Counter[str] = Counter()
    _WATCHERS.append(seen)
    try:
        yield seen
    finally:
        _WATCHERS.remove(seen)


_WATCHERS: list[Counter[str]] = []


def _autocast(x: Tensor, experts: StackedFFN) -> tuple[Tensor, StackedFFN]:
    """What autocast would have made of the operands of `F.linear`."""
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, experts
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return x.to(dtype), StackedFFN(
        first=experts.first.to(dtype),
        second=experts.second.to(dtype),
        sizes=experts.sizes,
        first_bias=cast(experts.first_bias),
        up=cast(experts.up),
        up_bias=cast(experts.up_bias),
        out_bias=cast(experts.out_bias),
        fused=experts.fused,
    )
