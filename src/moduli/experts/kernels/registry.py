"""Which kernels there are, and what each of them can compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import fused, grouped, native, ops
from moduli.experts.kernels.activations import known
from moduli.experts.kernels.autograd import autograd
from moduli.experts.kernels.eager import Between, eager
from moduli.experts.kernels.masked import masked
from moduli.routing import Routing


@dataclass(frozen=True)
class Kernel:
    """One way to compute experts.

    Attributes:
        summary: what it does, in one line.
        run: (x, routing, experts, between) -> y.
        refuses: (x, experts, between) -> why it cannot compute them, or None.
    """

    summary: str
    run: Callable[[Tensor, Routing, StackedFFN, Between], Tensor]
    refuses: Callable[[Tensor, StackedFFN, Between], str | None]


def run_operator(
    x: Tensor, routing: Routing, experts: StackedFFN, between: Between, name: str
) -> Tensor:
    """A kernel that differentiates by itself; "auto" chooses at run time."""
    act = known(between.activation)
    assert act is not None
    return ops.run(x, routing, experts, act, name)


def _operator(name: str) -> Callable[[Tensor, Routing, StackedFFN, Between], Tensor]:
    return partial(run_operator, name=name)


def _nothing(x: Tensor, experts: StackedFFN, between: Between) -> str | None:
    return None


def unusual(between: Between) -> str | None:
    """What keeps kernels out that differentiate by themselves; None if nothing does."""
    if between.gating is not None:
        return "its experts have a gating rule of their own"
    if between.after is not None:
        return "something is applied to the outputs of its experts before they are weighted"
    if known(between.activation) is None:
        name = getattr(between.activation, "__name__", type(between.activation).__name__)
        return f"it does not know the derivative of the activation {name}"
    return None


def _usual(x: Tensor, experts: StackedFFN, between: Between) -> str | None:
    return unusual(between)


def _equal(x: Tensor, experts: StackedFFN, between: Between) -> str | None:
    if len(set(experts.sizes)) > 1:
        return "its experts differ in size"
    return unusual(between)


def _no_after(x: Tensor, experts: StackedFFN, between: Between) -> str | None:
    if between.after is not None:
        return "something is applied to the outputs of its experts before they are weighted"
    if between.gating is not None and experts.first.dim() != 3:
        return "its experts differ in size and have a gating rule of their own"
    return None


def _native(x: Tensor, experts: StackedFFN, between: Between) -> str | None:
    return unusual(between) or native.refuses(x, experts)


def _grouped(x: Tensor, experts: StackedFFN, between: Between) -> str | None:
    return grouped.refuses(x, experts)


def _triton(x: Tensor, experts: StackedFFN, between: Between) -> str | None:
    return unusual(between) or fused.refuses(x, experts)


KERNELS: dict[str, Kernel] = {
    "eager": Kernel("every expert on every token: the reference", eager, _nothing),
    "autograd": Kernel("expert by expert, any activation", autograd, _nothing),
    "loop": Kernel("expert by expert in reused buffers", _operator("loop"), _usual),
    "native": Kernel("fused steps in C++, compiled on first use", _operator("native"), _native),
    "padded": Kernel("one batched product over padded experts", _operator("padded"), _equal),
    "masked": Kernel("the dense product, other experts' neurons off", masked, _no_after),
    "grouped": Kernel("torch's grouped products, no waiting", grouped.grouped, _grouped),
    "triton": Kernel("fused for small experts, on demand only", _operator("triton"), _triton),
}
