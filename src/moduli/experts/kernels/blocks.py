"""The tensors of single experts as views of the stacked ones, and gradients shaped like them.

Letters: E experts, D width, e neurons of one expert, R rows of its first matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels.activations import Known


@dataclass(frozen=True)
class Blocks:
    """One expert's share of the stacked tensors; of gradients, None where none is wanted."""

    first: Tensor | None
    first_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    second: Tensor | None

    def zero_(self) -> None:
        for tensor in (self.first, self.first_bias, self.up, self.up_bias, self.second):
            if tensor is not None:
                tensor.zero_()


@dataclass(frozen=True)
class Gradients:
    """Gradients of all experts: the whole tensors, and the same memory expert by expert."""

    whole: list[Tensor | None]
    parts: list[Blocks]


def blocks(experts: StackedFFN) -> list[Blocks]:
    """Views of every expert's own tensors."""
    tensors = [getattr(experts, name) for name in NAMES]
    return _cut(tensors, experts)


SPARE_ROWS = 32

NAMES = ("first", "first_bias", "up", "up_bias", "second")


def gradients(experts: StackedFFN, wanted: Sequence[bool]) -> Gradients:
    """Uninitialised tensors with the shapes and strides of those that are wanted.

    With the strides of the weights the gradient of a transposed view needs no copy to become the
    gradient of the parameter.
    """
    whole = []
    for name, want in zip(NAMES, wanted, strict=True):
        tensor = getattr(experts, name)
        whole.append(_empty_like(tensor) if want and tensor is not None else None)
    return Gradients(whole, _cut(whole, experts))


def gate_and_up(pre: Tensor, experts: StackedFFN) -> tuple[Tensor, Tensor | None]:
    """Views of pre-activations [..., R]: the part that is activated, and the other."""
    if not experts.gated:
        return pre, None
    if experts.fused == "interleaved":
        return pre[..., 0::2], pre[..., 1::2]
    gate, up = pre.chunk(2, dim=-1)
    return gate, up


def activate_into(
    pre: Tensor, experts: StackedFFN, act: Known, hidden: Tensor, gate: Tensor | None = None
) -> Tensor:
    """Activations of pre-activations [..., R] into `hidden` [..., e], which is returned; of gated
    experts act(gate) goes into `gate`, if given."""
    z_gate, z_up = gate_and_up(pre, experts)
    if z_up is None:
        return act.forward(z_gate, hidden)
    return torch.mul(act.forward(z_gate, hidden if gate is None else gate), z_up, out=hidden)


def differentiate_into(
    dh: Tensor, pre: Tensor, experts: StackedFFN, act: Known, gate: Tensor | None, dpre: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of pre-activations into `dpre` [..., R], as its gate and up part.

    Args:
        dh: gradient of the activations [..., e], which is used up.
        pre: pre-activations.
        experts: whose they are.
        act: their activation.
        gate: act(gate) of gated experts.
        dpre: like `pre`.
    """
    (dz_gate, dz_up), (z_gate, z_up) = gate_and_up(dpre, experts), gate_and_up(pre, experts)
    if z_up is None or dz_up is None or gate is None:
        act.backward(dh, z_gate, dz_gate)
    else:
        torch.mul(dh, gate, out=dz_up)
        act.backward(dh.mul_(z_up), z_gate, dz_gate)
    return dz_gate, dz_up


def rows_of(experts: StackedFFN) -> list[int]:
    """R of every expert."""
    return [2 * e if experts.gated else e for e in experts.sizes]


def saved_size(tokens: int, top_k: int, experts: StackedFFN) -> int:
    """Numbers that any operator may keep for backward: R per slot, and rows to spare."""
    return (tokens * top_k + SPARE_ROWS) * max(rows_of(experts))


def _cut(tensors: Sequence[Tensor | None], experts: StackedFFN) -> list[Blocks]:
    in_first = [e if experts.fused is None else 2 * e for e in experts.sizes]
    lengths = (in_first, in_first, experts.sizes, experts.sizes, experts.sizes)
    columns: list[Sequence[Tensor | None]] = []
    for tensor, own, packed in zip(tensors, lengths, (2, 1, 2, 1, 2), strict=True):
        if tensor is None:
            columns.append([None] * len(experts))
        else:
            stacked = tensor.dim() > packed
            columns.append(tensor.unbind() if stacked else tensor.split(list(own)))
    return [Blocks(*parts) for parts in zip(*columns, strict=True)]


def _empty_like(tensor: Tensor) -> Tensor:
    """Memory laid out as a view's own, without what lies between its rows."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda i: -strides[i])
    whole = torch.empty([tensor.shape[i] for i in order], dtype=tensor.dtype, device=tensor.device)
    return whole.permute([order.index(i) for i in range(tensor.dim())])
