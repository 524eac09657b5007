"""Kernels with host-side control flow as one operator: `moduli::experts`.

To compile, checkpointing and FakeTensor a layer is one node with a known output shape; autograd
sees one function that saves the input, the routing and the pre-activations. Its gradient has no
gradient, and it cannot be vmapped: both say so.

A backend is a module with

    forward(x, routing, experts, act, z) -> y
    backward(dy, x, routing, experts, act, z, wanted) -> gradients, None where not wanted

where forward leaves in `z` what backward needs; z is None where nobody will ask for gradients.

Letters: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import fused, loop, native, padded
from moduli.experts.kernels.activations import KNOWN, Known
from moduli.experts.kernels.blocks import saved_size
from moduli.experts.kernels.precision import fast_fp32
from moduli.experts.kernels.transforms import refuse_transforms, register_refusals
from moduli.routing import Routing

BACKENDS: dict[str, ModuleType] = {
    "loop": loop, "native": native, "padded": padded, "triton": fused,
}  # fmt: skip

_TENSORS = (
    "Tensor x, Tensor index, Tensor weights, Tensor? active, Tensor first, Tensor? first_bias, "
    "Tensor? up, Tensor? up_bias, Tensor second, Tensor? out_bias"
)
_REST = "int[] sizes, str? fused, str activation, str kernel"
_GRADIENTS = (0, 2, 4, 5, 6, 7, 8, 9)  # of which tensors, by position: not index, not active
_EXPERTS = (4, 5, 6, 7, 8)  # whose gradients are views like themselves

_WHAT = "experts"
_INSTEAD = "choose kernel='autograd' (or 'eager'), which is made of differentiable operations"

torch.library.define("moduli::experts", f"({_TENSORS}, {_REST}, bool save) -> (Tensor, Tensor)")
torch.library.define(
    "moduli::experts_backward",
    f"(Tensor dy, Tensor z, {_TENSORS}, {_REST}, bool[] wanted) -> Tensor[]",
)


def run(x: Tensor, routing: Routing, experts: StackedFFN, act: Known, kernel: str) -> Tensor:
    """One of `BACKENDS`, through the operator wherever somebody has to see it."""
    refuse_transforms(_WHAT, _INSTEAD)
    save = _wants_gradient(x, routing, experts)
    if not save and _nobody_watches(x):
        backend = BACKENDS[_resolved(kernel, x, routing, experts)]
        with _products(backend, x):
            y: Tensor = backend.forward(x, routing, experts, act, None)
        return y
    tensors = _operands(x, routing, experts)
    y, _ = torch.ops.moduli.experts(*tensors, experts.sizes, experts.fused, act.name, kernel, save)
    return y


def _wants_gradient(x: Tensor, routing: Routing, experts: StackedFFN) -> bool:
    """Whether anybody may ask for a gradient of the output."""
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in _operands(x, routing, experts)
    )


def _operands(x: Tensor, routing: Routing, experts: StackedFFN) -> tuple[Tensor | None, ...]:
    return (
        x, routing.experts, routing.weights, routing.active, experts.first, experts.first_bias,
        experts.up, experts.up_bias, experts.second, experts.out_bias,
    )  # fmt: skip


def _nobody_watches(x: Tensor) -> bool:
    """Whether the operator may be skipped, whose dispatch takes longer than a token does."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _unpack(tensors: Sequence[Any], sizes: Sequence[int], fused: Any) -> tuple[Routing, StackedFFN]:
    _, index, weights, active, first, first_bias, up, up_bias, second, out_bias = tensors
    experts = StackedFFN(
        first=first, first_bias=first_bias, up=up, up_bias=up_bias, second=second,
        out_bias=out_bias, sizes=tuple(sizes), fused=fused,
    )  # fmt: skip
    return Routing(index, weights, active), experts


@torch.library.impl("moduli::experts", "CompositeExplicitAutograd")
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    tensors, (sizes, fused, activation, kernel, save) = args[:10], args[10:]
    routing, experts = _unpack(tensors, sizes, fused)
    x = tensors[0]
    z = x.new_empty(_kept(x, routing, experts)) if save else None
    name = _resolved(kernel, x, routing, experts)
    with _products(BACKENDS[name], x):
        y = BACKENDS[name].forward(x, routing, experts, KNOWN[activation], z)
    if z is not None and kernel == "auto":
        z[-1] = list(BACKENDS).index(name)
    return y, x.new_empty(0) if z is None else z


@torch.library.register_fake("moduli::experts")  # type: ignore[untyped-decorator]
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    tensors, (sizes, fused, _, _, save) = args[:10], args[10:]
    routing, experts = _unpack(tensors, sizes, fused)
    x = tensors[0]
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        _kept(x, routing, experts) if save else 0
    )


def _kept(x: Tensor, routing: Routing, experts: StackedFFN) -> int:
    return saved_size(x.shape[0], routing.experts.shape[1], experts)


def _resolved(kernel: str, x: Tensor, routing: Routing, experts: StackedFFN) -> str:
    """The kernel; "auto" of a compiled graph is decided here, from real operands."""
    if kernel != "auto":
        return kernel
    from moduli.experts.kernels.choice import fastest  # which measures what is in this file

    return fastest(x, routing, experts, operator=True)


def _products(backend: Any, x: Tensor) -> AbstractContextManager[None]:
    """Where a backend's products go; the C++ kernel does its own."""
    theirs = backend is not native and x.dtype == torch.float32 and x.device.type == "cpu"
    return fast_fp32() if theirs else nullcontext()


@torch.library.impl("moduli::experts_backward", "CompositeExplicitAutograd")
def _backward(dy: Tensor, z: Tensor, *args: Any) -> list[Tensor]:
    tensors, (sizes, fused, activation, kernel, wanted) = args[:10], args[10:]
    routing, experts = _unpack(tensors, sizes, fused)
    if kernel == "auto":  # forward left its choice in the last number, which nothing else uses
        kernel = list(BACKENDS)[int(z[-1])]
    backend = BACKENDS[kernel]
    with _products(backend, dy):
        found = backend.backward(
            dy.contiguous(), tensors[0], routing, experts, KNOWN[activation], z, wanted
        )
    return [gradient for gradient in found if gradient is not None]


@torch.library.register_fake("moduli::experts_backward")  # type: ignore[untyped-decorator]
def _backward_fake(dy: Tensor, z: Tensor, *args: Any) -> list[Tensor]:
    tensors, wanted = args[:10], args[14]
    given = [(tensors[i], i) for i, want in zip(_GRADIENTS, wanted, strict=True) if want]
    # Gradients of experts lie in memory as their parameters do, others without gaps.
    return [
        torch.empty_like(t)
        if i in _EXPERTS
        else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, i in given
        if t is not None
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10], output[1])
    ctx.rest = inputs[10:14]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    result: list[Tensor | None] = [None] * len(needed)
    if dy is None:
        return tuple(result)
    *tensors, z = ctx.saved_tensors
    wanted = [bool(needed[i]) for i in _GRADIENTS]
    found = iter(torch.ops.moduli.experts_backward(dy, z, *tensors, *ctx.rest, wanted))
    for i, want in zip(_GRADIENTS, wanted, strict=True):
        if want:
            result[i] = next(found)
    return tuple(result)


torch.library.register_autograd("moduli::experts", _differentiate, setup_context=_setup)


register_refusals("moduli::experts", _WHAT, _INSTEAD)
