"""The C++ kernel: all steps fused, no buffer of [slots, width], forward and backward, on CPU.

`native.cpp` says how it computes; this file hands it pointers. Numbers are float32 or, where the
processor multiplies them itself, bfloat16. Letters: T tokens, D width, E experts, e neurons of one
expert, R rows of its first matrices, K experts per token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moduli.errors import ConfigError
from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels.activations import KNOWN, Known
from moduli.experts.kernels.blocks import gradients
from moduli.experts.kernels.build import library
from moduli.experts.kernels.combine import expert_gates
from moduli.routing import Routing

FEW = 4
"""Up to this many slots per expert that has any, weights are read in place instead of packed."""

_GATES = {None: 0, "concatenated": 1, "interleaved": 2}
_ACTIVATIONS = {name: i for i, name in enumerate(KNOWN)}


class _Matrix(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("row", c_int64), ("col", c_int64), ("stride", c_int64))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("tokens", "width", "experts", "top_k", "neurons")),
        ("sizes", c_void_p),
        ("gate", c_int64),
        ("threads", c_int64),
        *((name, c_void_p) for name in ("x", "index", "weights", "active")),
        *((name, _Matrix) for name in ("first", "up", "second")),
        *((name, c_void_p) for name in ("first_bias", "up_bias", "out_bias", "z")),
    )


class _Gradients(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("dy", "dx", "dweights")),
        *((name, _Matrix) for name in ("first", "up", "second")),
        *((name, c_void_p) for name in ("first_bias", "up_bias")),
    )


def refuses(x: Tensor, experts: StackedFFN) -> str | None:
    """Why it cannot compute these experts."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, and the tokens are on {x.device}"
    for matrix in (experts.first, experts.up, experts.second):
        if matrix is not None and matrix.dtype != x.dtype:
            return f"tokens are {x.dtype} and experts {matrix.dtype}"
        without_memory: bool = is_traceable_wrapper_subclass(matrix)  # sharded, quantised
        if without_memory:
            return f"it reads memory, and experts are a {type(matrix).__name__}"
    return unable(x.dtype, x.shape[1])


def unable(dtype: torch.dtype, width: int) -> str | None:
    """Why it cannot compute a dtype at a width on this machine."""
    reason = _missing(dtype)
    if reason is None and dtype == torch.bfloat16 and width % 2:
        return "the width is odd, and bfloat16 is multiplied in pairs"
    return reason


def _missing(dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it computes float32 and bfloat16, not {dtype}"
    found = library()
    if isinstance(found, str):
        return found
    if dtype == torch.bfloat16 and not found.moduli_has_bf16():
        return "this processor does not multiply bfloat16"
    return None


# What `torch.compiler.assume_constant_result` does, which takes a second to import: `torch.compile`
# asks, and does not look at how a library is found.
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(
    x: Tensor, routing: Routing, experts: StackedFFN, act: Known, z: Tensor | None
) -> Tensor:
    """The output [T, D]; pre-activations [S, R] go to `z`, expert after expert."""
    y = torch.empty(x.shape, dtype=x.dtype)
    if x.shape[0] == 0:
        return y
    layer, keep = _layer(x, routing, experts, z)
    slots = routing.experts.numel()
    few = slots <= FEW * min(slots, len(experts))
    _call("forward", ctypes.byref(layer), _dtype(x), _ACTIVATIONS[act.name], few, y.data_ptr())
    del keep
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    routing: Routing,
    experts: StackedFFN,
    act: Known,
    z: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weights, first, first_bias, up, up_bias, second, out_bias, where wanted."""
    grads = gradients(experts, wanted[2:7])
    first, first_bias, up, up_bias, second = grads.whole
    biases = [
        None if b is None else b.new_empty(b.shape, dtype=torch.float32)
        for b in (first_bias, up_bias)
    ]
    dx = torch.empty(x.shape, dtype=x.dtype) if wanted[0] else None
    dweights = None
    if wanted[1]:
        dweights = torch.zeros(routing.weights.shape, dtype=torch.float32)
    layer, keep = _layer(x, routing, experts, z)
    dy = dy.contiguous()
    found = _Gradients(
        dy.data_ptr(), _pointer(dx), _pointer(dweights), _matrix(first), _matrix(up),
        _matrix(second), *(_pointer(b) for b in biases),
    )  # fmt: skip
    _call("backward", ctypes.byref(layer), ctypes.byref(found), _dtype(x), _ACTIVATIONS[act.name])
    del keep
    for own, exact in ((first_bias, biases[0]), (up_bias, biases[1])):
        if own is not None and exact is not None:
            own.copy_(exact)
    dout = None
    if experts.out_bias is not None and wanted[7]:
        dout = expert_gates(routing, len(experts)).to(dy.dtype).T @ dy
    if dweights is not None:
        dweights = dweights.to(routing.weights.dtype)
    return [dx, dweights, *grads.whole, dout]


def _call(name: str, *args: Any) -> None:
    found = library()
    assert not isinstance(found, str)  # `refuses` was asked
    if getattr(found, f"moduli_{name}")(*args):
        raise ConfigError(
            "a slot of the routing names an expert that is not there; indices are valid in every "
            "slot that is active"
        )


def _dtype(x: Tensor) -> int:
    return 0 if x.dtype == torch.float32 else 1


def _layer(
    x: Tensor, routing: Routing, experts: StackedFFN, z: Tensor | None
) -> tuple[_Layer, list[Tensor | None]]:
    """Pointers, and the tensors that must live as long as they do."""
    x = x.contiguous()
    index = routing.experts.long().contiguous()
    weights = routing.weights.detach().float().contiguous()
    active = None if routing.active is None else routing.active.contiguous()
    biases = [
        None if b is None else b.to(x.dtype).contiguous()
        for b in (experts.first_bias, experts.up_bias, experts.out_bias)
    ]
    equal = len(set(experts.sizes)) == 1
    gate = 3 if experts.up is not None else _GATES[experts.fused]
    layer = _Layer(
        x.shape[0], x.shape[1], len(experts), index.shape[1], experts.sizes[0] if equal else 0,
        _sizes(experts.sizes), gate, torch.get_num_threads(),
        x.data_ptr(), index.data_ptr(), weights.data_ptr(), _pointer(active),
        _matrix(experts.first), _matrix(experts.up), _matrix(experts.second),
        *(_pointer(b) for b in biases), _pointer(z),
    )  # fmt: skip
    return layer, [x, index, weights, active, *biases]


def _matrix(tensor: Tensor | None) -> _Matrix:
    if tensor is None:
        return _Matrix(None, 0, 0, 0)
    strides = tensor.stride()
    stride = strides[0] if len(strides) == 3 else -1
    return _Matrix(tensor.data_ptr(), strides[-2], strides[-1], stride)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=256)
def _size_array(sizes: tuple[int, ...]) -> Any:
    return (c_int64 * len(sizes))(*sizes)


def _sizes(sizes: tuple[int, ...]) -> int:
    return ctypes.addressof(_size_array(sizes))
